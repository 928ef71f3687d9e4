// SPDX-License-Identifier: GPL-2.0-or-later
//! The lab kernel's strict mode: from a given guest physical address on, the slot and not the
//! attribute says which view a software-protected guest asks for. Only then do its accesses cause
//! memory faults.

use std::fs;

use anyhow::Result;

use crate::setting::{self, Setting};

/// The parameter; `ULONG_MAX` turns strict mode off.
pub(crate) const PATH: &str = "/sys/module/kvm/parameters/sw_protected_strict_from";

/// 4 GiB: firmware and the guest's image lie below. SeaBIOS moves itself to the end of the memory
/// below, where QEMU's DMA reaches it in the shared view only.
const FROM: &str = "0x100000000";

/// Strict mode while this lives; afterwards what was there before.
#[derive(Debug)]
#[must_use]
pub(crate) struct Strict {
    _from: Setting,
}

impl Strict {
    /// Turns it on.
    pub(crate) fn on() -> Result<Self> {
        let _from = Setting::set(PATH, FROM)?;
        Ok(Self { _from })
    }
}

/// The parameter's value as the kernel prints it.
pub(crate) fn read() -> Result<String> {
    setting::read(PATH)
}

/// May this process set the parameter?
pub(crate) fn writable() -> bool {
    fs::OpenOptions::new().write(true).open(PATH).is_ok()
}
