// SPDX-License-Identifier: MIT OR Apache-2.0

//! Mapped: one guest_memfd behind both views, for VMs without private memory. The kernel refuses
//! read() and write() on it, so its bytes are reached through mappings, each for one access.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::retry_on_intr;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::pages::ranges::{FilePages, PAGE_SIZE};
use crate::pages::zeroed::pages_in_memory;
use crate::views::{KernelFile, ViewFile};

/// One guest_memfd, which the host maps. Every page is shared and stays so.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Mapped {
    /// The guest_memfd.
    pub file: Arc<dyn ViewFile>,
}

const PAGE: usize = PAGE_SIZE as usize;

/// How many pages are looked at to find data, first and at most.
const FIRST_LOOK: u64 = 64;
const LONGEST_LOOK: u64 = 1 << 18;

/// A guest_memfd whose bytes are reached through mappings.
#[derive(Debug)]
pub(crate) struct MappedFile(KernelFile);

impl MappedFile {
    /// A guest_memfd with `GUEST_MEMFD_FLAG_MMAP` and `GUEST_MEMFD_FLAG_INIT_SHARED`.
    pub(crate) fn new(file: KernelFile) -> Self {
        Self(file)
    }

    /// Maps pages.
    fn map(&self, pages: FilePages) -> io::Result<MmapRegion> {
        let file = FileOffset::from_arc(self.0.file().clone(), pages.start_bytes());
        let size = usize::try_from(pages.bytes()).map_err(io::Error::other)?;
        MmapRegion::from_file(file, size).map_err(io::Error::other)
    }
}

/// The pages of an access, and where in them it begins. `None` for one of no bytes.
fn pages_of(offset: u64, bytes: &[u8]) -> Option<(FilePages, usize)> {
    let pages = FilePages::covering_bytes(offset, bytes.len() as u64)?;
    Some((pages, (offset % PAGE_SIZE) as usize))
}

/// Which pages of a mapping are allocated. A guest_memfd is never swapped out, so those that are
/// not in memory are holes.
fn allocated_pages(mapping: &MmapRegion) -> io::Result<Vec<bool>> {
    pages_in_memory(mapping.as_ptr(), mapping.size())
}

impl ViewFile for MappedFile {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    fn punch_hole(&self, pages: FilePages) -> io::Result<()> {
        self.0.punch_hole(pages)
    }

    /// A guest_memfd does not tell where it has data: mappings do. They begin small and become
    /// larger, so that it takes little to find what lies near.
    fn first_data(&self, pages: FilePages) -> io::Result<Option<FilePages>> {
        let (mut rest, mut count) = (Some(pages), FIRST_LOOK);
        while let Some(pages) = rest {
            let here = pages.first(count);
            let allocated = allocated_pages(&self.map(here)?)?;
            let mut each = (here.start()..).zip(allocated);
            if let Some((start, _)) = each.find(|(_, allocated)| *allocated) {
                let hole = each.find(|(_, allocated)| !allocated);
                return Ok(FilePages::new(
                    start,
                    hole.map_or(here.end(), |hole| hole.0),
                ));
            }
            rest = FilePages::new(here.end(), pages.end());
            count = (2 * count).min(LONGEST_LOOK);
        }
        Ok(None)
    }

    /// A touch of a hole, even for reading, would allocate it.
    fn read_at(&self, offset: u64, mut bytes: &mut [u8]) -> io::Result<()> {
        let Some((pages, mut at)) = pages_of(offset, bytes) else {
            return Ok(());
        };
        let mapping = self.map(pages)?;
        for allocated in allocated_pages(&mapping)? {
            let (here, behind) = bytes.split_at_mut(bytes.len().min(PAGE - at % PAGE));
            if allocated {
                let page = mapping.get_slice(at, here.len());
                page.map_err(io::Error::other)?.copy_to(here);
            } else {
                here.fill(0);
            }
            at += here.len();
            bytes = behind;
        }
        Ok(())
    }

    /// Allocates first: where there is no memory for a touch, it ends in a signal.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let Some((pages, at)) = pages_of(offset, bytes) else {
            return Ok(());
        };
        let (start, size) = (pages.start_bytes(), pages.bytes());
        retry_on_intr(|| rustix::fs::fallocate(self.fd(), FallocateFlags::KEEP_SIZE, start, size))?;
        let mapping = self.map(pages)?;
        let place = mapping.get_slice(at, bytes.len());
        place.map_err(io::Error::other)?.copy_from(bytes);
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        self.0.allocated()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a memfd, which can be mapped as well, and shows its holes.
    #[test]
    fn a_read_allocates_nothing_and_a_write_what_it_touches() {
        let pages = |start, end| FilePages::new(start, end).unwrap();
        let file = MappedFile::new(KernelFile::memfd("test", 8 * PAGE_SIZE).unwrap());
        file.write_at(3 * PAGE_SIZE - 2, b"data").unwrap();
        let mut read = vec![0xee; 6 * PAGE + 5];
        file.read_at(PAGE_SIZE + 7, &mut read).unwrap();
        let mut expected = vec![0; 6 * PAGE + 5];
        expected[2 * PAGE - 9..][..4].copy_from_slice(b"data");
        assert_eq!(read, expected);
        assert_eq!(file.first_data(pages(0, 8)).unwrap(), Some(pages(2, 4)));
        assert_eq!(file.first_data(pages(4, 8)).unwrap(), None);
        file.read_at(0, &mut []).unwrap();
        file.write_at(0, &[]).unwrap();
        assert_eq!(file.first_data(pages(0, 2)).unwrap(), None);
    }

    #[test]
    fn data_far_behind_a_hole_are_found() {
        let count = 10 * FIRST_LOOK;
        let pages = |start, end| FilePages::new(start, end).unwrap();
        let file = MappedFile::new(KernelFile::memfd("test", count * PAGE_SIZE).unwrap());
        let far = 9 * FIRST_LOOK;
        file.write_at(far * PAGE_SIZE, &[7; 3 * PAGE]).unwrap();
        let found = file.first_data(pages(1, count)).unwrap();
        assert_eq!(found, Some(pages(far, far + 3)));
        assert_eq!(file.first_data(pages(far + 3, count)).unwrap(), None);
    }
}
