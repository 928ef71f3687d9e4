// SPDX-License-Identifier: MIT OR Apache-2.0

//! The KVM owner, over a VM that somebody else opened and runs.
#![allow(unsafe_code)] // file descriptors that C code and ioctls return as plain numbers

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_GUEST_MEMFD, KVM_CAP_MEMORY_ATTRIBUTES, KVM_MEMORY_ATTRIBUTE_PRIVATE,
    kvm_create_guest_memfd, kvm_memory_attributes,
};
use kvm_ioctls::{Kvm, VmFd};
use rustix::io::{FdFlags, fcntl_setfd};

use super::Owner;
use crate::error::{Error, Result};
use crate::pages::ranges::GuestPages;
use crate::pages::states::View;
use crate::views::mapped::MappedFile;
use crate::views::{KernelFile, ViewFile};

/// `KVM_CAP_GUEST_MEMFD_FLAGS`, which kvm-bindings lacks: the flags that this VM's guest_memfd may
/// have.
const KVM_CAP_GUEST_MEMFD_FLAGS: u64 = 244;

/// `GUEST_MEMFD_FLAG_*` of `include/uapi/linux/kvm.h`.
const FLAG_MMAP: u64 = 1 << 0;
const FLAG_INIT_SHARED: u64 = 1 << 1;

/// A VM of KVM.
#[derive(Debug)]
pub struct KvmOwner {
    kvm: Kvm,
    vm: VmFd,
}

impl KvmOwner {
    /// Takes duplicates of `/dev/kvm` and of the VM.
    pub fn new(kvm: BorrowedFd<'_>, vm: BorrowedFd<'_>) -> Result<Self> {
        let duplicate = |fd: BorrowedFd<'_>, what| {
            fd.try_clone_to_owned()
                .map(IntoRawFd::into_raw_fd)
                .map_err(|source| Error::Descriptor { what, source })
        };
        let kvm = duplicate(kvm, "/dev/kvm")?;
        // SAFETY: the number is that of a duplicate that nobody else knows; Kvm closes it.
        let kvm = unsafe { Kvm::from_raw_fd(kvm) };
        let raw = duplicate(vm, "the VM's file descriptor")?;
        // SAFETY: as above; the VmFd closes it.
        let vm = unsafe { kvm.create_vmfd_from_rawfd(raw) }.map_err(|error| {
            // SAFETY: on an error, which comes of /dev/kvm, nobody has taken the duplicate over.
            drop(unsafe { OwnedFd::from_raw_fd(raw) });
            Error::Descriptor {
                what: "/dev/kvm",
                source: error.into(),
            }
        })?;
        Ok(Self { kvm, vm })
    }

    /// Asked of /dev/kvm: before Linux 6.18, VMs without private memory deny that there is any.
    fn has_guest_memfd(&self) -> bool {
        self.kvm.check_extension_raw(KVM_CAP_GUEST_MEMFD.into()) > 0
    }

    fn create_file(&self, bytes: u64, flags: u64) -> io::Result<KernelFile> {
        let fd = self.vm.create_guest_memfd(kvm_create_guest_memfd {
            size: bytes,
            flags,
            ..Default::default()
        })?;
        // SAFETY: the ioctl returned a new descriptor, which is ours alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // The kernel gives it without O_CLOEXEC.
        fcntl_setfd(fd.as_fd(), FdFlags::CLOEXEC)?;
        Ok(KernelFile::new(fd))
    }
}

impl Owner for KvmOwner {
    fn check_private_memory(&self) -> Result<()> {
        let attributes = self
            .vm
            .check_extension_raw(KVM_CAP_MEMORY_ATTRIBUTES.into());
        check_private_memory(self.has_guest_memfd(), attributes.into())
    }

    fn check_mapped_memory(&self) -> Result<()> {
        // An unknown capability is answered by 0.
        let flags = self.vm.check_extension_raw(KVM_CAP_GUEST_MEMFD_FLAGS);
        check_mapped_memory(self.has_guest_memfd(), u64::try_from(flags).unwrap_or(0))
    }

    fn create_private_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        Ok(Arc::new(self.create_file(bytes, 0)?))
    }

    fn create_mapped_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        let file = self.create_file(bytes, FLAG_MMAP | FLAG_INIT_SHARED)?;
        Ok(Arc::new(MappedFile::new(file)))
    }

    fn set_attributes(&self, guest: GuestPages, view: View) -> io::Result<()> {
        let attributes = match view {
            View::Shared => 0,
            View::Private => u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE),
        };
        self.vm.set_memory_attributes(kvm_memory_attributes {
            address: guest.start_bytes(),
            size: guest.bytes(),
            attributes,
            flags: 0,
        })?;
        Ok(())
    }
}

fn unsupported(wanted: &str, found: &str) -> Result<()> {
    Err(Error::Unsupported {
        wanted: wanted.into(),
        found: found.into(),
    })
}

fn check_private_memory(has_guest_memfd: bool, attributes: i64) -> Result<()> {
    let lacks = |found| unsupported("private memory in a guest_memfd", found);
    if !has_guest_memfd {
        return lacks("KVM has no guest_memfd here; Linux 6.8 or later is needed");
    }
    if attributes & i64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE) == 0 {
        return lacks(
            "this VM's type has no private memory; use a confidential guest (sev-snp-guest, \
             tdx-guest, sw-protected-guest)",
        );
    }
    Ok(())
}

fn check_mapped_memory(has_guest_memfd: bool, flags: u64) -> Result<()> {
    let lacks = |found| unsupported("a guest_memfd that the host maps", found);
    if !has_guest_memfd {
        return lacks("KVM has no guest_memfd here; Linux 6.18 or later is needed");
    }
    if flags & FLAG_MMAP == 0 {
        return lacks(
            "KVM_CAP_GUEST_MEMFD_FLAGS lacks GUEST_MEMFD_FLAG_MMAP; Linux 6.18 or later is \
             needed, or another memory backend",
        );
    }
    if flags & FLAG_INIT_SHARED == 0 {
        return lacks(
            "KVM_CAP_GUEST_MEMFD_FLAGS lacks GUEST_MEMFD_FLAG_INIT_SHARED, as it does for VMs \
             with private memory; use mode=private, or a VM without a confidential guest",
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kernels and VMs that this machine may not have.
    #[test]
    fn what_a_kernel_lacks_is_named_with_what_would_work() {
        let private = i64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE);
        for (refused, words) in [
            (
                check_private_memory(false, private),
                ["no guest_memfd", "Linux 6.8"],
            ),
            (
                check_private_memory(true, 0),
                ["no private memory", "use a confidential guest"],
            ),
            (
                check_mapped_memory(false, 3),
                ["no guest_memfd", "Linux 6.18"],
            ),
            (
                check_mapped_memory(true, 0),
                ["lacks GUEST_MEMFD_FLAG_MMAP", "Linux 6.18"],
            ),
            (
                check_mapped_memory(true, FLAG_MMAP),
                ["lacks GUEST_MEMFD_FLAG_INIT_SHARED", "use mode=private"],
            ),
        ] {
            let text = refused.unwrap_err().to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
        check_private_memory(true, private).unwrap();
        check_mapped_memory(true, FLAG_MMAP | FLAG_INIT_SHARED).unwrap();
    }
}
