// SPDX-License-Identifier: GPL-2.0-or-later
//! `cargo xtask bench`: what conversions cost here, on QEMU's own path, and at the least. Level 1
//! counts instructions, so figures repeat whatever else the machine does.

pub(crate) mod baseline;
mod breakdown;
mod chart;
mod native;
mod pins;
mod plan;
mod report;
mod rows;
mod run;
mod scale;

use std::collections::BTreeMap;
use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::cargo;
use crate::context::Context;
use crate::level1::{Lab, Parts};
use crate::packages::{self, Purpose};
use crate::process;
use crate::progress::{Step, Steps};

use plan::Measurement;
use rows::Row;
use run::How;

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

    /// Compare five rows with xtask/baseline.json, as `cargo xtask test bench` does
    #[arg(long)]
    check: bool,

    /// Measure the five rows and write them to xtask/baseline.json
    #[arg(long)]
    update_baseline: bool,

    /// Say also how many instructions the guest, the VMM and level 1's kernel have carried out, and
    /// write down which pages the guest touches
    #[arg(long)]
    breakdown: bool,

    /// Measure on this machine's own KVM, in time; what it cannot serve is left out and said
    #[arg(long, conflicts_with_all = ["check", "update_baseline", "breakdown", "jobs"])]
    native: bool,

    /// Measurements at once [default: one a CPU]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,

    /// Seconds after which a measurement is taken to hang, and tried again
    #[arg(long, default_value_t = 3600, value_name = "SECONDS")]
    limit: u64,
}

/// Runs the command.
pub(crate) fn run(ctx: &Context, options: &Options) -> Result<ExitCode> {
    if options.list {
        for measurement in plan::all() {
            println!("{}", measurement.name());
        }
        return Ok(ExitCode::SUCCESS);
    }
    let steps = Steps::new(3);
    let step = steps.begin("system packages");
    use Purpose::{Bench as Measuring, Image, Kernel, Qemu};
    packages::ensure(ctx, &step, &[Qemu, Kernel, Image, Measuring])?;
    step.finish("ready");

    if options.native {
        let step = steps.begin("this machine's KVM");
        let machine = native::Machine::probe(ctx, &step)?;
        step.finish("asked");
        let step = steps.begin("measuring");
        let (qemu, rows) = machine.rows(ctx, &step, &options.only)?;
        step.finish(format_args!("{} rows", rows.len()));
        let linux = process::output(process::command("uname", ["-sr"]))?;
        show(ctx, &versions(ctx, &qemu, &linux), &rows)?;
        return Ok(ExitCode::SUCCESS);
    }
    let step = steps.begin("lab");
    let bench = Bench::build(ctx, &step)?;
    step.finish("ready");

    let step = steps.begin("measuring");
    if options.check || options.update_baseline {
        let rows = bench.rows(&step, &[plan::check()], options)?;
        step.finish("done");
        return baseline::compare_or_update(ctx, &rows, options.update_baseline);
    }
    let wanted = plan::all().into_iter().filter(|m| m.wanted(&options.only));
    let rows = bench.rows(&step, &wanted.collect::<Vec<_>>(), options)?;
    step.finish(format_args!("{} rows", rows.len()));
    let (qemu, linux) = (
        &bench.lab.qemu.version,
        bench.lab.kernel.version.to_string(),
    );
    show(ctx, &versions(ctx, qemu, &linux), &rows)?;
    Ok(ExitCode::SUCCESS)
}

/// Everything that has to be built.
pub(crate) struct Bench<'a> {
    ctx: &'a Context,
    lab: Lab,
    floor: std::path::PathBuf,
    library: std::path::PathBuf,
}

impl<'a> Bench<'a> {
    pub(crate) fn build(ctx: &'a Context, step: &Step) -> Result<Self> {
        let parts = Parts::build(ctx, step)?;
        Self::new(ctx, step, Lab::complete(ctx, step, parts)?)
    }

    pub(crate) fn new(ctx: &'a Context, step: &Step, lab: Lab) -> Result<Self> {
        let floor = cargo::floor(ctx, step)?;
        let library = cargo::library(ctx, step)?;
        Ok(Self {
            ctx,
            lab,
            floor,
            library,
        })
    }

    fn rows(&self, step: &Step, wanted: &[Measurement], options: &Options) -> Result<Vec<Row>> {
        let plugin = options.breakdown.then(|| cargo::plugin(self.ctx, step));
        let how = How {
            jobs: options.jobs.unwrap_or(self.ctx.jobs),
            limit: Duration::from_secs(options.limit),
            plugin: plugin.transpose()?,
        };
        run::all(self, step, wanted, &how)
    }

    /// The five rows that are compared with the baseline.
    pub(crate) fn check_rows(&self, step: &Step) -> Result<Vec<Row>> {
        let how = How {
            jobs: 1,
            limit: Duration::from_secs(1800),
            plugin: None,
        };
        run::all(self, step, &[plan::check()], &how)
    }
}

type Versions = BTreeMap<&'static str, String>;

fn versions(ctx: &Context, qemu: &str, linux: &str) -> Versions {
    let mut head = process::command("git", ["describe", "--always", "--dirty"]);
    head.current_dir(&ctx.root);
    let head = process::output(head).unwrap_or_default();
    BTreeMap::from([
        ("guestmemfd", head.trim().to_owned()),
        ("qemu", qemu.trim().to_owned()),
        ("linux", linux.trim().to_owned()),
    ])
}

fn show(ctx: &Context, versions: &Versions, rows: &[Row]) -> Result<()> {
    let folder = ctx.root.join("target/bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    println!("{}", report::table(rows));
    if let Some(table) = breakdown::table(rows) {
        println!("{table}");
    }
    let json = folder.join("report.json");
    fs::write(&json, report::json(rows, versions)?)
        .with_context(|| format!("cannot write {}", json.display()))?;
    println!("{}", json.display());
    for chart in &chart::CHARTS {
        let svg = folder.join(chart.file);
        if chart::draw(chart, &svg, rows)? {
            println!("{}", svg.display());
        }
    }
    Ok(())
}
