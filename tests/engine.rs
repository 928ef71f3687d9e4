// SPDX-License-Identifier: GPL-2.0-or-later

//! Conversions and discards against a plain model, with every system call and callback failing in
//! turn, alone or with all that follow. The files are real memfds; only the hypervisor is the software owner.

#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use guestmemfd::backing::KernelFile;
use guestmemfd::listener::Level;
use guestmemfd::owner::SoftwareOwner;
use guestmemfd::*;
use proptest::prelude::*;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

const PAGES: u64 = 24;
/// The guest sees pages 0..16 here, 16..24 after a gap, and 0..8 a second time, unbound.
const LOW: u64 = 0;
const HIGH: u64 = 20;
const ALIAS: u64 = 100;

/// Lets calls fail.
#[derive(Debug, Default)]
struct Fault {
    /// The n-th call from now fails; 0: none does.
    nth: AtomicU64,
    /// All after it fail too.
    lasting: AtomicBool,
    slow: AtomicBool,
}

impl Fault {
    fn arm(&self, nth: u64) {
        self.nth.store(nth, Ordering::SeqCst);
        self.lasting.store(false, Ordering::SeqCst);
    }

    fn arm_lasting(&self, nth: u64) {
        self.arm(nth);
        self.lasting.store(true, Ordering::SeqCst);
    }

    /// Calls until the next failure; 0 once it has happened.
    fn left(&self) -> u64 {
        self.nth.load(Ordering::SeqCst)
    }

    /// Every call takes long enough for other threads to get in between.
    fn slow_down(&self) {
        self.slow.store(true, Ordering::SeqCst);
    }

    fn call(&self) -> io::Result<()> {
        if self.slow.load(Ordering::SeqCst) {
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
        match self.left() {
            0 => Ok(()),
            1 => {
                if !self.lasting.load(Ordering::SeqCst) {
                    self.nth.store(0, Ordering::SeqCst);
                }
                Err(Errno::NOMEM.into())
            }
            left => {
                self.nth.store(left - 1, Ordering::SeqCst);
                Ok(())
            }
        }
    }
}

#[derive(Debug)]
struct FaultyOwner(Arc<SoftwareOwner>, Arc<Fault>);

impl Owner for FaultyOwner {
    fn check_private_memory(&self) -> Result<()> {
        self.0.check_private_memory()
    }

    fn create_private_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        self.1.call()?;
        let file = self.0.create_private_file(bytes)?;
        Ok(Arc::new(FaultyFile(file, self.1.clone())))
    }

    fn set_attributes(&self, guest: GuestPages, view: View) -> io::Result<()> {
        self.1.call()?;
        self.0.set_attributes(guest, view)
    }
}

#[derive(Debug)]
struct FaultyFile(Arc<dyn ViewFile>, Arc<Fault>);

impl ViewFile for FaultyFile {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    fn punch_hole(&self, pages: FilePages) -> io::Result<()> {
        self.1.call()?;
        self.0.punch_hole(pages)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.0.allocated()
    }
}

/// Maps what is shared, as VFIO would, and sees that it is told the truth.
#[derive(Debug, Default)]
struct Mapper {
    mapped: parking_lot::Mutex<Vec<bool>>,
    fault: Arc<Fault>,
    /// Its device writes to what it has just mapped.
    writes: AtomicBool,
}

struct MapperHandle(Arc<Mapper>);

impl Listener for MapperHandle {
    fn begin(&self) -> bool {
        true
    }

    fn populate(&self, backend: &Backend, pages: FilePages) -> io::Result<()> {
        self.0.fault.call()?;
        let mut mapped = self.0.mapped.lock();
        for page in pages.start()..pages.end() {
            assert!(!std::mem::replace(&mut mapped[page as usize], true));
        }
        if self.0.writes.load(Ordering::SeqCst) {
            let backing = backend.backing();
            rustix::io::pwrite(backing.file(View::Shared).fd(), &[1], pages.start_bytes())?;
        }
        Ok(())
    }

    fn discard(&self, _: &Backend, pages: FilePages) {
        let mut mapped = self.0.mapped.lock();
        for page in pages.start()..pages.end() {
            assert!(std::mem::replace(&mut mapped[page as usize], false));
        }
    }

    fn gap(&self, _: GuestPages, to: View) -> io::Result<()> {
        match to {
            View::Shared => Ok(()),
            View::Private => Err(Errno::INVAL.into()),
        }
    }

    fn log(&self, _: Level, _: &str) {}
}

struct Machine {
    vm: Vm,
    backend: Arc<Backend>,
    owner: Arc<SoftwareOwner>,
    mapper: Arc<Mapper>,
    fault: Arc<Fault>,
}

fn guest(start: u64, end: u64) -> GuestPages {
    GuestPages::new(start, end).unwrap()
}

fn file(start: u64, end: u64) -> FilePages {
    FilePages::new(start, end).unwrap()
}

impl Machine {
    fn new() -> Self {
        Self::with(Discard::Now, PageState::Undecided)
    }

    fn with(discard: Discard, start: PageState) -> Self {
        let fault = Arc::new(Fault::default());
        let owner = Arc::new(SoftwareOwner::default());
        let mapper = Arc::new(Mapper {
            mapped: parking_lot::Mutex::new(vec![start.host_may_use(); PAGES as usize]),
            fault: fault.clone(),
            writes: AtomicBool::new(false),
        });
        let vm = Vm::new(
            Arc::new(FaultyOwner(owner.clone(), fault.clone())),
            Box::new(MapperHandle(mapper.clone())),
        );
        let config = BackendConfig {
            name: "ram".into(),
            size: PAGES * PAGE_SIZE,
            mode: None,
            discard,
            start,
            tag: 0,
        };
        let shared = Arc::new(KernelFile::memfd("shared", config.size).unwrap());
        let shared = Arc::new(FaultyFile(shared, fault.clone()));
        let backend = vm.create_backend_over(config, shared).unwrap();
        assert!(
            vm.add_window(&backend, guest(LOW, LOW + 16), 0, true)
                .unwrap()
        );
        assert!(
            vm.add_window(&backend, guest(HIGH, HIGH + 8), 16 * PAGE_SIZE, true)
                .unwrap()
        );
        assert!(
            !vm.add_window(&backend, guest(ALIAS, ALIAS + 8), 0, true)
                .unwrap()
        );
        Self {
            vm,
            backend,
            owner,
            mapper,
            fault,
        }
    }

    fn write(&self, view: View, page: u64, byte: u8) {
        let data = [byte; PAGE_SIZE as usize];
        let backing = self.backend.backing();
        rustix::io::pwrite(backing.file(view).fd(), &data, page * PAGE_SIZE).unwrap();
    }

    fn read(&self, view: View, page: u64) -> u8 {
        let mut data = [0xff; PAGE_SIZE as usize];
        let backing = self.backend.backing();
        rustix::io::pread(backing.file(view).fd(), &mut data, page * PAGE_SIZE).unwrap();
        assert!(data.iter().all(|byte| *byte == data[0]));
        data[0]
    }

    fn is_hole(&self, view: View, page: u64) -> bool {
        let backing = self.backend.backing();
        let data = rustix::fs::seek(backing.file(view).fd(), SeekFrom::Data(page * PAGE_SIZE));
        data.map_or(true, |at| at / PAGE_SIZE != page)
    }

    fn states(&self) -> Vec<PageState> {
        let mut states = Vec::new();
        for (run, state) in self.backend.state_runs(self.backend.pages()) {
            states.extend((run.start()..run.end()).map(|_| state));
        }
        states
    }

    /// What must hold between requests, whatever has failed.
    fn check_invariants(&self) {
        let mut unpunched = 0;
        let states = self.states();
        for (page, state) in (0..).zip(&states) {
            assert_ne!(*state, PageState::Transition);
            let view = match state {
                PageState::Private => View::Private,
                _ => View::Shared,
            };
            let bound = if page < 16 {
                LOW + page
            } else {
                HIGH + page - 16
            };
            assert_eq!(self.owner.view(bound), view, "attribute of page {page}");
            if page < 8 {
                assert_eq!(self.owner.view(ALIAS + page), view, "alias of page {page}");
            }
            assert_eq!(
                self.mapper.mapped.lock()[page as usize],
                state.host_may_use(),
                "mapping of page {page}"
            );
            if !self.is_hole(view.other(), page) {
                unpunched += 1;
            }
        }
        let stats = self.backend.stats();
        // More may be on record: a page that was a hole anyway.
        assert!(stats.unpunched >= unpunched * PAGE_SIZE);
        for (state, bytes) in PageState::ALL.iter().zip(stats.state_bytes) {
            let count = states.iter().filter(|s| *s == state).count() as u64;
            assert_eq!(bytes, count * PAGE_SIZE);
        }
    }

    /// The view that is exposed, per page, filled with a pattern of its own.
    fn fill(&self) -> Vec<u8> {
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

    fn exposed(&self) -> Vec<u8> {
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
fn at(page: u64) -> Option<(u64, bool)> {
    match page {
        0..16 => Some((page, true)),
        HIGH..28 => Some((page - HIGH + 16, true)),
        ALIAS..108 => Some((page - ALIAS, false)),
        _ => None,
    }
}

#[derive(Clone, Debug)]
enum Request {
    Convert(GuestPages, View),
    Discard(FilePages),
}

fn request() -> impl Strategy<Value = Request> {
    let range = (prop_oneof![0u64..30, 98u64..110], 1u64..12);
    let view = prop_oneof![Just(View::Shared), Just(View::Private)];
    prop_oneof![
        5 => (range, view).prop_map(|((start, count), view)| {
            Request::Convert(guest(start, start + count), view)
        }),
        1 => (0..PAGES, 1..PAGES).prop_map(|(start, count)| {
            Request::Discard(file(start, (start + count).min(PAGES)))
        }),
    ]
}

/// Must the request be refused even if no call fails? Which pages change, and to what?
fn expect(states: &[PageState], request: &Request) -> Option<Vec<PageState>> {
    let mut after = states.to_vec();
    match *request {
        Request::Discard(pages) => {
            after[pages.start() as usize..pages.end() as usize].fill(PageState::Undecided);
        }
        Request::Convert(guest, to) => {
            for page in guest.start()..guest.end() {
                match (at(page), to) {
                    (Some((_, false)) | None, View::Private) => return None,
                    (Some((page, _)), to) => after[page as usize] = to.into(),
                    (None, View::Shared) => {}
                }
            }
        }
    }
    Some(after)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Each request runs with its n-th call failing (0: none). Either all of it takes effect, with
    /// pages that changed views empty, or none of it, with all data where it was.
    #[test]
    fn a_request_takes_effect_as_a_whole_or_not_at_all(
        requests in prop::collection::vec((request(), 0u64..8), 1..25),
    ) {
        let machine = Machine::new();
        for (request, nth) in requests {
            let before = machine.states();
            let data = machine.fill();
            let expected = expect(&before, &request);
            machine.fault.arm(nth);
            let result = match &request {
                Request::Convert(guest, to) => machine.vm.convert(*guest, *to).map(|_| ()),
                Request::Discard(pages) => machine.vm.discard(&machine.backend, *pages),
            };
            let hit = nth != 0 && machine.fault.left() == 0;
            machine.fault.arm(0);
            machine.check_invariants();
            let after = machine.states();
            let exposed = machine.exposed();
            match result {
                Ok(()) => {
                    prop_assert_eq!(Some(&after), expected.as_ref());
                    for page in 0..PAGES as usize {
                        let stays = before[page].host_may_use() == after[page].host_may_use();
                        let discarded = matches!(&request, Request::Discard(p) if p.contains(page as u64));
                        let byte = if stays && !discarded { data[page] } else { 0 };
                        prop_assert_eq!(exposed[page], byte, "page {}", page);
                    }
                }
                Err(error) => {
                    prop_assert!(hit || expected.is_none(), "{} though nothing failed", error);
                    prop_assert_eq!(&after, &before);
                    if let Request::Convert(..) = request {
                        prop_assert_eq!(exposed, data);
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// While the kernel refuses everything from some call on, even taking back can fail. Once it
    /// serves again, the next conversion of the pages puts them right.
    #[test]
    fn after_lasting_failures_the_next_conversion_puts_things_right(
        requests in prop::collection::vec((request(), 0u64..8), 1..12),
    ) {
        let machine = Machine::new();
        for (request, nth) in requests {
            machine.fault.arm_lasting(nth);
            // Its answer is the other test's matter.
            let _ = match &request {
                Request::Convert(guest, to) => machine.vm.convert(*guest, *to).map(|_| ()),
                Request::Discard(pages) => machine.vm.discard(&machine.backend, *pages),
            };
            machine.fault.arm(0);
            prop_assert!(machine.states().iter().all(|s| *s != PageState::Transition));
            // A listener that could not map again is not told to let go either.
            let mut mapped = machine.mapper.mapped.lock();
            for (mapped, state) in mapped.iter_mut().zip(machine.states()) {
                *mapped = state.host_may_use();
            }
        }
        for to in [View::Private, View::Shared] {
            for range in [guest(LOW, LOW + 16), guest(HIGH, HIGH + 8)] {
                machine.vm.convert(range, to).unwrap();
            }
            machine.check_invariants();
        }
        prop_assert!(machine.exposed().iter().all(|byte| *byte == 0));
        prop_assert_eq!(machine.backend.stats().unpunched, 0);
    }
}

#[test]
fn a_discard_empties_both_views_whatever_the_policy_keeps() {
    let machine = Machine::with(Discard::Keep, PageState::Undecided);
    let (kept, page) = (guest(0, 1), 0);
    machine.write(View::Shared, page, 1);
    machine.vm.convert(kept, View::Private).unwrap();
    machine.write(View::Private, page, 2);
    assert_eq!(machine.read(View::Shared, page), 1, "kept");
    machine.vm.discard(&machine.backend, file(0, 2)).unwrap();
    assert!(machine.is_hole(View::Shared, page));
    assert!(machine.is_hole(View::Private, page));
}

#[test]
fn pages_that_start_private_have_their_attributes_and_no_host_mapping() {
    let machine = Machine::with(Discard::Now, PageState::Private);
    machine.check_invariants();
    assert!(!machine.vm.is_populated(&machine.backend, file(3, 4)));
    machine.vm.convert(guest(3, 4), View::Shared).unwrap();
    assert!(machine.vm.is_populated(&machine.backend, file(3, 4)));
    machine.check_invariants();
}

#[test]
fn what_a_device_wrote_before_the_pages_were_taken_back_is_not_kept() {
    let machine = Machine::new();
    for range in [guest(2, 4), guest(6, 8)] {
        machine.vm.convert(range, View::Private).unwrap();
    }
    machine.mapper.writes.store(true, Ordering::SeqCst);
    // Calls: two windows for each of two runs, then the listener, which refuses the second.
    machine.fault.arm(6);
    let error = machine.vm.convert(guest(2, 8), View::Shared).unwrap_err();
    assert!(matches!(error, Error::Listener { .. }), "{error}");
    machine.check_invariants();
}

#[test]
fn a_listener_that_panics_leaves_pages_as_they_were() {
    let machine = Machine::new();
    machine.mapper.mapped.lock()[3] = false;
    let convert = || machine.vm.convert(guest(3, 4), View::Private);
    // The listener finds that it was told a lie.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(convert)).unwrap_err();
    assert_eq!(machine.states()[3], PageState::Undecided);
    machine.mapper.mapped.lock()[3] = true;
    convert().unwrap();
}

#[test]
fn what_is_so_already_costs_no_call() {
    let machine = Machine::new();
    let low = guest(LOW, LOW + 16);
    assert_eq!(machine.vm.convert(low, View::Private).unwrap(), 16);
    machine.fault.arm(1);
    assert_eq!(machine.vm.convert(low, View::Private).unwrap(), 0);
    assert_eq!(machine.fault.left(), 1, "nothing was called");
}

#[test]
fn a_hole_that_could_not_be_punched_is_punched_before_the_view_is_seen_again() {
    let machine = Machine::new();
    let page = guest(20, 21);
    machine.write(View::Shared, 16, 7);
    // Calls: one attribute, then the punch.
    machine.fault.arm(2);
    machine.vm.convert(page, View::Private).unwrap();
    assert_eq!(machine.backend.stats().unpunched, PAGE_SIZE);
    assert_eq!(machine.read(View::Shared, 16), 7);

    machine.fault.arm(1);
    machine.vm.convert(page, View::Shared).unwrap_err();
    assert_eq!(machine.states()[16], PageState::Private);

    machine.fault.arm(0);
    machine.vm.convert(page, View::Shared).unwrap();
    assert_eq!(machine.read(View::Shared, 16), 0);
    assert_eq!(machine.backend.stats().unpunched, 0);
}

#[test]
fn windows_bring_attributes_with_them() {
    let machine = Machine::new();
    let low = guest(LOW, LOW + 16);
    machine.vm.convert(guest(2, 4), View::Private).unwrap();
    machine.vm.remove_window(low).unwrap();
    assert_eq!(machine.owner.view(2), View::Private, "until the commit");
    // Back at once: no call.
    machine.fault.arm(1);
    assert!(
        machine
            .vm
            .add_window(&machine.backend, low, 0, true)
            .unwrap()
    );
    machine.vm.clear_stale_windows().unwrap();
    assert_eq!(machine.fault.left(), 1, "nothing was called");
    machine.check_invariants();

    machine.vm.remove_window(low).unwrap();
    machine.vm.clear_stale_windows().unwrap_err();
    assert_eq!(machine.owner.view(2), View::Private, "the call has failed");
    machine.vm.clear_stale_windows().unwrap();
    assert_eq!(machine.owner.view(2), View::Shared);
    let elsewhere = guest(200, 216);
    machine
        .vm
        .add_window(&machine.backend, elsewhere, 0, true)
        .unwrap();
    assert_eq!(machine.owner.view(202), View::Private);
}

#[test]
fn a_window_whose_attributes_cannot_be_set_is_not_added() {
    let machine = Machine::new();
    machine.vm.convert(guest(2, 4), View::Private).unwrap();
    let other = guest(300, 316);
    machine.fault.arm(1);
    let error = machine
        .vm
        .add_window(&machine.backend, other, 0, false)
        .unwrap_err();
    assert!(matches!(error, Error::SetAttributes { .. }), "{error}");
    assert!(!machine.vm.owns(other));
    machine.check_invariants();

    machine
        .vm
        .add_window(&machine.backend, other, 0, false)
        .unwrap();
    assert_eq!(machine.owner.view(302), View::Private);
    machine.check_invariants();
}

#[test]
fn under_a_new_owner_private_memory_is_gone_and_shared_memory_survives() {
    let machine = Machine::new();
    machine.vm.convert(guest(0, 8), View::Private).unwrap();
    let before = machine.fill();
    let owner = Arc::new(SoftwareOwner::default());
    let owner = || Arc::new(FaultyOwner(owner.clone(), machine.fault.clone()));
    machine.vm.rebind(owner()).unwrap_err();
    for window in [guest(0, 16), guest(20, 28), guest(100, 108)] {
        machine.vm.remove_window(window).unwrap();
    }
    machine.fault.arm(1);
    machine.vm.rebind(owner()).unwrap_err();
    assert_eq!(machine.states()[0], PageState::Private);
    machine.vm.rebind(owner()).unwrap();
    assert!(machine.states().iter().all(|s| *s == PageState::Undecided));
    assert!(machine.mapper.mapped.lock().iter().all(|mapped| *mapped));
    assert!((0..PAGES).all(|page| machine.is_hole(View::Private, page)));
    let after = machine.exposed();
    assert!(after[..8].iter().all(|byte| *byte == 0));
    assert_eq!(after[8..], before[8..]);
}

#[test]
fn under_a_new_owner_pages_that_start_private_start_empty() {
    let machine = Machine::with(Discard::Now, PageState::Private);
    machine.vm.convert(guest(0, 8), View::Shared).unwrap();
    machine.fill();
    for window in [guest(0, 16), guest(20, 28), guest(100, 108)] {
        machine.vm.remove_window(window).unwrap();
    }
    machine
        .vm
        .rebind(Arc::new(SoftwareOwner::default()))
        .unwrap();
    assert!(machine.states().iter().all(|s| *s == PageState::Private));
    assert!(!machine.mapper.mapped.lock().iter().any(|mapped| *mapped));
    for view in [View::Shared, View::Private] {
        assert!((0..PAGES).all(|page| machine.is_hole(view, page)));
    }
}

#[test]
fn vcpus_that_convert_the_same_pages_at_once_leave_a_sound_state() {
    let machine = Machine::new();
    machine.fault.slow_down();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let machine = &machine;
            scope.spawn(move || {
                for i in 0..300u64 {
                    let start = (i * 5 + thread * 3) % 14;
                    let to = if (i + thread) % 2 == 0 {
                        View::Private
                    } else {
                        View::Shared
                    };
                    machine.vm.convert(guest(start, start + 2), to).unwrap();
                    if i % 16 == 0 {
                        machine.vm.discard(&machine.backend, file(8, 20)).unwrap();
                    }
                }
            });
        }
    });
    machine.check_invariants();
}

#[test]
fn a_request_returns_when_the_pages_are_where_it_asked_for_whoever_moves_them() {
    let machine = Machine::new();
    machine.fault.slow_down();
    for round in 0..100u64 {
        let to = [View::Private, View::Shared][round as usize % 2];
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let machine = &machine;
                scope.spawn(move || {
                    let start = (round * 3 + thread) % 8;
                    machine.vm.convert(guest(start, start + 6), to).unwrap();
                    let runs = machine.backend.state_runs(file(start, start + 6));
                    assert_eq!(runs, [(file(start, start + 6), to.into())]);
                });
            }
        });
    }
    machine.check_invariants();
}
