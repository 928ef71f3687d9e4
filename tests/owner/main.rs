// SPDX-License-Identifier: MIT OR Apache-2.0

//! What every owner must do, whoever it is: the same tests for KVM, with a guest of one CPU, and for
//! the software owner. Where KVM cannot run one it says so, or fails if `GUESTMEMFD_NEED_KVM` is set.

#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

#[cfg(target_arch = "x86_64")] // its guest is machine code
mod kvm;
mod machine;
mod software;
mod suite;

use guestmemfd::Mode;

/// The modes, and whether slots carry the file of mapped memory.
const PRIVATE: (Mode, bool) = (Mode::Private, false);
const IN_PLACE: (Mode, bool) = (Mode::InPlace, false);
const MAPPED: (Mode, bool) = (Mode::Mapped, false);
#[cfg(target_arch = "x86_64")]
const MAPPED_BOUND: (Mode, bool) = (Mode::Mapped, true);

#[test]
fn software_owner_private_memory() {
    suite::guest_and_host_match_a_plain_model(256, || software::machine(PRIVATE));
}

#[test]
fn software_owner_memory_in_place() {
    suite::guest_and_host_match_a_plain_model(256, || software::machine(IN_PLACE));
}

#[test]
fn software_owner_mapped_memory() {
    suite::guest_and_host_match_a_plain_model(64, || software::machine(MAPPED));
}

#[test]
#[cfg(target_arch = "x86_64")]
fn kvm_private_memory() {
    // A kernel has the one or the other.
    for mode in kvm::one_possible(&[PRIVATE, IN_PLACE]) {
        suite::guest_and_host_match_a_plain_model(16, || kvm::machine(mode).unwrap());
    }
}

/// As that of a guest whose firmware is measured. How large it is makes no difference: the file is
/// made like this.
#[test]
#[cfg(target_arch = "x86_64")]
fn kvm_memory_in_place_that_starts_private() {
    use guestmemfd::*;
    use std::sync::Arc;

    struct Silent;
    impl Listener for Silent {}

    if kvm::possible(&[IN_PLACE]).is_empty() {
        return;
    }
    let (owner, _vm) = kvm::owner(Mode::InPlace).unwrap();
    let vm = Vm::new(Arc::new(owner), Box::new(Silent));
    let mut config = BackendConfig::new("ram", 1 << 40);
    config.start = PageState::Private;
    let backend = vm.create_backend(config).unwrap();
    assert_eq!(backend.mode(), Mode::InPlace);
    let all = GuestPages::new(0, backend.pages().count()).unwrap();
    vm.add_window(&backend, all, 0, Binding::Bound).unwrap();
    let last = GuestPages::new(all.end() - 1, all.end()).unwrap();
    let gpa = last.start_bytes();
    let is_private = |vm: &Vm| {
        let error = vm.write(gpa, &[1]).unwrap_err();
        assert!(matches!(error, Error::PrivateMemory { .. }), "{error}");
    };
    is_private(&vm);
    vm.convert(last, View::Shared).unwrap();
    vm.write(gpa, &[7]).unwrap();
    vm.convert(last, View::Private).unwrap();
    is_private(&vm);
}

#[test]
#[cfg(target_arch = "x86_64")]
fn kvm_mapped_memory() {
    for wanted in [MAPPED, MAPPED_BOUND] {
        for mode in kvm::one_possible(&[wanted]) {
            suite::guest_and_host_match_a_plain_model(8, || kvm::machine(mode).unwrap());
        }
    }
}
