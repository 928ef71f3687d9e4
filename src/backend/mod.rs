// SPDX-License-Identifier: GPL-2.0-or-later

//! A backend: a size, its files, the states of its pages, and what it counts.

mod config;
pub mod map;
pub mod reach;
pub mod stats;

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::backend::reach::Reach;
use crate::backend::stats::Counters;
use crate::error::{Error, Result};
use crate::exclusion::pins::Pins;
use crate::pages::closed::Closed;
use crate::pages::ranges::{FilePages, FileSpace};
use crate::pages::set::PageSet;
use crate::pages::states::{PageState, PageStates, View};
use crate::views::{Backing, Mode, ViewFile};

pub use crate::pages::ranges::BackendId;
pub use config::{BackendConfig, DEFAULT_CONVERT_TIMEOUT, Discard, Prefault};

/// Guest memory with two views.
#[derive(Debug)]
pub struct Backend {
    id: BackendId,
    config: BackendConfig,
    pages: FilePages,
    pub(crate) states: Mutex<PageStates>,
    /// Of the states, for those who take no lock.
    closed: Closed,
    pub(crate) pins: Pins,
    mode: Mode,
    backing: Mutex<Arc<Backing>>,
    /// Pages that are still allocated in a view that they have left.
    unpunched: Mutex<Unpunched>,
    /// Pages whose attributes may not follow their state: setting them back has failed.
    unsure: Mutex<PageSet<FileSpace>>,
    /// With lazy attributes.
    reach: Option<Mutex<Reach>>,
    pub(crate) counters: Counters,
}

#[derive(Debug, Default)]
struct Unpunched {
    shared: PageSet<FileSpace>,
    private: PageSet<FileSpace>,
}

impl Unpunched {
    fn bytes(&self) -> u64 {
        self.shared.bytes() + self.private.bytes()
    }

    fn of(&mut self, view: View) -> &mut PageSet<FileSpace> {
        match view {
            View::Shared => &mut self.shared,
            View::Private => &mut self.private,
        }
    }
}

/// What became of a hole that was to be queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Queued {
    /// It is the only one.
    First,
    /// There were some.
    More,
    /// There were some, and now it is high time.
    Much,
    /// It was not queued: there are too many.
    Full,
}

/// Bytes of holes that may wait in a backend of this size: little beside what it holds, and enough
/// for holes to find neighbours.
fn backlog_limit(size: u64) -> u64 {
    (size / 128).clamp(2 << 20, 64 << 20)
}

impl Backend {
    pub(crate) fn new(id: BackendId, config: BackendConfig, backing: Backing) -> Result<Self> {
        let pages = FilePages::from_bytes(0, config.size)?;
        let no_memory = || Error::NoMemory {
            backend: config.name.clone(),
            size: config.size,
        };
        let states = PageStates::new(pages.count(), config.start).ok_or_else(no_memory)?;
        // Nothing that is always shared needs a pin.
        let pinnable = match backing.mode() {
            Mode::Private => pages.count(),
            Mode::Mapped => 0,
        };
        Ok(Self {
            id,
            pages,
            pins: Pins::new(pinnable).ok_or_else(no_memory)?,
            closed: states.closed(),
            states: Mutex::new(states),
            mode: backing.mode(),
            reach: config.lazy.map(|chunk| Mutex::new(Reach::new(chunk))),
            config,
            backing: Mutex::new(Arc::new(backing)),
            unpunched: Mutex::default(),
            unsure: Mutex::default(),
            counters: Counters::default(),
        })
    }

    /// Which backend of its VM.
    pub fn id(&self) -> BackendId {
        self.id
    }

    /// What it was to be.
    pub fn config(&self) -> &BackendConfig {
        &self.config
    }

    /// All its pages.
    pub fn pages(&self) -> FilePages {
        self.pages
    }

    /// How it keeps its pages.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Can KVM slots carry its guest_memfd?
    pub fn is_bindable(&self) -> bool {
        self.mode() == Mode::Private || self.config.bind
    }

    /// Its files.
    pub fn backing(&self) -> Arc<Backing> {
        self.backing.lock().clone()
    }

    /// Checks that a range of bytes is a range of whole pages of the backend.
    pub fn pages_at(&self, offset: u64, bytes: u64) -> Result<FilePages> {
        let pages = FilePages::from_bytes(offset, bytes)?;
        if self.pages.covers(pages) {
            Ok(pages)
        } else {
            Err(self.outside(offset, bytes))
        }
    }

    /// The pages that a range of bytes touches; no alignment needed.
    pub fn pages_covering(&self, offset: u64, bytes: u64) -> Result<FilePages> {
        FilePages::covering_bytes(offset, bytes)
            .filter(|pages| self.pages.covers(*pages))
            .ok_or_else(|| self.outside(offset, bytes))
    }

    #[cold]
    pub(crate) fn outside(&self, offset: u64, bytes: u64) -> Error {
        Error::OutsideBackend {
            backend: self.config.name.clone(),
            offset,
            bytes,
            size: self.config.size,
        }
    }

    /// The runs of states that make up a range of the backend.
    ///
    /// # Panics
    /// If the range does not lie inside the backend.
    pub fn state_runs(&self, pages: FilePages) -> Vec<(FilePages, PageState)> {
        self.states.lock().runs(pages).collect()
    }

    /// Are all of these pages in this view, as far as anybody can tell?
    pub(crate) fn all_surely_in(&self, pages: FilePages, view: View) -> bool {
        self.all_in(pages, |state| state == view.into())
            && self.unsure.lock().first_in(pages).is_none()
    }

    /// Pages whose attributes may not follow their state.
    pub(crate) fn unsure_within(&self, pages: FilePages) -> Vec<FilePages> {
        self.unsure.lock().within(pages)
    }

    /// Do the attributes of these pages follow their state?
    pub(crate) fn set_sure(&self, pages: FilePages, sure: bool) {
        let mut unsure = self.unsure.lock();
        match sure {
            true => unsure.remove(pages),
            false => unsure.insert(pages),
        }
    }

    /// Are all of these pages in one of the accepted states? Stops at the first that is not.
    pub(crate) fn all_in(&self, pages: FilePages, accepted: impl Fn(PageState) -> bool) -> bool {
        self.states
            .lock()
            .runs(pages)
            .all(|(_, state)| accepted(state))
    }

    /// Pins bytes if they lie in one page near which all are open. If not, nothing is pinned.
    #[inline]
    pub(crate) fn pin_one(&self, offset: u64, bytes: u64) -> bool {
        self.pins.add_one(&self.closed, offset, bytes)
    }

    /// Pins pages. True if no page near them is private or in transition: the pin holds.
    pub(crate) fn add_pin(&self, pages: FilePages) -> bool {
        self.pins.add(pages);
        self.closed.none_near(pages)
    }

    /// Takes a pin that was added back unless the host may use all of its pages; says then which state is
    /// in the way.
    pub(crate) fn check_pin(&self, pages: FilePages) -> std::result::Result<(), PageState> {
        let states = self.states.lock();
        let closed = states.runs(pages).map(|(_, state)| state);
        let Some(state) = closed
            .filter(|state| !state.host_may_use())
            .min_by_key(|s| *s as usize)
        else {
            return Ok(());
        };
        drop(states);
        self.pins.remove(pages);
        Err(state)
    }

    /// Takes back what [`Vm::pin`](crate::Vm::pin) has granted for the same pages.
    ///
    /// # Panics
    /// If the range does not lie inside the backend.
    pub fn unpin(&self, pages: FilePages) -> Result<()> {
        if self.mode == Mode::Mapped || self.pins.remove(pages) {
            return Ok(());
        }
        Err(self.not_pinned(pages))
    }

    #[cold]
    fn not_pinned(&self, pages: FilePages) -> Error {
        Error::NotPinned {
            backend: self.config.name.clone(),
            pages,
        }
    }

    /// Frees pages of a view.
    pub(crate) fn punch(&self, pages: FilePages, view: View) -> Result<()> {
        let backing = self.backing();
        backing
            .file(view)
            .punch_hole(pages)
            .map_err(|source| Error::Punch {
                backend: self.config.name.clone(),
                pages,
                view,
                source,
            })?;
        self.unpunched.lock().of(view).remove(pages);
        Ok(())
    }

    pub(crate) fn remember_unpunched(&self, pages: FilePages, view: View) {
        self.unpunched.lock().of(view).insert(pages);
    }

    /// Takes a hole for the worker, if there is room.
    pub(crate) fn queue(&self, pages: FilePages, view: View) -> Queued {
        let limit = backlog_limit(self.config.size);
        let mut unpunched = self.unpunched.lock();
        let before = unpunched.bytes();
        let after = before + pages.bytes();
        if after > limit {
            return Queued::Full;
        }
        unpunched.of(view).insert(pages);
        match (before == 0, before < limit / 2 && after >= limit / 2) {
            (_, true) => Queued::Much,
            (true, _) => Queued::First,
            _ => Queued::More,
        }
    }

    /// Bytes whose hole is still to be punched.
    pub(crate) fn unpunched_bytes(&self) -> u64 {
        self.unpunched.lock().bytes()
    }

    /// The first of some pages whose hole is still to be punched.
    pub(crate) fn first_unpunched(&self, pages: FilePages, view: View) -> Option<FilePages> {
        self.unpunched.lock().of(view).first_in(pages)
    }

    /// Punches what is left to punch, so that the view can be exposed. The caller has claimed the
    /// pages.
    pub(crate) fn prepare(&self, pages: FilePages, view: View) -> Result<()> {
        while let Some(hole) = self.first_unpunched(pages, view) {
            self.punch(hole, view)?;
        }
        Ok(())
    }

    /// Those of some pages that have data in a view.
    pub(crate) fn data_within(&self, pages: FilePages, view: View) -> Result<Vec<FilePages>> {
        let backing = self.backing();
        let mut found = Vec::new();
        let mut rest = Some(pages);
        while let Some(pages) = rest {
            let data = backing.file(view).first_data(pages);
            let data = data.map_err(|source| Error::FindData {
                backend: self.config.name.clone(),
                pages,
                view,
                source,
            })?;
            let Some(data) = data else { break };
            found.push(data);
            rest = FilePages::new(data.end(), pages.end());
        }
        Ok(found)
    }

    /// Reads bytes of the shared view.
    pub(crate) fn read_shared(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let read = self.backing().file(View::Shared).read_at(offset, bytes);
        read.map_err(|source| self.transfer_error("read", offset, bytes.len(), source))
    }

    /// Writes bytes of the shared view.
    pub(crate) fn write_shared(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let written = self.backing().file(View::Shared).write_at(offset, bytes);
        written.map_err(|source| self.transfer_error("write", offset, bytes.len(), source))
    }

    fn transfer_error(
        &self,
        what: &'static str,
        offset: u64,
        bytes: usize,
        source: io::Error,
    ) -> Error {
        Error::Transfer {
            what,
            backend: self.config.name.clone(),
            offset,
            bytes,
            source,
        }
    }

    /// The undecided pages around one of them, as far as a touch of it reaches inside a range. None
    /// without lazy attributes, or if the page is decided.
    pub(crate) fn undecided_around(&self, page: u64, within: FilePages) -> Option<FilePages> {
        let reach = self.reach.as_ref()?;
        let states = self.states.lock();
        if states.get(page) != PageState::Undecided {
            return None;
        }
        let chunk = reach.lock().chunk(page, within);
        let mut runs = states.runs(chunk);
        runs.find_map(|(run, _)| run.contains(page).then_some(run))
    }

    /// Starts over with another private file; all pages are in the state that they started in. The
    /// caller has emptied the shared view of those that were not shared, or shall not stay so. A
    /// mapped backend has nothing to start over.
    pub(crate) fn restart(&self, private: Arc<dyn ViewFile>) {
        let mut backing = self.backing.lock();
        let Backing::TwoFiles { shared, .. } = &**backing else {
            return;
        };
        *backing = Arc::new(Backing::TwoFiles {
            private,
            shared: shared.clone(),
        });
        drop(backing);
        let mut states = self.states.lock();
        let runs: Vec<_> = states.runs(self.pages).collect();
        for (run, state) in runs {
            states.set_run(run, state, self.config.start);
        }
        drop(states);
        *self.unpunched.lock() = Unpunched::default();
        *self.unsure.lock() = PageSet::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_backlog_of_holes_is_bounded() {
        for (size, limit) in [(4096, 2 << 20), (1 << 30, 8 << 20), (1 << 50, 64 << 20)] {
            assert_eq!(backlog_limit(size), limit);
        }
    }
}
