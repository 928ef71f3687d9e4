// SPDX-License-Identifier: MIT OR Apache-2.0

//! What benchmarks share.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use guestmemfd::listener::Level;
use guestmemfd::owner::SoftwareOwner;
use guestmemfd::{Backend, BackendConfig, GuestPages, Listener, Mode, PAGE_SIZE};
use guestmemfd::{Binding, View, Vm};

struct Quiet;

impl Listener for Quiet {
    fn gap(&self, _guest: GuestPages, _to: View) -> io::Result<()> {
        Ok(())
    }

    fn log(&self, _level: Level, _message: &str) {}
}

/// A backend whose first page is private, on no hypervisor.
pub(crate) fn backend(pages: u64) -> guestmemfd::Result<(Vm, Arc<Backend>)> {
    let vm = Vm::new(Arc::new(SoftwareOwner::default()), Box::new(Quiet));
    let mut config = BackendConfig::new("ram", pages * PAGE_SIZE);
    config.mode = Some(Mode::Private);
    config.convert_timeout = Duration::ZERO;
    let backend = vm.create_backend(config)?;
    let all = GuestPages::new(0, pages).expect("a range");
    vm.add_window(&backend, all, 0, Binding::Bound)?;
    vm.map_gpa_range(0, 1, 1 << 4)?;
    Ok((vm, backend))
}
