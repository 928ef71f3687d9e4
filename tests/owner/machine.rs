// SPDX-License-Identifier: MIT OR Apache-2.0

//! A VM, its backend, and a guest.

use std::io;
use std::sync::Arc;

use guestmemfd::listener::Level;
use guestmemfd::*;

/// Pages of the backend.
pub(crate) const PAGES: u64 = 16;

/// Where the guest sees them: first guest page, first page of the backend, pages. The last is a
/// second place for pages that the first shows.
pub(crate) const WINDOWS: [(u64, u64, u64); 3] = [(0x100, 0, 8), (0x200, 8, 8), (0x300, 0, 8)];

/// Runs on the owner's terms.
pub(crate) trait Guest {
    /// The byte at a guest physical address, as the guest sees it.
    fn read(&mut self, vm: &Vm, gpa: u64) -> u8;

    fn write(&mut self, vm: &Vm, gpa: u64, byte: u8);
}

pub(crate) struct Machine {
    /// Goes before the memory that it uses.
    pub(crate) guest: Box<dyn Guest>,
    pub(crate) vm: Vm,
    pub(crate) backend: Arc<Backend>,
}

struct Silent;

impl Listener for Silent {
    fn gap(&self, _: GuestPages, _: View) -> io::Result<()> {
        Err(io::ErrorKind::InvalidInput.into())
    }

    fn log(&self, _: Level, message: &str) {
        panic!("{message}");
    }
}

pub(crate) fn guest_pages((start, _, count): (u64, u64, u64)) -> GuestPages {
    GuestPages::new(start, start + count).unwrap()
}

/// A VM with a backend whose pages are all to be seen, and how each of [`WINDOWS`] is bound.
pub(crate) fn vm(
    owner: Arc<dyn Owner>,
    (mode, bind): (Mode, bool),
) -> Result<(Vm, Arc<Backend>, [Binding; 3])> {
    let vm = Vm::new(owner, Box::new(Silent));
    let mut config = BackendConfig::new("ram", PAGES * PAGE_SIZE);
    config.mode = Some(mode);
    config.bind = bind;
    let backend = vm.create_backend(config)?;
    let mut bindings = [Binding::Unbound; 3];
    for (window, binding) in WINDOWS.into_iter().zip(&mut bindings) {
        *binding = vm.add_window(
            &backend,
            guest_pages(window),
            window.1 * PAGE_SIZE,
            Binding::Bound,
        )?;
    }
    Ok((vm, backend, bindings))
}
