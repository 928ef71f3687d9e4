// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pins: pages that the host uses through the shared view, which must not become private meanwhile.
//!
//! A pin takes no lock. It is counted first and then looks whether any page near it is closed to
//! the host; a conversion closes its pages first and then looks for pins. So at least one of the
//! two sees the other.
//!
//! Whole chunks are counted as such, so that a device that maps gigabytes costs a few thousand
//! steps; the rest of a range is counted page by page, so that a ring does not hold up conversions
//! next to it. Counters of pages cost memory only where pages are pinned.

use std::time::Instant;

use crate::exclusion::sync::{ASK_INTERVAL, Condvar, Mutex};
use crate::pages::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};
use crate::pages::closed::{CHUNK, Closed, Fragment};
use crate::pages::ranges::{FilePages, PAGE_SIZE};
use crate::pages::zeroed::Zeroed;

/// Takes a pin from a chunk's. False if there is none.
#[inline]
fn take_pin(pins: &AtomicU64) -> bool {
    pins.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1))
        .is_ok()
}

/// The same for a page.
#[inline]
fn take_page(pins: &AtomicU32) -> bool {
    pins.fetch_update(SeqCst, SeqCst, |n| n.checked_sub(1))
        .is_ok()
}

/// How a wait for pins has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    Unpinned,
    TimedOut,
    Interrupted,
}

/// A thread that waits, counted as long as this lives: whoever is asked meanwhile may panic.
struct Waiting<'a>(&'a AtomicU32);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicU32) -> Self {
        count.fetch_add(1, SeqCst);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

/// The pins of a backend.
#[derive(Debug)]
pub(crate) struct Pins {
    /// How often each chunk is pinned as a whole.
    whole: Zeroed<AtomicU64>,
    /// How many pins there are of a part of each chunk.
    parts: Zeroed<AtomicU64>,
    /// How many of those each page belongs to.
    pages: Zeroed<AtomicU32>,
    /// The sum of all pinned ranges.
    pinned: AtomicU64,
    /// Threads that wait for pins to go.
    waiting: AtomicU32,
    lock: Mutex<()>,
    unpinned: Condvar,
}

impl Pins {
    /// `None` if there is no memory for the counters.
    pub(crate) fn new(pages: u64) -> Option<Self> {
        Some(Self {
            whole: Zeroed::new(pages.div_ceil(CHUNK))?,
            parts: Zeroed::new(pages.div_ceil(CHUNK))?,
            pages: Zeroed::new(pages)?,
            pinned: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            lock: Mutex::default(),
            unpinned: Condvar::default(),
        })
    }

    /// Bytes of all pins: of pages that are pinned twice, twice as many.
    pub(crate) fn bytes(&self) -> u64 {
        self.pinned.load(SeqCst) * PAGE_SIZE
    }

    /// Pins bytes of one page near which no page is closed. False where that is not so, and where
    /// there is no such page; then nothing is pinned.
    ///
    /// Most pins are that, several in every request of a device: nothing here can panic, and all
    /// else is left to [`Pins::add`] and its caller.
    #[inline]
    pub(crate) fn add_one(&self, closed: &Closed, offset: u64, bytes: u64) -> bool {
        let Some((page, chunk)) = self.one(offset, bytes) else {
            return false;
        };
        let (Some(parts), Some(closed)) = (self.parts.get(chunk), closed.chunk(chunk)) else {
            return false;
        };
        if closed.load(SeqCst) != 0 {
            return false;
        }
        page.fetch_add(1, SeqCst);
        parts.fetch_add(1, SeqCst);
        self.pinned.fetch_add(1, SeqCst);
        // The answer holds only now that the pin is counted.
        if closed.load(SeqCst) != 0 {
            self.remove_one(offset, bytes);
            return false;
        }
        true
    }

    /// Takes back a pin of bytes of one page. False if they are not that, or not pinned.
    #[inline]
    pub(crate) fn remove_one(&self, offset: u64, bytes: u64) -> bool {
        let Some((page, chunk)) = self.one(offset, bytes) else {
            return false;
        };
        let Some(parts) = self.parts.get(chunk) else {
            return false;
        };
        if !take_page(page) {
            return false;
        }
        if !take_pin(parts) {
            page.fetch_add(1, SeqCst);
            return false;
        }
        self.removed(1);
        true
    }

    /// The counter of the page that some bytes lie in, if it is one, and the number of its chunk.
    #[inline]
    fn one(&self, offset: u64, bytes: u64) -> Option<(&AtomicU32, usize)> {
        // For no bytes the difference wraps.
        if bytes.wrapping_sub(1) >= PAGE_SIZE - offset % PAGE_SIZE {
            return None;
        }
        let page = offset / PAGE_SIZE;
        Some((self.pages.get(page as usize)?, (page / CHUNK) as usize))
    }

    /// Pins pages, whoever may own them. The caller looks afterwards whether any is closed.
    #[inline]
    pub(crate) fn add(&self, pages: FilePages) {
        match Fragment::only(pages) {
            Some(fragment) => self.add_fragment(fragment),
            None => self.add_fragments(Fragment::of(pages)),
        }
        self.pinned.fetch_add(pages.count(), SeqCst);
    }

    #[inline]
    fn add_fragment(&self, fragment: Fragment) {
        if fragment.is_whole() {
            self.whole[fragment.chunk].fetch_add(1, SeqCst);
            return;
        }
        for page in self.counters(fragment.pages) {
            // Each of these pins is a mapping of the host's, which takes more than four bytes.
            page.fetch_add(1, SeqCst);
        }
        self.parts[fragment.chunk].fetch_add(1, SeqCst);
    }

    /// Takes back a pin of exactly these pages. Nothing is done, and `false` returned, if there
    /// cannot have been one.
    #[inline]
    pub(crate) fn remove(&self, pages: FilePages) -> bool {
        let removed = match Fragment::only(pages) {
            Some(fragment) => self.remove_fragment(fragment),
            None => self.remove_fragments(pages),
        };
        if removed {
            self.removed(pages.count());
        }
        removed
    }

    #[inline]
    fn removed(&self, pages: u64) {
        self.pinned.fetch_sub(pages, SeqCst);
        if self.waiting.load(SeqCst) > 0 {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        // With the lock, or a thread that has looked and not yet gone to sleep would miss it.
        let _lock = self.lock.lock();
        self.unpinned.notify_all();
    }

    #[inline(never)]
    fn remove_fragments(&self, pages: FilePages) -> bool {
        let bad = Fragment::of(pages).position(|fragment| !self.remove_fragment(fragment));
        self.add_fragments(Fragment::of(pages).take(bad.unwrap_or(0)));
        bad.is_none()
    }

    #[inline(never)]
    fn add_fragments(&self, fragments: impl Iterator<Item = Fragment>) {
        for fragment in fragments {
            self.add_fragment(fragment);
        }
    }

    #[inline]
    fn remove_fragment(&self, fragment: Fragment) -> bool {
        if fragment.is_whole() {
            return take_pin(&self.whole[fragment.chunk]);
        }
        let pages = self.counters(fragment.pages);
        let bad = pages.iter().position(|page| !take_page(page));
        if bad.is_none() && take_pin(&self.parts[fragment.chunk]) {
            return true;
        }
        self.give_back(&pages[..bad.unwrap_or(pages.len())]);
        false
    }

    #[cold]
    fn give_back(&self, pages: &[AtomicU32]) {
        for page in pages {
            page.fetch_add(1, SeqCst);
        }
    }

    /// The first pinned pages of a range: not always all of those that follow each other.
    pub(crate) fn first_in(&self, pages: FilePages) -> Option<FilePages> {
        Fragment::of(pages).find_map(|fragment| {
            if self.whole[fragment.chunk].load(SeqCst) > 0 {
                return Some(fragment.pages);
            }
            if self.parts[fragment.chunk].load(SeqCst) == 0 {
                return None;
            }
            let pinned = |page: &u64| self.pages[*page as usize].load(SeqCst) > 0;
            let (start, end) = (fragment.pages.start(), fragment.pages.end());
            let first = (start..end).find(pinned)?;
            let last = (first..end).find(|page| !pinned(page));
            FilePages::new(first, last.unwrap_or(end))
        })
    }

    /// Waits until no page of a range is pinned, or until the deadline.
    pub(crate) fn wait(
        &self,
        pages: FilePages,
        deadline: Instant,
        interrupted: impl Fn() -> bool,
    ) -> Waited {
        let _waiting = Waiting::new(&self.waiting);
        loop {
            // First, or pins that come and go could hold up a thread for ever. Without the lock:
            // whoever is asked may let go of pins.
            if interrupted() {
                return Waited::Interrupted;
            }
            let mut lock = self.lock.lock();
            // Before the clock: what is free at the deadline has been waited for.
            if self.first_in(pages).is_none() {
                return Waited::Unpinned;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Waited::TimedOut;
            }
            self.unpinned.wait_for(&mut lock, left.min(ASK_INTERVAL));
        }
    }

    fn counters(&self, pages: FilePages) -> &[AtomicU32] {
        &self.pages[pages.start() as usize..pages.end() as usize]
    }
}

#[cfg(test)]
#[cfg(not(any(feature = "loom", feature = "shuttle")))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::sample::Index;
    use std::time::Duration;

    const PAGES: u64 = 4 * CHUNK + 7;

    fn range() -> impl Strategy<Value = FilePages> {
        let any = (0..PAGES, 1..3 * CHUNK).prop_map(|(start, n)| (start, PAGES.min(start + n)));
        let whole = (0..4u64, 1..3u64).prop_map(|(c, n)| (c * CHUNK, PAGES.min((c + n) * CHUNK)));
        prop_oneof![any, whole].prop_map(|(start, end)| FilePages::new(start, end).unwrap())
    }

    proptest! {
        /// Pins and what they block against a plain list of them.
        #[test]
        fn pins_match_a_plain_list(
            changes in prop::collection::vec((any::<bool>(), range(), any::<Index>()), 0..30),
            asked in range(),
        ) {
            let pins = Pins::new(PAGES).unwrap();
            let mut model: Vec<FilePages> = Vec::new();
            for (add, pages, index) in changes {
                if add {
                    pins.add(pages);
                    model.push(pages);
                } else if model.is_empty() {
                    prop_assert!(!pins.remove(pages), "nothing is pinned");
                } else {
                    let pages = model.swap_remove(index.index(model.len()));
                    prop_assert!(pins.remove(pages));
                }
            }
            let pinned = |page: u64| model.iter().any(|pages| pages.contains(page));
            let first = (asked.start()..asked.end()).find(|page| pinned(*page));
            let found = pins.first_in(asked);
            prop_assert_eq!(found.map(FilePages::start), first);
            if let Some(found) = found {
                prop_assert!((found.start()..found.end()).all(pinned));
            }
            prop_assert_eq!(pins.bytes(), model.iter().map(|pages| pages.bytes()).sum::<u64>());
        }

        /// What is refused has changed nothing.
        #[test]
        fn only_what_is_pinned_can_be_unpinned(pages in range(), more in range()) {
            let pins = Pins::new(PAGES).unwrap();
            pins.add(pages);
            if !pages.covers(more) {
                prop_assert!(!pins.remove(more));
            }
            prop_assert!(pins.remove(pages));
            prop_assert_eq!(pins.first_in(FilePages::new(0, PAGES).unwrap()), None);
        }

        /// Bytes of one page are pinned and unpinned as `add` and `remove` would.
        #[test]
        fn a_page_is_pinned_where_no_closed_page_near_it_is_closed(
            offset in 0..(PAGES + 1) * PAGE_SIZE,
            bytes in prop_oneof![0..2 * PAGE_SIZE, Just(u64::MAX)],
            private in range(),
        ) {
            let (pins, closed) = (Pins::new(PAGES).unwrap(), Closed::new(PAGES).unwrap());
            closed.close(private);
            let page = FilePages::covering_bytes(offset, bytes)
                .filter(|page| page.count() == 1 && page.end() <= PAGES)
                .filter(|page| closed.no_closed_page_near(*page));
            let all = FilePages::new(0, PAGES).unwrap();
            prop_assert_eq!(pins.add_one(&closed, offset, bytes), page.is_some());
            prop_assert_eq!(pins.first_in(all), page);
            prop_assert_eq!(pins.bytes(), page.map_or(0, FilePages::bytes));
            prop_assert_eq!(pins.remove_one(offset, bytes), page.is_some());
            prop_assert!(!pins.remove_one(offset, bytes), "it is not pinned any more");
            prop_assert_eq!((pins.first_in(all), pins.bytes()), (None, 0));
        }

        #[test]
        fn a_chunk_is_closed_as_long_as_one_of_its_pages_is(
            pages in range(), more in range(), asked in range(),
        ) {
            let closed = Closed::new(PAGES).unwrap();
            closed.close(pages);
            closed.close(more);
            closed.open(pages);
            let near = |a: FilePages| a.start() / CHUNK..a.end().div_ceil(CHUNK);
            let meet = near(asked).any(|chunk| near(more).contains(&chunk));
            prop_assert_eq!(closed.no_closed_page_near(asked), !meet);
        }
    }

    /// Whoever has closed a page and finds no pin has it alone.
    #[test]
    fn a_pin_and_a_conversion_see_each_other() {
        const ROUNDS: u32 = 3_000;
        let (pins, closed) = (Pins::new(PAGES).unwrap(), Closed::new(PAGES).unwrap());
        let page = FilePages::new(5, 6).unwrap();
        let [private, pinned, both, done] = [const { AtomicU32::new(0) }; 4];
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while done.load(SeqCst) == 0 {
                        if pins.add_one(&closed, page.start_bytes(), 1) {
                            pinned.fetch_add(1, SeqCst);
                            both.fetch_add(private.load(SeqCst), SeqCst);
                            assert!(pins.remove_one(page.start_bytes(), 1));
                        }
                    }
                });
            }
            let mut converted = 0;
            // On a busy machine the others may not have had their turn by then.
            while converted < ROUNDS || pinned.load(SeqCst) == 0 {
                closed.close(page);
                if pins.first_in(page).is_none() {
                    private.store(1, SeqCst);
                    std::thread::yield_now();
                    private.store(0, SeqCst);
                    converted += 1;
                }
                closed.open(page);
            }
            done.store(1, SeqCst);
        });
        assert_eq!(both.into_inner(), 0, "a page was pinned and private");
        assert_eq!(pins.bytes(), 0);
    }

    #[test]
    fn a_wait_ends_with_the_last_unpin() {
        let pins = Pins::new(PAGES).unwrap();
        let pages = FilePages::new(5, 9).unwrap();
        pins.add(pages);
        std::thread::scope(|scope| {
            let waiter = scope
                .spawn(|| pins.wait(pages, Instant::now() + Duration::from_secs(60), || false));
            while pins.waiting.load(SeqCst) == 0 {
                std::thread::yield_now();
            }
            assert!(pins.remove(pages));
            assert_eq!(waiter.join().unwrap(), Waited::Unpinned);
        });
    }

    #[test]
    fn pages_that_are_free_at_the_deadline_have_been_waited_for() {
        let pins = Pins::new(PAGES).unwrap();
        let pages = FilePages::new(5, 6).unwrap();
        assert_eq!(pins.wait(pages, Instant::now(), || false), Waited::Unpinned);
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
