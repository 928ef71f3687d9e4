// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pins against conversions.

#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use guestmemfd::backend::Backend;
use guestmemfd::backend::reach::Chunk;
use guestmemfd::owner::SoftwareOwner;
use guestmemfd::{
    BackendConfig, Binding, Error, FilePages, GuestPages, Lazy, Listener, PageState, View, Vm,
};

const PAGES: u64 = 4096;

#[derive(Clone, Default)]
struct User {
    kicked: Arc<AtomicBool>,
}

impl Listener for User {
    fn gap(&self, _: GuestPages, _: View) -> io::Result<()> {
        Err(io::ErrorKind::InvalidInput.into())
    }

    fn interrupted(&self) -> bool {
        self.kicked.load(Ordering::Relaxed)
    }
}

struct Machine {
    vm: Vm,
    backend: Arc<Backend>,
    user: User,
}

impl Machine {
    fn new(convert_timeout: Duration) -> Self {
        let user = User::default();
        let vm = Vm::new(Arc::new(SoftwareOwner::default()), Box::new(user.clone()));
        let mut config = BackendConfig::new("ram", PAGES * guestmemfd::PAGE_SIZE);
        config.lazy = Lazy::On(Chunk::default());
        config.convert_timeout = convert_timeout;
        let backend = vm.create_backend(config).unwrap();
        vm.add_window(&backend, guest(0, PAGES), 0, Binding::Bound)
            .unwrap();
        Self { vm, backend, user }
    }

    fn state(&self, page: u64) -> PageState {
        self.backend
            .state_map(file(page, page + 1), usize::MAX)
            .runs[0]
            .1
    }

    fn pin(&self, pages: FilePages) -> guestmemfd::Result<()> {
        self.vm.pin(&self.backend, pages)
    }

    fn touch(&self, page: u64) -> guestmemfd::Result<u64> {
        let size = guestmemfd::PAGE_SIZE;
        self.vm.memory_fault(page * size, size, View::Private)
    }
}

fn guest(start: u64, end: u64) -> GuestPages {
    GuestPages::new(start, end).unwrap()
}

fn file(start: u64, end: u64) -> FilePages {
    FilePages::new(start, end).unwrap()
}

const SHORT: Duration = Duration::from_millis(20);
const LONG: Duration = Duration::from_secs(60);

#[test]
fn the_last_unpin_lets_a_waiting_conversion_go_on() {
    let machine = Machine::new(LONG);
    for _ in 0..2 {
        machine.pin(file(8, 16)).unwrap();
    }
    thread::scope(|scope| {
        let vcpu = scope.spawn(|| machine.vm.convert(guest(0, 32), View::Private));
        while machine.backend.stats().waits == 0 {
            thread::yield_now();
        }
        machine.backend.unpin(file(8, 16)).unwrap();
        thread::sleep(SHORT);
        assert!(!vcpu.is_finished(), "one of two pins is left");
        assert_eq!(machine.state(0), PageState::Undecided);
        machine.backend.unpin(file(8, 16)).unwrap();
        assert_eq!(vcpu.join().unwrap().unwrap(), 32);
    });
    assert_eq!(machine.state(8), PageState::Private);
}

#[test]
fn a_conversion_that_waits_holds_up_no_other() {
    let machine = Machine::new(LONG);
    machine.pin(file(8, 9)).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| machine.vm.convert(guest(0, 32), View::Private).unwrap());
        while machine.backend.stats().waits == 0 {
            thread::yield_now();
        }
        assert_eq!(machine.vm.convert(guest(0, 8), View::Private).unwrap(), 8);
        machine.pin(file(9, 10)).unwrap();
        machine.backend.unpin(file(9, 10)).unwrap();
        machine.backend.unpin(file(8, 9)).unwrap();
    });
    assert_eq!(machine.state(31), PageState::Private);
}

#[test]
fn a_request_whose_pages_stay_pinned_changes_nothing() {
    let machine = Machine::new(SHORT);
    machine.pin(file(8, 9)).unwrap();
    let start = Instant::now();
    let error = machine.vm.convert(guest(0, 32), View::Private).unwrap_err();
    assert!(start.elapsed() >= SHORT);
    assert!(matches!(error, Error::Pinned { pages, .. } if pages == file(8, 9)));
    assert!((0..32).all(|page| machine.state(page) == PageState::Undecided));
}

#[test]
fn a_touch_of_a_pinned_page_waits_and_is_tried_again_by_the_guest() {
    let machine = Machine::new(SHORT);
    machine.pin(file(8, 9)).unwrap();
    assert_eq!(machine.touch(8).unwrap(), 0);
    assert_eq!(machine.state(8), PageState::Undecided);
    machine.backend.unpin(file(8, 9)).unwrap();
    assert_eq!(machine.touch(8).unwrap(), 1);
    assert_eq!(machine.state(8), PageState::Private);
}

#[test]
fn a_chunk_that_is_decided_ends_at_pinned_pages() {
    let machine = Machine::new(SHORT);
    for pinned in [file(2, 4), file(5, 6), file(20, 21), file(30, 40)] {
        machine.pin(pinned).unwrap();
    }
    assert_eq!(machine.touch(8).unwrap(), 1);
    for page in 0..64 {
        let expected = match page {
            6..20 => PageState::Private,
            _ => PageState::Undecided,
        };
        assert_eq!(machine.state(page), expected, "page {page}");
    }
}

#[test]
fn a_wait_for_pins_can_be_interrupted() {
    let machine = Machine::new(LONG);
    machine.pin(file(8, 9)).unwrap();
    machine.user.kicked.store(true, Ordering::Relaxed);
    let error = machine.vm.convert(guest(8, 9), View::Private).unwrap_err();
    assert!(matches!(error, Error::Interrupted { .. }));
}

#[test]
fn private_pages_are_not_pinned_and_their_neighbours_are() {
    let machine = Machine::new(SHORT);
    machine.vm.convert(guest(8, 9), View::Private).unwrap();
    let refused = machine.pin(file(7, 9)).unwrap_err();
    assert!(matches!(refused, Error::NotShared { .. }));
    machine.pin(file(7, 8)).unwrap();
    let again = machine.backend.unpin(file(7, 9)).unwrap_err();
    assert!(matches!(again, Error::NotPinned { .. }));
    machine.backend.unpin(file(7, 8)).unwrap();
}

/// What is in use as shared stays so when pages around it are decided, and can be pinned meanwhile.
#[test]
fn a_pin_waits_for_a_conversion_that_leaves_the_page_shared() {
    let machine = Machine::new(LONG);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                machine
                    .vm
                    .free_pages(&machine.backend, file(0, 64))
                    .unwrap();
                machine.vm.write(8 << 12, b"data").unwrap();
                machine.touch(3).unwrap();
            }
        });
        for _ in 0..10_000 {
            machine.pin(file(8, 9)).unwrap();
            machine.backend.unpin(file(8, 9)).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(machine.backend.stats().pinned, 0);
}

#[test]
fn pages_pinned_very_often_do_not_become_private() {
    let machine = Machine::new(SHORT);
    let chunk = file(1024, 2048);
    (0..1 << 22).for_each(|_| machine.pin(chunk).unwrap());
    let wanted = guest(1500, 1501);
    machine.vm.convert(wanted, View::Private).unwrap_err();
    (0..1 << 22).for_each(|_| machine.backend.unpin(chunk).unwrap());
    machine.vm.convert(wanted, View::Private).unwrap();
}

/// Whoever holds a pin must find the page shared as long as it does.
#[test]
fn pins_and_conversions_that_race_never_both_have_a_page() {
    let machine = Machine::new(LONG);
    let pages = file(100, 104);
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    if machine.pin(pages).is_ok() {
                        for (_, state) in machine.backend.state_map(pages, usize::MAX).runs {
                            assert_ne!(state, PageState::Private);
                        }
                        machine.backend.unpin(pages).unwrap();
                    }
                    thread::yield_now();
                }
            });
        }
        for _ in 0..2000 {
            for to in [View::Private, View::Shared] {
                machine.vm.convert(guest(101, 103), to).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(machine.pin(pages).is_ok());
}
