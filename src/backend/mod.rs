// SPDX-License-Identifier: MIT OR Apache-2.0

//! A backend: a size, its files, the states of its pages, what is owed, and what it counts.

mod config;
pub(crate) mod create;
mod debts;
mod host;
pub mod map;
pub mod reach;
pub mod stats;

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::backend::create::Created;
use crate::backend::debts::Debts;
use crate::backend::host::HostMapping;
use crate::backend::reach::{Chunk, ChunkPredictor};
use crate::backend::stats::Counters;
use crate::error::{Error, Result};
use crate::exclusion::pins::Pins;
use crate::pages::closed::{Closed, Fragment};
use crate::pages::ranges::{FilePages, VmId};
use crate::pages::states::{PageState, PageStates, View};
use crate::views::{Mode, ViewFile, Views};

pub use crate::pages::ranges::BackendId;
pub use config::{BackendConfig, DEFAULT_CONVERT_TIMEOUT, Discard, Lazy, Prefault};

/// How many runs of states are looked at under one lock of them.
pub(crate) const RUNS_AT_ONCE: usize = 1024;

/// Guest memory with two views.
#[derive(Debug)]
pub struct Backend {
    id: BackendId,
    vm: VmId,
    config: BackendConfig,
    pages: FilePages,
    mode: Mode,
    states: Mutex<PageStates>,
    /// Of the states, for those who take no lock.
    closed: Closed,
    pins: Pins,
    views: Mutex<Arc<Views>>,
    host_mapping: HostMapping,
    debts: Debts,
    lazy: Option<Chunk>,
    /// With lazy attributes.
    predictor: Option<Mutex<ChunkPredictor>>,
    counters: Counters,
}

impl Backend {
    pub(crate) fn new(
        vm: VmId,
        id: BackendId,
        config: BackendConfig,
        created: Created,
    ) -> Result<Self> {
        let Created { views, lazy } = created;
        let pages = FilePages::from_bytes(0, config.size)?;
        let no_memory = || Error::NoMemory {
            backend: config.name.clone(),
            size: config.size,
        };
        let states = PageStates::new(pages.count(), config.start).ok_or_else(no_memory)?;
        let mode = views.mode();
        // What is always shared needs no pin.
        let pinnable = match mode.has_private_pages() {
            true => pages.count(),
            false => 0,
        };
        Ok(Self {
            id,
            vm,
            pages,
            mode,
            pins: Pins::new(pinnable).ok_or_else(no_memory)?,
            closed: states.closed(),
            states: Mutex::new(states),
            lazy,
            predictor: lazy.map(|chunk| Mutex::new(ChunkPredictor::new(chunk))),
            config,
            views: Mutex::new(Arc::new(views)),
            host_mapping: HostMapping::default(),
            debts: Debts::default(),
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

    /// The first chunk of lazy attributes; `None` if there are none.
    pub fn lazy_chunk(&self) -> Option<Chunk> {
        self.lazy
    }

    /// Can KVM slots carry its guest_memfd?
    pub fn is_bindable(&self) -> bool {
        self.mode.has_private_pages() || self.config.bind
    }

    /// What it has done so far.
    #[inline]
    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Is the view that a page leaves freed in the conversion? In place nothing is left behind.
    pub(crate) fn frees_left_view(&self) -> bool {
        self.mode == Mode::Private && self.config.discard == Discard::Now
    }

    /// Its files. Another owner's VM gets new ones.
    pub fn views(&self) -> Arc<Views> {
        self.views.lock().clone()
    }

    pub(crate) fn replace_views(&self, views: Views) {
        *self.views.lock() = Arc::new(views);
        self.host_mapping.forget();
    }

    /// Checks that it belongs to a VM.
    #[inline]
    pub(crate) fn check_vm(&self, vm: VmId) -> Result<()> {
        match self.vm == vm {
            true => Ok(()),
            false => Err(self.of_other_vm()),
        }
    }

    #[cold]
    fn of_other_vm(&self) -> Error {
        Error::OtherVm {
            backend: self.config.name.clone(),
        }
    }

    /// Checks that a range of bytes is a range of whole pages of the backend.
    ///
    /// # Errors
    /// [`Error::Range`] if it is none, [`Error::OutsideBackend`] if it ends beyond the backend.
    pub fn pages_at(&self, offset: u64, bytes: u64) -> Result<FilePages> {
        let pages = FilePages::from_bytes(offset, bytes)?;
        if self.pages.covers(pages) {
            Ok(pages)
        } else {
            Err(self.outside(offset, bytes))
        }
    }

    /// The pages that a range of bytes touches; no alignment needed.
    ///
    /// # Errors
    /// [`Error::OutsideBackend`] if it is empty or ends beyond the backend.
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
}

/// States.
impl Backend {
    /// Looks at the states, or changes them. No conversion of any page goes on meanwhile.
    pub(crate) fn with_states<T>(&self, act: impl FnOnce(&mut PageStates) -> T) -> T {
        act(&mut self.states.lock())
    }

    /// The state of one page.
    ///
    /// # Panics
    /// If there is no such page.
    pub fn state(&self, page: u64) -> PageState {
        self.states.lock().get(page)
    }

    /// The first run of states of some pages.
    pub(crate) fn first_run(&self, pages: FilePages) -> (FilePages, PageState) {
        self.states.lock().first_run(pages)
    }

    /// Are all of these pages in this view, as far as anybody can tell?
    pub(crate) fn is_surely_in(&self, pages: FilePages, view: View) -> bool {
        let in_view = (pages, view.into());
        self.first_run(pages) == in_view && self.debts.first_doubtful(pages).is_none()
    }

    /// The first of some pages that the host may not use, as the state says. A private page comes
    /// before one that is in transition.
    pub(crate) fn first_closed(&self, pages: FilePages) -> Option<(FilePages, PageState)> {
        let mut found = None;
        for fragment in Fragment::of(pages) {
            if self.closed.no_closed_page_near(fragment.pages) {
                continue;
            }
            let states = self.states.lock();
            for (run, state) in states.runs(fragment.pages) {
                match state {
                    PageState::Private => return Some((run, state)),
                    PageState::Transition => found = found.or(Some((run, state))),
                    PageState::Undecided | PageState::Shared => {}
                }
            }
        }
        found
    }

    /// The range from the first to the last private page of some pages.
    pub(crate) fn private_span(&self, pages: FilePages) -> Option<FilePages> {
        let states = self.states.lock();
        if states.count(PageState::Private) == 0 {
            return None;
        }
        states.span(pages, PageState::Private)
    }

    /// The undecided pages around one of them, as far as a touch of it reaches inside a range. None
    /// without lazy attributes, or if the page is decided.
    pub(crate) fn undecided_around(&self, page: u64, within: FilePages) -> Option<FilePages> {
        let predictor = self.predictor.as_ref()?;
        let states = self.states.lock();
        if states.get(page) != PageState::Undecided {
            return None;
        }
        let chunk = predictor.lock().chunk(page, within);
        let mut runs = states.runs(chunk);
        runs.find_map(|(run, _)| run.contains(page).then_some(run))
    }
}

/// Pins.
impl Backend {
    /// Which pages the host has pinned.
    #[inline]
    pub(crate) fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Pins bytes if they lie in one page near which all are open. If not, nothing is pinned.
    #[inline]
    pub(crate) fn pin_one(&self, offset: u64, bytes: u64) -> bool {
        self.pins.add_one(&self.closed, offset, bytes)
    }

    /// Takes back what `pin_one` has granted.
    #[inline]
    pub(crate) fn unpin_one(&self, offset: u64, bytes: u64) -> bool {
        self.pins.remove_one(offset, bytes)
    }

    /// Pins pages. True if no page near them is private or in transition: the pin holds.
    #[inline]
    pub(crate) fn add_pin(&self, pages: FilePages) -> bool {
        if !self.mode.has_private_pages() {
            return true;
        }
        self.pins.add(pages);
        self.closed.no_closed_page_near(pages)
    }

    /// Takes a pin that was added back unless the host may use all of its pages; says then which
    /// state is in the way.
    pub(crate) fn check_pin(&self, pages: FilePages) -> std::result::Result<(), PageState> {
        let Some((_, state)) = self.first_closed(pages) else {
            return Ok(());
        };
        self.pins.remove(pages);
        Err(state)
    }

    /// Takes back what [`Vm::pin`](crate::Vm::pin) has granted for the same pages.
    ///
    /// # Errors
    /// [`Error::NotPinned`] if a page is not pinned; then nothing is done.
    ///
    /// # Panics
    /// If the range does not lie inside the backend.
    pub fn unpin(&self, pages: FilePages) -> Result<()> {
        if !self.mode.has_private_pages() || self.pins.remove(pages) {
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
}

/// Files, and what they owe.
impl Backend {
    /// Frees pages of a view.
    pub(crate) fn punch(&self, pages: FilePages, view: View) -> Result<()> {
        let punched = self.views().file(view).punch_hole(pages);
        punched.map_err(|source| Error::Punch {
            backend: self.config.name.clone(),
            pages,
            view,
            source,
        })?;
        self.debts.hole_punched(pages, view);
        Ok(())
    }

    /// A hole that could not be punched now is punched before the view is exposed again.
    pub(crate) fn owe_hole(&self, pages: FilePages, view: View) {
        self.debts.owe_hole(pages, view);
    }

    /// Punches what is owed, so that the view can be exposed. The caller has claimed the pages.
    pub(crate) fn punch_owed(&self, pages: FilePages, view: View) -> Result<()> {
        while let Some(hole) = self.debts.first_hole(pages, view) {
            self.punch(hole, view)?;
        }
        Ok(())
    }

    /// The first of some pages whose hole is still to be punched.
    pub(crate) fn first_owed_hole(&self, pages: FilePages, view: View) -> Option<FilePages> {
        self.debts.first_hole(pages, view)
    }

    /// The attributes of these pages may not follow their states from now on.
    pub(crate) fn doubt_attributes(&self, pages: FilePages) {
        self.debts.doubt_attributes(pages);
    }

    /// They do.
    pub(crate) fn attributes_are_right(&self, pages: FilePages) {
        self.debts.attributes_are_right(pages);
    }

    /// The first of some pages whose attributes may not follow their states.
    pub(crate) fn first_doubtful(&self, pages: FilePages) -> Option<FilePages> {
        self.debts.first_doubtful(pages)
    }

    /// Nothing is owed any more: files and owner are new.
    pub(crate) fn forget_debts(&self) {
        self.debts.forget();
    }

    /// Those of some pages that have data in a view.
    pub(crate) fn data_within(&self, pages: FilePages, view: View) -> Result<Vec<FilePages>> {
        let views = self.views();
        let mut found = Vec::new();
        let mut rest = Some(pages);
        while let Some(pages) = rest {
            let Some(data) = self.first_data(views.file(view), pages, view)? else {
                break;
            };
            found.push(data);
            rest = FilePages::new(data.end(), pages.end());
        }
        Ok(found)
    }

    /// The first of some pages that have data in a view.
    fn first_data(
        &self,
        file: &dyn ViewFile,
        pages: FilePages,
        view: View,
    ) -> Result<Option<FilePages>> {
        file.first_data(pages).map_err(|source| Error::FindData {
            backend: self.config.name.clone(),
            pages,
            view,
            source,
        })
    }

    /// Copies what the shared view has in some pages to another one.
    pub(crate) fn copy_shared(&self, pages: FilePages, to: &Views) -> Result<()> {
        /// 1 MiB.
        const AT_ONCE: u64 = 256;
        let mut bytes = Vec::new();
        // One run at a time: the guest decides how many there are.
        let (views, mut rest) = (self.views(), Some(pages));
        while let Some(pages) = rest {
            let Some(data) = self.first_data(views.file(View::Shared), pages, View::Shared)? else {
                break;
            };
            rest = FilePages::new(data.end(), pages.end());
            for piece in data.pieces(AT_ONCE) {
                let offset = piece.start_bytes();
                bytes.resize(piece.bytes() as usize, 0);
                self.read_shared(offset, &mut bytes)?;
                let written = to.file(View::Shared).write_at(offset, &bytes);
                written.map_err(|why| self.transfer_error("write", offset, bytes.len(), why))?;
            }
        }
        Ok(())
    }

    /// Reads bytes of the shared view.
    pub(crate) fn read_shared(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let read = self.views().file(View::Shared).read_at(offset, bytes);
        read.map_err(|source| self.transfer_error("read", offset, bytes.len(), source))
    }

    /// Writes bytes of the shared view.
    pub(crate) fn write_shared(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let written = self.views().file(View::Shared).write_at(offset, bytes);
        written.map_err(|source| self.transfer_error("write", offset, bytes.len(), source))
    }

    #[cold]
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
}
