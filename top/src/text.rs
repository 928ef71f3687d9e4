// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshots as plain text, and the pieces that the live view has in common with it.

use std::fmt::Write;

use guestmemfd_qmp::query::human;

use crate::cells::{Grid, KINDS, NOT_READ};
use crate::snapshot::{COUNTERS, Events, Memory, Rates, Snapshot, rates};
use crate::source::QUESTIONS;

/// Cells of a report's map.
const COLUMNS: usize = 64;
const ROWS: usize = 16;

/// A report on the last of the snapshots, with rates since the first.
pub(crate) fn report(first: &Snapshot, last: &Snapshot) -> String {
    let mut text = String::new();
    for memory in &last.backends {
        let grid = Grid::new(&memory.map, memory.info.size, COLUMNS, ROWS);
        let rates = rates(first, last, &memory.info.id);
        let _ = writeln!(text, "{}\n", title(memory));
        for line in states(memory, &grid) {
            let _ = writeln!(text, "  {line}");
        }
        let _ = writeln!(text, "\n  {}", lettered_scale(&grid));
        for (offset, cells) in grid.rows() {
            let cells: String = cells.iter().map(|cell| cell.glyph()).collect();
            let _ = writeln!(text, "  {} {cells}", tick(offset, memory.info.size));
        }
        if let Some(line) = unread(memory) {
            let _ = writeln!(text, "  {line}");
        }
        let _ = writeln!(text);
        for line in counters(memory, rates.as_ref()) {
            let _ = writeln!(text, "  {line}");
        }
        let _ = writeln!(text);
    }
    for line in events(&last.events) {
        let _ = writeln!(text, "{line}");
    }
    text
}

/// What a backend is.
pub(crate) fn title(memory: &Memory) -> String {
    let info = &memory.info;
    let mut title = format!(
        "{}: {}, mode {}, discard {}",
        info.id,
        human(info.size),
        info.mode,
        info.discard
    );
    if let Some(chunk) = info.lazy_chunk {
        let _ = write!(title, ", lazy chunks from {}", human(chunk));
    }
    title
}

/// The legend, with the bytes of each state as QEMU counts them, and what else is counted in bytes.
pub(crate) fn states(memory: &Memory, grid: &Grid) -> Vec<String> {
    let info = &memory.info;
    let counted = [
        info.undecided_bytes,
        info.shared_bytes,
        info.private_bytes,
        info.transition_bytes,
        grid.sums().bytes[NOT_READ],
    ];
    let kinds = KINDS.iter().zip(counted);
    // Mostly there is nothing that has not been read.
    let kinds = kinds.filter(|(kind, bytes)| *bytes > 0 || kind.all != KINDS[NOT_READ].all);
    let mut lines: Vec<_> = kinds
        .map(|(kind, bytes)| {
            let percent = bytes as f64 / info.size as f64 * 100.0;
            let (all, most, name, bytes) = (kind.all, kind.most, kind.name, human(bytes));
            format!("{all} {most}  {name:<16} {bytes:>12} {percent:>6.1} %")
        })
        .collect();
    for (name, bytes) in [
        ("shared allocated", info.shared_allocated),
        ("pinned", info.pinned_bytes),
        ("still to punch", info.unpunched_bytes),
    ] {
        lines.push(format!("     {name:<16} {:>12}", human(bytes)));
    }
    lines
}

/// What a cell and a row are.
pub(crate) fn scale(grid: &Grid) -> String {
    let (cell, row) = (human(grid.cell_bytes), human(grid.row_bytes()));
    format!("a cell is {cell}, a row {row}")
}

/// The same, for cells that are letters.
pub(crate) fn lettered_scale(grid: &Grid) -> String {
    scale(grid) + "; small letters: mixed, mostly this"
}

/// An offset, as wide as any of the backend's.
pub(crate) fn tick(offset: u64, size: u64) -> String {
    let digits = (size.ilog2() / 4 + 1) as usize;
    format!("{offset:#0width$x}", width = digits + 2)
}

/// Says what has not been read.
pub(crate) fn unread(memory: &Memory) -> Option<String> {
    let left = memory.info.size - memory.map.read();
    (left > 0).then(|| {
        format!(
            "? {} from {:#x} on not read: the map has more runs than {QUESTIONS} questions tell",
            human(left),
            memory.map.read()
        )
    })
}

/// Totals, with rates where they are known.
pub(crate) fn counters(memory: &Memory, rates: Option<&Rates>) -> Vec<String> {
    let lines = COUNTERS.iter().enumerate().map(|(at, counter)| {
        let amount = |value: u64| match counter.bytes {
            true => human(value),
            false => value.to_string(),
        };
        let total = amount((counter.of)(&memory.info));
        let rate = match rates.map(|rates| rates[at]) {
            None => String::new(),
            Some(rate) if counter.bytes => format!("{:>12}/s", human(rate as u64)),
            Some(rate) => format!("{rate:>12.1}/s"),
        };
        format!("{:<22} {total:>12} {rate}", counter.name)
            .trim_end()
            .to_owned()
    });
    let info = &memory.info;
    let times = [
        ("median, to private", &info.latency_to_private),
        ("median, to shared", &info.latency_to_shared),
    ];
    let times = times
        .into_iter()
        .filter_map(|(name, times)| Some(format!("{name:<22} {:>12}", median(times)?)));
    lines.chain(times).collect()
}

/// Where the middle of a histogram lies, whose element N counts times under 2^N microseconds, and
/// the last one the rest.
fn median(times: &[u64]) -> Option<String> {
    let sum = |times: &[u64]| times.iter().map(|count| u128::from(*count)).sum::<u128>();
    let all = sum(times);
    let at = (0..times.len()).find(|at| sum(&times[..=*at]) * 2 >= all.max(1))?;
    Some(match at + 1 == times.len() {
        false => format!("< {} µs", 1u128 << at.min(100)),
        true => format!("> {} µs", 1u128 << at.saturating_sub(1).min(100)),
    })
}

/// Events, a line for each kind.
pub(crate) fn events(events: &Events) -> Vec<String> {
    let kinds = [
        ("failed conversions", &events.conversion_failed),
        ("host accesses refused", &events.private_access),
    ];
    let lines = kinds.into_iter().map(|(name, seen)| match &seen.last {
        Some(last) => format!("events, {name}: {}, last: {last}", seen.count),
        None => format!("events, {name}: {}", seen.count),
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_told_as_a_border() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[0, 0, 0]), None, "nothing has been measured");
        assert_eq!(median(&[0, 0, 3, 1, 1, 0]).as_deref(), Some("< 4 µs"));
        assert_eq!(median(&[1, 0, 0, 0, 0, 5]).as_deref(), Some("> 16 µs"));
        assert!(median(&[u64::MAX; 200]).is_some(), "sums may be large");
    }

    #[test]
    fn ticks_are_as_wide_as_the_size() {
        assert_eq!(tick(0, 1 << 20), "0x000000");
        assert_eq!(tick(0xff000, (1 << 20) - 4096), "0xff000");
        assert_eq!(tick(1 << 32, 1 << 40), "0x00100000000");
    }
}
