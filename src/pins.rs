// SPDX-License-Identifier: GPL-2.0-or-later

//! Pins: pages that the host uses through the shared view, which must not become private meanwhile.
//!
//! A pin takes no lock. It is counted first and then looks whether any page near it is closed to the
//! host; a conversion closes its pages first and then looks for pins. So at least one of the two sees
//! the other. Counters per chunk make both looks short; counters per page, which cost memory only
//! where pages are pinned, keep a ring of a device from holding up conversions next to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::addr::FilePages;

/// Pages of a chunk: 4 MiB.
const CHUNK: u64 = 1024;

/// How often a thread that waits for pins asks whether it is to give up.
const ASK_INTERVAL: Duration = Duration::from_millis(10);

/// The chunks that a range has pages in, each with their number.
fn chunks(pages: FilePages) -> impl Iterator<Item = (usize, u32)> {
    (pages.start() / CHUNK..pages.end().div_ceil(CHUNK)).map(move |chunk| {
        let start = pages.start().max(chunk * CHUNK);
        let end = pages.end().min((chunk + 1) * CHUNK);
        (chunk as usize, (end - start) as u32)
    })
}

/// How many pages of each chunk the host may not use.
#[derive(Clone, Debug)]
pub(crate) struct Closed(Arc<[AtomicU32]>);

impl Closed {
    /// For a number of pages that are all open.
    pub(crate) fn new(pages: u64) -> Self {
        let chunks = pages.div_ceil(CHUNK);
        Self((0..chunks).map(|_| AtomicU32::new(0)).collect())
    }

    /// The host may not use these pages any more.
    pub(crate) fn close(&self, pages: FilePages) {
        for (chunk, count) in chunks(pages) {
            self.0[chunk].fetch_add(count, SeqCst);
        }
    }

    /// The host may use these pages again.
    pub(crate) fn open(&self, pages: FilePages) {
        for (chunk, count) in chunks(pages) {
            self.0[chunk].fetch_sub(count, SeqCst);
        }
    }

    /// Are all pages of the chunks that these lie in open?
    pub(crate) fn none_near(&self, pages: FilePages) -> bool {
        chunks(pages).all(|(chunk, _)| self.0[chunk].load(SeqCst) == 0)
    }
}

/// How a wait for pins has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    Unpinned,
    TimedOut,
    Interrupted,
}

/// The pins of a backend.
#[derive(Debug)]
pub(crate) struct Pins {
    /// How often each page is pinned.
    pages: Box<[AtomicU32]>,
    /// Their sum over each chunk.
    chunks: Box<[AtomicU32]>,
    /// Threads that wait for pins to go.
    waiting: AtomicU32,
    lock: Mutex<()>,
    unpinned: Condvar,
}

impl Pins {
    /// `None` if there is no memory for the counters.
    pub(crate) fn new(pages: u64) -> Option<Self> {
        let zeroed = |count: u64| {
            let count = usize::try_from(count).ok()?;
            bytemuck::allocation::try_zeroed_slice_box(count).ok()
        };
        Some(Self {
            pages: zeroed(pages)?,
            chunks: zeroed(pages.div_ceil(CHUNK))?,
            waiting: AtomicU32::new(0),
            lock: Mutex::default(),
            unpinned: Condvar::new(),
        })
    }

    /// Pins pages, whoever may own them. The caller looks afterwards whether any is closed.
    pub(crate) fn add(&self, pages: FilePages) {
        for page in self.counters(pages) {
            page.fetch_add(1, SeqCst);
        }
        for (chunk, count) in chunks(pages) {
            self.chunks[chunk].fetch_add(count, SeqCst);
        }
    }

    /// Takes back one pin of each page. Nothing is done, and `false` returned, if a page has none.
    pub(crate) fn remove(&self, pages: FilePages) -> bool {
        let counters = self.counters(pages);
        let take = |page: &AtomicU32| page.fetch_update(SeqCst, SeqCst, |pins| pins.checked_sub(1));
        if let Some(bad) = counters.iter().position(|page| take(page).is_err()) {
            for page in &counters[..bad] {
                page.fetch_add(1, SeqCst);
            }
            return false;
        }
        for (chunk, count) in chunks(pages) {
            self.chunks[chunk].fetch_sub(count, SeqCst);
        }
        if self.waiting.load(SeqCst) > 0 {
            // With the lock, or a thread that has looked and not yet gone to sleep would miss it.
            let _lock = self.lock.lock();
            self.unpinned.notify_all();
        }
        true
    }

    /// The first run of pinned pages in a range.
    pub(crate) fn first_in(&self, pages: FilePages) -> Option<FilePages> {
        let pinned = |page: u64| self.pages[page as usize].load(SeqCst) > 0;
        let mut start = pages.start();
        for (chunk, count) in chunks(pages) {
            let end = start + u64::from(count);
            if self.chunks[chunk].load(SeqCst) > 0
                && let Some(first) = (start..end).find(|page| pinned(*page))
            {
                let last = (first..pages.end()).find(|page| !pinned(*page));
                return FilePages::new(first, last.unwrap_or(pages.end()));
            }
            start = end;
        }
        None
    }

    /// Waits until no page of a range is pinned.
    pub(crate) fn wait(
        &self,
        pages: FilePages,
        deadline: Instant,
        interrupted: impl Fn() -> bool,
    ) -> Waited {
        self.waiting.fetch_add(1, SeqCst);
        let mut lock = self.lock.lock();
        let waited = loop {
            if self.first_in(pages).is_none() {
                break Waited::Unpinned;
            }
            if interrupted() {
                break Waited::Interrupted;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Waited::TimedOut;
            }
            self.unpinned.wait_for(&mut lock, left.min(ASK_INTERVAL));
        };
        drop(lock);
        self.waiting.fetch_sub(1, SeqCst);
        waited
    }

    fn counters(&self, pages: FilePages) -> &[AtomicU32] {
        &self.pages[pages.start() as usize..pages.end() as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 3 * CHUNK + 7;

    fn range() -> impl Strategy<Value = FilePages> {
        (0..PAGES, 1..2 * CHUNK)
            .prop_map(|(start, n)| FilePages::new(start, PAGES.min(start + n)).unwrap())
    }

    proptest! {
        /// Pins and what they block against a plain count for each page.
        #[test]
        fn pins_match_a_plain_count(
            changes in prop::collection::vec((any::<bool>(), range()), 0..30),
            asked in range(),
        ) {
            let pins = Pins::new(PAGES).unwrap();
            let mut model = vec![0u32; PAGES as usize];
            for (add, pages) in changes {
                let counts = &mut model[pages.start() as usize..pages.end() as usize];
                if add {
                    pins.add(pages);
                    counts.iter_mut().for_each(|count| *count += 1);
                } else {
                    let all = counts.iter().all(|count| *count > 0);
                    prop_assert_eq!(pins.remove(pages), all);
                    if all {
                        counts.iter_mut().for_each(|count| *count -= 1);
                    }
                }
            }
            let pinned = |page: &u64| model[*page as usize] > 0;
            let first = (asked.start()..asked.end()).find(pinned);
            let found = pins.first_in(asked);
            prop_assert_eq!(found.map(FilePages::start), first);
            if let Some(found) = found {
                prop_assert!((found.start()..found.end()).all(|page| pinned(&page)));
                prop_assert!(found.end() == asked.end() || !pinned(&found.end()));
            }
        }

        #[test]
        fn a_chunk_is_closed_as_long_as_one_of_its_pages_is(
            pages in range(), more in range(), asked in range(),
        ) {
            let closed = Closed::new(PAGES);
            closed.close(pages);
            closed.close(more);
            closed.open(pages);
            let near = |a: FilePages| a.start() / CHUNK..a.end().div_ceil(CHUNK);
            let meet = near(asked).any(|chunk| near(more).contains(&chunk));
            prop_assert_eq!(closed.none_near(asked), !meet);
        }
    }

    #[test]
    fn a_wait_ends_with_the_last_unpin() {
        let pins = Pins::new(PAGES).unwrap();
        let pages = FilePages::new(5, 9).unwrap();
        pins.add(pages);
        std::thread::scope(|scope| {
            let far = Instant::now() + Duration::from_secs(60);
            let waiter = scope.spawn({
                let pins = &pins;
                move || pins.wait(pages, far, || false)
            });
            while pins.waiting.load(SeqCst) == 0 {
                std::thread::yield_now();
            }
            assert!(pins.remove(pages));
            assert_eq!(waiter.join().unwrap(), Waited::Unpinned);
        });
    }

    #[test]
    fn a_wait_for_a_pin_that_stays_times_out_and_can_be_interrupted() {
        let pins = Pins::new(PAGES).unwrap();
        let pages = FilePages::new(5, 6).unwrap();
        pins.add(pages);
        let soon = Instant::now() + Duration::from_millis(20);
        assert_eq!(pins.wait(pages, soon, || false), Waited::TimedOut);
        assert_eq!(pins.wait(pages, soon, || true), Waited::Interrupted);
    }
}
