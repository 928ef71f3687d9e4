// SPDX-License-Identifier: MIT OR Apache-2.0

//! An owner without a hypervisor: it remembers attributes and keeps private pages in a memfd. For
//! tests, and for machines without KVM.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::Errno;

use super::{Owner, lacks_in_place};
use crate::error::Result;
use crate::pages::ranges::{FilePages, FileSpace, GuestPages, GuestSpace};
use crate::pages::set::PageSet;
use crate::pages::states::View;
use crate::views::in_place::{InPlaceFile, Refusal};
use crate::views::{KernelFile, ViewFile};

/// An owner without a hypervisor.
#[derive(Debug, Default)]
pub struct SoftwareOwner {
    private: Mutex<PageSet<GuestSpace>>,
    in_place: bool,
}

impl SoftwareOwner {
    /// One whose files keep the attributes of their pages.
    pub fn in_place() -> Self {
        Self {
            in_place: true,
            ..Self::default()
        }
    }

    /// The view that a guest would see of a page. Not for [`Mode::InPlace`](crate::Mode::InPlace),
    /// where the file tells.
    pub fn view(&self, page: u64) -> View {
        let set = GuestPages::new(page, page + 1)
            .is_some_and(|page| self.private.lock().first_in(page).is_some());
        if set { View::Private } else { View::Shared }
    }
}

impl Owner for SoftwareOwner {
    fn check_in_place(&self) -> Result<()> {
        match self.in_place {
            true => Ok(()),
            false => lacks_in_place("this owner was made without"),
        }
    }

    fn check_private_memory(&self) -> Result<()> {
        Ok(())
    }

    fn check_mapped_memory(&self) -> Result<()> {
        Ok(())
    }

    fn create_in_place_file(&self, bytes: u64, start: View) -> io::Result<Arc<dyn InPlaceFile>> {
        let file = SoftwareInPlaceFile {
            memfd: KernelFile::memfd("guestmemfd-in-place", bytes)?,
            private: Mutex::default(),
        };
        if start == View::Private {
            let all = FilePages::from_bytes(0, bytes).map_err(io::Error::other)?;
            file.private.lock().insert(all);
        }
        Ok(Arc::new(file))
    }

    fn create_private_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        Ok(Arc::new(KernelFile::memfd("guestmemfd-private", bytes)?))
    }

    fn create_mapped_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        Ok(Arc::new(KernelFile::memfd("guestmemfd-mapped", bytes)?))
    }

    fn set_attributes(&self, guest: GuestPages, view: View) -> io::Result<()> {
        let mut private = self.private.lock();
        match view {
            View::Private => private.insert(guest),
            View::Shared => private.remove(guest),
        }
        Ok(())
    }
}

/// A memfd that refuses the host's reads and writes of private pages, as the kernel refuses those
/// of a guest_memfd. A mapping of it sees them all the same.
#[derive(Debug)]
struct SoftwareInPlaceFile {
    memfd: KernelFile,
    private: Mutex<PageSet<FileSpace>>,
}

impl SoftwareInPlaceFile {
    fn check_shared(&self, offset: u64, bytes: usize) -> io::Result<()> {
        let pages = FilePages::covering_bytes(offset, bytes as u64);
        match pages.and_then(|pages| self.private.lock().first_in(pages)) {
            None => Ok(()),
            Some(_) => Err(Errno::FAULT.into()),
        }
    }
}

impl InPlaceFile for SoftwareInPlaceFile {
    fn set_attributes(&self, pages: FilePages, view: View) -> std::result::Result<(), Refusal> {
        let mut private = self.private.lock();
        match view {
            View::Private => private.insert(pages),
            View::Shared => private.remove(pages),
        }
        Ok(())
    }
}

impl ViewFile for SoftwareInPlaceFile {
    fn fd(&self) -> BorrowedFd<'_> {
        self.memfd.fd()
    }

    fn punch_hole(&self, pages: FilePages) -> io::Result<()> {
        self.memfd.punch_hole(pages)
    }

    fn first_data(&self, pages: FilePages) -> io::Result<Option<FilePages>> {
        self.memfd.first_data(pages)
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.check_shared(offset, bytes.len())?;
        self.memfd.read_at(offset, bytes)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check_shared(offset, bytes.len())?;
        self.memfd.write_at(offset, bytes)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.memfd.allocated()
    }
}
