// SPDX-License-Identifier: GPL-2.0-or-later
//! How many instructions a pin takes with its unpin, through the C interface as QEMU links it: callgrind
//! counts those of the two functions.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::process::{Job, command};

use super::Bench;
use super::plan::Measurement;
use super::rows::Row;

const PROGRAM: &str = "tests/c/count-pins.c";
const TIMES: u32 = 1000;

/// Rows, how many bytes are pinned, and whether a private page lies near them.
const CASES: [(&str, u64, &[&str]); 4] = [
    ("pin-4k", 4 << 10, &[]),
    ("pin-4k-near-private", 4 << 10, &["near-private"]),
    ("pin-128k", 128 << 10, &[]),
    ("pin-256m", 256 << 20, &[]),
];

pub(super) fn measure(
    bench: &Bench,
    measurement: &Measurement,
    limit: Duration,
) -> Result<Vec<Row>> {
    let (ctx, folder) = (bench.ctx, bench.ctx.scratch());
    let program = folder.join("count-pins");
    let mut compiler = command("gcc", ["-O2", "-o"]);
    compiler
        .arg(&program)
        .arg(ctx.root.join(PROGRAM))
        .args(bench.library.flags()?);
    Job::new("gcc", compiler)
        .log(&ctx.log("bench-pins-gcc"))
        .run()?;
    let counts = folder.join("count-pins.callgrind");
    let one = |(row, bytes, more): (&str, u64, &[&str])| {
        let mut valgrind = command("valgrind", ["--tool=callgrind"]);
        valgrind
            .arg(format!("--callgrind-out-file={}", counts.display()))
            .arg("--toggle-collect=guestmemfd_backend_pin")
            .arg("--toggle-collect=guestmemfd_backend_unpin")
            .arg(&program)
            .args([bytes.to_string(), TIMES.to_string()])
            .args(more);
        Job::new(format!("valgrind, {row}"), valgrind)
            .log(&ctx.log("bench-pins"))
            .limit(limit)
            .run()?;
        let text = fs::read_to_string(&counts)
            .with_context(|| format!("cannot read {}", counts.display()))?;
        let all = total(&text).context("callgrind has counted nothing")?;
        Ok(Row {
            row: row.to_owned(),
            subject: measurement.subject.to_owned(),
            variant: measurement.variant.to_owned(),
            value: all as f64 / f64::from(TIMES),
            unit: "instructions/pin".to_owned(),
        })
    };
    CASES.into_iter().map(one).collect()
}

/// The sum in a file of callgrind's.
fn total(text: &str) -> Option<u64> {
    let mut lines = text.lines();
    lines.find_map(|line| line.strip_prefix("totals: ")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::total;

    #[test]
    fn the_sum_of_a_file_of_callgrinds() {
        let text = "# callgrind format\nevents: Ir\nfn=(1) x\n1 5\ntotals: 246000\n";
        assert_eq!(total(text), Some(246_000));
        assert_eq!(total("events: Ir\n"), None);
    }
}
