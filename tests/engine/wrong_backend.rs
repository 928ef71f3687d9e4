// SPDX-License-Identifier: MIT OR Apache-2.0

//! Backends where they do not belong: with another VM, or with theirs after it has forgotten them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use guestmemfd::*;

use crate::machine::*;

/// Where neither machine has a window.
const ELSEWHERE: u64 = 500;

/// Two machines whose backends have the same number, and pages in other states.
fn two() -> (Machine, Machine) {
    let (one, other) = (Machine::new(), Machine::new());
    assert_eq!(one.backend.id(), other.backend.id());
    one.vm.convert(guest(9, 12), View::Private).unwrap();
    other.vm.convert(guest(2, 4), View::Private).unwrap();
    (one, other)
}

/// Uses a backend in every function of a VM that takes one, but `guard`, which has a test of its
/// own. None of it would be refused by the backend's own VM, but for `remove_backend`.
fn use_everywhere(machine: &Machine, backend: &Arc<Backend>) -> [Result<()>; 8] {
    let vm = &machine.vm;
    let (elsewhere, shared) = (guest(ELSEWHERE, ELSEWHERE + 16), file(6, 7));
    let mut states = Vec::new();
    states.extend(*b"gmfdsta1");
    states.extend([PAGES, PAGES << 2].into_iter().flat_map(u64::to_le_bytes));
    [
        vm.add_window(backend, elsewhere, 0, Binding::Unbound)
            .map(drop),
        vm.free_pages(backend, file(0, 16)),
        vm.free_private(backend),
        vm.pin(backend, shared),
        vm.hold(backend, shared).map(drop),
        vm.save_states(backend, &mut Vec::new()),
        vm.restore_states(backend, &mut states.as_slice()),
        vm.remove_backend(backend),
    ]
}

#[test]
fn a_backend_of_another_vm_is_refused_everywhere_and_nothing_changes() {
    let (one, other) = two();
    let seen = |machine: &Machine| {
        (
            machine.states(),
            machine.exposed(),
            machine.backend.stats(),
            format!("{:?}", machine.vm),
        )
    };
    for machine in [&one, &other] {
        machine.fill();
    }
    let before = [seen(&one), seen(&other)];
    for machine in [&one, &other] {
        machine.fault.arm(1);
    }
    for (number, refused) in (0..).zip(use_everywhere(&one, &other.backend)) {
        assert!(
            matches!(refused, Err(Error::OtherVm { .. })),
            "{number}: {refused:?}"
        );
    }
    assert!(!one.vm.host_may_use(&other.backend, file(6, 7)));
    for machine in [&one, &other] {
        assert_eq!(machine.fault.left(), 1, "nothing was called");
        machine.fault.arm(0);
        machine.check_invariants();
    }
    assert_eq!([seen(&one), seen(&other)], before);
}

/// What is refused above is not refused because it is wrong in itself.
#[test]
fn its_own_vm_accepts_a_backend_everywhere() {
    let (one, _) = two();
    let answers = use_everywhere(&one, &one.backend);
    for (number, answer) in (0..).zip(answers) {
        let in_use = number == 7 && matches!(answer, Err(Error::InUse { .. }));
        assert!(in_use || answer.is_ok(), "{number}: {answer:?}");
    }
    assert!(one.vm.host_may_use(&one.backend, file(6, 7)));
}

#[test]
fn a_backend_that_was_removed_is_not_shown_to_the_guest_again() {
    let machine = Machine::new();
    machine.vm.convert(guest(2, 4), View::Private).unwrap();
    for window in [
        guest(LOW, LOW + 16),
        guest(HIGH, HIGH + 8),
        guest(ALIAS, ALIAS + 8),
    ] {
        machine.vm.remove_window(window).unwrap();
    }
    machine.vm.remove_backend(&machine.backend).unwrap();
    let low = guest(LOW, LOW + 16);
    let added = machine
        .vm
        .add_window(&machine.backend, low, 0, Binding::Bound);
    assert!(matches!(added, Err(Error::Removed { .. })), "{added:?}");
    assert!(!machine.vm.owns(low));
    assert_eq!(machine.owner.view(2), View::Shared);
    // The place is free for another, whose pages the listener does not know.
    machine.mapper.absent.store(true, Ordering::SeqCst);
    let new = machine
        .vm
        .create_backend(BackendConfig::new("new", 16 * PAGE_SIZE))
        .unwrap();
    machine.vm.add_window(&new, low, 0, Binding::Bound).unwrap();
    machine.vm.convert(guest(2, 4), View::Private).unwrap();
    assert_eq!(new.state(2), PageState::Private);
}
