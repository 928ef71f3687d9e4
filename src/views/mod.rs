// SPDX-License-Identifier: MIT OR Apache-2.0

//! The views of a backend: the files behind them, and by which strategy a view is opened and
//! closed.

#[cfg(not(miri))]
mod calls;
#[cfg(miri)]
#[path = "calls_miri.rs"]
mod calls;
pub mod in_place;
pub mod mapped;
pub(crate) mod memfd;
pub mod two_files;

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

use crate::pages::ranges::FilePages;
use crate::pages::states::View;

pub use in_place::InPlace;
pub use mapped::Mapped;
pub use memfd::KernelFile;
pub use two_files::TwoFiles;

/// How a backend keeps its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mode {
    /// Two files: a guest_memfd for private pages, a memfd for shared ones.
    Private,
    /// One guest_memfd that the host maps, for VMs without private memory.
    Mapped,
    /// One guest_memfd behind both views, which keeps the attributes of its pages.
    InPlace,
}

impl Mode {
    /// Can pages be private?
    pub fn has_private_pages(self) -> bool {
        self != Mode::Mapped
    }
}

/// One file with one page for each page of a backend.
pub trait ViewFile: Debug + Send + Sync {
    /// To map it, or to give it to KVM.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Frees the pages; they read zero if they are allocated again.
    ///
    /// # Errors
    /// The kernel's refusal.
    fn punch_hole(&self, pages: FilePages) -> io::Result<()>;

    /// The first of these pages that have data, which are those that are no hole.
    ///
    /// # Errors
    /// The kernel's refusal, or a file that cannot tell.
    fn first_data(&self, pages: FilePages) -> io::Result<Option<FilePages>>;

    /// Reads bytes from an offset on, which lie inside the file. Holes read zero and stay holes.
    ///
    /// # Errors
    /// The kernel's refusal; some bytes may have been read.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// Writes bytes from an offset on, which lie inside the file.
    ///
    /// # Errors
    /// The kernel's refusal; some bytes may have been written.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Allocated bytes as the kernel accounts them for the file. 0 for every guest_memfd: the
    /// kernel does not tell.
    ///
    /// # Errors
    /// The kernel's refusal.
    fn allocated(&self) -> io::Result<u64>;
}

/// How the views of a backend are kept, with its files: the strategy.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Views {
    /// [`Mode::Private`].
    TwoFiles(TwoFiles),
    /// [`Mode::Mapped`].
    Mapped(Mapped),
    /// [`Mode::InPlace`].
    InPlace(InPlace),
}

impl Views {
    /// Which mode this is.
    pub fn mode(&self) -> Mode {
        match self {
            Views::TwoFiles(_) => Mode::Private,
            Views::Mapped(_) => Mode::Mapped,
            Views::InPlace(_) => Mode::InPlace,
        }
    }

    /// The file behind a view; one file may be behind both.
    pub fn file(&self, view: View) -> &dyn ViewFile {
        match self {
            Views::TwoFiles(files) => files.file(view),
            Views::Mapped(mapped) => mapped.file.as_ref(),
            Views::InPlace(in_place) => in_place.file.as_view_file(),
        }
    }
}
