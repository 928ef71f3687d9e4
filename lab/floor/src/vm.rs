// SPDX-License-Identifier: GPL-2.0-or-later
//! The VM, and its vCPUs, each on a thread of its own.

use std::io::Write;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_MEMORY_EXIT_FLAG_PRIVATE, kvm_pre_fault_memory};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

use guestmemfd_floor::machine::{EXIT, IDLE, LINE_STATUS, MAP_GPA_RANGE, SERIAL};
use guestmemfd_floor::{boot, machine};

use crate::Options;
use crate::memory::{Memory, PAGE};

const ENCRYPTED: u64 = 1 << 4;
/// What a request may say: a page size, and which view.
const KNOWN: u64 = 0x1f;
/// As the guest reads it.
const EINVAL: u64 = -22_i64 as u64;

/// Runs the guest to its end. Returns the status with which QEMU would end.
pub(crate) fn run(options: &Options) -> Result<u8> {
    let kvm = Kvm::new().context("/dev/kvm")?;
    let vm = machine::new_vm(&kvm)?;

    let memory = Memory::new(&vm, options)?;
    let ram: Vec<_> = memory.windows.iter().map(|w| (w.gpa, w.size)).collect();
    let entry = boot::load(&memory.shared_view, &ram, &options.guest, &options.append)?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let vcpus = (0..options.cpus).map(|index| -> Result<VcpuFd> {
        let vcpu = vm.create_vcpu(index.into()).context("KVM_CREATE_VCPU")?;
        vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
        Ok(vcpu)
    });
    let vcpus = vcpus.collect::<Result<Vec<_>>>()?;
    // The others wait until the first one starts them.
    boot::enter(vcpus.first().context("no vCPU")?, entry)?;
    let machine = Arc::new(Machine {
        vm,
        memory,
        prefault: options.prefault,
        line: Mutex::default(),
    });
    let (sender, ended) = channel();
    for vcpu in vcpus {
        let (machine, sender) = (Arc::clone(&machine), sender.clone());
        thread::spawn(move || sender.send(machine.run(vcpu)));
    }
    // The first vCPU that ends, ends the others together with this process.
    ended.recv().context("no vCPU has run")?
}

struct Machine {
    vm: VmFd,
    memory: Memory,
    prefault: bool,
    /// What the guest has written of its next line.
    line: Mutex<Vec<u8>>,
}

impl Machine {
    fn run(&self, mut vcpu: VcpuFd) -> Result<u8> {
        loop {
            let mut converted = None;
            let exit = match vcpu.run() {
                // So it ends for a vCPU that another one has just started.
                Err(error) if error.errno() == Errno::AGAIN.raw_os_error() => continue,
                exit => exit.context("KVM_RUN")?,
            };
            match exit {
                VcpuExit::Hypercall(exit) if exit.nr == MAP_GPA_RANGE => {
                    let [gpa, pages, attributes, ..] = exit.args;
                    let good = attributes & !KNOWN == 0
                        && self.convert(gpa, pages, attributes & ENCRYPTED != 0);
                    *exit.ret = if good { 0 } else { EINVAL };
                    converted = good.then_some((gpa, pages));
                }
                VcpuExit::MemoryFault { flags, gpa, size } => {
                    let private = flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0;
                    let gpa = self.memory.without_shared_bit(gpa);
                    self.memory
                        .convert(&self.vm, gpa, size.div_ceil(PAGE), private)?;
                }
                VcpuExit::IoOut(EXIT, [low, ..]) => return Ok(low << 1 | 1),
                VcpuExit::IoOut(SERIAL, bytes) => {
                    let bytes = bytes.to_vec();
                    self.print(&bytes)?;
                }
                VcpuExit::IoIn(LINE_STATUS, bytes) => bytes.fill(IDLE),
                VcpuExit::IoIn(_, bytes) => bytes.fill(0xff),
                VcpuExit::IoOut(..) => {}
                VcpuExit::MmioRead(_, bytes) => bytes.fill(0xff),
                VcpuExit::MmioWrite(..) => {}
                other => bail!("the guest did what is not expected: {other:?}"),
            }
            if let (Some((gpa, pages)), true) = (converted, self.prefault) {
                prefault(&vcpu, gpa, pages)?;
            }
        }
    }

    fn convert(&self, gpa: u64, pages: u64, private: bool) -> bool {
        self.memory.convert(&self.vm, gpa, pages, private).is_ok()
    }

    /// Hands on whole lines, so that printing costs one system call each.
    fn print(&self, bytes: &[u8]) -> Result<()> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        line.extend_from_slice(bytes);
        if bytes.contains(&b'\n') {
            let mut out = std::io::stdout().lock();
            out.write_all(&line)?;
            out.flush()?;
            line.clear();
        }
        Ok(())
    }
}

/// Has KVM map pages before the guest touches them.
fn prefault(vcpu: &VcpuFd, gpa: u64, pages: u64) -> Result<()> {
    const OPCODE: Opcode = opcode::read_write::<kvm_pre_fault_memory>(0xae, 0xd5);
    let mut range = kvm_pre_fault_memory {
        gpa,
        size: pages * PAGE,
        ..Default::default()
    };
    // SAFETY: the vCPU's descriptor is open as long as `vcpu` lives.
    let fd = unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) };
    // The kernel moves the start on, and may return before the end.
    while range.size > 0 {
        // SAFETY: the request reads and writes one such structure and keeps nothing of it.
        let result = unsafe { ioctl(fd, Updater::<OPCODE, _>::new(&mut range)) };
        match result {
            Ok(()) | Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => return Err(error).context("KVM_PRE_FAULT_MEMORY"),
        }
    }
    Ok(())
}
