// SPDX-License-Identifier: MIT OR Apache-2.0

//! Windows: where pages of backends appear in guest physical space. Pure functions over lists; no
//! system call, no lock.
//!
//! A backend may have several windows, and a page may appear in more than one (a low-memory alias,
//! the shared alias of a software-protected guest). At most one window of a page is *bound*: its
//! KVM slot carries the guest_memfd, so the private view can be seen through it. The others show
//! the shared view only.

use crate::pages::ranges::{BackendId, FilePages, GuestPages, SmallList};
use crate::pages::states::View;

/// Which views can appear in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Binding {
    /// Its KVM slot carries the guest_memfd: both views.
    Bound,
    /// The slot does not: the shared view alone.
    Unbound,
    /// The same, at a place where the hypervisor reports an access to a private page: the shared
    /// alias that a guest reaches by an address bit. Elsewhere such an access stops the VM if
    /// memory is converted in place.
    SharedAlias,
}

/// A range of a backend in guest physical space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Where the guest sees it.
    pub guest: GuestPages,
    /// Whose pages.
    pub backend: BackendId,
    /// Which pages; as many as in `guest`.
    pub file: FilePages,
    /// Which views can appear in it.
    pub binding: Binding,
}

impl Window {
    /// A window of `guest.count()` pages from `file_start` on; `None` if they end beyond what a
    /// file can have.
    pub fn new(
        guest: GuestPages,
        backend: BackendId,
        file_start: u64,
        binding: Binding,
    ) -> Option<Self> {
        let file = guest.translate(guest.start(), file_start)?;
        Some(Self {
            guest,
            backend,
            file,
            binding,
        })
    }

    /// Can the private view appear in it?
    pub fn is_bound(&self) -> bool {
        self.binding == Binding::Bound
    }

    /// The part of the window inside a range of guest physical space.
    fn clip(&self, guest: GuestPages) -> Option<Self> {
        let guest = self.guest.intersection(guest)?;
        let file = guest.translate(self.guest.start(), self.file.start())?;
        Some(Self {
            guest,
            file,
            ..*self
        })
    }

    /// The first pages of the window, at most `count`; `None` if that is 0.
    pub(crate) fn first(&self, count: u64) -> Option<Self> {
        self.clip(GuestPages::new(
            self.guest.start(),
            self.guest.start().saturating_add(count),
        )?)
    }

    /// Where pages that the window shows appear.
    pub(crate) fn guest_at(&self, file: FilePages) -> Option<GuestPages> {
        self.guest_of(self.backend, file)
    }

    /// Where these pages of the backend appear in this window.
    fn guest_of(&self, backend: BackendId, file: FilePages) -> Option<GuestPages> {
        // Most windows show other pages.
        if self.backend != backend || !self.file.overlaps(file) {
            return None;
        }
        let file = self.file.intersection(file)?;
        file.translate(self.file.start(), self.guest.start())
    }

    /// Would this window show the same pages at the same addresses, as far as the two overlap?
    fn same_mapping(&self, other: &Self) -> bool {
        self.backend == other.backend
            && self.guest.start().wrapping_sub(self.file.start())
                == other.guest.start().wrapping_sub(other.file.start())
    }
}

/// What a part of guest physical space shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Pages of a backend: the window, cut to the range that was asked for.
    Window(Window),
    /// Nothing of ours.
    Gap(GuestPages),
}

impl Part {
    /// The window, if it is one.
    pub fn window(&self) -> Option<&Window> {
        match self {
            Part::Window(window) => Some(window),
            Part::Gap(_) => None,
        }
    }

    /// The gap, if it is one.
    pub fn gap(&self) -> Option<GuestPages> {
        match self {
            Part::Window(_) => None,
            Part::Gap(guest) => Some(*guest),
        }
    }
}

/// A window where there is one already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("window at {wanted} overlaps the window at {present}")]
#[non_exhaustive]
pub struct Overlap {
    /// Where a window was to be.
    pub wanted: GuestPages,
    /// Where one is.
    pub present: GuestPages,
}

/// Which windows there are: another one after each change of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout(u64);

/// The windows of a VM, sorted by guest address.
///
/// Attributes outlive a removed window until [`WindowTable::forget_stale`]: QEMU removes and adds
/// the same windows again whenever the memory layout around them changes.
#[derive(Debug, Default)]
pub struct WindowTable {
    windows: Vec<Window>,
    layout: Layout,
    stale: Vec<Stale>,
}

/// A window that the guest no longer sees.
#[derive(Clone, Copy, Debug)]
struct Stale {
    window: Window,
    /// Do the attributes follow the pages? Not where setting them has failed.
    in_line: bool,
}

impl WindowTable {
    /// No window left?
    pub fn is_empty(&self) -> bool {
        self.windows.is_empty()
    }

    /// Which windows there are.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Does the guest see any page of this backend?
    pub fn shows(&self, backend: BackendId) -> bool {
        self.windows.iter().any(|w| w.backend == backend)
    }

    /// Can a window be put here?
    ///
    /// # Errors
    /// The window that is in the way.
    pub fn check_free(&self, guest: GuestPages) -> Result<(), Overlap> {
        match self.overlapping(guest).first() {
            None => Ok(()),
            Some(present) => Err(Overlap {
                wanted: guest,
                present: present.guest,
            }),
        }
    }

    /// Is one of these pages shown by a bound window?
    pub fn is_bound(&self, backend: BackendId, file: FilePages) -> bool {
        self.windows
            .iter()
            .any(|w| w.is_bound() && w.guest_of(backend, file).is_some())
    }

    /// Where some of these pages show in a window that is not bound, other than a shared alias.
    pub fn unbound_place(&self, backend: BackendId, file: FilePages) -> Option<GuestPages> {
        let unbound = self
            .windows
            .iter()
            .filter(|w| w.binding == Binding::Unbound);
        unbound.filter_map(|w| w.guest_of(backend, file)).next()
    }

    /// Adds a window.
    ///
    /// # Errors
    /// The window that is in the way.
    pub fn add(&mut self, window: Window) -> Result<(), Overlap> {
        self.check_free(window.guest)?;
        let at = self.windows.partition_point(|w| w.guest < window.guest);
        self.windows.insert(at, window);
        self.layout.0 += 1;
        Ok(())
    }

    /// Removes the window of exactly this range. Its attributes are stale from now on.
    pub fn remove(&mut self, guest: GuestPages) -> Option<Window> {
        let at = self
            .windows
            .binary_search_by_key(&guest, |w| w.guest)
            .ok()?;
        let window = self.windows.remove(at);
        self.layout.0 += 1;
        self.stale.push(Stale {
            window,
            in_line: true,
        });
        Some(window)
    }

    /// Takes back what [`WindowTable::add`] and [`WindowTable::take_stale_under`] did, after
    /// attributes could not be set.
    pub fn take_back(&mut self, window: Window, other: Vec<Window>) {
        self.windows.retain(|w| *w != window);
        self.layout.0 += 1;
        let windows = other.into_iter().chain([window]);
        self.stale.extend(windows.map(|window| Stale {
            window,
            in_line: false,
        }));
    }

    /// Does any window show a part of this range?
    pub fn owns(&self, guest: GuestPages) -> bool {
        !self.overlapping(guest).is_empty()
    }

    /// The window that shows this page.
    pub fn at(&self, page: GuestPages) -> Option<&Window> {
        self.overlapping(page).first()
    }

    /// Cuts a range of guest physical space along windows and gaps, in order.
    pub fn resolve(&self, guest: GuestPages) -> SmallList<Part> {
        let mut parts = SmallList::new();
        let mut next = guest.start();
        for window in self.overlapping(guest).iter().filter_map(|w| w.clip(guest)) {
            if let Some(gap) = GuestPages::new(next, window.guest.start()) {
                parts.push(Part::Gap(gap));
            }
            next = window.guest.end();
            parts.push(Part::Window(window));
        }
        if let Some(gap) = GuestPages::new(next, guest.end()) {
            parts.push(Part::Gap(gap));
        }
        parts
    }

    /// The part of a window that shows all of a range, if one does.
    pub fn showing(&self, guest: GuestPages) -> Option<Window> {
        let part = self.overlapping(guest).first()?.clip(guest)?;
        (part.guest == guest).then_some(part)
    }

    /// The bound window that shows all of a range, and the backend's page at its start.
    pub fn around(&self, guest: GuestPages) -> Option<(Window, u64)> {
        let window = self.overlapping(guest).first()?;
        let part = window.clip(guest)?;
        (window.is_bound() && part.guest == guest).then_some((*window, part.file.start()))
    }

    /// Every place in guest physical space whose attributes follow these pages, stale ones too. In
    /// the order in which they are set to `to`: those where that view appears come last. If one
    /// cannot be set, no vCPU has used that view yet, and nothing is lost when the others are set
    /// back.
    pub fn places(&self, backend: BackendId, file: FilePages, to: View) -> SmallList<GuestPages> {
        let stale = self.stale.iter().map(|stale| &stale.window);
        let all = self.windows.iter().chain(stale);
        let (mut places, mut others) = (SmallList::new(), 0);
        for (window, guest) in all.filter_map(|w| Some((w, w.guest_of(backend, file)?))) {
            let shows_it = window.is_bound() == (to == View::Private);
            match shows_it {
                true => places.push(guest),
                false => {
                    places.insert(others, guest);
                    others += 1;
                }
            }
        }
        places
    }

    /// What is stale in a range of guest physical space.
    pub fn stale_in(&self, guest: GuestPages) -> Vec<Window> {
        let stale = self.stale.iter();
        stale.filter_map(|s| s.window.clip(guest)).collect()
    }

    /// All that is stale.
    pub fn stale(&self) -> Vec<Window> {
        self.stale.iter().map(|stale| stale.window).collect()
    }

    /// Removes what is stale under a window that is about to be added. Returns the stale parts that
    /// showed other pages or are not in line, whose attributes are to be cleared, and the parts of
    /// the window whose attributes do not follow its pages yet.
    pub fn take_stale_under(&mut self, window: &Window) -> (Vec<Window>, Vec<Window>) {
        let mut other = Vec::new();
        let mut fresh = vec![*window];
        for stale in std::mem::take(&mut self.stale) {
            let rests = stale.window.guest.minus(window.guest).into_iter().flatten();
            self.stale.extend(rests.filter_map(|rest| {
                let window = stale.window.clip(rest)?;
                Some(Stale { window, ..stale })
            }));
            let Some(part) = stale.window.clip(window.guest) else {
                continue;
            };
            if !stale.in_line || !part.same_mapping(window) {
                other.push(part);
                continue;
            }
            fresh = fresh
                .iter()
                .flat_map(|w| w.guest.minus(part.guest).map(|g| w.clip(g?)))
                .flatten()
                .collect();
        }
        (other, fresh)
    }

    /// Forgets what is stale of a backend that keeps its attributes itself.
    pub fn forget_stale_of(&mut self, backend: BackendId) {
        self.stale.retain(|stale| stale.window.backend != backend);
    }

    /// Forgets what is stale: its attributes have been cleared, or are gone with their owner.
    pub fn forget_stale(&mut self) {
        self.stale.clear();
    }

    fn overlapping(&self, guest: GuestPages) -> &[Window] {
        let from = self
            .windows
            .partition_point(|w| w.guest.end() <= guest.start());
        // Few: to count them is less than to search once more.
        let rest = &self.windows[from..];
        let overlap = rest.iter().take_while(|w| w.guest.start() < guest.end());
        &rest[..overlap.count()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RAM: BackendId = BackendId(1);
    const DIMM: BackendId = BackendId(2);

    fn guest(start: u64, end: u64) -> GuestPages {
        GuestPages::new(start, end).unwrap()
    }

    fn file(start: u64, end: u64) -> FilePages {
        FilePages::new(start, end).unwrap()
    }

    fn window(start: u64, end: u64, backend: BackendId, file_start: u64) -> Window {
        Window::new(guest(start, end), backend, file_start, Binding::Bound).unwrap()
    }

    /// Two windows of one backend with a gap between, another backend behind, and an alias.
    fn table() -> WindowTable {
        let mut table = WindowTable::default();
        for w in [
            window(300, 340, DIMM, 0),
            window(0, 100, RAM, 0),
            window(200, 300, RAM, 100),
            Window {
                binding: Binding::Unbound,
                ..window(1000, 1100, RAM, 0)
            },
        ] {
            table.add(w).unwrap();
        }
        table
    }

    #[test]
    fn a_request_is_cut_along_windows_and_gaps() {
        let table = table();
        let parts = table.resolve(guest(90, 310)).to_vec();
        assert_eq!(
            parts,
            [
                Part::Window(window(90, 100, RAM, 90)),
                Part::Gap(guest(100, 200)),
                Part::Window(window(200, 300, RAM, 100)),
                Part::Window(window(300, 310, DIMM, 0)),
            ]
        );
        let gap = guest(100, 200);
        assert_eq!(table.resolve(gap).to_vec(), [Part::Gap(gap)]);
    }

    #[test]
    fn attributes_go_to_every_place_a_page_appears_at() {
        let table = table();
        let places = |to| table.places(RAM, file(95, 105), to).to_vec();
        let (bound, unbound) = ([guest(95, 100), guest(200, 205)], [guest(1095, 1100)]);
        assert_eq!(places(View::Private), [&unbound[..], &bound].concat());
        assert_eq!(places(View::Shared), [&bound[..], &unbound].concat());
        assert!(table.is_bound(RAM, file(0, 1)));
        assert!(!table.is_bound(DIMM, file(40, 41)));
    }

    #[test]
    fn overlapping_windows_are_refused() {
        let mut table = table();
        let error = table.add(window(99, 101, DIMM, 5)).unwrap_err();
        assert_eq!(error.present, guest(0, 100));
    }

    #[test]
    fn only_the_exact_window_is_removed() {
        let mut table = table();
        assert!(table.remove(guest(0, 99)).is_none());
        assert!(table.remove(guest(0, 100)).is_some());
        assert!(!table.owns(guest(0, 200)));
    }

    #[test]
    fn a_window_that_comes_back_unchanged_needs_no_attributes() {
        let mut table = table();
        table.remove(guest(0, 100));
        let back = window(0, 100, RAM, 0);
        assert_eq!(table.take_stale_under(&back), (vec![], vec![]));
        assert!(table.stale().is_empty());
    }

    #[test]
    fn a_window_that_comes_back_with_a_hole_leaves_the_hole_stale() {
        let mut table = table();
        table.remove(guest(0, 100));
        assert_eq!(
            table.take_stale_under(&window(0, 40, RAM, 0)),
            (vec![], vec![])
        );
        assert_eq!(
            table.take_stale_under(&window(50, 100, RAM, 50)),
            (vec![], vec![])
        );
        assert_eq!(table.stale(), [window(40, 50, RAM, 40)]);
    }

    #[test]
    fn a_window_that_was_taken_back_starts_from_clear_attributes() {
        let mut table = table();
        table.remove(guest(0, 100));
        let new = window(0, 100, DIMM, 0);
        let (other, _) = table.take_stale_under(&new);
        table.add(new).unwrap();
        table.take_back(new, other.clone());
        let (other_again, fresh) = table.take_stale_under(&new);
        assert_eq!(other_again, [other, vec![new]].concat());
        assert_eq!(fresh, [new]);
    }

    #[test]
    fn other_pages_at_an_old_place_need_their_own_attributes() {
        let mut table = table();
        table.remove(guest(0, 100));
        let new = window(90, 120, DIMM, 0);
        let (other, fresh) = table.take_stale_under(&new);
        assert_eq!(other, [window(90, 100, RAM, 90)]);
        assert_eq!(fresh, [new]);
    }

    proptest! {
        /// Lookup against a plain search of every window for every page, for windows that were
        /// offered in any order, some of them overlapping.
        #[test]
        fn resolve_matches_a_search_page_by_page(
            offered in prop::collection::vec((0u64..200, 1u64..40, 0u64..50), 0..12),
            (from, length) in (0u64..220, 1u64..60),
        ) {
            let mut table = WindowTable::default();
            let mut model: Vec<Window> = Vec::new();
            for (start, length, file_start) in offered {
                let w = window(start, start + length, RAM, file_start);
                let free = model.iter().all(|m| !m.guest.overlaps(w.guest));
                prop_assert_eq!(table.add(w).is_ok(), free);
                if free { model.push(w); }
            }
            let asked = guest(from, from + length);
            let mut next = asked.start();
            for part in table.resolve(asked) {
                let pages = match part { Part::Window(w) => w.guest, Part::Gap(g) => g };
                prop_assert_eq!(pages.start(), next);
                next = pages.end();
                for page in pages.start()..pages.end() {
                    let expected = model.iter().find(|m| m.guest.contains(page))
                        .map(|m| page - m.guest.start() + m.file.start());
                    let found = match part {
                        Part::Window(w) => Some(page - w.guest.start() + w.file.start()),
                        Part::Gap(_) => None,
                    };
                    prop_assert_eq!(found, expected);
                }
            }
            prop_assert_eq!(next, asked.end());
        }
    }
}
