// SPDX-License-Identifier: GPL-2.0-or-later
//! Measurements in time on this machine's own KVM: what it can serve, and a word on what it cannot.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::context::Context;
use crate::process::{Job, command};
use crate::progress::Step;
use crate::{cargo, image, qemu, tsc};

use super::plan::{self, Measurement};
use super::rows::{Clock, Line, Row, rows};

/// Each subject is measured as often, in turn; the middle value counts.
const ROUNDS: usize = 5;

/// What a machine's KVM says of itself.
pub(super) struct Machine {
    runner: std::path::PathBuf,
    /// What it lacks for private memory.
    lacks: Option<String>,
}

impl Machine {
    pub(super) fn probe(ctx: &Context, step: &Step) -> Result<Self> {
        let runner = cargo::runner(ctx, step)?;
        let mut last = String::new();
        let outcome = Job::new("the probe", command(&runner, ["probe"]))
            .log(&ctx.log("bench-probe"))
            .follow(|line| line.clone_into(&mut last))
            .outcome()?;
        let lacks = (!outcome.success()).then_some(last);
        Ok(Self { runner, lacks })
    }

    /// What of that can be measured here. Says what cannot.
    pub(super) fn chosen(&self, step: &Step, only: &[String]) -> Result<Vec<Measurement>> {
        if let Some(lacks) = &self.lacks {
            step.note(format_args!(
                "{lacks}; so only what the host does for ordinary VMs is timed here, and conversions \
                 not: the lab counts their instructions (cargo xtask bench)"
            ));
        }
        plan::chosen(plan::native(self.lacks.is_none()), only).context("in time, on this machine")
    }

    /// Measures it. Returns QEMU's version, too.
    pub(super) fn rows(
        &self,
        ctx: &Context,
        step: &Step,
        wanted: &[Measurement],
    ) -> Result<(String, Vec<Row>)> {
        let qemu = qemu::build(ctx, step)?;
        let floor = cargo::floor(ctx, step)?;
        let guest = cargo::guest(ctx, step)?;
        let firmware = image::firmware(ctx)?;
        let paths: [(&str, &Path); 4] = [
            ("--qemu", &qemu.program),
            ("--firmware", &firmware),
            ("--guest", &guest),
            ("--floor", &floor),
        ];
        let mut values = BTreeMap::new();
        let total = (ROUNDS * wanted.len()) as u64;
        let mut done = 0;
        for _ in 0..ROUNDS {
            for (index, measurement) in wanted.iter().enumerate() {
                for row in self.one(ctx, &paths, measurement)? {
                    let key = (index, row.row.clone());
                    let known: &mut Vec<Row> = values.entry(key).or_default();
                    known.push(row);
                }
                done += 1;
                step.amount(done, total);
            }
        }
        let rows: Vec<Row> = values.into_values().filter_map(median).collect();
        Ok((qemu.version, rows))
    }

    fn one(
        &self,
        ctx: &Context,
        paths: &[(&str, &Path)],
        measurement: &Measurement,
    ) -> Result<Vec<Row>> {
        let mut runner = command(&self.runner, ["bench"]);
        for (option, path) in paths {
            runner.arg(option).arg(path);
        }
        runner.args(measurement.subject_words());
        let mut lines = Vec::new();
        Job::new(measurement.name(), runner)
            .log(&ctx.log("bench-native"))
            .limit(Duration::from_secs(600))
            .follow(|line| lines.extend(Line::parse(line)))
            .run()?;
        let khz = tsc::khz();
        let clock = Clock::Time {
            nanoseconds_per_tick: 1e6 / khz as f64,
        };
        rows(measurement, &lines, clock)
            .with_context(|| format!("{} on this machine", measurement.name()))
    }
}

/// The row whose value lies in the middle.
fn median(mut rows: Vec<Row>) -> Option<Row> {
    rows.sort_by(|a, b| a.value.total_cmp(&b.value));
    let middle = rows.len() / 2;
    (middle < rows.len()).then(|| rows.swap_remove(middle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_in_the_middle_counts() {
        let row = |value| Row {
            row: "ordinary-prealloc".to_owned(),
            subject: "ours".to_owned(),
            variant: "mode=mapped".to_owned(),
            value,
            unit: "ns/page".to_owned(),
        };
        let all = vec![row(9.0), row(1.0), row(2.0)];
        assert_eq!(median(all).map(|row| row.value), Some(2.0));
        assert_eq!(median(Vec::new()), None);
    }
}
