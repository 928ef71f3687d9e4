// SPDX-License-Identifier: MIT OR Apache-2.0

//! Files that the kernel serves by descriptor: memfds, and guest_memfds that nobody maps.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::pages::ranges::FilePages;
use crate::views::{ViewFile, calls};

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
        Ok(Self(Arc::new(calls::memfd(name, bytes)?)))
    }
}

impl ViewFile for KernelFile {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn punch_hole(&self, pages: FilePages) -> io::Result<()> {
        calls::punch_hole(&self.0, pages)
    }

    fn first_data(&self, pages: FilePages) -> io::Result<Option<FilePages>> {
        calls::first_data(&self.0, pages)
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(bytes, offset)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn allocated(&self) -> io::Result<u64> {
        calls::allocated(&self.0)
    }
}
