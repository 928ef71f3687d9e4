// SPDX-License-Identifier: GPL-2.0-or-later
//! What it costs that all memory of a guest starts private, as that of guests does whose firmware is
//! measured.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use guestmemfd::{BackendConfig, Binding, GuestPages, PAGE_SIZE, PageState, Vm};

use super::alone::{Alone, Quiet};
use super::{measured, nanoseconds};
use crate::memory;

const SIZE: u64 = 64 << 30;

pub(super) fn measure() -> Result<()> {
    let machine = Alone::new()?;
    let vm = Vm::new(Arc::new(machine.owner()?), Box::new(Quiet));
    let mut config = BackendConfig::new("ram0", SIZE);
    config.start = PageState::Private;
    let all = GuestPages::new(0, SIZE / PAGE_SIZE).context("no pages")?;

    let kernel = memory::kernel_bytes()?;
    let before = Instant::now();
    let backend = vm.create_backend(config)?;
    vm.add_window(&backend, all, 0, Binding::Bound)?;
    let took = before.elapsed();
    let kernel = memory::kernel_bytes()?.saturating_sub(kernel);
    measured("start-private-64g", "time", 1, nanoseconds(took)?);
    measured("start-private-64g", "kernel-memory", 1, kernel);
    Ok(())
}
