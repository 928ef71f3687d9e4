// SPDX-License-Identifier: MIT OR Apache-2.0

//! The VM, its one vCPU, and what the guest does to leave it.

use std::io::Write;

use anyhow::{Context, Result, bail};
use guestmemfd::View;
use guestmemfd_floor::machine::{EXIT, IDLE, LINE_STATUS, MAP_GPA_RANGE, SERIAL};
use guestmemfd_floor::{boot, machine};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_MEMORY_EXIT_FLAG_PRIVATE};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

use crate::Options;
use crate::fw_cfg::{self, FwCfg};
use crate::memory::Memory;

/// Runs the guest to its end. Returns the status with which QEMU would end.
pub(crate) fn run(options: &Options) -> Result<u8> {
    let kvm = Kvm::new().context("/dev/kvm")?;
    let vm = machine::new_vm(&kvm)?;

    let memory = Memory::new(&kvm, &vm, options)?;
    let ram = memory.ranges();
    let entry = boot::load(memory.mapping(), &ram, &options.guest, &options.append)?;
    let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
    boot::enter(&vcpu, entry)?;
    let mut machine = Machine {
        fw_cfg: FwCfg::new(&ram),
        memory,
        line: Vec::new(),
    };
    let status = machine.run(vcpu)?;
    eprintln!("{}", machine.memory.summary());
    Ok(status)
}

struct Machine {
    memory: Memory,
    fw_cfg: FwCfg,
    /// What the guest has written of its next line.
    line: Vec<u8>,
}

impl Machine {
    fn run(&mut self, mut vcpu: VcpuFd) -> Result<u8> {
        let vm = &self.memory.vm;
        loop {
            match vcpu.run().context("KVM_RUN")? {
                VcpuExit::Hypercall(exit) if exit.nr == MAP_GPA_RANGE => {
                    let [gpa, pages, attributes, ..] = exit.args;
                    let answer = match vm.map_gpa_range(gpa, pages, attributes) {
                        Ok(_) => 0,
                        Err(error) => -i64::from(error.errno()),
                    };
                    *exit.ret = answer as u64;
                }
                VcpuExit::MemoryFault { flags, gpa, size } => {
                    let intent = match flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) {
                        0 => View::Shared,
                        _ => View::Private,
                    };
                    vm.memory_fault(gpa, size, intent)?;
                }
                VcpuExit::IoOut(EXIT, [low, ..]) => return Ok(low << 1 | 1),
                VcpuExit::IoOut(SERIAL, bytes) => print(&mut self.line, bytes)?,
                VcpuExit::IoOut(port @ (fw_cfg::DMA_HIGH | fw_cfg::DMA_LOW), bytes) => {
                    if let Ok(value) = <[u8; 4]>::try_from(bytes) {
                        self.fw_cfg.write(vm, port, value);
                    }
                }
                VcpuExit::IoIn(LINE_STATUS, bytes) => bytes.fill(IDLE),
                VcpuExit::IoIn(fw_cfg::DMA_HIGH, bytes) if bytes.len() == 4 => {
                    bytes.copy_from_slice(&fw_cfg::DMA_SIGNATURE);
                }
                VcpuExit::IoIn(_, bytes) => bytes.fill(0xff),
                VcpuExit::IoOut(..) => {}
                VcpuExit::MmioRead(_, bytes) => bytes.fill(0xff),
                VcpuExit::MmioWrite(..) => {}
                other => bail!("the guest did what is not expected: {other:?}"),
            }
        }
    }
}

/// Hands on whole lines, so that printing costs one system call each.
fn print(line: &mut Vec<u8>, bytes: &[u8]) -> Result<()> {
    line.extend_from_slice(bytes);
    if bytes.contains(&b'\n') {
        let mut out = std::io::stdout().lock();
        out.write_all(line)?;
        out.flush()?;
        line.clear();
    }
    Ok(())
}
