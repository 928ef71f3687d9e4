// SPDX-License-Identifier: MIT OR Apache-2.0

//! Lazy attributes, and what is allocated at once.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use guestmemfd::owner::SoftwareOwner;
use guestmemfd::*;
use proptest::prelude::*;

use crate::machine::*;
use crate::mapper::*;
use crate::request::*;

/// What guest and host do to memory with lazy attributes.
#[derive(Clone, Debug)]
enum Use {
    /// A private touch of a guest page.
    Touch(u64),
    /// The same, and another vCPU uses a page of the backend, in one of the views, as soon as the
    /// attribute has been set.
    TouchWhile(u64, u64, View),
    /// The host or the guest writes to a page of the shared view, if it may.
    WriteShared(u64),
    Ask(Request),
}

fn touched() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..16, 20u64..28]
}

fn view() -> impl Strategy<Value = View> {
    prop_oneof![Just(View::Shared), Just(View::Private)]
}

fn uses() -> impl Strategy<Value = Use> {
    prop_oneof![
        4 => touched().prop_map(Use::Touch),
        4 => (touched(), 0..PAGES, view()).prop_map(|(touched, other, view)| {
            Use::TouchWhile(touched, other, view)
        }),
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
        listens in any::<bool>(),
    ) {
        let machine = match listens {
            true => Machine::lazy_with_listener(Discard::Now),
            false => Machine::lazy(Discard::Now),
        };
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
                    machine.vm.free_pages(&machine.backend, pages).unwrap();
                }
                Use::TouchWhile(guest_page, other, view) => {
                    let (touched, _) = at(guest_page).unwrap();
                    let stored = machine.another_vcpu_stores(other, view, number);
                    machine.vm.memory_fault(guest_page * PAGE_SIZE, PAGE_SIZE, View::Private).unwrap();
                    machine.fault.nobody_acts();
                    let exposed = machine.exposed();
                    for page in (0..PAGES).filter(|page| *page != touched) {
                        let expected = match page == other && stored.load(SeqCst) {
                            true => number,
                            false => data[page as usize],
                        };
                        prop_assert_eq!(exposed[page as usize], expected, "page {}", page);
                    }
                    machine.forgive_listener();
                }
                Use::Touch(guest_page) => {
                    let (touched, _) = at(guest_page).unwrap();
                    machine.fault.arm(nth);
                    let result = machine.vm.memory_fault(guest_page * PAGE_SIZE, PAGE_SIZE, View::Private);
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
                        machine.vm.memory_fault(at * PAGE_SIZE, PAGE_SIZE, View::Shared).unwrap();
                    }
                    machine.forgive_listener();
                }
            }
            machine.check_invariants();
        }
    }
}

#[test]
fn a_private_touch_decides_the_chunk_around_it() {
    let machine = Machine::lazy(Discard::Now);
    touch(&machine, 3);
    let states = machine
        .backend
        .state_map(machine.backend.pages(), usize::MAX)
        .runs;
    assert_eq!(
        states,
        [
            (file(0, 8), PageState::Private),
            (file(8, 24), PageState::Undecided)
        ]
    );
    let stats = machine.backend.stats();
    assert_eq!(stats.converted_to_private, PAGE_SIZE);
    assert_eq!(stats.converted_neighbours, 7 * PAGE_SIZE);
    machine.check_invariants();
}

#[test]
fn a_chunk_ends_at_pages_that_are_in_use_as_shared() {
    let machine = Machine::lazy(Discard::Now);
    machine.write(View::Shared, 5, 42);
    touch(&machine, 3);
    assert_eq!(machine.states()[5], PageState::Undecided);
    assert_eq!(machine.exposed()[5], 42);
    assert_eq!(machine.states()[4], PageState::Private);
    assert_eq!(machine.states()[6], PageState::Undecided);
    machine.check_invariants();
}

#[test]
fn what_another_vcpu_stores_privately_while_a_chunk_is_decided_stays() {
    let machine = Machine::lazy(Discard::Now);
    // A kernel that the host has loaded there, long read.
    machine.write(View::Shared, 5, 42);
    let stored = machine.another_vcpu_stores(5, View::Private, 7);
    touch(&machine, 3);
    assert!(!stored.load(SeqCst), "the store is an exit of its own");
    let stored = machine.another_vcpu_stores(12, View::Private, 7);
    touch(&machine, 10);
    assert!(stored.load(SeqCst));
    assert_eq!(machine.exposed()[12], 7);
}

#[test]
fn pages_that_come_into_use_as_shared_meanwhile_become_shared_again() {
    let machine = Machine::lazy(Discard::Now);
    let stored = machine.another_vcpu_stores(5, View::Shared, 7);
    touch(&machine, 3);
    assert!(stored.load(SeqCst));
    assert_eq!(machine.states()[5], PageState::Shared);
    assert_eq!(machine.exposed()[5], 7);
    assert_eq!(machine.states()[6], PageState::Private);
    machine.check_invariants();
}

#[test]
fn where_somebody_listens_a_private_touch_decides_its_page_alone() {
    let machine = Machine::lazy_with_listener(Discard::Now);
    touch(&machine, 3);
    let states = machine
        .backend
        .state_map(machine.backend.pages(), usize::MAX)
        .runs;
    assert_eq!(
        states,
        [
            (file(0, 3), PageState::Undecided),
            (file(3, 4), PageState::Private),
            (file(4, 24), PageState::Undecided)
        ]
    );
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
        .memory_fault(4 * PAGE_SIZE, PAGE_SIZE, View::Shared)
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
    // Calls: two looks for data, then the attribute.
    machine.fault.arm(3);
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
fn a_neighbour_that_owes_a_hole_keeps_no_touched_page_waiting() {
    let machine = Machine::lazy(Discard::Now);
    machine.vm.convert(guest(5, 6), View::Private).unwrap();
    // Calls: the punch of the shared view, two windows, then the punch of the private view.
    machine.fault.arm(4);
    machine.vm.free_pages(&machine.backend, file(5, 6)).unwrap();
    assert_eq!(machine.backend.stats().owed_holes, PAGE_SIZE);
    // Calls: two looks for data, then the hole that is owed.
    machine.fault.arm(3);
    touch(&machine, 3);
    assert_eq!(machine.states()[3], PageState::Private);
    assert_eq!(machine.states()[5], PageState::Undecided);
    machine.check_invariants();
}

#[test]
fn lazy_attributes_need_pages_that_start_undecided() {
    let owner = Arc::new(SoftwareOwner::default());
    let vm = Vm::new(owner, Box::new(MapperHandle(Arc::default())));
    let mut config = BackendConfig::new("ram", PAGE_SIZE);
    config.start = PageState::Private;
    config.lazy = Lazy::On(backend::reach::Chunk::default());
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
