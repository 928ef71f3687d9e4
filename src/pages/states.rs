// SPDX-License-Identifier: MIT OR Apache-2.0

//! The state of every page of a backend: two bitmaps, and counters that are kept as bits change.
//!
//! | shared | private | state |
//! |---|---|---|
//! | 0 | 0 | undecided |
//! | 1 | 0 | shared |
//! | 0 | 1 | private |
//! | 1 | 1 | in transition |

use crate::pages::bitmap::{Bitmap, WORD};
use crate::pages::closed::{CHUNK, Closed};
use crate::pages::ranges::FilePages;

/// One of the two views of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum View {
    /// Mapped by the host, backed by the shared file.
    Shared,
    /// Only the guest's, backed by the guest_memfd.
    Private,
}

impl View {
    /// The two.
    pub const BOTH: [View; 2] = [View::Shared, View::Private];

    /// The other one.
    pub fn other(self) -> Self {
        match self {
            View::Shared => View::Private,
            View::Private => View::Shared,
        }
    }
}

impl std::fmt::Display for View {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            View::Shared => "shared",
            View::Private => "private",
        })
    }
}

/// The state of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PageState {
    /// Nobody has chosen yet. The attribute is clear: to KVM the page is shared.
    Undecided,
    /// Host and guest use the shared view.
    Shared,
    /// Only the guest, through the private view.
    Private,
    /// Claimed by a conversion: no new pin, no host access.
    Transition,
}

impl PageState {
    /// All states, in the order of their bits.
    pub const ALL: [PageState; 4] = [
        PageState::Undecided,
        PageState::Shared,
        PageState::Private,
        PageState::Transition,
    ];

    fn bits(self) -> (bool, bool) {
        match self {
            PageState::Undecided => (false, false),
            PageState::Shared => (true, false),
            PageState::Private => (false, true),
            PageState::Transition => (true, true),
        }
    }

    fn from_bits(shared: bool, private: bool) -> Self {
        match (shared, private) {
            (false, false) => PageState::Undecided,
            (true, false) => PageState::Shared,
            (false, true) => PageState::Private,
            (true, true) => PageState::Transition,
        }
    }

    /// May the host use the page?
    pub fn host_may_use(self) -> bool {
        matches!(self, PageState::Undecided | PageState::Shared)
    }
}

impl From<View> for PageState {
    fn from(view: View) -> Self {
        match view {
            View::Shared => PageState::Shared,
            View::Private => PageState::Private,
        }
    }
}

/// The states of all pages of a backend. 64 MiB for a backend of 1 TiB.
#[doc(hidden)] // for benchmarks
#[derive(Debug)]
pub struct PageStates {
    shared: Bitmap,
    private: Bitmap,
    pages: u64,
    counts: [u64; 4],
    closed: Closed,
}

impl PageStates {
    /// States for `pages` pages that are all in state `initial`; `None` where there is no memory
    /// for the bitmaps.
    pub fn new(pages: u64, initial: PageState) -> Option<Self> {
        let mut states = Self {
            shared: Bitmap::new(pages)?,
            private: Bitmap::new(pages)?,
            pages,
            counts: [pages, 0, 0, 0],
            closed: Closed::new(pages)?,
        };
        if let Some(all) = FilePages::new(0, pages) {
            states.set_run(all, PageState::Undecided, initial);
        }
        Some(states)
    }

    /// Number of pages.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Number of pages in a state, without a scan.
    pub fn count(&self, state: PageState) -> u64 {
        self.counts[state as usize]
    }

    /// Near which pages there are some that the host may not use; follows the states.
    pub(crate) fn closed(&self) -> Closed {
        self.closed.clone()
    }

    /// The state of one page.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn get(&self, page: u64) -> PageState {
        assert!(page < self.pages, "there is no page {page}");
        PageState::from_bits(self.shared.get(page), self.private.get(page))
    }

    /// Moves a run of pages, all in state `from`, to state `to`.
    ///
    /// # Panics
    /// If the range does not lie inside the backend.
    pub fn set_run(&mut self, run: FilePages, from: PageState, to: PageState) {
        assert!(run.end() <= self.pages, "there are no pages {run}");
        debug_assert!(
            self.runs(run).eq([(run, from)]),
            "{run} is not all {from:?}"
        );
        let ((old_shared, old_private), (shared, private)) = (from.bits(), to.bits());
        if old_shared != shared {
            self.shared.fill(run, shared);
        }
        if old_private != private {
            self.private.fill(run, private);
        }
        self.counts[from as usize] -= run.count();
        self.counts[to as usize] += run.count();
        match (from.host_may_use(), to.host_may_use()) {
            (true, false) => self.closed.close(run),
            (false, true) => self.closed.open(run),
            _ => {}
        }
    }

    /// Moves those pages of a range that are in state `from` to state `to`, a word at a time: it
    /// takes no longer if no two neighbours are alike.
    ///
    /// # Panics
    /// If the range does not lie inside the backend.
    pub fn replace(&mut self, range: FilePages, from: PageState, to: PageState) {
        assert!(range.end() <= self.pages, "there are no pages {range}");
        let (from_shared, from_private) = from.bits();
        let (from_shared, from_private) = (flip_for(!from_shared), flip_for(!from_private));
        let (to_shared, to_private) = to.bits();
        for word in range.start() / WORD..range.end().div_ceil(WORD) {
            let inside = bits_inside(range, word);
            let index = word as usize;
            let (shared, private) = (self.shared.words()[index], self.private.words()[index]);
            let moved = (shared ^ from_shared) & (private ^ from_private) & inside;
            if moved == 0 {
                continue;
            }
            self.shared.words_mut()[index] = shared & !moved | moved & flip_for(to_shared);
            self.private.words_mut()[index] = private & !moved | moved & flip_for(to_private);
            self.counts[from as usize] -= u64::from(moved.count_ones());
            self.counts[to as usize] += u64::from(moved.count_ones());
            let chunk = (word * WORD / CHUNK) as usize;
            match (from.host_may_use(), to.host_may_use()) {
                (true, false) => self.closed.close_in(chunk, moved.count_ones()),
                (false, true) => self.closed.open_in(chunk, moved.count_ones()),
                _ => {}
            }
        }
    }

    /// The range from the first to the last page of a range that is in a state; `None` if none is.
    ///
    /// # Panics
    /// If the range does not lie inside the backend.
    pub fn span(&self, range: FilePages, state: PageState) -> Option<FilePages> {
        assert!(range.end() <= self.pages, "there are no pages {range}");
        let (shared, private) = state.bits();
        let (shared, private) = (flip_for(!shared), flip_for(!private));
        let in_state = |word: u64| {
            let (s, p) = (
                self.shared.words()[word as usize],
                self.private.words()[word as usize],
            );
            (s ^ shared) & (p ^ private) & bits_inside(range, word)
        };
        let mut words = range.start() / WORD..range.end().div_ceil(WORD);
        let first = words.find_map(|word| match in_state(word) {
            0 => None,
            bits => Some(word * WORD + u64::from(bits.trailing_zeros())),
        })?;
        let words = first / WORD..range.end().div_ceil(WORD);
        let last = words.rev().find_map(|word| match in_state(word) {
            0 => None,
            bits => Some(word * WORD + u64::from(bits.ilog2())),
        })?;
        FilePages::new(first, last + 1)
    }

    /// Moves all pages to one state, whatever state they are in.
    pub fn reset(&mut self, to: PageState) {
        let Some(all) = FilePages::new(0, self.pages) else {
            return;
        };
        if self.count(to) == self.pages {
            return;
        }
        let (shared, private) = to.bits();
        self.shared.fill(all, shared);
        self.private.fill(all, private);
        self.counts = [0; 4];
        self.counts[to as usize] = self.pages;
        self.closed.set_all(all, !to.host_may_use());
    }

    /// The longest runs of one state that make up the range, in order.
    ///
    /// # Panics
    /// The iterator, if the range does not lie inside the backend.
    pub fn runs(&self, range: FilePages) -> impl Iterator<Item = (FilePages, PageState)> + '_ {
        let mut rest = Some(range);
        std::iter::from_fn(move || {
            let (run, state) = self.first_run(rest?);
            rest = FilePages::new(run.end(), range.end());
            Some((run, state))
        })
    }

    /// The first of them.
    ///
    /// # Panics
    /// If there is no page where the range starts.
    #[inline]
    pub fn first_run(&self, range: FilePages) -> (FilePages, PageState) {
        let state = self.get(range.start());
        let end = self.run_end(range.start(), state, range.end());
        (range.first(end - range.start()), state)
    }

    /// The first page behind `page` that is not in `state`, which `page` is in, but not beyond
    /// `limit`. Looks at 64 pages a step, and at 1024 where nothing changes.
    fn run_end(&self, page: u64, state: PageState, limit: u64) -> u64 {
        const STEP: usize = 16;
        if page + 1 == limit {
            return limit;
        }
        // So it is when a guest starts; to look at untouched bitmaps would have the kernel map
        // them.
        if self.count(state) == self.pages() {
            return limit;
        }
        let (shared, private) = state.bits();
        let (shared, private) = (flip_for(shared), flip_for(private));
        let first = page / WORD;
        let words = first as usize..limit.div_ceil(WORD) as usize;
        let (s, p) = (
            &self.shared.words()[words.clone()],
            &self.private.words()[words],
        );
        let differs = |(s, p): (&u64, &u64)| (s ^ shared) | (p ^ private);
        let end = |index: usize, differs: u64| {
            let bit = u64::from(differs.trailing_zeros());
            limit.min((first + index as u64) * WORD + bit)
        };
        // Bits before `page` in its word do not end the run.
        let behind = differs((&s[0], &p[0])) & !((1 << (page % WORD)) - 1);
        if behind != 0 {
            return end(0, behind);
        }
        let steps = s[1..].chunks_exact(STEP).zip(p[1..].chunks_exact(STEP));
        let same = steps.take_while(|(s, p)| {
            let any = s.iter().zip(*p).fold(0, |any, pair| any | differs(pair));
            any == 0
        });
        let passed = 1 + STEP * same.count();
        let mut rest = (passed..).zip(s[passed..].iter().zip(&p[passed..]));
        let found = rest.find(|(_, pair)| differs(*pair) != 0);
        found.map_or(limit, |(index, pair)| end(index, differs(pair)))
    }
}

/// The bits of a word whose pages lie in a range.
fn bits_inside(range: FilePages, word: u64) -> u64 {
    let first = range.start().saturating_sub(word * WORD).min(WORD);
    let last = (range.end() - word * WORD).min(WORD);
    let below = |bit: u64| {
        if bit == WORD {
            u64::MAX
        } else {
            (1 << bit) - 1
        }
    };
    below(last) & !below(first)
}

/// What to flip a word with so that bits with this value become zero.
fn flip_for(value: bool) -> u64 {
    if value { u64::MAX } else { 0 }
}

#[cfg(test)]
#[cfg(not(feature = "loom"))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Enough for whole steps between changes.
    const PAGES: u64 = 5000;

    fn state() -> impl Strategy<Value = PageState> {
        (0usize..4).prop_map(|i| PageState::ALL[i])
    }

    fn set_all(states: &mut PageStates, range: FilePages, to: impl Fn(PageState) -> PageState) {
        let runs: Vec<_> = states.runs(range).collect();
        for (run, from) in runs {
            states.set_run(run, from, to(from));
        }
    }

    /// All that can be seen of states.
    fn seen(states: &PageStates) -> (Vec<(FilePages, PageState)>, Vec<u64>, Vec<bool>) {
        let all = FilePages::new(0, PAGES).unwrap();
        let closed = (0..PAGES).map(|page| {
            let page = FilePages::new(page, page + 1).unwrap();
            states.closed().no_closed_page_near(page)
        });
        let counts = PageState::ALL.map(|state| states.count(state));
        (
            states.runs(all).collect(),
            counts.to_vec(),
            closed.collect(),
        )
    }

    proptest! {
        /// Words that change at once against runs that change one by one.
        #[test]
        fn what_is_replaced_is_what_runs_say(
            changes in prop::collection::vec((0..PAGES, 1..PAGES, state()), 0..20),
            (start, length) in (0..PAGES, 1..PAGES),
            (from, to, all) in (state(), state(), state()),
        ) {
            let [mut states, mut model] = [(); 2].map(|()| {
                let mut states = PageStates::new(PAGES, PageState::Undecided).unwrap();
                for (start, length, to) in &changes {
                    let end = (start + length).min(PAGES);
                    set_all(&mut states, FilePages::new(*start, end).unwrap(), |_| *to);
                }
                states
            });
            let range = FilePages::new(start, (start + length).min(PAGES)).unwrap();
            let mut runs = model.runs(range).filter(|(_, state)| *state == from);
            let first = runs.next().map(|(run, _)| run);
            let last = runs.last().map(|(run, _)| run).or(first);
            let span = first.zip(last).and_then(|(a, b)| FilePages::new(a.start(), b.end()));
            prop_assert_eq!(states.span(range, from), span);
            states.replace(range, from, to);
            set_all(&mut model, range, |state| if state == from { to } else { state });
            prop_assert_eq!(seen(&states), seen(&model));
            states.reset(all);
            set_all(&mut model, FilePages::new(0, PAGES).unwrap(), |_| all);
            prop_assert_eq!(seen(&states), seen(&model));
        }

        /// Bitmaps, runs and counters against a plain vector of states.
        #[test]
        fn states_match_a_plain_vector(
            initial in state(),
            changes in prop::collection::vec((0..PAGES, 1..PAGES, state()), 0..40),
            (from, length) in (0..PAGES, 1..PAGES),
        ) {
            let mut states = PageStates::new(PAGES, initial).unwrap();
            let mut model = vec![initial; PAGES as usize];
            for (start, length, to) in changes {
                let range = FilePages::new(start, (start + length).min(PAGES)).unwrap();
                let runs: Vec<_> = states.runs(range).collect();
                for (run, from) in runs {
                    states.set_run(run, from, to);
                }
                model[range.start() as usize..range.end() as usize].fill(to);
            }
            for (page, state) in (0..).zip(&model) {
                let page = FilePages::new(page, page + 1).unwrap();
                prop_assert!(state.host_may_use() || !states.closed().no_closed_page_near(page));
            }
            for state in PageState::ALL {
                let expected = model.iter().filter(|s| **s == state).count() as u64;
                prop_assert_eq!(states.count(state), expected);
            }
            let range = FilePages::new(from, (from + length).min(PAGES)).unwrap();
            let mut page = range.start();
            let mut before = None;
            for (run, state) in states.runs(range) {
                prop_assert_eq!(run.start(), page);
                prop_assert_ne!(before, Some(state), "runs are as long as they can be");
                prop_assert!(model[page as usize..run.end() as usize].iter().all(|s| *s == state));
                (page, before) = (run.end(), Some(state));
            }
            prop_assert_eq!(page, range.end());
        }
    }

    #[test]
    fn a_backend_too_large_for_memory_is_an_error() {
        assert!(PageStates::new(1 << 50, PageState::Undecided).is_none());
    }

    #[test]
    fn sizes_around_a_word_end_where_they_should() {
        for pages in [1, 63, 64, 65, 128, 129] {
            let states = PageStates::new(pages, PageState::Private).unwrap();
            let all = FilePages::new(0, pages).unwrap();
            assert!(states.runs(all).eq([(all, PageState::Private)]));
        }
    }
}
