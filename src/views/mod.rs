// SPDX-License-Identifier: GPL-2.0-or-later

//! The files behind the views of a backend.

pub(crate) mod mapped;
pub(crate) mod memfd;

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::pages::ranges::FilePages;
use crate::pages::states::View;

pub use memfd::KernelFile;

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
