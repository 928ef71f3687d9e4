// SPDX-License-Identifier: MIT OR Apache-2.0
//! `query-guestmemfd` and `x-query-guestmemfd-map`: what QEMU says of its backends.

use anyhow::{Context as _, Result, bail};
use qapi_spec::Command;
use serde::{Deserialize, Serialize};

use crate::Qmp;

/// The command for all backends.
#[derive(Debug, Serialize)]
pub struct QueryGuestmemfd {}

impl Command for QueryGuestmemfd {
    type Ok = Vec<Backend>;
    const NAME: &'static str = "query-guestmemfd";
    const ALLOW_OOB: bool = false;
}

/// One backend. Without documentation of its own a field is what QEMU's is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Backend {
    pub id: String,
    pub mode: String,
    pub discard: String,
    pub size: u64,
    pub undecided_bytes: u64,
    pub shared_bytes: u64,
    pub private_bytes: u64,
    pub transition_bytes: u64,
    pub shared_allocated: u64,
    pub conversions_to_private: u64,
    pub conversions_to_shared: u64,
    pub converted_to_private_bytes: u64,
    pub converted_to_shared_bytes: u64,
    pub converted_along_bytes: u64,
    pub hypercalls: u64,
    pub faults_private: u64,
    pub faults_shared: u64,
    pub refused: u64,
    pub waits: u64,
    pub stray_accesses: u64,
    pub pinned_bytes: u64,
    pub unpunched_bytes: u64,
    /// Without lazy attributes there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lazy_chunk: Option<u64>,
    /// Histograms of the time that conversions took; empty unless `measure-latency` is on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub latency_to_private: Vec<u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub latency_to_shared: Vec<u64>,
}

impl Backend {
    /// Does every page have one state?
    pub fn check(&self) -> Result<()> {
        let states = [
            self.undecided_bytes,
            self.shared_bytes,
            self.private_bytes,
            self.transition_bytes,
        ];
        let sum = states.iter().try_fold(0, |sum: u64, n| sum.checked_add(*n));
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
pub fn backends(qmp: &mut Qmp) -> Result<Vec<Backend>> {
    let backends = qmp.execute(&QueryGuestmemfd {})?;
    backends.iter().try_for_each(Backend::check)?;
    Ok(backends)
}

/// The one backend of a QEMU that has one.
pub fn backend(qmp: &mut Qmp) -> Result<Backend> {
    only(backends(qmp)?)
}

/// The backend with this id.
pub fn named(qmp: &mut Qmp, id: &str) -> Result<Backend> {
    let found = backends(qmp)?.into_iter().find(|backend| backend.id == id);
    found.with_context(|| format!("query-guestmemfd shows no backend '{id}'"))
}

/// The one of an answer that has one.
pub fn only(backends: Vec<Backend>) -> Result<Backend> {
    match <[Backend; 1]>::try_from(backends) {
        Ok([backend]) => Ok(backend),
        Err(all) => bail!("one backend expected, query-guestmemfd shows {}", all.len()),
    }
}

/// The command for a part of one backend's map.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct QueryMap<'a> {
    /// The backend's.
    pub id: &'a str,
    /// Bytes before the part, which goes to the backend's end.
    pub offset: u64,
    /// The most runs that the answer may have.
    pub max_runs: u32,
}

impl Command for QueryMap<'_> {
    type Ok = MapPart;
    const NAME: &'static str = "x-query-guestmemfd-map";
    const ALLOW_OOB: bool = false;
}

/// Its answer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct MapPart {
    /// The backend's.
    pub id: String,
    /// The whole backend's, in bytes.
    pub size: u64,
    /// One after the other, from the offset on that was asked for.
    pub runs: Vec<Run>,
    /// Where to go on, if there is more.
    pub next: Option<u64>,
}

/// Neighbouring pages of one state.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Run {
    /// In bytes.
    pub offset: u64,
    /// In bytes.
    pub size: u64,
    /// Of all of it.
    pub state: State,
}

/// What a page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Nobody has chosen yet.
    Undecided,
    /// With the host.
    Shared,
    /// To the guest.
    Private,
    /// Claimed by a conversion.
    Transition,
}

/// Bytes for people.
pub fn human(bytes: u64) -> String {
    const UNITS: [(u64, &str); 4] = [
        (1 << 40, "TiB"),
        (1 << 30, "GiB"),
        (1 << 20, "MiB"),
        (1 << 10, "KiB"),
    ];
    match UNITS.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) if bytes.is_multiple_of(*unit) => format!("{} {name}", bytes / unit),
        // Two digits show a single page beside a MiB.
        Some((unit, name)) => format!("{}.{:02} {name}", bytes / unit, bytes % unit * 100 / unit),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_for_people() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(4096), "4 KiB");
        assert_eq!(human((1 << 20) + 4096), "1.00 MiB");
        assert_eq!(human((1 << 20) + 40960), "1.03 MiB");
        assert_eq!(human(256 << 20), "256 MiB");
    }
}
