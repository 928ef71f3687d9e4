// SPDX-License-Identifier: MIT OR Apache-2.0

//! In place: one guest_memfd behind both views. A page stays where it is, with its data if the VM's
//! type keeps them; what changes is who may use it. The file itself keeps the attributes, as
//! `KVM_SET_MEMORY_ATTRIBUTES2` of Linux 7.4 sets them.

use std::io;
use std::sync::Arc;

use crate::pages::ranges::FilePages;
use crate::pages::states::View;
use crate::views::ViewFile;

/// A guest_memfd that keeps the attributes of its pages, and that the host maps.
pub trait InPlaceFile: ViewFile + AsViewFile {
    /// The guest sees this view of these pages from now on, and the host may use the shared one.
    /// All of them change, or none; what is so already costs little.
    ///
    /// # Errors
    /// [`Refusal::InUse`] only towards private, and only for a moment or as long as somebody uses
    /// the page: nobody may map, pin or hold a page that is private.
    fn set_attributes(&self, pages: FilePages, view: View) -> Result<(), Refusal>;
}

/// An [`InPlaceFile`] as the file behind a view. Since Rust 1.86 a reference to the one coerces to
/// the other; until then every file brings this along.
pub trait AsViewFile {
    /// The same file.
    fn as_view_file(&self) -> &dyn ViewFile;
}

impl<T: ViewFile> AsViewFile for T {
    fn as_view_file(&self) -> &dyn ViewFile {
        self
    }
}

/// Why attributes have not been set.
#[derive(Debug)]
#[non_exhaustive]
pub enum Refusal {
    /// The kernel found a page that somebody uses, by its number; it may be free at once.
    InUse {
        /// The page.
        page: u64,
    },
    /// Anything else.
    Other(io::Error),
}

/// One file, and its views.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct InPlace {
    /// The guest_memfd.
    pub file: Arc<dyn InPlaceFile>,
}

/// How often a refusal is tried again at once: pages are held for a moment by the kernel itself,
/// where it looks at them or keeps them for another CPU.
const TRIES: u32 = 4;

impl InPlace {
    pub(crate) fn set_attributes(&self, pages: FilePages, view: View) -> Result<(), Refusal> {
        let mut left = TRIES;
        loop {
            left -= 1;
            match self.file.set_attributes(pages, view) {
                Err(Refusal::InUse { .. }) if left > 0 => std::thread::yield_now(),
                result => return result,
            }
        }
    }
}
