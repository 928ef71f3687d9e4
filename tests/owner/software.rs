// SPDX-License-Identifier: MIT OR Apache-2.0

//! A guest that sees what the software owner would show it.

use std::sync::Arc;

use guestmemfd::owner::SoftwareOwner;
use guestmemfd::*;

use crate::machine::{Guest, Machine, WINDOWS, vm};

struct SoftwareGuest {
    owner: Arc<SoftwareOwner>,
    backend: Arc<Backend>,
}

pub(crate) fn machine(mode: (Mode, bool)) -> Machine {
    let owner = Arc::new(match mode.0 {
        Mode::InPlace => SoftwareOwner::in_place(),
        _ => SoftwareOwner::default(),
    });
    let (vm, backend, _) = vm(owner.clone(), mode).unwrap();
    let guest = Box::new(SoftwareGuest {
        owner,
        backend: backend.clone(),
    });
    Machine { guest, vm, backend }
}

impl SoftwareGuest {
    /// The view of a page that the guest sees, and where in the files an address lies.
    fn place(&self, gpa: u64) -> (View, u64) {
        let page = gpa / PAGE_SIZE;
        let mut windows = WINDOWS.into_iter();
        let (start, first, _) = windows
            .find(|(start, _, count)| (*start..start + count).contains(&page))
            .unwrap();
        (self.owner.view(page), gpa - (start - first) * PAGE_SIZE)
    }
}

impl Guest for SoftwareGuest {
    fn read(&mut self, _: &Vm, gpa: u64) -> u8 {
        let (view, offset) = self.place(gpa);
        let mut byte = [0];
        let views = self.backend.views();
        // The guest may what the host may not.
        rustix::io::pread(views.file(view).fd(), &mut byte, offset).unwrap();
        byte[0]
    }

    fn write(&mut self, _: &Vm, gpa: u64, byte: u8) {
        let (view, offset) = self.place(gpa);
        let views = self.backend.views();
        rustix::io::pwrite(views.file(view).fd(), &[byte], offset).unwrap();
    }
}
