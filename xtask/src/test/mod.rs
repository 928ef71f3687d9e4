// SPDX-License-Identifier: GPL-2.0-or-later
//! `cargo xtask test`: every test there is, as named steps.

mod avocado;
mod beside;
mod crates;
mod licences;
mod msrv;
mod own;
mod patches;
mod report;
mod steps;
mod style;
mod tools;
mod uapi;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;

use crate::context::Context;
use crate::packages::{self, Purpose};
use crate::progress::{Step, Steps};

use report::{Line, Tally, table, total};

/// Options of `test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only these steps, by name [default: all but those for --full]
    #[arg(value_name = "STEP")]
    steps: Vec<String>,

    /// Only tests whose name contains this, or one of several; steps without named tests are left out
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,

    /// Also the long steps: QEMU's own tests, with the library and without
    #[arg(long)]
    full: bool,

    /// So many of the steps that run guests run at once [default: 2, or 1 with one CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=8))]
    jobs: Option<u8>,

    /// Say which steps there are, and stop
    #[arg(long)]
    list: bool,
}

/// A part of all tests.
struct TestStep {
    name: &'static str,
    what: &'static str,
    /// Runs only when asked for.
    long: bool,
    /// Has tests whose names a filter can select.
    named: bool,
    /// Keeps about one CPU busy, and can run beside others of its kind.
    beside: bool,
    run: fn(&steps::Bench, &Step) -> Result<Tally>,
}

const fn step(
    name: &'static str,
    what: &'static str,
    run: fn(&steps::Bench, &Step) -> Result<Tally>,
) -> TestStep {
    TestStep {
        name,
        what,
        long: false,
        named: false,
        beside: false,
        run,
    }
}

impl TestStep {
    const fn named(self) -> Self {
        Self {
            named: true,
            ..self
        }
    }

    const fn long(self) -> Self {
        Self { long: true, ..self }
    }

    const fn beside(self) -> Self {
        Self {
            beside: true,
            ..self
        }
    }
}

const STEPS: &[TestStep] = &[
    step("format", "rustfmt has nothing to change", steps::format),
    step(
        "style",
        "the library's rooms import one way, and lines fit",
        style_step,
    ),
    step(
        "licences",
        "each file has the licence of its place",
        licences_step,
    ),
    step(
        "clippy",
        "no warnings in any package, nor in the library's documentation",
        steps::clippy,
    ),
    step(
        "unit",
        "unit and property tests of all packages",
        steps::unit,
    )
    .named(),
    step(
        "crates",
        "crates of others: licences, sources, flaws",
        crates::crates,
    ),
    step(
        "header",
        "the C header is what the library's source says, and its number",
        steps::header,
    ),
    step("c", "tests in C, as they are and under valgrind", steps::c),
    step(
        "msrv",
        "the library with the oldest Rust that it promises",
        msrv_step,
    ),
    step(
        "loom",
        "pins against conversions in every order",
        tools::loom,
    ),
    step(
        "sanitizers",
        "tests in C with AddressSanitizer and ThreadSanitizer",
        tools::sanitizers,
    ),
    step(
        "miri",
        "what is pure, and the C interface, in Miri",
        tools::miri,
    ),
    step(
        "fuzz",
        "what guests, C programs and snapshots may hand in, made up",
        tools::fuzz,
    ),
    step(
        "qemu",
        "QEMU builds with the patches and the library",
        steps::qemu,
    ),
    step("kernel", "the lab's kernel builds", steps::kernel),
    step(
        "qemu-tests",
        "QEMU's tests that the patches add or change",
        own::ours,
    ),
    step(
        "patches",
        "each patch is listed, applies, and passes checkpatch",
        patches_step,
    ),
    step(
        "uapi",
        "the lab's kernel answers as it should, converting in place and not",
        uapi::test,
    )
    .named()
    .beside(),
    step(
        "machine",
        "tests with QEMU on this machine's KVM",
        steps::machine,
    )
    .named()
    .beside(),
    step(
        "lab",
        "tests with QEMU in level 1 of the lab, which converts memory in place",
        steps::lab,
    )
    .named()
    .beside(),
    step(
        "two-files",
        "the same where memory is converted in two files",
        steps::two_files,
    )
    .named()
    .beside(),
    step(
        "avocado",
        "tests with Avocado, in the lab with one file and with two if this machine's KVM does not serve",
        avocado_step,
    )
    .beside(),
    step("libvirt", "libvirt's domains in the lab", libvirt_step).beside(),
    step(
        "bench",
        "conversions cost no more instructions than they did",
        steps::bench,
    ),
    step(
        "topics",
        "QEMU compiles after each folder of patches, with the library and without",
        topics_step,
    )
    .long(),
    step("series", "QEMU compiles after each patch", series_step).long(),
    step("qtest", "QEMU's own tests, with the library", own::with).long(),
    step(
        "without",
        "QEMU's own tests, built without the library",
        own::without,
    )
    .long(),
    step(
        "fixes",
        "QEMU's own tests, with the first folder of patches alone",
        own::fixes,
    )
    .long(),
];

fn licences_step(bench: &steps::Bench, _step: &Step) -> Result<Tally> {
    licences::check(bench.ctx)
}

fn style_step(bench: &steps::Bench, _step: &Step) -> Result<Tally> {
    style::check(&bench.ctx.root)?;
    Ok(Tally::pass(""))
}

fn msrv_step(bench: &steps::Bench, step: &Step) -> Result<Tally> {
    msrv::test(bench.ctx, step)
}

fn series_step(bench: &steps::Bench, step: &Step) -> Result<Tally> {
    patches::compile_each(bench.ctx, step)
}

fn topics_step(bench: &steps::Bench, step: &Step) -> Result<Tally> {
    patches::compile_topics(bench.ctx, step)
}

fn patches_step(bench: &steps::Bench, step: &Step) -> Result<Tally> {
    patches::test(bench.ctx, step)
}

fn avocado_step(bench: &steps::Bench, step: &Step) -> Result<Tally> {
    avocado::confidential(bench, step)
}

fn libvirt_step(bench: &steps::Bench, step: &Step) -> Result<Tally> {
    avocado::libvirt(bench, step)
}

impl Options {
    fn wants(&self, step: &TestStep) -> bool {
        if !self.steps.is_empty() {
            return self.steps.iter().any(|name| name == step.name);
        }
        (self.full || !step.long) && (self.filter.is_empty() || step.named)
    }
}

/// Runs the command.
pub(crate) fn run(ctx: &Context, options: &Options) -> Result<ExitCode> {
    if options.list {
        for step in STEPS {
            let long = if step.long { " (with --full)" } else { "" };
            println!("{:10} {}{long}", step.name, step.what);
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(name) = options
        .steps
        .iter()
        .find(|name| STEPS.iter().all(|s| s.name != **name))
    {
        anyhow::bail!("no test step is called {name}; see: cargo xtask test --list");
    }
    let wanted: Vec<&TestStep> = STEPS.iter().filter(|step| options.wants(step)).collect();
    let progress = Steps::new(wanted.len() + 1);
    let step = progress.begin("system packages");
    use Purpose::{Debian, Image, Kernel, Qemu, Test};
    packages::ensure(ctx, &step, &[Qemu, Kernel, Image, Debian, Test])?;
    step.finish("ready");

    let bench = steps::Bench::new(ctx, options.filter.clone(), options.full);
    let jobs = options.jobs.map_or(ctx.jobs.min(2), usize::from);
    let lines: Vec<Line> = wanted
        .chunk_by(|one, next| one.beside && next.beside)
        .flat_map(|steps| beside::map(steps, jobs, |step| run_step(&bench, step, &progress)))
        .collect();
    println!("{}", table(&lines));
    println!("{}", total(&lines));
    let good = lines.iter().all(|line| line.tally.failed == 0);
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run_step(bench: &steps::Bench, test: &TestStep, progress: &Steps) -> Line {
    let start = Instant::now();
    let step = progress.begin(format_args!("{}: {}", test.name, test.what));
    let tally = (test.run)(bench, &step).unwrap_or_else(|error| {
        step.note(format_args!("{error:#}"));
        let text = format!("{error:#}");
        Tally::fail(text.lines().next().unwrap_or_default())
    });
    let word = match (tally.failed, tally.passed) {
        (0, 0) => "nothing to run".to_owned(),
        (0, _) => "ok".to_owned(),
        (failed, _) => format!("{failed} FAILED"),
    };
    step.finish(word);
    Line {
        name: test.name,
        tally,
        time: start.elapsed(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(steps: &[&str], filter: &[&str], full: bool) -> Options {
        Options {
            steps: steps.iter().map(|name| (*name).to_owned()).collect(),
            filter: filter.iter().map(|text| (*text).to_owned()).collect(),
            full,
            jobs: None,
            list: false,
        }
    }

    fn names(options: &Options) -> Vec<&'static str> {
        STEPS
            .iter()
            .filter(|step| options.wants(step))
            .map(|step| step.name)
            .collect()
    }

    #[test]
    fn steps_are_chosen_by_name_length_and_filter() {
        assert_eq!(names(&options(&[], &[], true)).len(), STEPS.len());
        assert!(!names(&options(&[], &[], false)).contains(&"qtest"));
        assert_eq!(names(&options(&["qtest", "c"], &[], false)), ["c", "qtest"]);
        assert_eq!(
            names(&options(&[], &["x", "y"], false)),
            ["unit", "uapi", "machine", "lab", "two-files"]
        );
    }
}
