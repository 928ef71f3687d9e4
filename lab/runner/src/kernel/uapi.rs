// SPDX-License-Identifier: GPL-2.0-or-later
//! KVM's interface, as far as kvm-bindings does not have it, and VMs.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use kvm_bindings::{KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd};
use kvm_ioctls::{Kvm, VmFd};
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

use crate::setting;

/// In-place conversion is on or off from boot on.
pub(super) const PARAMETER: &str = "/sys/module/kvm/parameters/gmem_in_place_conversion";

pub(super) const PAGE: u64 = 4096;

pub(super) const CAP_MEMORY_ATTRIBUTES: u64 = 233;
pub(super) const CAP_GUEST_MEMFD_FLAGS: u64 = 244;
pub(super) const CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES: u64 = 252;

pub(super) const MMAP: u64 = 1 << 0;
pub(super) const INIT_SHARED: u64 = 1 << 1;
pub(super) const PRIVATE: u64 = KVM_MEMORY_ATTRIBUTE_PRIVATE as u64;

pub(super) const ORDINARY: u64 = 0;
pub(super) const SW_PROTECTED: u64 = 1;

/// `struct kvm_memory_attributes2`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Attributes2 {
    pub(super) offset: u64,
    pub(super) size: u64,
    pub(super) attributes: u64,
    pub(super) flags: u64,
    pub(super) error_offset: u64,
    pub(super) reserved: [u64; 11],
}

pub(super) const SET_ATTRIBUTES2: Opcode = opcode::read_write::<Attributes2>(0xae, 0xd2);

/// `KVM_SET_MEMORY_ATTRIBUTES2`, on whatever descriptor.
pub(super) fn set_attributes2(on: impl AsFd, attributes: &mut Attributes2) -> Result<(), Errno> {
    // SAFETY: the request reads and writes one such structure and keeps nothing of it.
    unsafe { ioctl(on, Updater::<SET_ATTRIBUTES2, _>::new(attributes)) }
}

/// A kernel that does not know the parameter has no in-place conversion either.
pub(super) fn in_place() -> bool {
    setting::read(PARAMETER).is_ok_and(|value| value == "Y")
}

pub(super) fn kvm() -> Result<Kvm> {
    Kvm::new().context("cannot open /dev/kvm")
}

pub(super) fn vm(kind: u64) -> Result<VmFd> {
    let vm = kvm()?.create_vm_with_type(kind);
    vm.with_context(|| format!("KVM creates no VM of type {kind}"))
}

/// A new guest_memfd.
pub(super) fn guest_memfd(vm: &VmFd, size: u64, flags: u64) -> Result<OwnedFd, Errno> {
    let raw = vm
        .create_guest_memfd(kvm_create_guest_memfd {
            size,
            flags,
            ..Default::default()
        })
        .map_err(|error| Errno::from_raw_os_error(error.errno()))?;
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}
