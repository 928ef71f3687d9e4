// SPDX-License-Identifier: MIT OR Apache-2.0
//! `guestmemfd-top`: shows what the memory of a guest on `memory-backend-guestmemfd` is doing.

#![forbid(unsafe_code)]

mod cells;
mod live;
mod options;
mod record;
mod snapshot;
mod source;
mod svg;
mod text;
mod view;

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use serde_json::Value;

use options::Options;
use record::{Reader, Writer};
use snapshot::{COUNTERS, Map, Snapshot, rates};
use source::Source;
use view::{Colors, View};

fn main() -> ExitCode {
    let options = Options::parse();
    options.check(io::stdout().is_terminal());
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // What a QEMU or a record said may be in it.
            let error = format!("{error:#}").replace(char::is_control, " ");
            eprintln!("guestmemfd-top: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    if options.reports() {
        return match &options.replay {
            Some(path) => report_record(options, path),
            None => report_now(options),
        };
    }
    let (updates, origin) = match &options.replay {
        Some(path) => {
            let updates = live::play(Reader::open(path)?, options.interval);
            (updates, path.display().to_string())
        }
        None => {
            let source = connect(options)?;
            let updates = live::ask(source, options.interval());
            (updates, options.socket().display().to_string())
        }
    };
    let mut writer = writer(options)?;
    let stop = live::stop_signals()?;
    if let (false, Some(writer)) = (io::stdout().is_terminal(), &mut writer) {
        let (reason, count) = live::write(&updates, writer, &stop)?;
        eprintln!("guestmemfd-top: {count} snapshots recorded; {reason}");
        return Ok(());
    }
    let colors = Colors::of(|name| std::env::var(name).ok());
    let mut view = View::new(origin, colors, options.backend.clone());
    live::show(&updates, writer.as_mut(), &mut view, &stop)
}

fn connect(options: &Options) -> Result<Source> {
    Source::connect(options.socket(), options.timeout)
}

fn writer(options: &Options) -> Result<Option<Writer>> {
    options.record.as_deref().map(Writer::create).transpose()
}

fn report_now(options: &Options) -> Result<()> {
    let mut snapshot = connect(options)?.sample()?;
    if let Some(mut writer) = writer(options)? {
        writer.write(&snapshot)?;
    }
    choose(options, &mut snapshot)?;
    report(options, std::slice::from_ref(&snapshot), &snapshot)
}

fn report_record(options: &Options, path: &Path) -> Result<()> {
    let mut reader = Reader::open(path)?;
    let mut history = Vec::new();
    let mut last = None;
    for snapshot in reader.by_ref() {
        // A report shows one map; of what was before only the numbers count.
        let mut numbers = snapshot.clone();
        for memory in &mut numbers.backends {
            memory.map = Map::default();
        }
        history.push(numbers);
        last = Some(snapshot);
    }
    if let Some(cut) = &reader.cut {
        eprintln!("guestmemfd-top: {}: {cut}", path.display());
    }
    let mut last =
        last.with_context(|| format!("{}: the record has no snapshot", path.display()))?;
    choose(options, &mut last)?;
    report(options, &history, &last)
}

fn choose(options: &Options, snapshot: &mut Snapshot) -> Result<()> {
    options.backend.iter().try_for_each(|id| snapshot.only(id))
}

/// Reports on the last of the snapshots, with those before it for what changed.
fn report(options: &Options, history: &[Snapshot], last: &Snapshot) -> Result<()> {
    let first = history.first().unwrap_or(last);
    if let Some(path) = &options.svg {
        let picture = svg::picture(history, last)?;
        std::fs::write(path, picture)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    let mut text = String::new();
    if options.once {
        text = text::report(first, last);
    }
    if options.json {
        text = serde_json::to_string_pretty(&json(first, last)?)? + "\n";
    }
    io::stdout()
        .write_all(text.as_bytes())
        .context("cannot print")
}

/// A snapshot as in a record, and per backend what each counter grew by in a second.
fn json(first: &Snapshot, last: &Snapshot) -> Result<Value> {
    let mut value = serde_json::to_value(last)?;
    for (at, memory) in last.backends.iter().enumerate() {
        let Some(rates) = rates(first, last, &memory.info.id) else {
            continue;
        };
        let pairs = COUNTERS.iter().zip(rates);
        value["backends"][at]["rates"] = pairs
            .map(|(counter, rate)| (counter.key.to_owned(), Value::from(rate)))
            .collect();
    }
    Ok(value)
}
