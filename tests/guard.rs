// SPDX-License-Identifier: MIT OR Apache-2.0

//! Accesses to private pages that go around every check, caught by a guard. The files are real
//! memfds with real mappings; only the hypervisor is the software owner.

#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use guestmemfd::listener::Level;
use guestmemfd::owner::SoftwareOwner;
use guestmemfd::*;
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

const PAGES: u64 = 64;
const GPA: u64 = 1 << 32;

/// How long something may take that takes a second.
const LIMIT: Duration = Duration::from_secs(60);

/// Whom the guard has caught, what it had to say otherwise, and what the listener does besides.
#[derive(Default)]
struct Caught(
    Mutex<Vec<Stray>>,
    Mutex<Vec<String>>,
    Mutex<Option<Box<dyn FnOnce() + Send>>>,
);

struct Handle(Arc<Caught>);

impl Listener for Handle {
    fn stray(&self, _: &Backend, stray: Stray) {
        self.0.0.lock().push(stray);
        let act = self.0.2.lock().take();
        if let Some(act) = act {
            act();
        }
    }

    fn gap(&self, _: GuestPages, _: View) -> io::Result<()> {
        Err(Errno::INVAL.into())
    }

    fn log(&self, _: Level, message: &str) {
        self.0.1.lock().push(message.to_owned());
    }
}

struct Machine {
    vm: Arc<Vm>,
    backend: Arc<Backend>,
    caught: Arc<Caught>,
    host: MmapRegion,
}

/// The host's mapping of a backend's shared file.
fn map(backend: &Backend) -> MmapRegion {
    let file = backend.views().file(View::Shared).fd().try_clone_to_owned();
    let file = FileOffset::new(file.unwrap().into(), 0);
    MmapRegion::from_file(file, backend.config().size as usize).unwrap()
}

impl Machine {
    fn new(discard: Discard) -> Self {
        let mut config = BackendConfig::new("ram", PAGES * PAGE_SIZE);
        config.discard = discard;
        Self::with(config)
    }

    fn with(config: BackendConfig) -> Self {
        let caught = Arc::new(Caught::default());
        let owner = Arc::new(SoftwareOwner::default());
        let vm = Arc::new(Vm::new(owner, Box::new(Handle(caught.clone()))));
        let backend = vm.create_backend(config).unwrap();
        let all = GuestPages::from_bytes(GPA, PAGES * PAGE_SIZE).unwrap();
        vm.add_window(&backend, all, 0, Binding::Bound).unwrap();
        let host = map(&backend);
        Self {
            vm,
            backend,
            caught,
            host,
        }
    }

    fn caught(&self) -> Vec<(FilePages, Option<u64>, Option<u32>)> {
        let caught = self.caught.0.lock();
        caught.iter().map(|s| (s.pages, s.gpa, s.thread)).collect()
    }

    fn guard_at(&self, address: usize) -> Result<StrayGuard> {
        // SAFETY: the mapping lives as long as the machine; where there is none, the kernel
        // refuses.
        unsafe { self.vm.guard(&self.backend, address) }
    }

    /// `None` where this user may not have one, which is said; elsewhere there must be one.
    fn quiet_guard(&self) -> Option<StrayGuard> {
        match self.guard_at(self.host.as_ptr().addr()) {
            Err(Error::Unsupported { found, .. }) if !rustix::process::geteuid().is_root() => {
                eprintln!("skipped: {found}");
                None
            }
            guard => Some(guard.unwrap()),
        }
    }

    /// The same on a thread of its own.
    fn guard(&self) -> Option<GuardThread> {
        Some(self.quiet_guard()?.spawn().unwrap())
    }

    /// Has the listener act once, when it is told of somebody.
    fn at_stray(&self, act: impl FnOnce() + Send + 'static) {
        *self.caught.2.lock() = Some(Box::new(act));
    }

    fn convert(&self, page: u64, pages: u64, to: View) {
        let guest = GuestPages::from_bytes(GPA + page * PAGE_SIZE, pages * PAGE_SIZE);
        self.vm.convert(guest.unwrap(), to).unwrap();
    }

    fn read(&self, page: u64) -> u8 {
        let at = (page * PAGE_SIZE) as usize;
        let byte = self.host.get_ref::<u8>(at);
        byte.unwrap().load()
    }

    fn write(&self, page: u64, byte: u8) {
        let at = (page * PAGE_SIZE) as usize;
        self.host.get_ref::<u8>(at).unwrap().store(byte);
    }

    fn allocated(&self) -> u64 {
        self.backend.stats().shared_allocated / PAGE_SIZE
    }

    fn holes_where_private(&self) -> bool {
        let views = self.backend.views();
        let mut runs = self
            .backend
            .state_map(self.backend.pages(), usize::MAX)
            .runs
            .into_iter();
        runs.all(|(pages, state)| {
            let data = || views.file(View::Shared).first_data(pages).unwrap();
            state != PageState::Private || data().is_none()
        })
    }

    /// Waits until something holds.
    fn wait(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !holds(self) {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn file(start: u64, end: u64) -> FilePages {
    FilePages::new(start, end).unwrap()
}

fn page(page: u64) -> FilePages {
    file(page, page + 1)
}

#[test]
fn a_stray_access_is_told_with_its_thread_and_leaves_nothing() {
    let machine = Machine::new(Discard::Now);
    let Some(_guard) = machine.guard() else {
        return;
    };
    machine.write(3, 7);
    machine.convert(3, 2, View::Private);
    assert_eq!(machine.allocated(), 0);

    assert_eq!(machine.read(4), 0, "a stray access reads zeros");
    let thread = rustix::thread::gettid().as_raw_nonzero().get() as u32;
    let gpa = GPA + 4 * PAGE_SIZE;
    assert_eq!(machine.caught(), [(page(4), Some(gpa), Some(thread))]);
    machine.wait("the page is given back", |m| m.allocated() == 0);

    machine.write(3, 9);
    assert_eq!(machine.caught.0.lock().len(), 2);
    assert_eq!(machine.backend.stats().strays, 2);
    machine.wait("the page is given back", |m| m.allocated() == 0);
    machine.convert(3, 2, View::Shared);
    assert_eq!(machine.read(3), 0, "what was written has not stayed");
}

#[test]
fn what_the_host_may_use_is_served_in_silence() {
    let machine = Machine::new(Discard::Now);
    let Some(guard) = machine.guard() else { return };
    for page in 0..PAGES {
        assert_eq!(machine.read(page), 0);
        machine.write(page, 1 + page as u8);
    }
    machine.convert(0, PAGES / 2, View::Private);
    machine.convert(0, PAGES / 2, View::Shared);
    for page in 0..PAGES {
        let expected = if page < PAGES / 2 { 0 } else { 1 + page as u8 };
        assert_eq!(machine.read(page), expected);
    }
    assert!(machine.caught.0.lock().is_empty());
    drop(guard);
    machine.convert(0, 1, View::Private);
    assert_eq!(machine.read(0), 0, "nobody guards any more");
    assert!(machine.caught.0.lock().is_empty());
}

#[test]
fn what_another_mapping_leaves_is_found_and_freed() {
    let machine = Machine::new(Discard::Now);
    let Some(_guard) = machine.guard() else {
        return;
    };
    machine.convert(0, PAGES, View::Private);
    // As far as the kernel is concerned, it might be another process.
    let other = map(&machine.backend);
    let at = (5 * PAGE_SIZE) as usize;
    other.get_ref::<u8>(at).unwrap().store(1_u8);
    machine.wait("it is found", |m| !m.caught.0.lock().is_empty());
    assert_eq!(
        machine.caught(),
        [(page(5), Some(GPA + 5 * PAGE_SIZE), None)]
    );
    assert_eq!(machine.allocated(), 0);
}

/// Threads touch what they may while others convert it. Whoever loses the race is a stray; no
/// private page keeps what it left, and the guard goes on.
#[test]
fn conversions_and_touches_race_without_a_trace() {
    let machine = Machine::new(Discard::Now);
    let Some(guard) = machine.guard() else { return };
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let (machine, end) = (&machine, &end);
            scope.spawn(move || {
                while !end.load(Ordering::SeqCst) {
                    for page in (thread..PAGES).step_by(2) {
                        machine.read(page);
                        machine.write(page, 1);
                    }
                }
            });
        }
        for round in 0..200 {
            let (page, pages) = (round * 7 % (PAGES - 8), 1 + round % 8);
            machine.convert(page, pages, View::Private);
            if round % 3 > 0 {
                machine.convert(page, pages, View::Shared);
            }
        }
        end.store(true, Ordering::SeqCst);
    });
    let private = machine.backend.stats().state_bytes[PageState::Private as usize] / PAGE_SIZE;
    assert!(private > 0, "nothing is left to look at");
    machine.wait("private pages are holes", |m| {
        m.allocated() <= PAGES - private && m.holes_where_private()
    });

    machine.convert(9, 1, View::Private);
    machine.caught.0.lock().clear();
    machine.read(9);
    assert_eq!(machine.caught.0.lock().len(), 1, "the guard is still there");
    drop(guard);
    assert_eq!(*machine.caught.1.lock(), [""; 0]);
}

/// Nobody is served before the guard is, and then at once; the descriptor says when.
#[test]
fn a_guard_can_be_served_in_an_event_loop() {
    let machine = Machine::new(Discard::Now);
    let Some(mut guard) = machine.quiet_guard() else {
        return;
    };
    let readable = |guard: &StrayGuard, milliseconds: i64| {
        let timeout = Timespec {
            tv_sec: 0,
            tv_nsec: milliseconds * 1_000_000,
        };
        let mut fds = [PollFd::new(guard, PollFlags::IN)];
        poll(&mut fds, Some(&timeout)).unwrap() > 0
    };
    assert!(!readable(&guard, 0), "nobody waits");
    let left = guard.serve().unwrap();
    assert!(left > Duration::ZERO, "there is nothing to do");
    machine.convert(3, 1, View::Private);
    std::thread::scope(|scope| {
        let stray = scope.spawn(|| machine.read(3));
        while !readable(&guard, 10) {}
        std::thread::sleep(Duration::from_millis(50));
        assert!(!stray.is_finished(), "it waits for the guard");
        assert!(machine.caught.0.lock().is_empty());
        let left = guard.serve().unwrap();
        assert_eq!(stray.join().unwrap(), 0);
        assert!(left < Duration::from_secs(1), "a page is to be given back");
    });
    assert_eq!(machine.caught().len(), 1);
    assert_eq!(machine.allocated(), 1);
    machine.wait("the page is given back", |_| {
        guard.serve().unwrap();
        machine.allocated() == 0
    });
}

#[test]
fn a_guard_can_run_on_a_thread_of_its_users_and_is_told_to_stop() {
    let machine = Machine::new(Discard::Now);
    let Some(mut guard) = machine.quiet_guard() else {
        return;
    };
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    machine.convert(3, 1, View::Private);
    std::thread::scope(|scope| {
        let user = scope.spawn(|| guard.run(&stop));
        assert_eq!(machine.read(3), 0);
        assert_eq!(machine.caught().len(), 1);
        machine.wait("the page is given back", |m| m.allocated() == 0);
        rustix::io::write(&stop, &1u64.to_ne_bytes()).unwrap();
        user.join().unwrap().unwrap();
    });
    // It goes on with what it was, somewhere else.
    let thread = guard.spawn().unwrap();
    assert_eq!(machine.read(3), 0);
    assert_eq!(machine.caught().len(), 2);
    drop(thread);
    machine.convert(3, 1, View::Shared);
}

#[test]
fn those_who_wait_go_on_when_the_guard_is_dropped() {
    let machine = Machine::new(Discard::Now);
    let Some(guard) = machine.quiet_guard() else {
        return;
    };
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| machine.read(3));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!reader.is_finished(), "nobody serves it");
        drop(guard);
        assert_eq!(reader.join().unwrap(), 0);
    });
}

#[test]
fn a_listener_that_panics_does_not_end_the_guard() {
    let machine = Machine::new(Discard::Now);
    let Some(_guard) = machine.guard() else {
        return;
    };
    machine.convert(3, 2, View::Private);
    machine.at_stray(|| std::panic::resume_unwind(Box::new("a bug of the user's")));
    assert_eq!(machine.read(3), 0, "the thread goes on");
    machine.wait("it is said", |m| m.caught.1.lock().len() == 1);
    let said = machine.caught.1.lock().remove(0);
    assert!(
        said.contains("panicked") && said.contains("0x3000"),
        "{said}"
    );
    assert_eq!(machine.read(4), 0);
    assert_eq!(machine.caught.0.lock().len(), 2);
    machine.wait("the pages are given back", |m| m.allocated() == 0);
}

#[test]
fn a_listener_may_look_and_not_convert_when_it_is_told_of_a_stray() {
    let machine = Machine::new(Discard::Now);
    let Some(guard) = machine.guard() else {
        return;
    };
    machine.convert(3, 1, View::Private);
    let (vm, backend) = (machine.vm.clone(), machine.backend.clone());
    let answers = Arc::new(Mutex::new(None));
    let given = answers.clone();
    machine.at_stray(move || {
        let other = vm.hold(&backend, page(9)).map(drop);
        let at = GuestPages::from_bytes(GPA + 9 * PAGE_SIZE, PAGE_SIZE).unwrap();
        let converted = vm.convert(at, View::Private).map(drop);
        let freed = vm.free_pages(&backend, page(9));
        let state = backend.state(3);
        // A guard may be let go of as well.
        drop(guard);
        *given.lock() = Some((other, converted, freed, state));
    });
    assert_eq!(machine.read(3), 0);
    machine.wait("the listener is done", |_| answers.lock().is_some());
    let answers = answers.lock().take().unwrap();
    assert!(
        matches!(
            answers,
            (
                Ok(()),
                Err(Error::InCallback),
                Err(Error::InCallback),
                PageState::Private
            )
        ),
        "{answers:?}"
    );
}

#[test]
fn a_backend_of_another_vm_is_not_guarded() {
    let [one, two] = [(); 2].map(|()| Machine::new(Discard::Now));
    // SAFETY: the mapping lives as long as the machine.
    let guard = unsafe { one.vm.guard(&two.backend, two.host.as_ptr().addr()) };
    assert!(matches!(guard, Err(Error::OtherVm { .. })), "{guard:?}");
}

#[test]
fn a_guard_that_could_not_do_its_work_is_refused() {
    let keep = Machine::new(Discard::Keep);
    let address = keep.host.as_ptr().addr();
    let error = keep.guard_at(address).unwrap_err();
    assert!(error.to_string().contains("discard=keep"), "{error}");

    let mut config = BackendConfig::new("ram", PAGES * PAGE_SIZE);
    config.start = PageState::Private;
    let launched = Machine::with(config);
    let address = launched.host.as_ptr().addr();
    let error = launched.guard_at(address).unwrap_err();
    assert!(error.to_string().contains("starts private"), "{error}");

    let machine = Machine::new(Discard::Now);
    let error = machine.guard_at(1 << 20).unwrap_err();
    assert!(error.to_string().contains("userfaultfd"), "{error}");
    let error = machine.guard_at(address + 1).unwrap_err();
    assert!(error.to_string().contains("userfaultfd"), "{error}");
}
