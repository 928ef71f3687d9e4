// SPDX-License-Identifier: GPL-2.0-or-later
//! Tools that look where tests do not: loom, sanitizers, fuzzing, Miri. docs/testing.md says what each sees.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use crate::cargo::{TARGET, cargo};
use crate::context::Context;
use crate::fuzz::{Fuzzer, TARGETS};
use crate::process::{Job, command, output};
use crate::progress::Step;

use super::report::{Tally, Tap};
use super::steps::{Bench, TEST_LIMIT, cargo_test, count_tests, judge};

/// Pins against conversions, in every order of their steps.
pub(super) fn loom(bench: &Bench, step: &Step) -> Result<Tally> {
    step.say("going through all orders");
    let pins = &["--package", "guestmemfd", "--lib", "--features", "loom"];
    let tally = cargo_test(bench, step, "loom", &[pins, &["orders"][..]].concat())?;
    ensure!(tally.passed + tally.failed > 0, "no test is named orders");
    Ok(tally)
}

/// The tests in C, with what C and Rust do to memory looked at.
pub(super) fn sanitizers(bench: &Bench, step: &Step) -> Result<Tally> {
    let mut tally = Tally::default();
    for sanitizer in [&ADDRESS, &THREAD] {
        let result = match sanitizer.runtime()? {
            Some(runtime) => sanitizer.test(bench.ctx, step, &runtime)?,
            None => Tally::skip(sanitizer.lacking()),
        };
        tally.add(result);
    }
    Ok(tally)
}

/// How long each target is fuzzed.
const FUZZ_SECONDS: u64 = 10;

/// Each target, for a while.
pub(super) fn fuzz(bench: &Bench, step: &Step) -> Result<Tally> {
    let fuzzer = Fuzzer::build(bench.ctx, step)?;
    let mut tally = Tally::default();
    for target in TARGETS {
        step.say(format_args!("fuzzing {target}"));
        let (outcome, inputs) = fuzzer.run(target, FUZZ_SECONDS, |_| {})?;
        tally.add(match outcome.check() {
            Ok(()) => Tally::pass(format!("{target}: {inputs} inputs")),
            Err(error) => {
                step.note(error);
                Tally::fail(format!("{target}: input found"))
            }
        });
    }
    Ok(tally)
}

/// A sanitizer that rustc and gcc both know.
struct Sanitizer {
    name: &'static str,
    /// Its name in options.
    option: &'static str,
    /// Its short name, in that of its runtime.
    short: &'static str,
}

const ADDRESS: Sanitizer = Sanitizer {
    name: "AddressSanitizer",
    option: "address",
    short: "asan",
};

const THREAD: Sanitizer = Sanitizer {
    name: "ThreadSanitizer",
    option: "thread",
    short: "tsan",
};

/// What Rust's standard library needs.
const LIBRARIES: [&str; 6] = ["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"];

impl Sanitizer {
    /// Rust's runtime, which serves what gcc compiles as well; gcc's lacks what newer compilers call.
    fn runtime(&self) -> Result<Option<PathBuf>> {
        let folder = output(command(
            "rustc",
            ["--print=target-libdir", "--target", TARGET],
        ))?;
        let ending = format!("_rt.{}.a", self.short);
        let Ok(files) = Path::new(folder.trim()).read_dir() else {
            return Ok(None);
        };
        let mut files = files.flatten().map(|entry| entry.path());
        Ok(files.find(|path| path.to_string_lossy().ends_with(&ending)))
    }

    fn lacking(&self) -> String {
        format!(
            "{}: this Rust has no librustc-*_rt.{}.a for {TARGET}",
            self.name, self.short
        )
    }

    fn test(&self, ctx: &Context, step: &Step, runtime: &Path) -> Result<Tally> {
        let folder = ctx.root.join("target").join(self.short);
        step.say(format_args!("building with {}", self.name));
        self.build_library(ctx, &folder)?;
        let program = self.build_test(ctx, &folder, runtime)?;
        step.say(format_args!("running with {}", self.name));
        let mut tap = Tap::default();
        let outcome = Job::new("the test in C", Command::new(program))
            .log(&ctx.log(&format!("c-{}", self.short)))
            .limit(TEST_LIMIT)
            .follow(|line| {
                tap.line(line);
                if line.starts_with("not ok") || line.starts_with("SUMMARY:") {
                    step.note(line);
                }
            })
            .outcome()?;
        let mut tally = judge(tap, outcome.success(), &outcome.ending());
        if tally.failed > 0 {
            tally.detail = format!("{}: {}", self.name, tally.detail);
        }
        Ok(tally)
    }

    /// Sanitizers are not stable in Rust: it has to be told that we know. Its standard library is the
    /// one that it ships, which is not looked into.
    fn build_library(&self, ctx: &Context, folder: &Path) -> Result<()> {
        let flags = format!(
            "-Zsanitizer={} -Cunsafe-allow-abi-mismatch=sanitizer",
            self.option
        );
        let mut build = cargo(ctx);
        build
            .args(["rustc", "--locked", "--package", "guestmemfd", "--lib"])
            .args(["--crate-type", "staticlib"])
            .args(["--target", TARGET, "--target-dir"])
            .arg(folder)
            .env("RUSTFLAGS", flags)
            .env("RUSTC_BOOTSTRAP", "1");
        let job = Job::new(format!("building the library with {}", self.name), build);
        job.log(&ctx.log(&format!("cargo-{}", self.short))).run()
    }

    fn build_test(&self, ctx: &Context, folder: &Path, runtime: &Path) -> Result<PathBuf> {
        let (object, program) = (folder.join("test.o"), folder.join("test-interface"));
        let mut compile = command("gcc", ["-g", "-O1", "-c", "-o"]);
        compile.arg(&object).arg("-Iinclude").current_dir(&ctx.root);
        compile.arg(format!("-fsanitize={}", self.option));
        compile.arg("tests/c/test-interface.c");
        Job::new("compiling the test in C", compile).run()?;
        let mut link = command("gcc", ["-o"]);
        link.arg(&program).arg(&object);
        link.arg(folder.join(TARGET).join("debug/libguestmemfd.a"));
        // All of it: programs are watched through functions that replace those of the C library.
        link.arg("-Wl,--whole-archive").arg(runtime);
        link.args(["-Wl,--no-whole-archive", "-Wl,--export-dynamic"])
            .args(LIBRARIES);
        Job::new("linking the test in C", link).run()?;
        Ok(program)
    }
}

/// What Miri can follow: rooms without system calls, and calls of the C interface, whose files are
/// ordinary ones there.
const INTERPRETED: [&[&str]; 2] = [
    &[
        "--package=guestmemfd",
        "--lib",
        "--",
        "pages::",
        "windows::",
    ],
    &["--package=guestmemfd-fuzz", "--lib", "--", "seeds"],
];

/// The library in an interpreter that knows what Rust allows.
pub(super) fn miri(bench: &Bench, step: &Step) -> Result<Tally> {
    if output(miri_command(bench.ctx, &["--version"])).is_err() {
        let why =
            "Miri: cargo-miri is not installed (rustup component add miri --toolchain nightly)";
        return Ok(Tally::skip(why));
    }
    let mut tally = Tally::default();
    for (number, tests) in INTERPRETED.iter().enumerate() {
        step.say(format_args!("interpreting {}", tests[0]));
        let mut command = miri_command(bench.ctx, &["test"]);
        command
            .arg("--target-dir")
            .arg(bench.ctx.root.join("target/miri"))
            .args(*tests)
            // It is a thousand times slower; files are outside of what it isolates.
            .env("PROPTEST_CASES", "2")
            .env("MIRIFLAGS", "-Zmiri-disable-isolation");
        tally.add(count_tests(
            bench.ctx,
            step,
            &format!("miri-{number}"),
            command,
        )?);
    }
    Ok(tally)
}

/// Cargo's Miri, which there is for nightly Rust alone.
fn miri_command(ctx: &Context, args: &[&str]) -> Command {
    let mut command = command("cargo", ["+nightly", "miri"]);
    command.args(args).current_dir(&ctx.root);
    command
}
