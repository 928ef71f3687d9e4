// SPDX-License-Identifier: MIT OR Apache-2.0

//! A VM without a hypervisor, and what must hold in it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use guestmemfd::owner::SoftwareOwner;
use guestmemfd::views::KernelFile;
use guestmemfd::*;
use rustix::fs::SeekFrom;

use crate::fault::{Fault, FaultyFile, FaultyOwner};
use crate::mapper::{Mapper, MapperHandle};

pub(crate) const PAGES: u64 = 24;
/// The guest sees pages 0..16 here, 16..24 after a gap, and 0..8 a second time, unbound.
pub(crate) const LOW: u64 = 0;
pub(crate) const HIGH: u64 = 20;
pub(crate) const ALIAS: u64 = 100;

pub(crate) struct Machine {
    pub(crate) vm: Vm,
    pub(crate) backend: Arc<Backend>,
    pub(crate) owner: Arc<SoftwareOwner>,
    pub(crate) mapper: Arc<Mapper>,
    pub(crate) fault: Arc<Fault>,
}

pub(crate) fn guest(start: u64, end: u64) -> GuestPages {
    GuestPages::new(start, end).unwrap()
}

pub(crate) fn file(start: u64, end: u64) -> FilePages {
    FilePages::new(start, end).unwrap()
}

impl Machine {
    pub(crate) fn new() -> Self {
        Self::with(Discard::Now, PageState::Undecided)
    }

    pub(crate) fn with(discard: Discard, start: PageState) -> Self {
        Self::build(discard, start, None)
    }

    /// Lazy attributes in chunks of eight pages, and no listener, with which there are no chunks.
    pub(crate) fn lazy(discard: Discard) -> Self {
        let machine = Self::lazy_with_listener(discard);
        machine.mapper.absent.store(true, Ordering::SeqCst);
        machine
    }

    pub(crate) fn lazy_with_listener(discard: Discard) -> Self {
        let chunk = backend::reach::Chunk::from_bytes(8 * PAGE_SIZE);
        Self::build(discard, PageState::Undecided, chunk)
    }

    pub(crate) fn build(
        discard: Discard,
        start: PageState,
        lazy: Option<backend::reach::Chunk>,
    ) -> Self {
        let mut config = BackendConfig::new("ram", PAGES * PAGE_SIZE);
        config.discard = discard;
        config.start = start;
        config.lazy = lazy.map_or(Lazy::Off, Lazy::On);
        config.prefault = Prefault::Small;
        Self::over(SoftwareOwner::default(), config, |vm, config, fault| {
            let shared = Arc::new(KernelFile::memfd("shared", config.size).unwrap());
            let shared = Arc::new(FaultyFile(shared, fault.clone()));
            vm.create_backend_over(config, shared).unwrap()
        })
    }

    /// In place; the second window of the first pages is a shared alias.
    pub(crate) fn in_place() -> Self {
        Self::in_place_waiting(backend::DEFAULT_CONVERT_TIMEOUT)
    }

    pub(crate) fn in_place_waiting(convert_timeout: Duration) -> Self {
        let mut config = BackendConfig::new("ram", PAGES * PAGE_SIZE);
        config.convert_timeout = convert_timeout;
        Self::over(SoftwareOwner::in_place(), config, |vm, config, _| {
            vm.create_backend(config).unwrap()
        })
    }

    fn over(
        owner: SoftwareOwner,
        config: BackendConfig,
        create: impl FnOnce(&Vm, BackendConfig, &Arc<Fault>) -> Arc<Backend>,
    ) -> Self {
        let fault = Arc::new(Fault::default());
        let owner = Arc::new(owner);
        let mapper = Arc::new(Mapper {
            mapped: parking_lot::Mutex::new(vec![config.start.host_may_use(); PAGES as usize]),
            fault: fault.clone(),
            ..Mapper::default()
        });
        let vm = Vm::new(
            Arc::new(FaultyOwner(owner.clone(), fault.clone())),
            Box::new(MapperHandle(mapper.clone())),
        );
        let backend = create(&vm, config, &fault);
        // Bound is more than a second window can get.
        let (wanted, alias) = match backend.mode() {
            Mode::InPlace => (Binding::SharedAlias, Binding::SharedAlias),
            _ => (Binding::Bound, Binding::Unbound),
        };
        for (window, offset, wanted, binding) in [
            (guest(LOW, LOW + 16), 0, Binding::Bound, Binding::Bound),
            (
                guest(HIGH, HIGH + 8),
                16 * PAGE_SIZE,
                Binding::Bound,
                Binding::Bound,
            ),
            (guest(ALIAS, ALIAS + 8), 0, wanted, alias),
        ] {
            let added = vm.add_window(&backend, window, offset, wanted);
            assert_eq!(added.unwrap(), binding);
        }
        Self {
            vm,
            backend,
            owner,
            mapper,
            fault,
        }
    }

    pub(crate) fn write(&self, view: View, page: u64, byte: u8) {
        let data = [byte; PAGE_SIZE as usize];
        let views = self.backend.views();
        rustix::io::pwrite(views.file(view).fd(), &data, page * PAGE_SIZE).unwrap();
    }

    pub(crate) fn read(&self, view: View, page: u64) -> u8 {
        let mut data = [0xff; PAGE_SIZE as usize];
        let views = self.backend.views();
        rustix::io::pread(views.file(view).fd(), &mut data, page * PAGE_SIZE).unwrap();
        assert!(data.iter().all(|byte| *byte == data[0]));
        data[0]
    }

    pub(crate) fn is_hole(&self, view: View, page: u64) -> bool {
        let views = self.backend.views();
        let data = rustix::fs::seek(views.file(view).fd(), SeekFrom::Data(page * PAGE_SIZE));
        data.map_or(true, |at| at / PAGE_SIZE != page)
    }

    pub(crate) fn states(&self) -> Vec<PageState> {
        let mut states = Vec::new();
        for (run, state) in self
            .backend
            .state_map(self.backend.pages(), usize::MAX)
            .runs
        {
            states.extend((run.start()..run.end()).map(|_| state));
        }
        states
    }

    /// Another vCPU stores a byte all over a page of the backend when the next attribute is set. Says
    /// whether it could: where attribute and intent differ, there is an exit instead.
    pub(crate) fn another_vcpu_stores(&self, page: u64, view: View, byte: u8) -> Arc<AtomicBool> {
        let stored = Arc::new(AtomicBool::new(false));
        let (owner, views, done) = (self.owner.clone(), self.backend.views(), stored.clone());
        self.fault.at_attribute(view, move || {
            if owner.view(bound(page)) == view {
                let data = [byte; PAGE_SIZE as usize];
                rustix::io::pwrite(views.file(view).fd(), &data, page * PAGE_SIZE).unwrap();
                done.store(true, Ordering::SeqCst);
            }
        });
        stored
    }

    /// Where hosts use the pages all the time: on a busy machine one of them may be kept from letting go
    /// for longer than a conversion waits.
    pub(crate) fn convert_in_the_end(&self, guest: GuestPages, to: View) {
        while let Err(error) = self.vm.convert(guest, to) {
            assert!(matches!(error, Error::Pinned { .. }), "{error}");
        }
    }

    /// What must hold between requests, whatever has failed.
    pub(crate) fn check_invariants(&self) {
        let mut owed = 0;
        let states = self.states();
        for (page, state) in (0..).zip(&states) {
            assert_ne!(*state, PageState::Transition);
            let view = match state {
                PageState::Private => View::Private,
                _ => View::Shared,
            };
            assert_eq!(
                self.owner.view(bound(page)),
                view,
                "attribute of page {page}"
            );
            if page < 8 {
                assert_eq!(self.owner.view(ALIAS + page), view, "alias of page {page}");
            }
            assert!(
                self.mapper.absent.load(Ordering::SeqCst)
                    || self.mapper.mapped.lock()[page as usize] == state.host_may_use(),
                "mapping of page {page}"
            );
            if !self.is_hole(view.other(), page) {
                owed += 1;
            }
        }
        let stats = self.backend.stats();
        // More may be on record: a page that was a hole anyway.
        assert!(stats.owed_holes >= owed * PAGE_SIZE);
        for (state, bytes) in PageState::ALL.iter().zip(stats.state_bytes) {
            let count = states.iter().filter(|s| *s == state).count() as u64;
            assert_eq!(bytes, count * PAGE_SIZE);
        }
    }

    /// A listener that could not map pages again is not told to let go either.
    pub(crate) fn forgive_listener(&self) {
        let mut mapped = self.mapper.mapped.lock();
        for (mapped, state) in mapped.iter_mut().zip(self.states()) {
            *mapped = state.host_may_use();
        }
    }

    /// The view that is exposed, per page, filled with a pattern of its own.
    pub(crate) fn fill(&self) -> Vec<u8> {
        (0..)
            .zip(self.states())
            .map(|(page, state)| {
                let (view, byte) = match state {
                    PageState::Private => (View::Private, 0x80 | page as u8),
                    _ => (View::Shared, 1 + page as u8),
                };
                self.write(view, page, byte);
                byte
            })
            .collect()
    }

    pub(crate) fn exposed(&self) -> Vec<u8> {
        (0..)
            .zip(self.states())
            .map(|(page, state)| match state {
                PageState::Private => self.read(View::Private, page),
                _ => self.read(View::Shared, page),
            })
            .collect()
    }
}

/// The page of the backend at a guest page, and whether the window there is bound.
pub(crate) fn at(page: u64) -> Option<(u64, bool)> {
    match page {
        0..16 => Some((page, true)),
        HIGH..28 => Some((page - HIGH + 16, true)),
        ALIAS..108 => Some((page - ALIAS, false)),
        _ => None,
    }
}

/// Where the guest sees a page of the backend through a bound window.
pub(crate) fn bound(page: u64) -> u64 {
    match page {
        0..16 => LOW + page,
        page => HIGH + page - 16,
    }
}

pub(crate) fn touch(machine: &Machine, page: u64) {
    machine
        .vm
        .memory_fault(page * PAGE_SIZE, PAGE_SIZE, View::Private)
        .unwrap();
}
