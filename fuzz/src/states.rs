// SPDX-License-Identifier: GPL-2.0-or-later

//! Saved states that nobody has saved.

use std::sync::Arc;

use guestmemfd::owner::SoftwareOwner;
use guestmemfd::{
    Backend, BackendConfig, Binding, Error, GuestPages, Listener, PAGE_SIZE, PageState, View, Vm,
};

const PAGES: u64 = 200;

/// How saved states of so many pages begin.
fn header() -> Vec<u8> {
    [*b"gmfdsta1", PAGES.to_le_bytes()].concat()
}

struct Nobody;

impl Listener for Nobody {}

struct Machine {
    vm: Vm,
    owner: Arc<SoftwareOwner>,
    backend: Arc<Backend>,
}

impl Machine {
    fn new() -> Self {
        let owner = Arc::new(SoftwareOwner::default());
        let vm = Vm::new(owner.clone(), Box::new(Nobody));
        let backend = vm
            .create_backend(BackendConfig::new("ram", PAGES * PAGE_SIZE))
            .expect("a small backend");
        let guest = GuestPages::new(0, PAGES).expect("there are pages");
        vm.add_window(&backend, guest, 0, Binding::Bound)
            .expect("it fits");
        Self { vm, owner, backend }
    }

    fn states(&self) -> Vec<PageState> {
        (0..PAGES).map(|page| self.backend.state(page)).collect()
    }

    fn restore(&self, mut saved: &[u8]) -> guestmemfd::Result<()> {
        let restored = self.vm.restore_states(&self.backend, &mut saved);
        for (page, state) in (0..).zip(self.states()) {
            assert_ne!(state, PageState::Transition);
            let private = self.owner.view(page) == View::Private;
            assert_eq!(private, state == PageState::Private, "page {page}");
        }
        restored
    }

    fn save(&self) -> Vec<u8> {
        let mut saved = Vec::new();
        self.vm
            .save_states(&self.backend, &mut saved)
            .expect("nothing is converted");
        saved
    }
}

/// Restores states from bytes, as they are and behind the beginning that they should have.
pub fn try_bytes(bytes: &[u8]) {
    let machine = Machine::new();
    for saved in [bytes.to_vec(), [&header()[..], bytes].concat()] {
        match machine.restore(&saved) {
            Ok(()) => {
                let again = Machine::new();
                again.restore(&machine.save()).expect("it has been saved");
                assert_eq!(again.states(), machine.states());
                assert_eq!(again.save(), machine.save());
            }
            Err(error) => assert!(matches!(error, Error::BadStates { .. }), "{error}"),
        }
    }
}
