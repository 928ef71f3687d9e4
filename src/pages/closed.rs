// SPDX-License-Identifier: GPL-2.0-or-later

//! Which chunks of a backend have pages that the host may not use, for readers that take no lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

use crate::pages::ranges::FilePages;
use crate::pages::zeroed::Zeroed;

/// Pages of a chunk: 4 MiB.
pub(crate) const CHUNK: u64 = 1024;

/// A range's part of a chunk.
#[derive(Clone, Copy)]
pub(crate) struct Part {
    pub(crate) chunk: usize,
    pub(crate) pages: FilePages,
}

impl Part {
    /// The parts that make up a range.
    pub(crate) fn of(pages: FilePages) -> impl Iterator<Item = Part> + Clone {
        (pages.start() / CHUNK..pages.end().div_ceil(CHUNK)).filter_map(move |chunk| {
            let whole = FilePages::new(chunk * CHUNK, (chunk + 1) * CHUNK)?;
            Some(Part {
                chunk: chunk as usize,
                pages: whole.intersection(pages)?,
            })
        })
    }

    /// The part that a range is, if it lies in one chunk. Nearly all do.
    pub(crate) fn only(pages: FilePages) -> Option<Part> {
        let chunk = pages.start() / CHUNK;
        (pages.end() <= (chunk + 1) * CHUNK).then_some(Part {
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
        for part in Part::of(pages) {
            self.0[part.chunk].fetch_add(part.pages.count() as u32, SeqCst);
        }
    }

    /// The host may use these pages again.
    pub(crate) fn open(&self, pages: FilePages) {
        for part in Part::of(pages) {
            self.0[part.chunk].fetch_sub(part.pages.count() as u32, SeqCst);
        }
    }

    /// Are all pages of the chunks that these lie in open?
    pub(crate) fn none_near(&self, pages: FilePages) -> bool {
        let is_open = |part: Part| self.0[part.chunk].load(SeqCst) == 0;
        match Part::only(pages) {
            Some(part) => is_open(part),
            None => Part::of(pages).all(is_open),
        }
    }

    /// The counter of a chunk, if there is such a chunk.
    #[inline]
    pub(crate) fn chunk(&self, chunk: usize) -> Option<&AtomicU32> {
        self.0.get(chunk)
    }
}
