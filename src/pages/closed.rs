// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which chunks of a backend have pages that the host may not use, for readers that take no lock.

use std::sync::Arc;

use crate::pages::atomic::{AtomicU32, Ordering::SeqCst};
use crate::pages::ranges::FilePages;
use crate::pages::zeroed::Zeroed;

/// Pages of a chunk: 4 MiB. Two where orders are explored, which takes longer with each counter.
pub(crate) const CHUNK: u64 = if cfg!(feature = "loom") { 2 } else { 1024 };

/// What a range has of a chunk.
#[derive(Clone, Copy)]
pub(crate) struct Fragment {
    pub(crate) chunk: usize,
    pub(crate) pages: FilePages,
}

impl Fragment {
    /// The fragments that make up a range.
    pub(crate) fn of(pages: FilePages) -> impl Iterator<Item = Fragment> + Clone {
        (pages.start() / CHUNK..pages.end().div_ceil(CHUNK)).filter_map(move |chunk| {
            let whole = FilePages::new(chunk * CHUNK, (chunk + 1) * CHUNK)?;
            Some(Fragment {
                chunk: chunk as usize,
                pages: whole.intersection(pages)?,
            })
        })
    }

    /// The fragment that a range is, if it lies in one chunk. Nearly all do.
    pub(crate) fn only(pages: FilePages) -> Option<Fragment> {
        let chunk = pages.start() / CHUNK;
        (pages.end() <= (chunk + 1) * CHUNK).then_some(Fragment {
            chunk: chunk as usize,
            pages,
        })
    }

    pub(crate) fn is_whole(self) -> bool {
        self.pages.count() == CHUNK
    }
}

/// How many pages of each chunk the host may not use.
#[derive(Clone, Debug)]
pub(crate) struct Closed(Arc<Zeroed<AtomicU32>>);

impl Closed {
    /// For a number of pages that are all open. `None` if there is no memory.
    pub(crate) fn new(pages: u64) -> Option<Self> {
        Some(Self(Arc::new(Zeroed::new(pages.div_ceil(CHUNK))?)))
    }

    /// The host may not use these pages any more.
    pub(crate) fn close(&self, pages: FilePages) {
        for fragment in Fragment::of(pages) {
            self.0[fragment.chunk].fetch_add(fragment.pages.count() as u32, SeqCst);
        }
    }

    /// The host may use these pages again.
    pub(crate) fn open(&self, pages: FilePages) {
        for fragment in Fragment::of(pages) {
            self.0[fragment.chunk].fetch_sub(fragment.pages.count() as u32, SeqCst);
        }
    }

    /// Some pages of a chunk, wherever they lie in it, are not the host's any more.
    pub(crate) fn close_in(&self, chunk: usize, pages: u32) {
        self.0[chunk].fetch_add(pages, SeqCst);
    }

    /// Some pages of a chunk, wherever they lie in it, are the host's again.
    pub(crate) fn open_in(&self, chunk: usize, pages: u32) {
        self.0[chunk].fetch_sub(pages, SeqCst);
    }

    /// All pages are closed, or all are open.
    pub(crate) fn set_all(&self, all: FilePages, closed: bool) {
        for fragment in Fragment::of(all) {
            let count = if closed {
                fragment.pages.count() as u32
            } else {
                0
            };
            self.0[fragment.chunk].store(count, SeqCst);
        }
    }

    /// Are all pages of the chunks that these lie in open?
    pub(crate) fn no_closed_page_near(&self, pages: FilePages) -> bool {
        let is_open = |fragment: Fragment| self.0[fragment.chunk].load(SeqCst) == 0;
        match Fragment::only(pages) {
            Some(fragment) => is_open(fragment),
            None => Fragment::of(pages).all(is_open),
        }
    }

    /// The counter of a chunk, if there is such a chunk.
    #[inline]
    pub(crate) fn chunk(&self, chunk: usize) -> Option<&AtomicU32> {
        self.0.get(chunk)
    }
}
