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
    for mode in kvm::possible(&[PRIVATE, IN_PLACE]) {
        suite::guest_and_host_match_a_plain_model(16, || kvm::machine(mode).unwrap());
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn kvm_mapped_memory() {
    for wanted in [MAPPED, MAPPED_BOUND] {
        for mode in kvm::possible(&[wanted]) {
            suite::guest_and_host_match_a_plain_model(8, || kvm::machine(mode).unwrap());
        }
    }
}
