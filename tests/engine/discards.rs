// SPDX-License-Identifier: MIT OR Apache-2.0

//! What pages leave behind: freed in the conversion, owed, or kept; and memory that is freed.

use guestmemfd::*;

use crate::machine::*;

#[test]
fn what_is_owed_is_tried_again_hole_by_hole() {
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
    assert_eq!(machine.backend.stats().owed_holes, 2 * PAGE_SIZE);
    machine.fault.arm(1);
    let error = machine.vm.punch_owed().unwrap_err();
    assert!(matches!(error, Error::Punch { .. }), "{error}");
    assert_eq!(machine.backend.stats().owed_holes, PAGE_SIZE);
    machine.vm.punch_owed().unwrap();
    machine.check_invariants();
}

#[test]
fn freeing_pages_empties_both_views_whatever_the_policy_keeps() {
    let machine = Machine::with(Discard::Keep, PageState::Undecided);
    let (kept, page) = (guest(0, 1), 0);
    machine.write(View::Shared, page, 1);
    machine.vm.convert(kept, View::Private).unwrap();
    machine.write(View::Private, page, 2);
    assert_eq!(machine.read(View::Shared, page), 1, "kept");
    machine.vm.free_pages(&machine.backend, file(0, 2)).unwrap();
    assert!(machine.is_hole(View::Shared, page));
    assert!(machine.is_hole(View::Private, page));
}

/// Shared data, private data, and pages that nobody has touched.
fn mixed(machine: &Machine) -> Vec<PageState> {
    machine.vm.convert(guest(2, 6), View::Private).unwrap();
    machine.vm.convert(guest(8, 9), View::Private).unwrap();
    machine.vm.convert(guest(4, 5), View::Shared).unwrap();
    machine.fill();
    machine.states()
}

#[test]
fn what_is_private_is_freed_and_what_is_shared_stays() {
    for discard in [Discard::Now, Discard::Keep] {
        for listens in [true, false] {
            let machine = match listens {
                true => Machine::lazy_with_listener(discard),
                false => Machine::lazy(discard),
            };
            let before = mixed(&machine);
            let data = machine.exposed();
            machine.vm.free_private(&machine.backend).unwrap();
            for (page, was) in (0..).zip(before) {
                let (expected, byte) = match was {
                    PageState::Private => (PageState::Undecided, 0),
                    was => (was, data[page]),
                };
                assert_eq!(machine.states()[page], expected, "page {page}");
                assert_eq!(machine.exposed()[page], byte, "page {page}");
                assert!(machine.is_hole(View::Private, page as u64), "page {page}");
            }
            machine.check_invariants();
        }
    }
}

#[test]
fn a_mapped_backend_has_nothing_private_to_free() {
    let vm = Machine::new().vm;
    let mut config = BackendConfig::new("mapped", 16 * PAGE_SIZE);
    config.mode = Some(Mode::Mapped);
    let backend = vm.create_backend(config).unwrap();
    backend
        .views()
        .file(View::Shared)
        .write_at(0, &[1])
        .unwrap();
    vm.free_private(&backend).unwrap();
    assert_eq!(backend.stats().shared_allocated, PAGE_SIZE);
}
