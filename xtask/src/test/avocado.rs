// SPDX-License-Identifier: GPL-2.0-or-later
//! Tests run by Avocado, in level 1 by the Python of its Debian userland: those of `tests/avocado`, which
//! run on this machine's own KVM where that serves, and those of libvirt.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::context::Context;
use crate::debian::{DEBIAN, ENTER, GUEST};
use crate::image::{self, PROGRAM};
use crate::level1::{Lab, Parts, Task, linux_paths, memory_for, quote};
use crate::process::{Job, command};
use crate::progress::Step;
use crate::python::{self, AVOCADO, PACKAGES};
use crate::{boot, cache};

use super::report::{Tally, Tap};
use super::steps::{Bench, follow_tap, judge};

/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// A folder of tests.
#[derive(Debug)]
struct Suite {
    name: &'static str,
    folder: &'static str,
    /// What level 1 does before them.
    prepare: &'static str,
}

const CONFIDENTIAL: Suite = Suite {
    name: "avocado",
    folder: "tests/avocado",
    // Strict mode: guests convert by touching memory as well.
    prepare: "echo 0x100000000 > /sys/module/kvm/parameters/sw_protected_strict_from",
};

const LIBVIRT: Suite = Suite {
    name: "libvirt",
    folder: "tests/libvirt",
    prepare: "in-debian sh /host/tests/libvirt/prepare /run/lab/guest.elf",
};

/// Folders of the checkout that level 1 sees.
const SHARED: [&str; 3] = ["tests/avocado", "tests/libvirt", "docs/libvirt"];

/// The part of Avocado's results that TAP does not have.
#[derive(Debug, Deserialize)]
struct Results {
    tests: Vec<TestResult>,
}

#[derive(Debug, Deserialize)]
struct TestResult {
    name: String,
    status: String,
    fail_reason: String,
}

impl TestResult {
    fn failed(&self) -> bool {
        !matches!(self.status.as_str(), "PASS" | "WARN" | "SKIP" | "CANCEL")
    }
}

/// Confidential guests: on this machine as its kernel converts memory, or in level 1 in place and in
/// two files.
pub(super) fn confidential(bench: &Bench, step: &Step) -> Result<Tally> {
    let parts = bench.parts(step)?;
    if boot::own_kvm_serves(&parts.runner) {
        return run(bench, step, CONFIDENTIAL.name, |folder, tap| {
            on_this_machine(bench, step, &parts, folder, tap)
        });
    }
    both_ways(bench, step, &CONFIDENTIAL, parts)
}

/// libvirt's domains: in level 1, as they change the system that they run on.
pub(super) fn libvirt(bench: &Bench, step: &Step) -> Result<Tally> {
    let parts = bench.parts(step)?;
    both_ways(bench, step, &LIBVIRT, parts)
}

/// In level 1, in place and in two files.
fn both_ways(bench: &Bench, step: &Step, suite: &'static Suite, parts: Parts) -> Result<Tally> {
    let mut tally = Tally::default();
    for in_place in [true, false] {
        let name = match in_place {
            true => suite.name.to_owned(),
            false => format!("{}-two-files", suite.name),
        };
        let parts = parts.clone();
        tally.add(run(bench, step, &name, |folder, tap| {
            let level_1 = Level1 {
                suite,
                name: &name,
                in_place,
            };
            in_level_1(bench, step, &level_1, parts, folder, tap)
        })?);
    }
    Ok(tally)
}

/// A suite in level 1.
struct Level1<'a> {
    suite: &'static Suite,
    /// Of its results and its log.
    name: &'a str,
    in_place: bool,
}

fn run(
    bench: &Bench,
    step: &Step,
    name: &str,
    avocado: impl FnOnce(&Path, &mut Tap) -> Result<(bool, String)>,
) -> Result<Tally> {
    let folder = bench.ctx.scratch().join(name);
    cache::remove(&folder)?;
    fs::create_dir_all(&folder)?;
    let mut tap = Tap::default();
    let outcome = avocado(&folder, &mut tap);
    explain(step, &folder);
    let (success, ending) = outcome?;
    Ok(judge(tap, success, &ending))
}

/// What the tests are to know of the place where they run: names and paths.
type Parameters<'a> = [(&'static str, &'a str); 5];

/// The words after `avocado`: what to run with, and where results go.
fn words(full: bool, tests: &str, parameters: Parameters, out: &str) -> Vec<String> {
    let mut words: Vec<String> = ["run", tests, "--disable-sysinfo", "--tap", "-"]
        .map(str::to_owned)
        .into();
    // They count on having the machine for themselves: a guest with four vCPUs keeps it busy.
    words.extend(["--max-parallel-tasks", "1"].map(str::to_owned));
    for (name, value) in parameters {
        words.extend(["-p".to_owned(), format!("{name}={value}")]);
    }
    words.extend(["--job-results-dir".to_owned(), out.to_owned()]);
    words.extend(["--json".to_owned(), format!("{out}/results.json")]);
    if !full {
        words.extend(
            ["--filter-by-tags=-full", "--filter-by-tags-include-empty"].map(str::to_owned),
        );
    }
    words
}

fn on_this_machine(
    bench: &Bench,
    step: &Step,
    parts: &Parts,
    folder: &Path,
    tap: &mut Tap,
) -> Result<(bool, String)> {
    let ctx = bench.ctx;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let tools = python::environment(ctx, step, AVOCADO)?;
    let (_, disk) = GUEST.disk(ctx, step)?;
    let parameters = [
        ("qemu_bin", &*text(&parts.qemu.program)),
        ("firmware", &text(&image::firmware(ctx)?)),
        ("guest", &text(&parts.guest)),
        ("linux", &text(&parts.kernel.image)),
        ("linux_disk", &text(&disk)),
    ];
    let tests = text(&ctx.root.join(CONFIDENTIAL.folder));
    let words = words(bench.full, &tests, parameters, &text(folder));
    step.say("running");
    let outcome = Job::new("avocado", command(tools.join("avocado"), words))
        .log(&ctx.log("avocado"))
        .limit(LIMIT)
        .follow(|line| follow_tap(tap, step, line))
        .outcome()?;
    Ok((outcome.success(), outcome.ending()))
}

fn in_level_1(
    bench: &Bench,
    step: &Step,
    level_1: &Level1<'_>,
    parts: Parts,
    folder: &Path,
    tap: &mut Tap,
) -> Result<(bool, String)> {
    let (ctx, suite) = (bench.ctx, level_1.suite);
    let packages = python::packages(ctx, step, AVOCADO)?;
    let disks = vec![DEBIAN.disk(ctx, step)?, GUEST.disk(ctx, step)?];
    let lab = Lab::complete(ctx, step, parts)?;
    copy_folders(ctx, folder)?;
    let [_, kernel, _, guest_disk] = linux_paths();
    let parameters = [
        ("qemu_bin", PROGRAM),
        ("firmware", &format!("/level1{}", image::FIRMWARE_FOLDER)),
        ("guest", "/run/lab/guest.elf"),
        ("linux", &kernel),
        ("linux_disk", &guest_disk),
    ];
    let tests = format!("/host/{}", suite.folder);
    let words = words(bench.full, &tests, parameters, "/host");
    let task = Task {
        name: format!("{} in the lab", level_1.name),
        script: script(suite, &words),
        share: Some(folder.to_owned()),
        memory: memory_for(0),
        limit: Some(LIMIT),
        disks,
        programs: vec![packages, lab.kernel.image.clone()],
        log: Some(level_1.name.to_owned()),
        in_place: Some(level_1.in_place),
        ..Task::default()
    };
    step.say("running");
    let status = lab.run(ctx, &task, |line| follow_tap(tap, step, line))?;
    Ok((status == 0, format!("exit status {status}")))
}

fn script(suite: &Suite, words: &[String]) -> String {
    format!(
        "{} &&\n{ENTER} mkdir /tmp/python && {ENTER} tar -xf /run/lab/{PACKAGES} -C /tmp/python &&\n\
         {ENTER} env PYTHONPATH=/tmp/python PYTHONWARNINGS=ignore python3 -m avocado {}\n",
        suite.prepare,
        quote(words)
    )
}

fn copy_folders(ctx: &Context, to: &Path) -> Result<()> {
    for folder in SHARED {
        let (from, to) = (ctx.root.join(folder), to.join(folder));
        fs::create_dir_all(&to)?;
        for entry in
            fs::read_dir(&from).with_context(|| format!("cannot list {}", from.display()))?
        {
            let path = entry?.path();
            if path.is_file() {
                fs::copy(&path, to.join(cache::file_name(&path)))?;
            }
        }
    }
    Ok(())
}

/// Says why tests failed, with the paths that their logs have on this machine.
fn explain(step: &Step, folder: &Path) {
    // Without results there is another error to show.
    let Ok(text) = fs::read_to_string(folder.join("results.json")) else {
        return;
    };
    match serde_json::from_str::<Results>(&text) {
        Ok(results) => {
            for test in results.tests.iter().filter(|test| test.failed()) {
                step.note(reason(test, folder));
            }
        }
        Err(error) => step.note(format_args!("Avocado's results cannot be read: {error}")),
    }
}

fn reason(test: &TestResult, folder: &Path) -> String {
    let here = test
        .fail_reason
        .replace("/host/", &format!("{}/", folder.display()));
    format!("{}: {here}", test.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_a_test_failed_is_told_with_paths_of_this_machine() {
        let text = r#"{"pass": 1, "tests": [
            {"name": "a", "status": "PASS", "fail_reason": "<unknown>", "tags": {}},
            {"name": "b", "status": "ERROR", "fail_reason": "see /host/job-1/b/qmp.log"},
            {"name": "c", "status": "CANCEL", "fail_reason": "no KVM"}]}"#;
        let results: Results = serde_json::from_str(text).expect("Avocado's format");
        let failed: Vec<String> = results
            .tests
            .iter()
            .filter(|test| test.failed())
            .map(|test| reason(test, Path::new("/x/avocado")))
            .collect();
        assert_eq!(failed, ["b: see /x/avocado/job-1/b/qmp.log"]);
    }

    #[test]
    fn long_tests_run_only_with_full() {
        let filtered = |full| {
            words(full, "t", [("a", "b"); 5], "o")
                .iter()
                .any(|word| word == "--filter-by-tags=-full")
        };
        assert!(filtered(false) && !filtered(true));
    }
}
