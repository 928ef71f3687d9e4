// SPDX-License-Identifier: GPL-2.0-or-later
//! A vCPU that reads and writes where it is told to.

use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MEMORY_EXIT_FLAG_PRIVATE, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

use super::memory::Map;
use super::uapi;

/// Where its code lies, in a slot of its own.
const CODE_SIZE: u64 = 0x1_0000;
const SLOT: u32 = 0;

/// `mov eax, [ebx]; out 0x80, eax`
const READ: (u64, &[u8]) = (0x1000, &[0x8b, 0x03, 0xe7, 0x80]);
/// `mov [ebx], ecx; out 0x80, eax`
const WRITE: (u64, &[u8]) = (0x1100, &[0x89, 0x0b, 0xe7, 0x80]);
/// `0: mov esi, ebx; mov edi, ecx; 1: inc [esi]; add esi, 4096; dec edi; jnz 1b; out 0x80, eax; jmp 0b`
const SWEEP: (u64, &[u8]) = (
    0x1200,
    &[
        0x89, 0xde, 0x89, 0xcf, 0xff, 0x06, 0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, 0x4f, 0x75, 0xf5,
        0xe7, 0x80, 0xeb, 0xed,
    ],
);

/// `KVM_SET_VAPIC_ADDR`.
const SET_VAPIC_ADDR: Opcode = opcode::write::<u64>(0xae, 0x93);

/// The spurious interrupt vector's place among the APIC's registers; its second byte's lowest bit
/// switches the APIC on.
const SPURIOUS: usize = 0xf0;

/// How an access ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// What EAX holds then.
    Value(u32),
    /// A memory fault: which view the guest wants, and where.
    Fault { private: bool, gpa: u64 },
    /// `KVM_RUN` failed without telling.
    Refused(Errno),
}

/// The vCPU, with its code.
#[derive(Debug)]
pub(super) struct Vcpu {
    vcpu: VcpuFd,
    _code: Map,
}

impl Vcpu {
    /// In 32-bit protected mode with flat segments. Slot 0 is its code's.
    pub(super) fn new(vm: &VmFd) -> Result<Self> {
        let code = Map::anonymous(CODE_SIZE)?;
        for (at, bytes) in [READ, WRITE, SWEEP] {
            code.put(usize::try_from(at)?, bytes);
        }
        let slot = kvm_userspace_memory_region {
            slot: SLOT,
            guest_phys_addr: 0,
            memory_size: CODE_SIZE,
            userspace_addr: code.address(),
            flags: 0,
        };
        // SAFETY: the mapping lives as long as the vCPU.
        unsafe { vm.set_user_memory_region(slot) }.context("a slot for code")?;
        let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        let cpuid = uapi::kvm()?.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
        let mut special = vcpu.get_sregs().context("KVM_GET_SREGS")?;
        special.cs = flat(0x08, 0xb);
        for segment in [&mut special.ds, &mut special.es, &mut special.ss] {
            *segment = flat(0x10, 0x3);
        }
        special.cr0 = 0x11;
        vcpu.set_sregs(&special).context("KVM_SET_SREGS")?;
        Ok(Self { vcpu, _code: code })
    }

    /// Has KVM read and write the vAPIC's word here. The VM has to have interrupt controllers.
    pub(super) fn use_vapic(&self, gpa: u64) -> Result<()> {
        let mut apic = self.vcpu.get_lapic().context("KVM_GET_LAPIC")?;
        apic.regs[SPURIOUS + 1] |= 1;
        self.vcpu.set_lapic(&apic).context("KVM_SET_LAPIC")?;
        // SAFETY: the vCPU's descriptor is open as long as `self` lives.
        let fd = unsafe { BorrowedFd::borrow_raw(self.vcpu.as_raw_fd()) };
        // SAFETY: the request reads one such number and keeps nothing of it.
        let set = unsafe { ioctl(fd, Setter::<SET_VAPIC_ADDR, u64>::new(gpa)) };
        set.context("KVM_SET_VAPIC_ADDR")
    }

    /// Reads from memory.
    pub(super) fn read(&mut self, gpa: u64) -> Result<Seen> {
        self.prepare(READ.0, gpa, 0)?;
        self.enter()
    }

    /// Writes to memory.
    pub(super) fn write(&mut self, gpa: u64, value: u32) -> Result<Seen> {
        self.prepare(WRITE.0, gpa, value)?;
        self.enter()
    }

    /// Gets ready to count up a word in each of some pages, again and again: each `enter` is one round.
    pub(super) fn prepare_sweep(&mut self, gpa: u64, pages: u32) -> Result<()> {
        self.prepare(SWEEP.0, gpa, pages)
    }

    fn prepare(&mut self, code: u64, gpa: u64, value: u32) -> Result<()> {
        let mut registers = self.vcpu.get_regs().context("KVM_GET_REGS")?;
        registers.rip = code;
        registers.rbx = gpa;
        registers.rcx = value.into();
        registers.rflags = 2;
        self.vcpu.set_regs(&registers).context("KVM_SET_REGS")
    }

    /// Goes on until something comes of it.
    pub(super) fn enter(&mut self) -> Result<Seen> {
        match self.vcpu.run() {
            Ok(VcpuExit::IoOut(0x80, bytes)) => {
                let bytes = bytes.try_into().context("4 bytes")?;
                Ok(Seen::Value(u32::from_le_bytes(bytes)))
            }
            Ok(VcpuExit::MemoryFault { flags, gpa, .. }) => Ok(Seen::Fault {
                private: flags & u64::from(KVM_MEMORY_EXIT_FLAG_PRIVATE) != 0,
                gpa,
            }),
            Ok(other) => bail!("the vCPU did what is not expected: {other:?}"),
            Err(error) => Ok(Seen::Refused(Errno::from_raw_os_error(error.errno()))),
        }
    }
}

fn flat(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}
