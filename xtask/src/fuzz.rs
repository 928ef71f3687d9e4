// SPDX-License-Identifier: GPL-2.0-or-later
//! `cargo xtask fuzz`: libFuzzer on the targets of `fuzz/`. On the stable Rust: what the fuzzer needs
//! of it are passes of LLVM, and AddressSanitizer, which it has and does not call stable.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::cargo::{TARGET, cargo};
use crate::context::Context;
use crate::packages::{self, Purpose};
use crate::process::{Job, Outcome};
use crate::progress::{Step, Steps};

/// What can be fuzzed.
pub(crate) const TARGETS: [&str; 4] = ["hypercall", "config", "map", "states"];

/// As cargo-fuzz asks for it.
const FLAGS: &str = "--cfg fuzzing -Zsanitizer=address -Cpasses=sancov-module \
     -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
     -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares";

/// How much longer than asked for a run may take: it begins with what was found before.
const GRACE: Duration = Duration::from_secs(120);

/// Options of `fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What to fuzz
    #[arg(value_name = "TARGET", value_parser = TARGETS)]
    target: String,

    /// How long
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
}

/// Runs the command.
pub(crate) fn run(ctx: &Context, options: &Options) -> Result<ExitCode> {
    let step = Steps::new(1).begin(format_args!("fuzzing {}", options.target));
    packages::ensure(ctx, &step, &[Purpose::Test])?;
    let fuzzer = Fuzzer::build(ctx, &step)?;
    let (outcome, inputs) = fuzzer.run(&options.target, options.seconds, |line| step.note(line))?;
    outcome.check()?;
    step.finish(format_args!("{inputs} inputs, nothing found"));
    Ok(ExitCode::SUCCESS)
}

/// The targets, built.
pub(crate) struct Fuzzer<'a> {
    ctx: &'a Context,
    programs: PathBuf,
}

impl<'a> Fuzzer<'a> {
    pub(crate) fn build(ctx: &'a Context, step: &Step) -> Result<Self> {
        step.say("building with libFuzzer");
        let folder = ctx.root.join("target/fuzz");
        let mut build = cargo(ctx);
        build
            .args([
                "build",
                "--locked",
                "--package",
                "guestmemfd-fuzz",
                "--bins",
            ])
            .args(["--features", "libfuzzer", "--profile", "fuzz"])
            .args(["--target", TARGET, "--target-dir"])
            .arg(&folder)
            .env("RUSTFLAGS", FLAGS)
            .env("RUSTC_BOOTSTRAP", "1");
        let job = Job::new("building with libFuzzer", build);
        job.log(&ctx.log("cargo-fuzz")).run()?;
        let programs = folder.join(TARGET).join("fuzz");
        Ok(Self { ctx, programs })
    }

    /// Fuzzes for some seconds, from the seeds and from what earlier runs have found. Says how many
    /// inputs were tried.
    pub(crate) fn run(
        &self,
        target: &str,
        seconds: u64,
        mut follow: impl FnMut(&str),
    ) -> Result<(Outcome, u64)> {
        let found = self.ctx.scratch().join("fuzz").join(target);
        fs::create_dir_all(&found).with_context(|| format!("cannot make {}", found.display()))?;
        let mut command = Command::new(self.programs.join(target));
        command
            .arg(&found)
            .arg(self.ctx.root.join("fuzz/seeds").join(target))
            .arg(format!("-max_total_time={seconds}"))
            // A request that takes long is a bug; a machine may be busy.
            .args(["-timeout=20", "-print_final_stats=1"])
            .arg(format!("-artifact_prefix={}-", found.display()));
        let mut inputs = 0;
        let outcome = Job::new(format!("fuzzing {target}"), command)
            .log(&self.ctx.log(&format!("fuzz-{target}")))
            .limit(Duration::from_secs(seconds) + GRACE)
            .follow(|line| {
                inputs = number_of_inputs(line).unwrap_or(inputs);
                follow(line);
            })
            .outcome()?;
        ensure!(
            !outcome.success() || inputs > 0,
            "fuzzing {target}: no input was tried"
        );
        Ok((outcome, inputs))
    }
}

/// `stat::number_of_executed_units: 4711`
fn number_of_inputs(line: &str) -> Option<u64> {
    let number = line.strip_prefix("stat::number_of_executed_units:")?;
    number.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fuzzer_says_how_many_inputs_it_has_tried() {
        let line = "stat::number_of_executed_units: 4711";
        assert_eq!(number_of_inputs(line), Some(4711));
        assert_eq!(number_of_inputs("stat::new_units_added: 3"), None);
    }

    #[test]
    fn every_target_has_a_program_and_seeds() {
        let fuzz = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        for target in TARGETS {
            assert!(
                fuzz.join("fuzz_targets")
                    .join(target)
                    .with_extension("rs")
                    .exists()
            );
            assert!(fuzz.join("seeds").join(target).read_dir().unwrap().count() > 0);
        }
    }
}
