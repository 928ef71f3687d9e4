// SPDX-License-Identifier: GPL-2.0-or-later
//! Carries out measurements, several at once: instructions are counted, so they do not disturb each
//! other.

use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::level1::{Task, memory_for};
use crate::progress::Step;

use super::Bench;
use super::plan::Measurement;
use super::rows::{Line, Row, rows};

/// A guest under emulation that counts instructions may hang; then it is tried again.
const TRIES: usize = 3;

/// Rows of all measurements, in their order.
pub(super) fn all(
    bench: &Bench,
    step: &Step,
    wanted: &[Measurement],
    jobs: usize,
    limit: Duration,
) -> Result<Vec<Row>> {
    ensure!(
        !wanted.is_empty(),
        "no measurement has such a name; see: cargo xtask bench --list"
    );
    let next = Mutex::new(wanted.iter().enumerate());
    let (sender, outcomes) = channel();
    let mut results: Vec<Option<Vec<Row>>> = vec![None; wanted.len()];
    std::thread::scope(|scope| {
        for _ in 0..jobs.clamp(1, wanted.len()) {
            let (next, sender) = (&next, sender.clone());
            scope.spawn(move || work(bench, next, limit, &sender));
        }
        drop(sender);
        for (done, (index, outcome)) in (1_u64..).zip(&outcomes) {
            let name = wanted[index].name();
            match outcome {
                Ok(rows) => {
                    step.note(format_args!("{name}: {} rows", rows.len()));
                    results[index] = Some(rows);
                }
                Err(error) => step.note(format_args!("{name}: {error:#}")),
            }
            step.amount(done, wanted.len() as u64);
        }
    });
    let rows: Vec<Row> = results.into_iter().flatten().flatten().collect();
    ensure!(!rows.is_empty(), "nothing could be measured");
    Ok(rows)
}

type Queue<'a> = Mutex<std::iter::Enumerate<std::slice::Iter<'a, Measurement>>>;

fn work(
    bench: &Bench,
    next: &Queue<'_>,
    limit: Duration,
    outcomes: &Sender<(usize, Result<Vec<Row>>)>,
) {
    loop {
        let Some((index, measurement)) = next.lock().ok().and_then(|mut queue| queue.next()) else {
            return;
        };
        let mut outcome = one(bench, measurement, limit);
        for _ in 1..TRIES {
            if outcome.is_ok() {
                break;
            }
            outcome = one(bench, measurement, limit);
        }
        if outcomes.send((index, outcome)).is_err() {
            return;
        }
    }
}

fn one(bench: &Bench, measurement: &Measurement, limit: Duration) -> Result<Vec<Row>> {
    let name = measurement.name();
    let task = Task {
        name: name.clone(),
        script: measurement.script(),
        memory: memory_for(0),
        limit: Some(limit),
        count_instructions: true,
        programs: vec![bench.floor.clone()],
        log: Some(format!("bench-{}", name.replace([' ', '='], "-"))),
        ..Task::default()
    };
    let mut lines = Vec::new();
    let mut last = String::new();
    let status = bench.lab.run(bench.ctx, &task, |line| {
        lines.extend(Line::parse(line));
        line.clone_into(&mut last);
    })?;
    if status != 0 {
        bail!("exit status {status}: {last}");
    }
    rows(measurement, &lines)
}
