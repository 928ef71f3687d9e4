// SPDX-License-Identifier: GPL-2.0-or-later
//! The steps of `cargo xtask test`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::cargo::{self, cargo};
use crate::context::Context;
use crate::level1::{Lab, Parts, RUNNER, Task, linux_paths, memory_for, quote, runner_paths};
use crate::process::{Job, command, output};
use crate::progress::Step;
use crate::qemu::Qemu;
use crate::{
    cache, debian, header as c_header, image, kernel as lab_kernel, meson, python,
    qemu as qemu_build,
};

use super::report::{CargoTest, MesonTest, Tally, Tap};

/// How long a whole run of the runner may take.
const RUNNER_LIMIT: Duration = Duration::from_secs(45 * 60);

/// How long other tests may take.
pub(super) const TEST_LIMIT: Duration = Duration::from_secs(30 * 60);

/// What the steps share: what one has built serves the next.
pub(crate) struct Bench<'a> {
    pub(crate) ctx: &'a Context,
    filter: Vec<String>,
    pub(super) full: bool,
    qemu: OnceLock<Result<Qemu, String>>,
    kernel: OnceLock<Result<lab_kernel::Kernel, String>>,
}

impl<'a> Bench<'a> {
    pub(crate) fn new(ctx: &'a Context, filter: Vec<String>, full: bool) -> Self {
        Self {
            ctx,
            filter,
            full,
            qemu: OnceLock::new(),
            kernel: OnceLock::new(),
        }
    }

    pub(super) fn filter(&self) -> &[String] {
        &self.filter
    }

    fn qemu(&self, step: &Step) -> Result<Qemu> {
        once(&self.qemu, || qemu_build::build(self.ctx, step))
    }

    fn kernel(&self, step: &Step) -> Result<lab_kernel::Kernel> {
        once(&self.kernel, || lab_kernel::build(self.ctx, step))
    }

    pub(super) fn parts(&self, step: &Step) -> Result<Parts> {
        Ok(Parts {
            qemu: self.qemu(step)?,
            kernel: self.kernel(step)?,
            guest: cargo::guest(self.ctx, step)?,
            runner: cargo::runner(self.ctx, step)?,
        })
    }

    /// The arguments of the runner's `test`.
    fn runner_words(
        &self,
        runner: &str,
        paths: Vec<String>,
        programs: [(&str, String); 3],
        out: &str,
    ) -> Vec<String> {
        let mut words = vec![runner.to_owned(), "test".to_owned()];
        words.extend(paths);
        for (option, path) in programs {
            words.extend([option.to_owned(), path]);
        }
        words.extend(["--out".to_owned(), out.to_owned()]);
        for filter in &self.filter {
            words.extend(["--filter".to_owned(), filter.clone()]);
        }
        if self.full {
            words.push("--full".to_owned());
        }
        words
    }
}

/// What the runner tests besides QEMU, with the options by which it takes them.
fn programs(ctx: &Context, step: &Step) -> Result<[(&'static str, PathBuf); 3]> {
    Ok([
        ("--vmm", cargo::example(ctx, step)?),
        ("--owner-tests", cargo::owner_tests(ctx, step)?),
        ("--top", cargo::top(ctx, step)?),
    ])
}

/// Makes something for all steps; when that fails, it fails for all of them.
fn once<T: Clone>(
    cell: &OnceLock<Result<T, String>>,
    make: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let made = cell.get_or_init(|| make().map_err(|error| format!("{error:#}")));
    made.clone().map_err(|error| anyhow!(error))
}

pub(crate) fn format(bench: &Bench, step: &Step) -> Result<Tally> {
    simple(bench, step, "format", &["fmt", "--all", "--check"])
}

pub(crate) fn clippy(bench: &Bench, step: &Step) -> Result<Tally> {
    let args = [
        "clippy",
        "--workspace",
        "--all-targets",
        "--",
        "--deny",
        "warnings",
    ];
    simple(bench, step, "clippy", &args)?;
    let library = ["--package", "guestmemfd"];
    let plain = ["clippy", "--no-default-features", "--lib"];
    let deny = ["--", "--deny", "warnings"];
    let args = [&plain[..], &library, &deny].concat();
    simple(bench, step, "clippy-no-features", &args)?;
    documentation(bench, step)?;
    arm64(bench, step)
}

/// The library's documentation has no link that leads nowhere.
fn documentation(bench: &Bench, step: &Step) -> Result<()> {
    step.say("running rustdoc");
    let mut command = cargo(bench.ctx);
    command.args(["doc", "--package", "guestmemfd", "--no-deps"]);
    command.env("RUSTDOCFLAGS", "--deny warnings");
    let job = Job::new("cargo doc", command);
    job.log(&bench.ctx.log("doc")).limit(TEST_LIMIT).run()
}

/// The library must compile for arm64, which is checked where the target is installed.
fn arm64(bench: &Bench, step: &Step) -> Result<Tally> {
    const TARGET: &str = "aarch64-unknown-linux-gnu";
    let folder = output(command(
        "rustc",
        ["--print=target-libdir", "--target", TARGET],
    ))?;
    if !Path::new(folder.trim()).exists() {
        return Ok(Tally::pass(format!(
            "not for arm64: rustup target add {TARGET}"
        )));
    }
    let package = ["clippy", "--package", "guestmemfd", "--lib"];
    let target = ["--target", TARGET, "--", "--deny", "warnings"];
    simple(
        bench,
        step,
        "clippy-arm64",
        &[&package[..], &target].concat(),
    )
}

fn simple(bench: &Bench, step: &Step, name: &str, args: &[&str]) -> Result<Tally> {
    step.say("running");
    let mut command = cargo(bench.ctx);
    command.args(args);
    let job = Job::new(format!("cargo {}", args[0]), command);
    job.log(&bench.ctx.log(name)).limit(TEST_LIMIT).run()?;
    Ok(Tally::pass(""))
}

pub(crate) fn unit(bench: &Bench, step: &Step) -> Result<Tally> {
    step.say("running");
    let all: &[&str] = &["--workspace", "--no-fail-fast"];
    let mut tally = cargo_test(bench, step, "unit", all)?;
    step.say("exploring schedules of claims");
    let claims = &["--package", "guestmemfd", "--lib", "--features", "shuttle"];
    tally.add(cargo_test(bench, step, "schedules", claims)?);
    Ok(tally)
}

pub(super) fn cargo_test(bench: &Bench, step: &Step, name: &str, args: &[&str]) -> Result<Tally> {
    let mut command = cargo(bench.ctx);
    command.arg("test").args(args).arg("--").args(&bench.filter);
    count_tests(bench.ctx, step, name, command)
}

/// Runs tests of Rust's.
pub(super) fn count_tests(
    ctx: &Context,
    step: &Step,
    name: &str,
    command: Command,
) -> Result<Tally> {
    let mut counts = CargoTest::default();
    let outcome = Job::new("cargo test", command)
        .log(&ctx.log(name))
        .limit(TEST_LIMIT)
        .follow(|line| counts.line(line))
        .outcome()?;
    show_failure(step, outcome.check());
    Ok(counts.finish(outcome.success()))
}

fn show_failure(step: &Step, result: Result<()>) {
    if let Err(error) = result {
        step.note(error);
    }
}

pub(crate) fn header(bench: &Bench, _step: &Step) -> Result<Tally> {
    c_header::check(bench.ctx)?;
    Ok(Tally::pass(""))
}

pub(crate) fn c(bench: &Bench, step: &Step) -> Result<Tally> {
    let ctx = bench.ctx;
    let tools = python::environment(ctx, step, python::TOOLS)?;
    let build = meson::folder(ctx, "test");
    step.say("building");
    meson::configure(ctx, &tools, &build, &[meson::cargo_target_dir(ctx)])?;
    step.say("running");
    let mut tally = meson_test(ctx, step, &tools, &build, "c", &[], &[])?;
    step.say("running under valgrind");
    let valgrind = meson_test(
        ctx,
        step,
        &tools,
        &build,
        "c-valgrind",
        &["--setup", "valgrind"],
        &[],
    )?;
    tally.add(valgrind);
    Ok(tally)
}

/// Runs the tests of a build folder, of which some programs are expected to fail, by name.
pub(super) fn meson_test(
    ctx: &Context,
    step: &Step,
    tools: &Path,
    build: &Path,
    name: &str,
    args: &[&str],
    expected: &[&str],
) -> Result<Tally> {
    let mut test = meson::command(tools, &["test", "--print-errorlogs", "-C"]);
    test.arg(build).args(args);
    let mut counts = MesonTest::default();
    let outcome = Job::new("meson test", test)
        .log(&ctx.log(name))
        .limit(TEST_LIMIT)
        .follow(|line| counts.line(line))
        .outcome()?;
    if expected.is_empty() {
        show_failure(step, outcome.check());
    }
    Ok(counts.finish(outcome.success(), expected))
}

pub(crate) fn qemu(bench: &Bench, step: &Step) -> Result<Tally> {
    let qemu = bench.qemu(step)?;
    Ok(Tally::pass(qemu.version))
}

pub(crate) fn kernel(bench: &Bench, step: &Step) -> Result<Tally> {
    let kernel = bench.kernel(step)?;
    Ok(Tally::pass(kernel.version))
}

pub(crate) fn machine(bench: &Bench, step: &Step) -> Result<Tally> {
    let qemu = bench.qemu(step)?;
    let guest = cargo::plain_guest(bench.ctx, step)?;
    let runner = cargo::runner(bench.ctx, step)?;
    let programs = programs(bench.ctx, step)?;
    let firmware = image::firmware(bench.ctx)?;
    let out = bench.ctx.scratch().join("machine");
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let paths = [
        "--qemu",
        &text(&qemu.program),
        "--firmware",
        &text(&firmware),
    ];
    let mut paths: Vec<String> = paths.iter().map(|word| (*word).to_owned()).collect();
    paths.extend(["--guest".to_owned(), text(&guest)]);
    let words = bench.runner_words(
        &text(&runner),
        paths,
        programs.map(|(option, path)| (option, text(&path))),
        &text(&out),
    );
    step.say("running");
    let mut tap = Tap::default();
    let outcome = Job::new("the runner", command(&words[0], &words[1..]))
        .log(&bench.ctx.log("machine"))
        .limit(RUNNER_LIMIT)
        .follow(|line| follow_tap(&mut tap, step, line))
        .outcome()?;
    Ok(judge(tap, outcome.success(), &outcome.ending()))
}

pub(crate) fn lab(bench: &Bench, step: &Step) -> Result<Tally> {
    in_lab(bench, step, "lab", bench.ctx.in_place)
}

pub(crate) fn two_files(bench: &Bench, step: &Step) -> Result<Tally> {
    in_lab(bench, step, "two-files", false)
}

/// The runner's tests in a level 1 whose kernel converts in place, or in two files.
fn in_lab(bench: &Bench, step: &Step, name: &str, in_place: bool) -> Result<Tally> {
    let ctx = bench.ctx;
    let lab = Lab::complete(ctx, step, bench.parts(step)?)?;
    let disk = debian::GUEST.disk(ctx, step)?;
    let programs = programs(ctx, step)?;
    let logs = ctx.scratch().join(name);
    cache::remove(&logs)?;
    fs::create_dir_all(&logs)?;
    let in_level_1 = programs.each_ref().map(|(option, path)| {
        let name = path.file_name().unwrap_or_default();
        (*option, format!("/run/lab/{}", Path::new(name).display()))
    });
    let mut level_1_programs: Vec<PathBuf> = programs.map(|(_, path)| path).into();
    level_1_programs.push(lab.kernel.image.clone());
    // Sockets cannot lie in a folder of the host, so the logs are copied there.
    let paths = [&runner_paths()[..], &linux_paths()[..]].concat();
    let runner = bench.runner_words(RUNNER, paths, in_level_1, "/tmp/test");
    let script = format!(
        "{}\nstatus=$?\ncp -r /tmp/test/. /host/\nexit $status\n",
        quote(runner)
    );
    let task = Task {
        name: "the runner in the lab".to_owned(),
        script,
        share: Some(logs),
        memory: memory_for(0),
        limit: Some(RUNNER_LIMIT),
        programs: level_1_programs,
        disks: vec![disk],
        iommu: true,
        in_place: Some(in_place),
        log: Some(name.to_owned()),
        ..Task::default()
    };
    step.say("running");
    let mut tap = Tap::default();
    let result = lab.run(ctx, &task, |line| follow_tap(&mut tap, step, line));
    let (success, ending) = match result {
        Ok(status) => (status == 0, format!("exit status {status}")),
        Err(error) => {
            step.note(format_args!("{error:#}"));
            (false, "level 1 did not come to its end".to_owned())
        }
    };
    Ok(judge(tap, success, &ending))
}

pub(crate) fn bench(bench: &Bench, step: &Step) -> Result<Tally> {
    let ctx = bench.ctx;
    let lab = Lab::complete(ctx, step, bench.parts(step)?)?;
    step.say("measuring");
    let rows = crate::bench::Bench::new(ctx, step, lab)?.check_rows(step)?;
    let mut tally = Tally::default();
    for (line, within) in crate::bench::baseline::compare(ctx, &rows)? {
        tally.add(match within {
            true => Tally::pass(""),
            false => Tally::fail(line),
        });
    }
    Ok(tally)
}

pub(super) fn follow_tap(tap: &mut Tap, step: &Step, line: &str) {
    tap.line(line);
    let (done, total) = tap.progress();
    if total > 0 {
        step.amount(done, total);
    }
    // The reason follows in comments.
    let of_failure = tap.last_failed() && line.starts_with('#');
    if of_failure || line.starts_with("not ok") || line.starts_with("Bail out!") {
        step.note(line);
    }
}

pub(super) fn judge(tap: Tap, success: bool, ending: &str) -> Tally {
    let mut tally = tap.finish();
    if !success && tally.failed == 0 {
        tally.add(Tally::fail(format!("all tests passed, but: {ending}")));
    }
    tally
}
