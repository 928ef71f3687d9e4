// SPDX-License-Identifier: GPL-2.0-or-later
//! `cargo xtask bench`: what conversions cost here, on QEMU's own path, and at the least. Level 1
//! counts instructions, so figures repeat whatever else the machine does.

pub(crate) mod baseline;
mod breakdown;
mod chart;
mod markdown;
mod native;
mod pins;
mod plan;
mod record;
mod report;
mod rows;
mod run;
mod scale;

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::cache::{self, Key};
use crate::cargo;
use crate::context::Context;
use crate::level1::{Lab, Parts};
use crate::library::{self, Library};
use crate::packages::{self, Purpose};
use crate::process;
use crate::progress::{Step, Steps};

use plan::Measurement;
use record::{Record, Versions};
use rows::Row;
use run::{How, Outcome};

const REPORT: &str = "report.json";

/// Options of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only measurements whose name contains one of these, such as ours, floor, request [default:
    /// all]; --list names them
    #[arg(value_name = "TEXT")]
    only: Vec<String>,

    /// Say which measurements there are, and stop
    #[arg(long)]
    list: bool,

    /// Print what the last runs have measured as the tables of docs/performance.md, and stop
    #[arg(long, exclusive = true)]
    markdown: bool,

    /// Compare a few rows, with two files and in place, with xtask/baseline.json, as `cargo xtask test bench` does
    #[arg(long, conflicts_with = "only")]
    check: bool,

    /// Measure these rows and write them to xtask/baseline.json
    #[arg(long, conflicts_with = "only")]
    update_baseline: bool,

    /// Say also how many instructions the guest, the VMM and level 1's kernel have carried out, and
    /// write down which pages the guest touches
    #[arg(long, conflicts_with_all = ["check", "update_baseline"])]
    breakdown: bool,

    /// Measure on this machine's own KVM, in time; what it cannot serve is left out and said
    #[arg(long, conflicts_with_all = ["check", "update_baseline", "breakdown", "jobs"])]
    native: bool,

    /// Measurements at once [default: one a CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    jobs: Option<u16>,

    /// Seconds after which a measurement is taken to hang, and tried again
    #[arg(long, default_value_t = 3600, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
}

/// Runs the command.
pub(crate) fn run(ctx: &Context, options: &Options) -> Result<ExitCode> {
    let wanted = plan::chosen(plan::all(), &options.only)?;
    let folder = ctx.root.join("target/bench");
    if options.list {
        wanted.iter().for_each(|one| println!("{}", one.name()));
        return Ok(ExitCode::SUCCESS);
    }
    if options.markdown {
        let report = record::Report::read(&folder.join(REPORT))?;
        print!("{}", markdown::tables(&report));
        return Ok(ExitCode::SUCCESS);
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let steps = Steps::new(3);
    let step = steps.begin("system packages");
    use Purpose::{Bench as Measuring, Image, Kernel, Qemu};
    packages::ensure(ctx, &step, &[Qemu, Kernel, Image, Measuring])?;
    // Logs and counts have one name each, and there is one report.
    let _lock = cache::lock(&folder, "bench", &step)?;
    step.finish("ready");

    if options.native {
        return native(ctx, &steps, &options.only, &folder.join("native"));
    }
    let step = steps.begin("lab");
    let bench = Bench::build(ctx, &step)?;
    step.finish("ready");

    let step = steps.begin("measuring");
    if options.check || options.update_baseline {
        let rows = bench.check_rows(&step)?;
        step.finish("done");
        return baseline::compare_or_update(ctx, &rows, options.update_baseline);
    }
    let linux = bench.lab.kernel.version.to_string();
    let versions = versions(ctx, &bench.lab.qemu.version, &linux);
    let mut record = open(&step, &folder, versions)?;
    // A long run that is interrupted keeps what it has. The end says if that is not possible.
    let keep = |rows: &[Row]| drop(record.add(rows));
    let outcome = bench.measure(&step, &wanted, options, keep)?;
    step.finish(format_args!("{} rows", outcome.rows.len()));
    show(record, &outcome)
}

fn native(ctx: &Context, steps: &Steps, only: &[String], folder: &Path) -> Result<ExitCode> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let step = steps.begin("this machine's KVM");
    let machine = native::Machine::probe(ctx, &step)?;
    let wanted = machine.chosen(&step, only)?;
    step.finish("asked");
    let step = steps.begin("measuring");
    let (qemu, rows) = machine.rows(ctx, &step, &wanted)?;
    let linux = process::output(process::command("uname", ["-sr"]))?;
    let record = open(&step, folder, versions(ctx, &qemu, &linux))?;
    step.finish(format_args!("{} rows", rows.len()));
    let failed = Vec::new();
    show(record, &Outcome { rows, failed })
}

fn open(step: &Step, folder: &Path, versions: Versions) -> Result<Record> {
    let (record, note) = Record::open(folder.join(REPORT), versions)?;
    note.into_iter().for_each(|note| step.note(note));
    Ok(record)
}

/// Everything that has to be built.
pub(crate) struct Bench<'a> {
    ctx: &'a Context,
    lab: Lab,
    floor: PathBuf,
    library: Library,
}

impl<'a> Bench<'a> {
    pub(crate) fn build(ctx: &'a Context, step: &Step) -> Result<Self> {
        let parts = Parts::build(ctx, step)?;
        Self::new(ctx, step, Lab::complete(ctx, step, parts)?)
    }

    pub(crate) fn new(ctx: &'a Context, step: &Step, lab: Lab) -> Result<Self> {
        let floor = cargo::floor(ctx, step)?;
        let library = library::install(ctx, step)?;
        Ok(Self {
            ctx,
            lab,
            floor,
            library,
        })
    }

    fn measure(
        &self,
        step: &Step,
        wanted: &[Measurement],
        options: &Options,
        measured: impl FnMut(&[Row]),
    ) -> Result<Outcome> {
        let plugin = options.breakdown.then(|| cargo::plugin(self.ctx, step));
        let how = How {
            jobs: options.jobs.map_or(self.ctx.jobs, usize::from),
            limit: Duration::from_secs(options.limit),
            plugin: plugin.transpose()?,
        };
        run::all(self, step, wanted, &how, measured)
    }

    /// The rows that are compared with the baseline.
    pub(crate) fn check_rows(&self, step: &Step) -> Result<Vec<Row>> {
        let how = How {
            jobs: 1,
            limit: Duration::from_secs(1800),
            plugin: None,
        };
        run::all(self, step, &plan::checks(), &how, |_| {}).map(|outcome| outcome.rows)
    }
}

/// What was measured. Changes that are not committed yet count by their content.
fn versions(ctx: &Context, qemu: &str, linux: &str) -> Versions {
    let git = |args: &[&str]| {
        let mut git = process::command("git", args);
        git.current_dir(&ctx.root);
        process::output(git).unwrap_or_default()
    };
    let mut head = git(&["describe", "--always", "--dirty"]).trim().to_owned();
    if head.ends_with("-dirty") {
        let changes = Key::default().add("changes", git(&["diff", "HEAD"]));
        head += &format!("-{}", changes.finish());
    }
    let all = [
        ("guestmemfd", head.as_str()),
        ("qemu", qemu),
        ("linux", linux),
    ];
    all.map(|(name, of)| (name.to_owned(), of.trim().to_owned()))
        .into()
}

/// Prints what was measured beside what is known of the same rows, and writes the report and the charts.
fn show(mut record: Record, outcome: &Outcome) -> Result<ExitCode> {
    let kept = record.add(&outcome.rows);
    let measured: HashSet<&str> = outcome.rows.iter().map(|row| row.row.as_str()).collect();
    let of_these = |row: &&Row| measured.contains(row.row.as_str());
    let rows: Vec<Row> = record
        .report
        .rows
        .iter()
        .filter(of_these)
        .cloned()
        .collect();
    println!("{}", report::table(&rows));
    if let Some(table) = breakdown::table(&rows) {
        println!("{table}");
    }
    kept?;
    println!("{}", record.path.display());
    for chart in &chart::CHARTS {
        let svg = record.path.with_file_name(chart.file);
        if chart::draw(chart, &svg, &record.report.rows)? {
            println!("{}", svg.display());
        }
    }
    if outcome.failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("could not be measured: {}", outcome.failed.join(", "));
    Ok(ExitCode::FAILURE)
}
