// SPDX-License-Identifier: GPL-2.0-or-later
//! The memory map and the counters, for people.

use comfy_table::{CellAlignment, Table, presets};

use crate::memory::{self, Backing, Kind};
use crate::query::{Backend, human};

/// Bytes per state of every backend, and what the kernel has allocated for their files.
pub(crate) fn map(backends: &[Backend], files: &[Backing]) -> String {
    let mut table = Table::new();
    table
        .load_preset(presets::UTF8_HORIZONTAL_ONLY)
        .set_header([
            "backend",
            "mode",
            "discard",
            "size",
            "undecided",
            "shared",
            "private",
            "in transition",
        ]);
    for b in backends {
        table.add_row([
            b.id.clone(),
            b.mode.clone(),
            b.discard.clone(),
            human(b.size),
            human(b.undecided_bytes),
            human(b.shared_bytes),
            human(b.private_bytes),
            human(b.transition_bytes),
        ]);
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let allocated = |kind| match memory::allocated(files, kind) {
        Some(bytes) => human(bytes),
        None => "unknown (this kernel has no cachestat)".into(),
    };
    format!(
        "{table}\nallocated by the kernel: shared files {}, private files {}",
        allocated(Kind::Memfd),
        allocated(Kind::GuestMemfd)
    )
}

/// The counters of every backend, a line each.
pub(crate) fn counters(backends: &[Backend]) -> String {
    let line = |b: &Backend| {
        format!(
            "{}: conversions to private {} ({}), to shared {} ({}); hypercalls {}, refused {}; \
             memory faults private {}, shared {}; holes still to punch {}",
            b.id,
            b.conversions_to_private,
            human(b.converted_to_private_bytes),
            b.conversions_to_shared,
            human(b.converted_to_shared_bytes),
            b.hypercalls,
            b.refused,
            b.faults_private,
            b.faults_shared,
            human(b.unpunched_bytes),
        )
    };
    backends.iter().map(line).collect::<Vec<_>>().join("\n")
}
