// SPDX-License-Identifier: GPL-2.0-or-later

//! A request takes a bounded amount of memory, and does a bounded amount of work between two looks
//! at an interruption, however the guest has scattered the states of its pages. What is counted here
//! is timed by `cargo bench --bench bounds`.

#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

mod null;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use guestmemfd::{Backend, Error, FilePages, GuestPages, Listener, PAGE_SIZE, PageState, View, Vm};
use null::{Calls, NullOwner};

/// 256 MiB. A list of all their runs would take more than may be taken.
const PAGES: u64 = 1 << 16;
/// Runs of states that a step of a request may have.
const RUNS: u64 = 1024;
/// A step sets an attribute and punches a hole for each run that moves.
const CALLS: u64 = 2 * RUNS;
/// Pages that a step may claim: 64 MiB.
const STEP_PAGES: u64 = 1 << 14;
const MIB: u64 = 1 << 20;

/// What a request does between two looks at `interrupted`.
#[derive(Default)]
struct Watch {
    calls: Arc<Calls>,
    calls_before: AtomicU64,
    most_calls: AtomicU64,
    looks: AtomicU64,
    is_interrupted: AtomicBool,
}

struct User(Arc<Watch>);

impl Listener for User {
    fn interrupted(&self) -> bool {
        let watch = &self.0;
        let calls = watch.calls.count.load(Relaxed);
        let before = watch.calls_before.swap(calls, Relaxed);
        watch.most_calls.fetch_max(calls - before, Relaxed);
        watch.looks.fetch_add(1, Relaxed);
        watch.is_interrupted.load(Relaxed)
    }
}

struct Machine {
    vm: Vm,
    backend: Arc<Backend>,
    watch: Arc<Watch>,
}

impl Machine {
    fn new(pages: u64) -> Self {
        let watch = Arc::new(Watch::default());
        let user = Box::new(User(watch.clone()));
        let (vm, backend) = null::machine(pages, watch.calls.clone(), user).unwrap();
        Self { vm, backend, watch }
    }

    /// Every second page is private.
    fn scattered(pages: u64) -> Self {
        let machine = Self::new(pages);
        null::scatter(&machine.vm, all(pages), View::Private).unwrap();
        machine.start_over();
        machine
    }

    /// What has been counted so far does not count.
    fn start_over(&self) {
        let watch = &self.watch;
        watch.calls_before.store(self.calls(), Relaxed);
        watch.most_calls.store(0, Relaxed);
        watch.looks.store(0, Relaxed);
    }

    fn calls(&self) -> u64 {
        self.watch.calls.count.load(Relaxed)
    }

    /// How often the user has been looked at, and the most that was done before each look.
    fn looks(&self) -> (u64, u64) {
        (
            self.watch.looks.load(Relaxed),
            self.watch.most_calls.load(Relaxed),
        )
    }

    fn pages_in(&self, state: PageState) -> u64 {
        self.backend.stats().state_bytes[state as usize] / PAGE_SIZE
    }
}

fn all(pages: u64) -> GuestPages {
    GuestPages::new(0, pages).unwrap()
}

/// The most memory that this thread has had more than at the start.
fn heap(act: impl FnOnce()) -> u64 {
    allocation_counter::measure(act).bytes_max
}

#[test]
fn a_request_takes_little_memory_and_looks_for_an_interruption_after_each_step() {
    for to in View::BOTH {
        let machine = Machine::scattered(PAGES);
        let heap = heap(|| {
            machine.vm.convert(all(PAGES), to).unwrap();
        });
        assert!(heap <= MIB, "{heap} bytes of heap to {to}");
        assert_eq!(machine.pages_in(to.into()), PAGES);
        let (looks, most) = machine.looks();
        assert_eq!(looks, PAGES / RUNS - 1, "the last step needs no look");
        assert!(most <= CALLS, "{most} calls without a look, to {to}");
    }
}

#[test]
fn an_interrupted_request_has_done_its_first_step_and_goes_on_behind_it() {
    let machine = Machine::scattered(PAGES);
    machine.watch.is_interrupted.store(true, Relaxed);
    let error = machine.vm.convert(all(PAGES), View::Private).unwrap_err();
    assert!(matches!(error, Error::Interrupted { .. }), "{error}");
    assert_eq!(machine.pages_in(PageState::Private), PAGES / 2 + RUNS / 2);
    assert_eq!(machine.pages_in(PageState::Transition), 0);
    machine.watch.is_interrupted.store(false, Relaxed);
    let changed = machine.vm.convert(all(PAGES), View::Private).unwrap();
    assert_eq!(changed, PAGES / 2 - RUNS / 2);
}

#[test]
fn a_step_of_pages_that_are_alike_is_64_mib() {
    let pages = 3 * STEP_PAGES + 1;
    let machine = Machine::new(pages);
    machine.start_over();
    assert_eq!(
        machine.vm.convert(all(pages), View::Private).unwrap(),
        pages
    );
    assert_eq!(machine.looks(), (3, 2));
}

/// Who waits for a page waits for the step that it is in.
#[test]
fn a_step_has_few_pages_in_transition() {
    /// The most pages that were in transition.
    struct Mapper(Arc<AtomicU64>);

    impl Listener for Mapper {
        fn begin(&self) -> bool {
            true
        }

        fn unmap(&self, backend: &Backend, _: FilePages) {
            let moving = backend.stats().state_bytes[PageState::Transition as usize];
            self.0.fetch_max(moving / PAGE_SIZE, Relaxed);
        }
    }

    let most = Arc::new(AtomicU64::new(0));
    let mapper = Box::new(Mapper(most.clone()));
    let (vm, _backend) = null::machine(PAGES, Arc::default(), mapper).unwrap();
    null::scatter(&vm, all(PAGES), View::Private).unwrap();
    vm.convert(all(PAGES), View::Private).unwrap();
    assert_eq!(most.load(Relaxed), RUNS / 2);
}

#[test]
fn all_that_is_private_is_freed_without_a_call_for_each_page() {
    let machine = Machine::scattered(PAGES);
    let before = machine.calls();
    let heap = heap(|| machine.vm.free_private(&machine.backend).unwrap());
    assert_eq!(
        machine.calls() - before,
        2 * PAGES / STEP_PAGES,
        "an attribute and a hole for each step"
    );
    assert!(heap <= MIB, "{heap} bytes of heap");
    assert_eq!(machine.pages_in(PageState::Private), 0);
}

#[test]
fn a_new_owner_walks_no_runs() {
    let machine = Machine::scattered(PAGES);
    machine.vm.remove_window(all(PAGES)).unwrap();
    let before = machine.calls();
    let owner = Arc::new(NullOwner(machine.watch.calls.clone()));
    let heap = heap(|| machine.vm.rebind(owner).unwrap());
    assert!(
        machine.calls() - before <= 1,
        "{} calls",
        machine.calls() - before
    );
    assert!(heap <= MIB, "{heap} bytes of heap");
    assert_eq!(machine.pages_in(PageState::Undecided), PAGES);
}
