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

    fn check_mapped_memory(&self) -> Result<()> {
        self.0.check_mapped_memory()
    }

    fn create_mapped_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        self.0.create_mapped_file(bytes)
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

    fn first_data(&self, pages: FilePages) -> io::Result<Option<FilePages>> {
        self.1.call()?;
        self.0.first_data(pages)
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
    /// Threads that wait are wanted elsewhere.
    interrupts: AtomicBool,
    /// What was to be allocated.
    prefaulted: parking_lot::Mutex<Vec<GuestPages>>,
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

    fn prefault(&self, guest: GuestPages) {
        self.0.prefaulted.lock().push(guest);
    }

    fn interrupted(&self) -> bool {
        self.0.interrupts.load(Ordering::SeqCst)
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
        Self::build(discard, start, None)
    }

    /// Lazy attributes in chunks of eight pages.
    fn lazy(discard: Discard) -> Self {
        let chunk = lazy::Chunk::from_bytes(8 * PAGE_SIZE);
        Self::build(discard, PageState::Undecided, chunk)
    }

    fn build(discard: Discard, start: PageState, lazy: Option<lazy::Chunk>) -> Self {
        let fault = Arc::new(Fault::default());
        let owner = Arc::new(SoftwareOwner::default());
        let mapper = Arc::new(Mapper {
            mapped: parking_lot::Mutex::new(vec![start.host_may_use(); PAGES as usize]),
            fault: fault.clone(),
            ..Mapper::default()
        });
        let vm = Vm::new(
            Arc::new(FaultyOwner(owner.clone(), fault.clone())),
            Box::new(MapperHandle(mapper.clone())),
        );
        let config = BackendConfig {
            name: "ram".into(),
            size: PAGES * PAGE_SIZE,
            mode: None,
            bind: false,
            discard,
            start,
            lazy,
            prefault: Prefault::Small,
            convert_timeout: guestmemfd::backend::DEFAULT_CONVERT_TIMEOUT,
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

    /// A listener that could not map pages again is not told to let go either.
    fn forgive_listener(&self) {
        let mut mapped = self.mapper.mapped.lock();
        for (mapped, state) in mapped.iter_mut().zip(self.states()) {
            *mapped = state.host_may_use();
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
        discard in prop_oneof![Just(Discard::Now), Just(Discard::Coalesced)],
        requests in prop::collection::vec((request(), 0u64..8), 1..25),
    ) {
        let machine = Machine::with(discard, PageState::Undecided);
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
            if discard == Discard::Coalesced {
                machine.vm.drain().unwrap();
            }
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
            machine.forgive_listener();
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

/// What guest and host do to memory with lazy attributes.
#[derive(Clone, Debug)]
enum Use {
    /// A private touch of a guest page.
    Touch(u64),
    /// The host or the guest writes to a page of the shared view, if it may.
    WriteShared(u64),
    Ask(Request),
}

fn uses() -> impl Strategy<Value = Use> {
    prop_oneof![
        4 => prop_oneof![0u64..16, 20u64..28].prop_map(Use::Touch),
        4 => (0..PAGES).prop_map(Use::WriteShared),
        1 => request().prop_map(Use::Ask),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// A private touch makes its page private and may decide undecided ones around it; data that is
    /// exposed stays so, and what was decided stays as it was, whichever call fails.
    #[test]
    fn a_private_touch_harms_no_page_next_to_it(
        uses in prop::collection::vec((uses(), 0u64..10), 1..40),
    ) {
        let machine = Machine::lazy(Discard::Now);
        for (number, (what, nth)) in (1..).zip(uses) {
            let before = machine.states();
            let data = machine.exposed();
            match what {
                Use::WriteShared(page) if before[page as usize].host_may_use() => {
                    machine.write(View::Shared, page, number);
                }
                Use::WriteShared(_) => {}
                Use::Ask(Request::Convert(guest, to)) => {
                    let _ = machine.vm.convert(guest, to);
                }
                Use::Ask(Request::Discard(pages)) => {
                    machine.vm.discard(&machine.backend, pages).unwrap();
                }
                Use::Touch(guest_page) => {
                    let (touched, _) = at(guest_page).unwrap();
                    machine.fault.arm(nth);
                    let result = machine.vm.memory_fault(guest_page * PAGE_SIZE, PAGE_SIZE, true);
                    machine.fault.arm(0);
                    let after = machine.states();
                    let exposed = machine.exposed();
                    for page in 0..PAGES as usize {
                        if result.is_ok() && page as u64 == touched {
                            prop_assert_eq!(after[page], PageState::Private);
                            continue;
                        }
                        let decided = before[page] != PageState::Undecided;
                        let stays = decided || result.is_err() && nth == 0;
                        prop_assert!(!stays || after[page] == before[page], "page {}", page);
                        prop_assert_eq!(exposed[page], data[page], "data of page {}", page);
                    }
                    prop_assert!(nth != 0 || result.is_ok());
                    // Where an attribute could not be set back, the next request puts it right.
                    let shared = |page: &u64| after[*page as usize] == PageState::Shared;
                    for page in (0..PAGES).filter(shared) {
                        let at = if page < 16 { LOW + page } else { HIGH + page - 16 };
                        machine.vm.memory_fault(at * PAGE_SIZE, PAGE_SIZE, false).unwrap();
                    }
                    machine.forgive_listener();
                }
            }
            machine.check_invariants();
        }
    }
}

fn touch(machine: &Machine, page: u64) {
    machine
        .vm
        .memory_fault(page * PAGE_SIZE, PAGE_SIZE, true)
        .unwrap();
}

#[test]
fn a_private_touch_decides_the_chunk_around_it() {
    let machine = Machine::lazy(Discard::Now);
    touch(&machine, 3);
    let states = machine.backend.state_runs(machine.backend.pages());
    assert_eq!(
        states,
        [
            (file(0, 8), PageState::Private),
            (file(8, 24), PageState::Undecided)
        ]
    );
    let stats = machine.backend.stats();
    assert_eq!(stats.converted_to_private, PAGE_SIZE);
    assert_eq!(stats.converted_along, 7 * PAGE_SIZE);
    machine.check_invariants();
}

#[test]
fn pages_in_use_as_shared_are_found_after_the_attribute_is_set() {
    let machine = Machine::lazy(Discard::Now);
    machine.write(View::Shared, 5, 42);
    touch(&machine, 3);
    assert_eq!(machine.states()[5], PageState::Shared);
    assert_eq!(machine.exposed()[5], 42);
    assert_eq!(machine.states()[6], PageState::Private);
    machine.check_invariants();
}

#[test]
fn chunks_end_at_decided_pages_and_at_the_window() {
    let machine = Machine::lazy(Discard::Now);
    machine.vm.convert(guest(2, 3), View::Shared).unwrap();
    touch(&machine, 4);
    touch(&machine, 20);
    let private = |page: usize| machine.states()[page] == PageState::Private;
    assert!(!(0..3).any(private), "behind a page that is decided");
    assert!((3..8).all(private));
    assert!(!(8..16).any(private), "another chunk, another window");
    assert!((16..24).all(private));
    machine.check_invariants();
}

#[test]
fn a_hypercall_and_a_shared_touch_decide_what_they_name_only() {
    let machine = Machine::lazy(Discard::Now);
    machine.vm.map_gpa_range(PAGE_SIZE, 1, 1 << 4).unwrap();
    machine
        .vm
        .memory_fault(4 * PAGE_SIZE, PAGE_SIZE, false)
        .unwrap();
    let states = machine.states();
    assert_eq!(states[1], PageState::Private);
    assert_eq!(states[4], PageState::Shared);
    let decided = states.iter().filter(|s| **s != PageState::Undecided);
    assert_eq!(decided.count(), 2);
}

#[test]
fn where_the_chunk_is_too_much_the_page_alone_becomes_private() {
    let machine = Machine::lazy(Discard::Now);
    machine.fault.arm(1);
    touch(&machine, 3);
    let private = machine
        .states()
        .iter()
        .filter(|s| **s == PageState::Private)
        .count();
    assert_eq!(private, 1);
    machine.check_invariants();
}

#[test]
fn lazy_attributes_need_pages_that_start_undecided() {
    let owner = Arc::new(SoftwareOwner::default());
    let vm = Vm::new(owner, Box::new(MapperHandle(Arc::default())));
    let config = BackendConfig {
        name: "ram".into(),
        size: PAGE_SIZE,
        mode: None,
        bind: false,
        discard: Discard::Now,
        start: PageState::Private,
        lazy: Some(lazy::Chunk::default()),
        prefault: Prefault::Off,
        convert_timeout: guestmemfd::backend::DEFAULT_CONVERT_TIMEOUT,
        tag: 0,
    };
    let error = vm.create_backend(config).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
}

#[test]
fn pages_that_a_small_hypercall_has_made_private_are_allocated_at_once() {
    let machine = Machine::new();
    let map = |page: u64, pages, attributes| {
        machine
            .vm
            .map_gpa_range(page * PAGE_SIZE, pages, attributes)
            .unwrap();
    };
    map(0, 2, 1 << 4);
    map(0, 2, 1 << 4);
    assert_eq!(
        *machine.mapper.prefaulted.lock(),
        [guest(0, 2)],
        "not where nothing has changed"
    );
    map(0, 2, 0);
    touch(&machine, 5);
    assert_eq!(
        machine.mapper.prefaulted.lock().len(),
        1,
        "not if shared, not by a fault"
    );
}

/// Waits for the worker.
fn until(what: &str, condition: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < std::time::Duration::from_secs(10),
            "{what}"
        );
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn coalesced_holes_are_punched_by_themselves_before_long() {
    let machine = Machine::with(Discard::Coalesced, PageState::Undecided);
    machine.fill();
    for page in 0..8 {
        machine
            .vm
            .convert(guest(page, page + 1), View::Private)
            .unwrap();
    }
    until("punched", || {
        (0..8).all(|page| machine.is_hole(View::Shared, page))
    });
    until("on record", || machine.backend.stats().unpunched == 0);
}

#[test]
fn a_coalesced_hole_is_punched_before_its_page_is_seen_again() {
    let machine = Machine::with(Discard::Coalesced, PageState::Undecided);
    for round in 1..50 {
        machine.write(View::Shared, 3, round);
        machine.vm.convert(guest(3, 4), View::Private).unwrap();
        assert_eq!(machine.exposed()[3], 0);
        machine.write(View::Private, 3, round);
        machine.vm.convert(guest(3, 4), View::Shared).unwrap();
        assert_eq!(machine.exposed()[3], 0);
    }
    machine.vm.drain().unwrap();
    assert_eq!(machine.backend.stats().unpunched, 0);
    machine.check_invariants();
}

#[test]
fn the_worker_tries_again_what_it_could_not_punch() {
    let machine = Machine::with(Discard::Coalesced, PageState::Undecided);
    machine.write(View::Shared, 16, 1);
    machine.vm.convert(guest(20, 21), View::Private).unwrap();
    // From here on every call fails. It may have come too late for the hole, which is as well.
    machine.fault.arm_lasting(1);
    std::thread::sleep(std::time::Duration::from_millis(50));
    machine.fault.arm(0);
    until("punched", || machine.backend.stats().unpunched == 0);
    assert!(machine.is_hole(View::Shared, 16));
}

#[test]
fn draining_tells_what_cannot_be_punched_and_does_the_rest() {
    let machine = Machine::new();
    for page in [1, 5] {
        machine.write(View::Shared, page, 1);
        // Calls: the attributes of two windows, then the punch.
        machine.fault.arm(3);
        machine
            .vm
            .convert(guest(page, page + 1), View::Private)
            .unwrap();
    }
    assert_eq!(machine.backend.stats().unpunched, 2 * PAGE_SIZE);
    machine.fault.arm(1);
    let error = machine.vm.drain().unwrap_err();
    assert!(matches!(error, Error::Punch { .. }), "{error}");
    assert_eq!(machine.backend.stats().unpunched, PAGE_SIZE);
    machine.vm.drain().unwrap();
    machine.check_invariants();
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
    for discard in [Discard::Now, Discard::Coalesced] {
        convert_the_same_pages_at_once(&Machine::lazy(discard));
    }
}

fn convert_the_same_pages_at_once(machine: &Machine) {
    machine.fault.slow_down();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            scope.spawn(move || {
                for i in 0..300u64 {
                    let start = (i * 5 + thread * 3) % 14;
                    let to = if (i + thread) % 2 == 0 {
                        View::Private
                    } else {
                        View::Shared
                    };
                    machine.vm.convert(guest(start, start + 2), to).unwrap();
                    touch(machine, start);
                    if i % 16 == 0 {
                        machine.vm.discard(&machine.backend, file(8, 20)).unwrap();
                    }
                }
            });
        }
    });
    machine.vm.drain().unwrap();
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

#[test]
fn a_request_that_is_interrupted_while_it_waits_is_counted_when_it_comes_again() {
    let machine = Machine::new();
    let everything = guest(LOW, LOW + 16);
    machine.fault.slow_down();
    machine.mapper.interrupts.store(true, Ordering::SeqCst);
    let mut interruptions = 0;
    let mut served = 0;
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            for round in 0..200 {
                let to = [View::Private, View::Shared][round % 2];
                while machine.vm.convert(everything, to).is_err() {}
            }
        });
        while !busy.is_finished() {
            match machine.vm.map_gpa_range(0, 1, 1 << 4) {
                Ok(_) => served += 1,
                Err(Error::Interrupted { .. }) => interruptions += 1,
                Err(error) => panic!("{error}"),
            }
        }
    });
    let stats = machine.backend.stats();
    assert!(interruptions > 0, "nobody had to wait");
    assert_eq!((stats.hypercalls, stats.refused), (served, 0));
}
