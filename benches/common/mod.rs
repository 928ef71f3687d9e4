// SPDX-License-Identifier: GPL-2.0-or-later

//! What benchmarks share.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use guestmemfd::listener::Level;
use guestmemfd::owner::SoftwareOwner;
use guestmemfd::{Backend, BackendConfig, Discard, GuestPages, Listener, Mode, PAGE_SIZE};
use guestmemfd::{PageState, Prefault, View, Vm};

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
    let backend = vm.create_backend(BackendConfig {
        name: "ram".to_owned(),
        size: pages * PAGE_SIZE,
        mode: Some(Mode::Private),
        bind: false,
        discard: Discard::Now,
        start: PageState::Undecided,
        lazy: None,
        prefault: Prefault::Off,
        convert_timeout: Duration::ZERO,
        tag: 0,
    })?;
    let all = GuestPages::new(0, pages).expect("a range");
    vm.add_window(&backend, all, 0, true)?;
    vm.map_gpa_range(0, 1, 1 << 4)?;
    Ok((vm, backend))
}
