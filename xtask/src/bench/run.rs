// SPDX-License-Identifier: GPL-2.0-or-later
//! Carries out measurements: those that count instructions several at once, because they do not disturb
//! each other, then those that take time.

use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::cargo;
use crate::level1::{Task, memory_for};
use crate::process::Job;
use crate::progress::Step;

use super::Bench;
use super::breakdown;
use super::pins;
use super::plan::Measurement;
use super::rows::{Clock, Line, Row, rows};
use super::scale;

/// How measurements are carried out.
pub(super) struct How {
    /// How many of those that count instructions at once.
    pub(super) jobs: usize,
    /// How long one may take.
    pub(super) limit: Duration,
    /// Tells who has carried out the instructions.
    pub(super) plugin: Option<PathBuf>,
}

/// A guest under emulation that counts instructions may hang; then it is tried again.
const TRIES: usize = 3;

/// What has come of measurements.
#[derive(Debug)]
pub(super) struct Outcome {
    /// In the order of the measurements.
    pub(super) rows: Vec<Row>,
    /// Names of those that did not work.
    pub(super) failed: Vec<String>,
}

/// Carries out all of them, and hands on the rows of each as they come.
pub(super) fn all(
    bench: &Bench,
    step: &Step,
    wanted: &[Measurement],
    how: &How,
    mut measured: impl FnMut(&[Row]),
) -> Result<Outcome> {
    let (timed, counted): (Vec<_>, Vec<_>) = wanted
        .iter()
        .enumerate()
        .partition(|(_, m)| m.library() || m.scale());
    let (mut done, mut failed) = (0, Vec::new());
    let mut results: Vec<Option<Vec<Row>>> = vec![None; wanted.len()];
    for (part, jobs) in [(counted, how.jobs), (timed, 1)] {
        let workers = jobs.clamp(1, part.len().max(1));
        let next = Mutex::new(part.into_iter());
        let (sender, outcomes) = channel();
        std::thread::scope(|scope| {
            for _ in 0..workers {
                let (next, sender) = (&next, sender.clone());
                scope.spawn(move || work(bench, next, how, &sender));
            }
            drop(sender);
            for (index, news) in outcomes {
                let name = wanted[index].name();
                match news {
                    News::Again(error) => {
                        step.note(format_args!("{name}, which is tried again: {error:#}"));
                        continue;
                    }
                    News::End(Ok(rows)) => {
                        step.note(format_args!("{name}: {} rows", rows.len()));
                        measured(&rows);
                        results[index] = Some(rows);
                    }
                    News::End(Err(error)) => {
                        step.note(format_args!("{name}: {error:#}"));
                        failed.push(name);
                    }
                }
                done += 1;
                step.amount(done, wanted.len() as u64);
            }
        });
    }
    let rows: Vec<Row> = results.into_iter().flatten().flatten().collect();
    ensure!(!rows.is_empty(), "nothing could be measured");
    Ok(Outcome { rows, failed })
}

type Queue<'a> = Mutex<std::vec::IntoIter<(usize, &'a Measurement)>>;

/// What a worker says of a measurement.
enum News {
    Again(anyhow::Error),
    End(Result<Vec<Row>>),
}

fn work(bench: &Bench, next: &Queue<'_>, how: &How, news: &Sender<(usize, News)>) {
    loop {
        let Some((index, measurement)) = next.lock().ok().and_then(|mut queue| queue.next()) else {
            return;
        };
        let mut outcome = one(bench, measurement, how);
        for _ in 1..TRIES {
            let Err(error) = outcome else { break };
            // If nobody listens any more, the last one notices.
            let _ = news.send((index, News::Again(error)));
            outcome = one(bench, measurement, how);
        }
        if news.send((index, News::End(outcome))).is_err() {
            return;
        }
    }
}

fn one(bench: &Bench, measurement: &Measurement, how: &How) -> Result<Vec<Row>> {
    if measurement.pins() {
        return pins::measure(bench, measurement, how.limit);
    }
    if measurement.library() {
        return library(bench, measurement, how.limit);
    }
    if measurement.scale() {
        return scale::measure(bench, measurement, how.limit);
    }
    let name = measurement.name();
    let file = name.replace([' ', '='], "-");
    let watch = how.plugin.as_ref().map(|plugin| {
        let counts = bench.ctx.scratch().join(format!("bench-{file}.counts"));
        (breakdown::option(plugin, &counts), counts)
    });
    let task = Task {
        name,
        script: measurement.script(),
        memory: memory_for(0),
        limit: Some(how.limit),
        count_instructions: true,
        plugin: watch.as_ref().map(|(option, _)| option.clone()),
        programs: vec![bench.floor.clone()],
        log: Some(format!("bench-{file}")),
        in_place: Some(measurement.in_place()),
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
    let mut rows = rows(measurement, &lines, Clock::Instructions)?;
    if let Some((_, counts)) = watch {
        let touched = format!("target/bench/touched-{file}.txt");
        let parts = breakdown::read(&counts, &bench.ctx.root.join(touched))?;
        rows.extend(breakdown::rows(measurement, &lines, &parts)?);
    }
    Ok(rows)
}

/// The library alone, in time, on this machine.
fn library(bench: &Bench, measurement: &Measurement, limit: Duration) -> Result<Vec<Row>> {
    let mut command = cargo::cargo(bench.ctx);
    command.args(["bench", "--package", "guestmemfd", "--bench"]);
    command.arg(measurement.bench());
    let mut lines = Vec::new();
    Job::new("cargo bench", command)
        .log(&bench.ctx.log(&format!("bench-{}", measurement.bench())))
        .limit(limit)
        .follow(|line| lines.extend(Line::parse(line)))
        .run()?;
    rows(measurement, &lines, Clock::Instructions)
}
