// SPDX-License-Identifier: GPL-2.0-or-later

//! Discards: in the conversion, coalesced, and of both views.

use guestmemfd::*;

use crate::fault::LASTING;
use crate::machine::*;

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
    machine.fault.arm_pair(1, LASTING);
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
