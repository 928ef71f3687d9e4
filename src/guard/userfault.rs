// SPDX-License-Identifier: MIT OR Apache-2.0

//! Faults of this process where a mapping shows a hole of its file: userfaultfd.
//!
//! The crate of that name needs libclang wherever it is built, which is much to ask of somebody who
//! builds QEMU; rustix has the system call, linux-raw-sys the structures.

#![allow(unsafe_code)] // ioctls

use std::ffi::c_void;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use linux_raw_sys::general::{
    _UFFDIO_ZEROPAGE, UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_MISSING_SHMEM,
    UFFD_FEATURE_THREAD_ID, UFFDIO_REGISTER_MODE_MISSING, uffd_msg, uffdio_api, uffdio_range,
    uffdio_register, uffdio_zeropage,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER, UFFDIO_WAKE, UFFDIO_ZEROPAGE};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Updater, opcode};
use rustix::mm::UserfaultfdFlags;

use crate::pages::ranges::PAGE_SIZE;

/// A thread waits for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    /// Of the page, from the beginning of the mapping.
    pub(crate) offset: u64,
    /// The kernel's id of the thread.
    pub(crate) thread: u32,
}

/// The faults of a mapping.
#[derive(Debug)]
pub(crate) struct Userfault {
    fd: OwnedFd,
    start: u64,
}

impl Userfault {
    /// Takes over the faults at holes of a mapping of shared memory. They go back to the kernel
    /// when this is dropped.
    pub(crate) fn new(start: usize, size: u64) -> io::Result<Self> {
        let start = start as u64;
        let fd = open()?;
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features: (UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_THREAD_ID).into(),
            ioctls: 0,
        };
        update::<{ UFFDIO_API as Opcode }, _>(&fd, &mut api)?;
        let mut register = uffdio_register {
            range: uffdio_range { start, len: size },
            mode: UFFDIO_REGISTER_MODE_MISSING.into(),
            ioctls: 0,
        };
        update::<{ UFFDIO_REGISTER as Opcode }, _>(&fd, &mut register)?;
        if register.ioctls & (1 << _UFFDIO_ZEROPAGE) == 0 {
            return Err(io::Error::other(
                "this memory cannot be filled with pages of zeros",
            ));
        }
        Ok(Self { fd, start })
    }

    /// The next fault, if there is one.
    pub(crate) fn next(&self) -> io::Result<Option<Fault>> {
        let mut message = MaybeUninit::<uffd_msg>::uninit();
        let read = match rustix::io::read(&self.fd, as_bytes(&mut message)) {
            Err(Errno::AGAIN) => return Ok(None),
            read => read?.0.len(),
        };
        if read != size_of::<uffd_msg>() {
            return Err(Errno::IO.into());
        }
        // SAFETY: the kernel has filled all of it; any bytes are a message.
        let message = unsafe { message.assume_init() };
        if u32::from(message.event) != UFFD_EVENT_PAGEFAULT {
            return Ok(None);
        }
        // SAFETY: this member belongs to the event, and with UFFD_FEATURE_THREAD_ID it has a
        // thread.
        let (address, thread) = unsafe {
            let fault = message.arg.pagefault;
            (fault.address, fault.feat.ptid)
        };
        Ok(Some(Fault {
            offset: address.saturating_sub(self.start) & !(PAGE_SIZE - 1),
            thread,
        }))
    }

    /// Fills the hole at an offset with a page of zeros, if it still is one, and lets the threads
    /// go on that wait for it. They do on an error as well, and then fault again.
    pub(crate) fn fill(&self, offset: u64) -> io::Result<()> {
        let mut range = uffdio_range {
            start: self.start + offset,
            len: PAGE_SIZE,
        };
        let mut page = uffdio_zeropage {
            range,
            mode: 0,
            zeropage: 0,
        };
        let Err(error) = update::<{ UFFDIO_ZEROPAGE as Opcode }, _>(&self.fd, &mut page) else {
            return Ok(());
        };
        update::<{ UFFDIO_WAKE as Opcode }, _>(&self.fd, &mut range)?;
        match error {
            // Somebody else has filled it, or the kernel was in the way for a moment.
            Errno::EXIST | Errno::AGAIN => Ok(()),
            error => Err(error.into()),
        }
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A descriptor that takes faults of the kernel as well as of the program: KVM's for the guest, for
/// example. Needs a privilege, or the device that stands for it.
fn open() -> io::Result<OwnedFd> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    // SAFETY: it is used for this process alone, on memory that is named in `new`.
    let refused = match unsafe { rustix::mm::userfaultfd(flags) } {
        Ok(fd) => return Ok(fd),
        Err(refused) => refused,
    };
    let device = rustix::fs::open(
        "/dev/userfaultfd",
        OFlags::RDWR | OFlags::CLOEXEC,
        Mode::empty(),
    );
    match device {
        // SAFETY: the device has no other ioctl; it returns a new descriptor.
        Ok(device) => Ok(unsafe { rustix::ioctl::ioctl(&device, NewUserfault(flags)) }?),
        // What the system call said tells more.
        Err(_) => Err(refused.into()),
    }
}

/// `USERFAULTFD_IOC_NEW`.
struct NewUserfault(UserfaultfdFlags);

// SAFETY: the ioctl takes the flags in place of a pointer, and returns a descriptor.
unsafe impl Ioctl for NewUserfault {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(0xaa, 0)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0.bits() as usize)
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: it has not failed, so this is a descriptor, and nobody else's.
        Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(out) })
    }
}

/// An ioctl that reads and writes a structure.
fn update<const OPCODE: Opcode, T>(fd: &OwnedFd, value: &mut T) -> rustix::io::Result<()> {
    // SAFETY: the callers name the structure that belongs to the number. Pages are only ever filled
    // with what the kernel would fill them with.
    unsafe { rustix::ioctl::ioctl(fd, Updater::<OPCODE, T>::new(value)) }
}

fn as_bytes<T>(value: &mut MaybeUninit<T>) -> &mut [MaybeUninit<u8>] {
    let bytes = std::ptr::from_mut(value).cast();
    // SAFETY: the same memory, which need not be initialised; the reference lives as long.
    unsafe { std::slice::from_raw_parts_mut(bytes, size_of::<T>()) }
}
