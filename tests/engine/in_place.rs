// SPDX-License-Identifier: MIT OR Apache-2.0

//! Conversions in place, in one file that keeps the attributes of its pages: against a plain model,
//! with every call failing in turn, and with pages that somebody holds.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use guestmemfd::owner::SoftwareOwner;
use guestmemfd::*;
use proptest::prelude::*;

use crate::fault::{FaultyOwner, LASTING};
use crate::machine::*;
use crate::request::*;

/// What the file holds, page by page.
fn bytes(machine: &Machine) -> Vec<u8> {
    (0..PAGES)
        .map(|page| machine.read(View::Shared, page))
        .collect()
}

fn fill(machine: &Machine) -> Vec<u8> {
    for page in 0..PAGES {
        machine.write(View::Shared, page, 1 + page as u8);
    }
    bytes(machine)
}

pub(crate) fn check(machine: &Machine) {
    let attributes = machine.fault.file_attributes();
    for (page, state) in machine.states().into_iter().enumerate() {
        let (private, usable) = match state {
            PageState::Private => (true, false),
            PageState::Transition => panic!("page {page} is in transition"),
            PageState::Undecided | PageState::Shared => (false, true),
        };
        assert_eq!(attributes[page], private, "attribute of page {page}");
        assert_eq!(machine.mapper.mapped.lock()[page], usable, "page {page}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Each request runs with its n-th call failing (0: none). Either all of it takes effect or none
    /// of it; data stay where they are unless they are freed.
    #[test]
    fn a_request_takes_effect_as_a_whole_and_data_stay(
        requests in prop::collection::vec((request(), 0u64..6), 1..25),
    ) {
        let machine = Machine::in_place();
        for (request, nth) in requests {
            let before = machine.states();
            let data = fill(&machine);
            let expected = expect(&before, &request);
            machine.fault.arm(nth);
            let result = match &request {
                Request::Convert(guest, to) => machine.vm.convert(*guest, *to).map(drop),
                Request::Discard(pages) => machine.vm.free_pages(&machine.backend, *pages),
            };
            let hit = nth != 0 && machine.fault.left() == 0;
            machine.fault.arm(0);
            check(&machine);
            let after = machine.states();
            match result {
                Ok(()) => {
                    prop_assert_eq!(Some(&after), expected.as_ref());
                    for page in 0..PAGES {
                        let freed = matches!(&request, Request::Discard(p) if p.contains(page));
                        let byte = if freed { 0 } else { data[page as usize] };
                        prop_assert_eq!(machine.read(View::Shared, page), byte, "page {}", page);
                    }
                }
                Err(error) => {
                    prop_assert!(hit || expected.is_none(), "{} though nothing failed", error);
                    if let Request::Convert(..) = request {
                        prop_assert_eq!(&after, &before);
                        prop_assert_eq!(bytes(&machine), data);
                    }
                }
            }
        }
    }
}

#[test]
fn a_page_that_is_held_for_a_moment_costs_no_wait() {
    let machine = Machine::in_place();
    machine.fault.hold(5, 2);
    assert_eq!(machine.vm.convert(guest(3, 8), View::Private).unwrap(), 5);
    assert_eq!(machine.backend.stats().waits, 0);
    check(&machine);
}

#[test]
fn a_page_that_is_held_longer_is_waited_for() {
    let machine = Machine::in_place();
    machine.fault.hold(5, 30);
    assert_eq!(machine.vm.convert(guest(3, 8), View::Private).unwrap(), 5);
    assert_eq!(machine.backend.stats().waits, 1);
    check(&machine);
}

#[test]
fn a_page_that_is_held_for_ever_is_named_and_all_is_as_it_was() {
    let machine = Machine::in_place_waiting(Duration::from_millis(30));
    let data = fill(&machine);
    machine.fault.hold(5, LASTING);
    let error = machine.vm.convert(guest(3, 8), View::Private).unwrap_err();
    assert!(
        matches!(error, Error::Held { offset: 0x5000, .. }),
        "{error}"
    );
    assert!(error.to_string().contains("0x5000"), "{error}");
    assert_eq!(error.errno(), rustix::io::Errno::BUSY.raw_os_error());
    check(&machine);
    assert_eq!(bytes(&machine), data);
    // The tries are bounded: a few at once, then fewer and fewer.
    assert!(
        machine.fault.refusals() < 60,
        "{}",
        machine.fault.refusals()
    );
    assert_eq!(machine.vm.convert(guest(6, 8), View::Private).unwrap(), 2);
    // A fault waits as well, and comes again.
    let touched = machine
        .vm
        .memory_fault(5 * PAGE_SIZE, PAGE_SIZE, View::Private);
    assert_eq!(touched.unwrap(), 0);
}

#[test]
fn a_wait_for_a_page_that_is_held_can_be_interrupted() {
    let machine = Machine::in_place_waiting(Duration::from_secs(60));
    machine.fault.hold(5, LASTING);
    machine.mapper.interrupts.store(true, SeqCst);
    let error = machine.vm.convert(guest(5, 6), View::Private).unwrap_err();
    assert!(matches!(error, Error::Interrupted { .. }), "{error}");
    check(&machine);
}

#[test]
fn a_listener_that_cannot_map_leaves_the_page_private() {
    let machine = Machine::in_place();
    let data = fill(&machine);
    machine.vm.convert(guest(2, 4), View::Private).unwrap();
    // Calls: the attribute, then the listener.
    machine.fault.arm(2);
    let error = machine.vm.convert(guest(2, 4), View::Shared).unwrap_err();
    assert!(matches!(error, Error::Listener { .. }), "{error}");
    check(&machine);
    assert_eq!(bytes(&machine), data);
    // Where the attribute cannot be set back, the next conversion does it.
    machine.fault.arm_pair(2, LASTING);
    machine.vm.convert(guest(2, 4), View::Shared).unwrap_err();
    machine.fault.arm(0);
    machine.vm.convert(guest(2, 4), View::Shared).unwrap();
    check(&machine);
}

#[test]
fn pages_that_show_unbound_do_not_become_private() {
    let machine = Machine::in_place();
    let unbound = guest(300, 304);
    let add = machine
        .vm
        .add_window(&machine.backend, unbound, 0, Binding::Unbound);
    assert_eq!(add.unwrap(), Binding::Unbound);
    let error = machine.vm.convert(guest(2, 8), View::Private).unwrap_err();
    assert!(matches!(error, Error::ShownUnbound { .. }), "{error}");
    assert!(error.to_string().contains("0x12e000"), "{error}");
    machine.vm.convert(guest(4, 8), View::Private).unwrap();
    machine.vm.remove_window(unbound).unwrap();
    machine.vm.clear_stale_windows().unwrap();
    machine.vm.convert(guest(2, 4), View::Private).unwrap();
    check(&machine);
}

#[test]
fn windows_come_and_go_without_a_call() {
    let machine = Machine::in_place();
    machine.vm.convert(guest(2, 8), View::Private).unwrap();
    machine.fault.arm(1);
    let low = guest(LOW, LOW + 16);
    machine.vm.remove_window(low).unwrap();
    machine.vm.clear_stale_windows().unwrap();
    let back = machine
        .vm
        .add_window(&machine.backend, low, 0, Binding::Bound);
    assert_eq!(back.unwrap(), Binding::Bound);
    assert_eq!(machine.fault.left(), 1, "nothing was called");
    check(&machine);
}

#[test]
fn what_is_private_is_freed_and_what_is_shared_keeps_its_data() {
    let machine = Machine::in_place();
    machine.vm.convert(guest(2, 6), View::Private).unwrap();
    machine.vm.convert(guest(4, 5), View::Shared).unwrap();
    let data = fill(&machine);
    machine.vm.free_private(&machine.backend).unwrap();
    check(&machine);
    for page in 0..PAGES {
        let freed = [2, 3, 5].contains(&page);
        let byte = if freed { 0 } else { data[page as usize] };
        assert_eq!(machine.read(View::Shared, page), byte, "page {page}");
    }
    assert_eq!(machine.backend.stats().state_bytes[2], 0);
}

#[test]
fn under_a_new_owner_there_is_a_new_file_with_what_was_shared() {
    let machine = Machine::in_place();
    let data = fill(&machine);
    machine.vm.convert(guest(2, 6), View::Private).unwrap();
    for (start, end) in [(LOW, LOW + 16), (HIGH, HIGH + 8), (ALIAS, ALIAS + 8)] {
        machine.vm.remove_window(guest(start, end)).unwrap();
    }
    let owner = Arc::new(SoftwareOwner::in_place());
    let owner = FaultyOwner(owner, machine.fault.clone());
    machine.vm.rebind(Arc::new(owner)).unwrap();
    for page in 0..PAGES {
        let gone = (2..6).contains(&page);
        let byte = if gone { 0 } else { data[page as usize] };
        assert_eq!(machine.read(View::Shared, page), byte, "page {page}");
    }
    check(&machine);
}

/// Which call fails does not matter: nothing has started over.
#[test]
fn what_cannot_be_copied_to_a_new_file_stays_where_it_is() {
    for nth in 1.. {
        let machine = Machine::in_place();
        let data = fill(&machine);
        for (start, end) in [(LOW, LOW + 16), (HIGH, HIGH + 8), (ALIAS, ALIAS + 8)] {
            machine.vm.remove_window(guest(start, end)).unwrap();
        }
        let owner = Arc::new(SoftwareOwner::in_place());
        let owner = FaultyOwner(owner, machine.fault.clone());
        machine.fault.arm(nth);
        let result = machine.vm.rebind(Arc::new(owner));
        let hit = machine.fault.left() == 0;
        machine.fault.arm(0);
        assert_eq!(bytes(&machine), data, "call {nth}: {result:?}");
        if !hit {
            assert!(nth > 2, "no call has failed");
            return result.unwrap();
        }
        result.unwrap_err();
    }
}

#[test]
fn memory_that_starts_private_takes_no_call() {
    let vm = Vm::new(Arc::new(SoftwareOwner::in_place()), Box::new(Nobody));
    let mut config = BackendConfig::new("ram", 1 << 40);
    config.start = PageState::Private;
    let backend = vm.create_backend(config).unwrap();
    assert_eq!(backend.mode(), Mode::InPlace);
    let all = guest(0, backend.pages().count());
    vm.add_window(&backend, all, 0, Binding::Bound).unwrap();
    assert!(vm.read(0, &mut [0]).is_err(), "the host has nothing in it");
    vm.convert(guest(0, 1), View::Shared).unwrap();
    vm.write(0, &[7]).unwrap();
}

struct Nobody;

impl Listener for Nobody {}

#[test]
fn what_cannot_be_had_in_place_is_refused_with_what_works() {
    let refused = |owner: SoftwareOwner, change: &dyn Fn(&mut BackendConfig)| {
        let vm = Vm::new(Arc::new(owner), Box::new(Nobody));
        let mut config = BackendConfig::new("ram", PAGE_SIZE);
        change(&mut config);
        vm.create_backend(config).unwrap_err().to_string()
    };
    let lazy = refused(SoftwareOwner::in_place(), &|config| {
        config.lazy = Lazy::On(backend::reach::Chunk::default());
    });
    assert!(lazy.contains("use lazy-attributes=auto"), "{lazy}");
    let keep = refused(SoftwareOwner::in_place(), &|config| {
        config.discard = Discard::Keep
    });
    assert!(keep.contains("use discard=now"), "{keep}");
    let without = refused(SoftwareOwner::default(), &|config| {
        config.mode = Some(Mode::InPlace)
    });
    assert!(
        without.contains("mode=in-place is not possible"),
        "{without}"
    );
    let mapped = refused(SoftwareOwner::in_place(), &|config| {
        config.mode = Some(Mode::Mapped);
        config.confidential = true;
    });
    assert!(mapped.contains("the guest is confidential"), "{mapped}");
}
