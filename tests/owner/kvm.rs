// SPDX-License-Identifier: MIT OR Apache-2.0

//! A guest of one CPU, which KVM runs: it reads or writes one byte, and halts.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use guestmemfd::owner::KvmOwner;
use guestmemfd::*;
use guestmemfd_floor::boot;
use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEMORY_EXIT_FLAG_PRIVATE, KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM,
    kvm_userspace_memory_region2,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

use crate::machine::{Guest, Machine, WINDOWS, vm};

/// Where the guest's instructions are, in memory of their own.
const CODE: u64 = 0x1000;
/// mov (%ebx), %al; hlt
const LOAD: [u8; 3] = [0x8a, 0x03, 0xf4];
/// mov %al, (%ebx); hlt
const STORE: [u8; 3] = [0x88, 0x03, 0xf4];

struct KvmGuest {
    vcpu: VcpuFd,
    code: MmapRegion,
    /// KVM uses them as long as the VM lives.
    _vm: VmFd,
    _memory: Vec<MmapRegion>,
}

/// Which of these modes can be tested here? Says why the others cannot.
pub(crate) fn possible(modes: &[(Mode, bool)]) -> Vec<(Mode, bool)> {
    let mut skipped = String::new();
    let mut can = |mode: &(Mode, bool)| match machine(*mode) {
        Ok(_) => true,
        Err(why) => {
            skipped += &format!("skipped: {mode:?} on KVM: {why}\n");
            false
        }
    };
    let possible: Vec<_> = modes.iter().copied().filter(|mode| can(mode)).collect();
    // Not by a macro, whose output is not shown if a test passes.
    std::io::stderr().write_all(skipped.as_bytes()).unwrap();
    possible
}

/// The same where a machine that is to have KVM has one of them at least.
pub(crate) fn one_possible(modes: &[(Mode, bool)]) -> Vec<(Mode, bool)> {
    let possible = possible(modes);
    let needed = std::env::var_os("GUESTMEMFD_NEED_KVM").is_some();
    assert!(!possible.is_empty() || !needed, "none of {modes:?} on KVM");
    possible
}

/// KVM as the owner of a VM for a mode, and the VM.
pub(crate) fn owner(mode: Mode) -> std::result::Result<(KvmOwner, VmFd), String> {
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm: {error}"))?;
    let kind = match mode {
        Mode::Private | Mode::InPlace => KVM_X86_SW_PROTECTED_VM,
        _ => KVM_X86_DEFAULT_VM,
    };
    let kvm_vm = kvm
        .create_vm_with_type(kind.into())
        .map_err(|error| format!("a VM of type {kind}: {error}"))?;
    // SAFETY: both are open while the references are used.
    let [kvm_fd, vm_fd] =
        [kvm.as_raw_fd(), kvm_vm.as_raw_fd()].map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
    let owner = KvmOwner::new(kvm_fd, vm_fd).map_err(|error| error.to_string())?;
    Ok((owner, kvm_vm))
}

pub(crate) fn machine(mode: (Mode, bool)) -> std::result::Result<Machine, String> {
    let (owner, kvm_vm) = owner(mode.0)?;
    let (vm, backend, bindings) = vm(Arc::new(owner), mode).map_err(|error| error.to_string())?;

    let mut memory = Vec::new();
    for (slot, (window, binding)) in (1..).zip(WINDOWS.into_iter().zip(bindings)) {
        let bound = binding == Binding::Bound;
        let (start, first, count) = window;
        let views = backend.views();
        let shared = views.file(View::Shared).fd().try_clone_to_owned().unwrap();
        let file = FileOffset::new(File::from(shared), first * PAGE_SIZE);
        let mapping = MmapRegion::from_file(file, (count * PAGE_SIZE) as usize).unwrap();
        let private = views.file(View::Private).fd().as_raw_fd();
        let region = kvm_userspace_memory_region2 {
            slot,
            flags: if bound { KVM_MEM_GUEST_MEMFD } else { 0 },
            guest_memfd: if bound { private as u32 } else { 0 },
            guest_memfd_offset: if bound { first * PAGE_SIZE } else { 0 },
            ..plain(start * PAGE_SIZE, &mapping)
        };
        // SAFETY: the guest keeps the mapping as long as the VM.
        unsafe { kvm_vm.set_user_memory_region2(region) }.unwrap();
        memory.push(mapping);
    }
    let code = MmapRegion::new(PAGE_SIZE as usize).unwrap();
    // SAFETY: as above.
    unsafe { kvm_vm.set_user_memory_region2(plain(CODE, &code)) }.unwrap();
    let vcpu = kvm_vm.create_vcpu(0).unwrap();
    boot::enter(&vcpu, CODE).unwrap();
    let guest = Box::new(KvmGuest {
        vcpu,
        code,
        _vm: kvm_vm,
        _memory: memory,
    });
    Ok(Machine { guest, vm, backend })
}

fn plain(gpa: u64, mapping: &MmapRegion) -> kvm_userspace_memory_region2 {
    kvm_userspace_memory_region2 {
        guest_phys_addr: gpa,
        memory_size: mapping.size() as u64,
        userspace_addr: mapping.as_ptr() as u64,
        ..Default::default()
    }
}

impl KvmGuest {
    /// Runs the instructions with an address and a byte; gives the byte that they leave.
    fn run(&mut self, vm: &Vm, code: [u8; 3], gpa: u64, byte: u8) -> u8 {
        let slice = self.code.as_volatile_slice();
        slice.write_slice(&code, 0).unwrap();
        let mut registers = self.vcpu.get_regs().unwrap();
        registers.rip = CODE;
        registers.rbx = gpa;
        registers.rax = byte.into();
        self.vcpu.set_regs(&registers).unwrap();
        loop {
            match self.vcpu.run().unwrap() {
                VcpuExit::Hlt => break,
                VcpuExit::MemoryFault { flags, gpa, size } => {
                    let intent = match flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) {
                        0 => View::Shared,
                        _ => View::Private,
                    };
                    vm.memory_fault(gpa, size, intent).unwrap();
                }
                other => panic!("{other:?}"),
            }
        }
        self.vcpu.get_regs().unwrap().rax as u8
    }
}

impl Guest for KvmGuest {
    fn read(&mut self, vm: &Vm, gpa: u64) -> u8 {
        self.run(vm, LOAD, gpa, 0xdd)
    }

    fn write(&mut self, vm: &Vm, gpa: u64, byte: u8) {
        self.run(vm, STORE, gpa, byte);
    }
}
