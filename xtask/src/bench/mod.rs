// SPDX-License-Identifier: GPL-2.0-or-later
//! `cargo xtask bench`: what conversions cost here, on QEMU's own path, and at the least. Level 1
//! counts instructions, so figures repeat whatever else the machine does.

pub(crate) mod baseline;
mod chart;
mod plan;
mod report;
mod rows;
mod run;

use std::collections::BTreeMap;
use std::fs;
use std::process::ExitCode;

use anyhow::{Context as _, Result};

use crate::cargo;
use crate::context::Context;
use crate::level1::{Lab, Parts};
use crate::packages::{self, Purpose};
use crate::progress::{Step, Steps};

use plan::Measurement;
use rows::Row;

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
    use Purpose::{Image, Kernel, Qemu};
    packages::ensure(ctx, &step, &[Qemu, Kernel, Image])?;
    step.finish("ready");

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
    show(ctx, &bench, &rows)?;
    Ok(ExitCode::SUCCESS)
}

/// Everything that has to be built.
pub(crate) struct Bench<'a> {
    ctx: &'a Context,
    lab: Lab,
    floor: std::path::PathBuf,
}

impl<'a> Bench<'a> {
    pub(crate) fn build(ctx: &'a Context, step: &Step) -> Result<Self> {
        let parts = Parts::build(ctx, step)?;
        Self::new(ctx, step, Lab::complete(ctx, step, parts)?)
    }

    pub(crate) fn new(ctx: &'a Context, step: &Step, lab: Lab) -> Result<Self> {
        let floor = cargo::floor(ctx, step)?;
        Ok(Self { ctx, lab, floor })
    }

    fn rows(&self, step: &Step, wanted: &[Measurement], options: &Options) -> Result<Vec<Row>> {
        let jobs = options.jobs.unwrap_or(self.ctx.jobs);
        let limit = std::time::Duration::from_secs(options.limit);
        run::all(self, step, wanted, jobs, limit)
    }

    /// The five rows that are compared with the baseline.
    pub(crate) fn check_rows(&self, step: &Step) -> Result<Vec<Row>> {
        let limit = std::time::Duration::from_secs(1800);
        run::all(self, step, &[plan::check()], 1, limit)
    }

    fn versions(&self) -> Result<BTreeMap<&'static str, String>> {
        let mut head = crate::process::command("git", ["describe", "--always", "--dirty"]);
        head.current_dir(&self.ctx.root);
        let head = crate::process::output(head).unwrap_or_default();
        Ok(BTreeMap::from([
            ("guestmemfd", head.trim().to_owned()),
            ("qemu", self.lab.qemu.version.clone()),
            ("linux", self.lab.kernel.version.to_string()),
        ]))
    }
}

fn show(ctx: &Context, bench: &Bench, rows: &[Row]) -> Result<()> {
    let folder = ctx.root.join("target/bench");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    println!("{}", report::table(rows));
    let json = folder.join("report.json");
    fs::write(&json, report::json(rows, &bench.versions()?)?)
        .with_context(|| format!("cannot write {}", json.display()))?;
    let svg = folder.join("conversions.svg");
    chart::draw(&svg, rows)?;
    println!("{}\n{}", json.display(), svg.display());
    Ok(())
}
