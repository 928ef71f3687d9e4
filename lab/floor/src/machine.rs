// SPDX-License-Identifier: GPL-2.0-or-later
//! The machine that the conformance guest expects: a software-protected VM, and its few ports.

use anyhow::{Context, Result};
use kvm_bindings::{KVM_CAP_EXIT_HYPERCALL, KVM_X86_SW_PROTECTED_VM, kvm_enable_cap};
use kvm_ioctls::{Kvm, VmFd};

/// `KVM_HC_MAP_GPA_RANGE`, which kvm-bindings lacks.
pub const MAP_GPA_RANGE: u64 = 12;

/// The port of the serial port's data.
pub const SERIAL: u16 = 0x3f8;
/// The port of its status.
pub const LINE_STATUS: u16 = SERIAL + 5;
/// Everything that was sent is out.
pub const IDLE: u8 = 0x60;
/// The port of `isa-debug-exit`.
pub const EXIT: u16 = 0x501;

/// A VM with private memory and an interrupt controller, whose conversions by hypercall end in exits.
pub fn new_vm(kvm: &Kvm) -> Result<VmFd> {
    let vm = kvm
        .create_vm_with_type(KVM_X86_SW_PROTECTED_VM.into())
        .context("KVM does not offer software-protected VMs here")?;
    let mut hypercalls = kvm_enable_cap {
        cap: KVM_CAP_EXIT_HYPERCALL,
        ..Default::default()
    };
    hypercalls.args[0] = 1 << MAP_GPA_RANGE;
    vm.enable_cap(&hypercalls)
        .context("KVM_CAP_EXIT_HYPERCALL")?;
    vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
    Ok(vm)
}
