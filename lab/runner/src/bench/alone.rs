// SPDX-License-Identifier: GPL-2.0-or-later
//! The library alone with KVM as its owner: no QEMU, and no guest.

use std::os::fd::{AsRawFd, BorrowedFd};

use anyhow::{Context, Result};
use guestmemfd::Listener;
use guestmemfd::owner::KvmOwner;
use kvm_bindings::KVM_X86_SW_PROTECTED_VM;
use kvm_ioctls::{Kvm, VmFd};

/// A software-protected VM.
pub(super) struct Alone {
    kvm: Kvm,
    vm: VmFd,
}

impl Alone {
    pub(super) fn new() -> Result<Self> {
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        let vm = kvm.create_vm_with_type(KVM_X86_SW_PROTECTED_VM.into());
        let vm = vm.context("KVM creates no software-protected VM")?;
        Ok(Self { kvm, vm })
    }

    pub(super) fn owner(&self) -> Result<KvmOwner> {
        let [kvm, vm] = [self.kvm.as_raw_fd(), self.vm.as_raw_fd()];
        // SAFETY: both are open as long as `self` lives.
        let [kvm, vm] = [kvm, vm].map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
        Ok(KvmOwner::new(kvm, vm)?)
    }
}

/// Has nothing to say.
#[derive(Debug)]
pub(super) struct Quiet;

impl Listener for Quiet {}
