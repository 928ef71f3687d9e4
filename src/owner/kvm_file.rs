// SPDX-License-Identifier: MIT OR Apache-2.0

//! A guest_memfd that keeps the attributes of its pages: the interface of Linux 7.4.
#![allow(unsafe_code)] // an ioctl

use std::ffi::c_void;
use std::io;
use std::os::fd::BorrowedFd;

use kvm_bindings::{KVM_MEMORY_ATTRIBUTE_PRIVATE, KVMIO};
use rustix::io::{Errno, retry_on_intr};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};

use crate::pages::ranges::{FilePages, PAGE_SIZE};
use crate::pages::states::View;
use crate::views::ViewFile;
use crate::views::in_place::{InPlaceFile, Refusal};
use crate::views::mapped::MappedFile;

/// `struct kvm_memory_attributes2` of `include/uapi/linux/kvm.h`.
#[repr(C)]
#[derive(Debug, Default)]
struct Attributes {
    offset: u64,
    size: u64,
    attributes: u64,
    flags: u64,
    error_offset: u64,
    reserved: [u64; 11],
}

const _: () = assert!(size_of::<Attributes>() == 128);

/// `KVM_SET_MEMORY_ATTRIBUTES2`.
const SET_MEMORY_ATTRIBUTES2: Opcode = opcode::read_write::<Attributes>(KVMIO as u8, 0xd2);

// SAFETY: the kernel reads and writes one `Attributes`, as the opcode says.
unsafe impl Ioctl for &mut Attributes {
    type Output = ();

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        SET_MEMORY_ATTRIBUTES2
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut::<Attributes>(*self).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// A guest_memfd of KVM, mapped by the host.
#[derive(Debug)]
pub(super) struct KvmInPlaceFile(pub(super) MappedFile);

impl InPlaceFile for KvmInPlaceFile {
    fn set_attributes(&self, pages: FilePages, view: View) -> Result<(), Refusal> {
        let mut attributes = Attributes {
            offset: pages.start_bytes(),
            size: pages.bytes(),
            attributes: match view {
                View::Shared => 0,
                View::Private => KVM_MEMORY_ATTRIBUTE_PRIVATE.into(),
            },
            ..Attributes::default()
        };
        // SAFETY: a structure of the kernel's form that lives as long as the call; the pages that
        // the call takes from the host's mapping are the host's no more, which is the caller's
        // doing.
        let set = retry_on_intr(|| unsafe { rustix::ioctl::ioctl(self.fd(), &mut attributes) });
        set.map_err(|errno| match errno {
            Errno::AGAIN => Refusal::InUse {
                page: attributes.error_offset / PAGE_SIZE,
            },
            errno => Refusal::Other(errno.into()),
        })
    }
}

/// But for attributes it is like any that the host maps.
impl ViewFile for KvmInPlaceFile {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    fn punch_hole(&self, pages: FilePages) -> io::Result<()> {
        self.0.punch_hole(pages)
    }

    fn first_data(&self, pages: FilePages) -> io::Result<Option<FilePages>> {
        self.0.first_data(pages)
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, bytes)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, bytes)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.0.allocated()
    }
}
