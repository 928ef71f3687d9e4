// SPDX-License-Identifier: MIT OR Apache-2.0

//! Files that the kernel serves by descriptor: memfds, and guest_memfds that nobody maps.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::{Errno, retry_on_intr};

use crate::pages::ranges::FilePages;
use crate::views::ViewFile;

/// A file of the kernel: a memfd, or a guest_memfd that nobody maps, whose bytes cannot be had.
#[derive(Debug)]
pub struct KernelFile(Arc<File>);

impl KernelFile {
    /// A file that some other call created.
    pub fn new(fd: OwnedFd) -> Self {
        Self(Arc::new(fd.into()))
    }

    /// What can be mapped.
    pub(crate) fn file(&self) -> &Arc<File> {
        &self.0
    }

    /// A memfd of this size, which nobody can resize.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn memfd(name: &str, bytes: u64) -> io::Result<Self> {
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        retry_on_intr(|| rustix::fs::ftruncate(&fd, bytes))?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(Self::new(fd))
    }
}

impl ViewFile for KernelFile {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn punch_hole(&self, pages: FilePages) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        retry_on_intr(|| {
            rustix::fs::fallocate(self.fd(), flags, pages.start_bytes(), pages.bytes())
        })?;
        Ok(())
    }

    fn first_data(&self, pages: FilePages) -> io::Result<Option<FilePages>> {
        let seek = |from| retry_on_intr(|| rustix::fs::seek(self.fd(), from));
        let data = match seek(SeekFrom::Data(pages.start_bytes())) {
            // No data from here to the end of the file.
            Err(Errno::NXIO) => return Ok(None),
            data => data?,
        };
        if data >= pages.start_bytes() + pages.bytes() {
            return Ok(None);
        }
        let hole = seek(SeekFrom::Hole(data))?;
        let data = FilePages::covering_bytes(data, hole.saturating_sub(data));
        Ok(data.and_then(|data| data.intersection(pages)))
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(bytes, offset)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn allocated(&self) -> io::Result<u64> {
        // st_blocks counts units of 512 bytes and is never negative.
        Ok(rustix::fs::fstat(self.fd())?.st_blocks.unsigned_abs() * 512)
    }
}
