// SPDX-License-Identifier: GPL-2.0-or-later

//! The files behind the views of a backend.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::unistd::{SysconfVar, sysconf};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::{Errno, retry_on_intr};

use crate::addr::{FilePages, PAGE_SIZE};
use crate::error::{Error, Result};
use crate::state::View;

/// States are kept for pages of [`PAGE_SIZE`], which must be the kernel's: it punches and converts no
/// smaller ones. On arm64 it may have larger pages.
pub(crate) fn check_page_size(bytes: u64) -> Result<()> {
    if bytes == PAGE_SIZE {
        return Ok(());
    }
    Err(Error::Unsupported {
        wanted: format!("pages of {PAGE_SIZE} bytes"),
        found: format!("this kernel's have {bytes}; use one that was built with pages of 4 KiB"),
    })
}

/// Of the running kernel, in bytes.
pub(crate) fn kernel_page_size() -> u64 {
    let size = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    // Linux always tells.
    size.and_then(|size| size.try_into().ok())
        .unwrap_or(PAGE_SIZE)
}

/// How a backend keeps its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Two files: a guest_memfd for private pages, a memfd for shared ones.
    Private,
    /// One guest_memfd that the host maps, for VMs without private memory.
    Mapped,
}

/// One file with one page for each page of a backend.
pub trait ViewFile: Debug + Send + Sync {
    /// To map it, or to give it to KVM.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Frees the pages; they read zero if they are allocated again.
    fn punch_hole(&self, pages: FilePages) -> io::Result<()>;

    /// The first of these pages that have data, which are those that are no hole.
    fn first_data(&self, pages: FilePages) -> io::Result<Option<FilePages>>;

    /// Reads bytes from an offset on, which lie inside the file. Holes read zero and stay holes.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes bytes from an offset on, which lie inside the file.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Allocated bytes as the kernel accounts them for the file. 0 for every guest_memfd: the kernel
    /// does not tell.
    fn allocated(&self) -> io::Result<u64>;
}

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

/// The files of a backend.
#[derive(Debug)]
pub enum Backing {
    /// [`Mode::Private`].
    TwoFiles {
        /// The guest_memfd.
        private: Arc<dyn ViewFile>,
        /// The memfd.
        shared: Arc<dyn ViewFile>,
    },
    /// [`Mode::Mapped`]. Every page is shared and stays so.
    Mapped {
        /// The guest_memfd, which the host maps.
        file: Arc<dyn ViewFile>,
    },
}

impl Backing {
    /// Which mode this is.
    pub fn mode(&self) -> Mode {
        match self {
            Backing::TwoFiles { .. } => Mode::Private,
            Backing::Mapped { .. } => Mode::Mapped,
        }
    }

    /// The file behind a view; one file may be behind both.
    pub fn file(&self, view: View) -> &dyn ViewFile {
        match (self, view) {
            (Backing::TwoFiles { private, .. }, View::Private) => private.as_ref(),
            (Backing::TwoFiles { shared, .. }, View::Shared) => shared.as_ref(),
            (Backing::Mapped { file }, _) => file.as_ref(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_with_larger_pages_is_refused() {
        check_page_size(kernel_page_size()).unwrap();
        let error = check_page_size(64 << 10).unwrap_err();
        assert!(error.to_string().contains("65536"), "{error}");
    }
}
