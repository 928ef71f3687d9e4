// SPDX-License-Identifier: GPL-2.0-or-later
//! The lab kernel's strict mode: from a given guest physical address on, the slot and not the
//! attribute says which view a software-protected guest asks for. Only then do its accesses cause
//! memory faults.

use std::fs;

use anyhow::{Context, Result};

/// The parameter; `ULONG_MAX` turns strict mode off.
pub(crate) const PATH: &str = "/sys/module/kvm/parameters/sw_protected_strict_from";

/// 4 GiB: firmware and the guest's image lie below. SeaBIOS moves itself to the end of the memory
/// below, where QEMU's DMA reaches it in the shared view only.
const FROM: &str = "0x100000000";

/// Strict mode while this lives; afterwards what was there before.
#[derive(Debug)]
#[must_use]
pub(crate) struct Strict {
    before: String,
}

impl Strict {
    /// Turns it on.
    pub(crate) fn on() -> Result<Self> {
        let before = read()?;
        write(FROM)?;
        Ok(Self { before })
    }
}

impl Drop for Strict {
    fn drop(&mut self) {
        if let Err(why) = write(&self.before) {
            eprintln!("strict mode stays on: {why:#}");
        }
    }
}

/// The parameter's value as the kernel prints it.
pub(crate) fn read() -> Result<String> {
    let value = fs::read_to_string(PATH).with_context(|| format!("cannot read {PATH}"))?;
    Ok(value.trim().to_owned())
}

/// May this process set the parameter?
pub(crate) fn writable() -> bool {
    fs::OpenOptions::new().write(true).open(PATH).is_ok()
}

fn write(value: &str) -> Result<()> {
    fs::write(PATH, value).with_context(|| format!("cannot write {value} to {PATH}"))
}
