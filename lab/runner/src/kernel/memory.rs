// SPDX-License-Identifier: GPL-2.0-or-later
//! A guest_memfd whose pages are converted in place, and mappings.

use std::ffi::c_void;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr;

use anyhow::{Context, Result, bail, ensure};
use kvm_ioctls::VmFd;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::touch::{Touched, touch};
use super::uapi::{self, Attributes2, INIT_SHARED, MMAP, PAGE, PRIVATE};

/// Memory that is mapped as long as this lives.
#[derive(Debug)]
pub(crate) struct Map {
    start: *mut u8,
    size: usize,
}

// SAFETY: it is memory, and does not belong to a thread.
unsafe impl Send for Map {}
// SAFETY: those who use it from several threads do so by volatile accesses.
unsafe impl Sync for Map {}

impl Map {
    /// A file from its beginning.
    pub(crate) fn file(file: impl AsFd, size: u64) -> Result<Self, Errno> {
        let bytes = usize::try_from(size).map_err(|_| Errno::NOMEM)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(ptr::null_mut(), bytes, access, MapFlags::SHARED, file, 0) }?;
        Ok(Self {
            start: start.cast(),
            size: bytes,
        })
    }

    /// Zeros.
    pub(super) fn anonymous(size: u64) -> Result<Self> {
        let bytes = usize::try_from(size)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), bytes, access, flags) };
        Ok(Self {
            start: start.context("mmap")?.cast(),
            size: bytes,
        })
    }

    /// Where it begins.
    pub(super) fn address(&self) -> u64 {
        self.start as u64
    }

    /// Where a page begins.
    pub(crate) fn page(&self, page: u64) -> *mut c_void {
        let offset = usize::try_from(page * PAGE).unwrap_or(usize::MAX);
        assert!(offset < self.size, "page {page} is not in the mapping");
        // SAFETY: it is within the mapping.
        unsafe { self.start.add(offset).cast() }
    }

    /// Reads the beginning of a page; a page that is private ends this process.
    pub(super) fn read(&self, page: u64) -> u32 {
        // SAFETY: it is mapped and aligned.
        unsafe { self.page(page).cast::<u32>().read_volatile() }
    }

    /// Writes it.
    pub(crate) fn write(&self, page: u64, value: u32) {
        // SAFETY: it is mapped and aligned.
        unsafe { self.page(page).cast::<u32>().write_volatile(value) }
    }

    /// Puts bytes at its beginning.
    pub(super) fn put(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.size, "too long");
        // SAFETY: it is within the mapping, and nobody else has references to it.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(offset), bytes.len()) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: nobody uses it any more. It cannot fail for a whole mapping.
        let _ = unsafe { munmap(self.start.cast(), self.size) };
    }
}

/// Why pages have not become what they were to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    pub(super) errno: Errno,
    /// The page at which the kernel says it was.
    pub(super) page: u64,
}

/// A file that the host has mapped, all of it shared at first.
#[derive(Debug)]
pub(super) struct File {
    pub(super) fd: OwnedFd,
    pub(super) map: Map,
    pub(super) pages: u64,
}

impl File {
    pub(super) fn new(vm: &VmFd, pages: u64) -> Result<Self> {
        let fd = uapi::guest_memfd(vm, pages * PAGE, MMAP | INIT_SHARED);
        let fd = fd.context("KVM_CREATE_GUEST_MEMFD with MMAP and INIT_SHARED")?;
        let map = Map::file(&fd, pages * PAGE).context("mmap of a guest_memfd")?;
        Ok(Self { fd, map, pages })
    }

    /// Converts pages.
    pub(super) fn set(&self, pages: Range<u64>, private: bool) -> Result<(), Refused> {
        set(&self.fd, pages, private)
    }

    /// The same where it must work.
    pub(super) fn convert(&self, pages: Range<u64>, private: bool) -> Result<()> {
        let to = if private { "private" } else { "shared" };
        match self.set(pages.clone(), private) {
            Ok(()) => Ok(()),
            Err(why) => bail!("pages {pages:?} do not become {to}: {why:?}"),
        }
    }

    /// Frees pages.
    pub(super) fn punch(&self, pages: Range<u64>) -> Result<()> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let size = (pages.end - pages.start) * PAGE;
        fallocate(&self.fd, hole, pages.start * PAGE, size).context("punching a hole")
    }

    /// What happens to a process that touches a page must fit the view that it has.
    pub(super) fn expect(&self, page: u64, private: bool) -> Result<()> {
        for write in [false, true] {
            let touched = touch(&self.map, page, write)?;
            let wanted = if private { Touched::BUS } else { Touched::Done };
            ensure!(
                touched == wanted,
                "page {page} is {}, but a touch of the host (write: {write}): {touched:?}",
                if private { "private" } else { "shared" }
            );
        }
        Ok(())
    }
}

/// Converts pages of a file.
pub(super) fn set(file: impl AsFd, pages: Range<u64>, private: bool) -> Result<(), Refused> {
    let mut attributes = Attributes2 {
        offset: pages.start * PAGE,
        size: (pages.end - pages.start) * PAGE,
        attributes: if private { PRIVATE } else { 0 },
        // Only the kernel's answer counts.
        error_offset: u64::MAX,
        ..Default::default()
    };
    uapi::set_attributes2(file, &mut attributes).map_err(|errno| Refused {
        errno,
        page: attributes.error_offset / PAGE,
    })
}
