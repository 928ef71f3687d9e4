// SPDX-License-Identifier: GPL-2.0-or-later
//! `query-guestmemfd`: what QEMU says of its backends.

use anyhow::{Result, bail};
use qapi_spec::Command;
use serde::{Deserialize, Serialize};

use crate::qmp::Qmp;

/// The command.
#[derive(Debug, Serialize)]
pub(crate) struct QueryGuestmemfd {}

impl Command for QueryGuestmemfd {
    type Ok = Vec<Backend>;
    const NAME: &'static str = "query-guestmemfd";
    const ALLOW_OOB: bool = false;
}

/// One backend.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Backend {
    pub(crate) id: String,
    pub(crate) mode: String,
    pub(crate) discard: String,
    pub(crate) size: u64,
    pub(crate) undecided_bytes: u64,
    pub(crate) shared_bytes: u64,
    pub(crate) private_bytes: u64,
    pub(crate) transition_bytes: u64,
    pub(crate) shared_allocated: u64,
    pub(crate) conversions_to_private: u64,
    pub(crate) conversions_to_shared: u64,
    pub(crate) converted_to_private_bytes: u64,
    pub(crate) converted_to_shared_bytes: u64,
    pub(crate) converted_along_bytes: u64,
    pub(crate) hypercalls: u64,
    pub(crate) faults_private: u64,
    pub(crate) faults_shared: u64,
    pub(crate) refused: u64,
    pub(crate) waits: u64,
    pub(crate) pinned_bytes: u64,
    pub(crate) unpunched_bytes: u64,
    /// Without lazy attributes there is none.
    pub(crate) lazy_chunk: Option<u64>,
    /// Histograms of the time that conversions took since the first query.
    pub(crate) latency_to_private: Vec<u64>,
    pub(crate) latency_to_shared: Vec<u64>,
}

/// Where a backend has which states: the command.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct QueryMap<'a> {
    pub(crate) id: &'a str,
    pub(crate) offset: u64,
    pub(crate) max_runs: u32,
}

impl Command for QueryMap<'_> {
    type Ok = Map;
    const NAME: &'static str = "x-query-guestmemfd-map";
    const ALLOW_OOB: bool = false;
}

/// A part of a backend's map.
#[derive(Debug, Deserialize)]
pub(crate) struct Map {
    pub(crate) size: u64,
    pub(crate) runs: Vec<Run>,
    /// Where to go on.
    pub(crate) next: Option<u64>,
}

/// Neighbouring pages in one state.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Run {
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) state: String,
}

impl Backend {
    /// Does every page have one state?
    pub(crate) fn check(&self) -> Result<()> {
        let states = [
            self.undecided_bytes,
            self.shared_bytes,
            self.private_bytes,
            self.transition_bytes,
        ];
        let sum = states.iter().copied().reduce(u64::wrapping_add);
        if sum != Some(self.size) {
            bail!(
                "{}: the states' bytes {states:?} do not add up to its size {}",
                self.id,
                self.size
            );
        }
        Ok(())
    }
}

/// All backends of a QEMU, with their sums checked.
pub(crate) fn backends(qmp: &mut Qmp) -> Result<Vec<Backend>> {
    let backends = qmp.execute(&QueryGuestmemfd {})?;
    backends.iter().try_for_each(Backend::check)?;
    Ok(backends)
}

/// The one backend of a QEMU that has one.
pub(crate) fn backend(qmp: &mut Qmp) -> Result<Backend> {
    match <[Backend; 1]>::try_from(backends(qmp)?) {
        Ok([backend]) => Ok(backend),
        Err(all) => bail!("one backend expected, query-guestmemfd shows {}", all.len()),
    }
}
