// SPDX-License-Identifier: MIT OR Apache-2.0

//! Windows, the states that pages start in, and new owners.

use std::sync::Arc;

use guestmemfd::owner::SoftwareOwner;
use guestmemfd::*;

use crate::fault::*;
use crate::machine::*;

#[test]
fn pages_that_start_private_have_their_attributes_and_no_host_mapping() {
    let machine = Machine::with(Discard::Now, PageState::Private);
    machine.check_invariants();
    assert!(!machine.vm.host_may_use(&machine.backend, file(3, 4)));
    machine.vm.convert(guest(3, 4), View::Shared).unwrap();
    assert!(machine.vm.host_may_use(&machine.backend, file(3, 4)));
    machine.check_invariants();
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
    let back = machine
        .vm
        .add_window(&machine.backend, low, 0, Binding::Bound);
    assert_eq!(back.unwrap(), Binding::Bound);
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
        .add_window(&machine.backend, elsewhere, 0, Binding::Bound)
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
        .add_window(&machine.backend, other, 0, Binding::Unbound)
        .unwrap_err();
    assert!(matches!(error, Error::SetAttributes { .. }), "{error}");
    assert!(!machine.vm.owns(other));
    machine.check_invariants();

    machine
        .vm
        .add_window(&machine.backend, other, 0, Binding::Unbound)
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

/// Windows of a machine, as it begins with them.
const WINDOWS: [(u64, u64); 3] = [(LOW, LOW + 16), (HIGH, HIGH + 8), (ALIAS, ALIAS + 8)];

fn remove_windows(machine: &Machine) {
    for (start, end) in WINDOWS {
        machine.vm.remove_window(guest(start, end)).unwrap();
    }
}

/// A backend of eight pages where the guest saw the first pages of another.
fn replace_backend(machine: &Machine) -> Arc<Backend> {
    let new = machine
        .vm
        .create_backend(BackendConfig::new("new", 8 * PAGE_SIZE));
    let new = new.unwrap();
    let low = guest(LOW, LOW + 8);
    machine.vm.add_window(&new, low, 0, Binding::Bound).unwrap();
    new
}

#[test]
fn attributes_of_a_backend_that_is_gone_are_cleared_when_the_kernel_serves_again() {
    let machine = Machine::new();
    machine.vm.convert(guest(2, 4), View::Private).unwrap();
    remove_windows(&machine);
    machine.fault.arm_pair(1, LASTING);
    machine.vm.remove_backend(&machine.backend).unwrap_err();
    machine.fault.arm(0);
    assert_eq!(machine.owner.view(2), View::Private, "the call has failed");
    let new = replace_backend(&machine);
    assert_eq!(machine.owner.view(2), View::Shared);
    machine
        .vm
        .memory_fault(2 * PAGE_SIZE, PAGE_SIZE, View::Shared)
        .unwrap();
    assert_eq!(new.state(2), PageState::Shared);
    machine.vm.clear_stale_windows().unwrap();
    assert_eq!(machine.owner.view(ALIAS + 2), View::Shared);
}

#[test]
fn attributes_in_doubt_do_not_outlive_their_windows() {
    let machine = Machine::new();
    // Calls: the attribute of the alias, of the window, and the one that would set the first back.
    machine.fault.arm_pair(2, LASTING);
    machine.vm.convert(guest(2, 3), View::Private).unwrap_err();
    machine.fault.arm(0);
    assert_eq!(machine.states()[2], PageState::Undecided);
    assert_eq!(
        machine.owner.view(ALIAS + 2),
        View::Private,
        "could not be set back"
    );
    remove_windows(&machine);
    machine.vm.clear_stale_windows().unwrap();
    assert_eq!(machine.owner.view(ALIAS + 2), View::Shared);
}

#[test]
fn a_new_owner_that_fails_leaves_listeners_with_what_they_had() {
    let machine = Machine::with(Discard::Now, PageState::Private);
    machine.vm.convert(guest(0, 8), View::Shared).unwrap();
    remove_windows(&machine);
    let owner = Arc::new(FaultyOwner(machine.owner.clone(), machine.fault.clone()));
    // Calls: the new private file, then the punch of the shared one.
    machine.fault.arm(2);
    let error = machine.vm.rebind(owner.clone()).unwrap_err();
    assert!(matches!(error, Error::Punch { .. }), "{error}");
    for (page, mapped) in machine.mapper.mapped.lock().iter().enumerate() {
        assert_eq!(
            *mapped,
            machine.states()[page].host_may_use(),
            "page {page}"
        );
    }
    machine.vm.rebind(owner).unwrap();
    assert!(!machine.mapper.mapped.lock().iter().any(|mapped| *mapped));
}
