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
use super::kvm_file::KvmInPlaceFile;
use crate::error::{Error, Result};
use crate::pages::ranges::GuestPages;
use crate::pages::states::View;
use crate::views::in_place::InPlaceFile;
use crate::views::mapped::MappedFile;
use crate::views::{KernelFile, ViewFile};

/// `KVM_CAP_GUEST_MEMFD_FLAGS`, which kvm-bindings lacks: the flags that this VM's guest_memfd may
/// have.
const KVM_CAP_GUEST_MEMFD_FLAGS: u64 = 244;

/// `KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES`: the attributes that this VM's guest_memfd keep. Where
/// they do, the VM has no others.
const KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES: u64 = 252;

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
    ///
    /// # Errors
    /// [`Error::Descriptor`] if one of them is none, or cannot be duplicated.
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

    fn offers(&self) -> Offers {
        let ask = |capability| bits(self.vm.check_extension_raw(capability));
        Offers {
            guest_memfd: self.has_guest_memfd(),
            flags: ask(KVM_CAP_GUEST_MEMFD_FLAGS),
            attributes: ask(KVM_CAP_MEMORY_ATTRIBUTES.into()),
            file_attributes: ask(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES),
        }
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
    fn check_in_place(&self) -> Result<()> {
        self.offers().check_in_place()
    }

    fn check_private_memory(&self) -> Result<()> {
        self.offers().check_private_memory()
    }

    fn check_mapped_memory(&self) -> Result<()> {
        self.offers().check_mapped_memory()
    }

    fn create_in_place_file(&self, bytes: u64, start: View) -> io::Result<Arc<dyn InPlaceFile>> {
        let flags = match start {
            View::Shared => FLAG_MMAP | FLAG_INIT_SHARED,
            View::Private => FLAG_MMAP,
        };
        let file = MappedFile::new(self.create_file(bytes, flags)?);
        Ok(Arc::new(KvmInPlaceFile(file)))
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

/// What kernel and VM offer.
#[derive(Clone, Copy, Debug, Default)]
struct Offers {
    guest_memfd: bool,
    /// Flags of files.
    flags: u64,
    /// Attributes of the VM.
    attributes: u64,
    /// Attributes of files.
    file_attributes: u64,
}

const PRIVATE: u64 = KVM_MEMORY_ATTRIBUTE_PRIVATE as u64;

const NO_GUEST_MEMFD: &str = "KVM has no guest_memfd here; Linux 6.8 or later is needed";

impl Offers {
    fn has_private_memory(self) -> bool {
        (self.attributes | self.file_attributes) & PRIVATE != 0
    }

    fn check_in_place(self) -> Result<()> {
        let lacks = |found| unsupported("private memory in place", found);
        match () {
            () if !self.guest_memfd => lacks(NO_GUEST_MEMFD),
            () if self.file_attributes & PRIVATE == 0 => lacks(
                "KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES lacks KVM_MEMORY_ATTRIBUTE_PRIVATE; Linux \
                 7.4 or later is needed, with module parameter kvm.gmem_in_place_conversion=1, and \
                 a confidential guest",
            ),
            () if self.flags & FLAG_MMAP == 0 => {
                lacks("KVM_CAP_GUEST_MEMFD_FLAGS lacks GUEST_MEMFD_FLAG_MMAP for this VM's type")
            }
            () => Ok(()),
        }
    }

    fn check_private_memory(self) -> Result<()> {
        let lacks = |found| unsupported("private memory in a guest_memfd of its own", found);
        match () {
            () if !self.guest_memfd => lacks(NO_GUEST_MEMFD),
            () if self.file_attributes & PRIVATE != 0 => lacks(
                "this kernel converts memory in place only; use mode=in-place, or module parameter \
                 kvm.gmem_in_place_conversion=0 if the kernel has CONFIG_KVM_VM_MEMORY_ATTRIBUTES",
            ),
            () if self.attributes & PRIVATE == 0 => lacks(
                "this VM's type has no private memory; use a confidential guest (sev-snp-guest, \
                 tdx-guest, sw-protected-guest)",
            ),
            () => Ok(()),
        }
    }

    fn check_mapped_memory(self) -> Result<()> {
        let lacks = |found| unsupported("a guest_memfd that the host maps", found);
        match () {
            () if !self.guest_memfd => {
                lacks("KVM has no guest_memfd here; Linux 6.18 or later is needed")
            }
            () if self.has_private_memory() => lacks(
                "this VM has private memory, which the host must not map; use mode=auto, or a VM \
                 without a confidential guest",
            ),
            () if self.flags & FLAG_MMAP == 0 => lacks(
                "KVM_CAP_GUEST_MEMFD_FLAGS lacks GUEST_MEMFD_FLAG_MMAP; Linux 6.18 or later is \
                 needed, or another memory backend",
            ),
            () if self.flags & FLAG_INIT_SHARED == 0 => {
                lacks("KVM_CAP_GUEST_MEMFD_FLAGS lacks GUEST_MEMFD_FLAG_INIT_SHARED")
            }
            () => Ok(()),
        }
    }
}

/// The bits of a capability. One that is unknown is answered by 0, and a failure by a negative
/// number.
fn bits(answer: i32) -> u64 {
    u64::try_from(answer).unwrap_or(0)
}

fn unsupported(wanted: &str, found: &str) -> Result<()> {
    Err(Error::Unsupported {
        wanted: wanted.into(),
        found: found.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_fails_to_answer_offers_nothing() {
        assert_eq!(bits(-1), 0);
        assert_eq!(bits(8), PRIVATE);
    }

    /// Kernels and VMs that this machine may not have.
    #[test]
    fn what_a_kernel_lacks_is_named_with_what_would_work() {
        let none = Offers::default();
        let old = Offers {
            guest_memfd: true,
            ..none
        };
        let two_files = Offers {
            attributes: PRIVATE,
            ..old
        };
        let in_place = Offers {
            file_attributes: PRIVATE,
            flags: FLAG_MMAP | FLAG_INIT_SHARED,
            ..old
        };
        let no_mmap = Offers {
            flags: 0,
            ..in_place
        };
        let mapped = Offers {
            flags: FLAG_MMAP | FLAG_INIT_SHARED,
            ..old
        };
        let not_shared = Offers {
            flags: FLAG_MMAP,
            ..old
        };
        for (refused, words) in [
            (none.check_in_place(), ["no guest_memfd", "Linux 6.8"]),
            (
                two_files.check_in_place(),
                ["Linux 7.4", "kvm.gmem_in_place_conversion=1"],
            ),
            (
                no_mmap.check_in_place(),
                ["lacks GUEST_MEMFD_FLAG_MMAP", "type"],
            ),
            (none.check_private_memory(), ["no guest_memfd", "Linux 6.8"]),
            (
                old.check_private_memory(),
                ["no private memory", "use a confidential guest"],
            ),
            (
                in_place.check_private_memory(),
                ["mode=in-place", "kvm.gmem_in_place_conversion=0"],
            ),
            (none.check_mapped_memory(), ["no guest_memfd", "Linux 6.18"]),
            (
                old.check_mapped_memory(),
                ["lacks GUEST_MEMFD_FLAG_MMAP", "Linux 6.18"],
            ),
            (
                two_files.check_mapped_memory(),
                ["has private memory", "use mode=auto"],
            ),
            (
                in_place.check_mapped_memory(),
                ["has private memory", "use mode=auto"],
            ),
            (
                not_shared.check_mapped_memory(),
                ["lacks GUEST_MEMFD_FLAG_INIT_SHARED", "KVM_CAP"],
            ),
        ] {
            let text = refused.unwrap_err().to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        }
        in_place.check_in_place().unwrap();
        two_files.check_private_memory().unwrap();
        mapped.check_mapped_memory().unwrap();
    }
}
