// SPDX-License-Identifier: GPL-2.0-or-later
//! `kernel`: what KVM's guest_memfd answers, without QEMU. In-place conversion (as in Linux 7.4) is
//! a parameter of the kernel, and what is tested depends on it.

mod answers;
pub(crate) mod held;
pub(crate) mod memory;
mod ranges;
mod selftests;
mod slots;
mod touch;
mod uapi;
mod vapic;
mod vcpu;
mod views;

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

/// Options of `kernel`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Whether the kernel is to convert in place [default: whatever it does]
    #[arg(long, value_name = "on|off", value_parser = on_or_off)]
    in_place: Option<bool>,
    /// A folder with the kernel's own tests; without it none of them
    #[arg(long, value_name = "DIR")]
    selftests: Option<PathBuf>,
    /// Only tests whose name contains this, or one of several
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
}

fn on_or_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("write on or off".to_owned()),
    }
}

/// One test.
struct Test {
    name: String,
    run: Box<dyn Fn() -> Result<()>>,
}

impl Test {
    fn new(name: impl Into<String>, run: impl Fn() -> Result<()> + 'static) -> Self {
        Self {
            name: name.into(),
            run: Box::new(run),
        }
    }
}

/// Runs them, and reports as TAP; true if none failed.
pub(crate) fn run(options: &Options) -> bool {
    let in_place = uapi::in_place();
    if options.in_place.is_some_and(|wanted| wanted != in_place) {
        println!("Bail out! {} is not as it was to be", uapi::PARAMETER);
        return false;
    }
    let wanted = |test: &Test| {
        let mut filters = options.filter.iter();
        options.filter.is_empty() || filters.any(|text| test.name.contains(text.as_str()))
    };
    let tests = all(options, in_place).into_iter().filter(wanted);
    let tests: Vec<Test> = tests.collect();
    println!("TAP version 13\n1..{}", tests.len());
    let results = tests.iter().enumerate();
    results.fold(true, |good, (index, test)| report(index + 1, test) && good)
}

fn all(options: &Options, in_place: bool) -> Vec<Test> {
    let mut tests = answers::tests(in_place);
    tests.extend(slots::tests(in_place));
    if in_place {
        tests.extend(views::tests());
        tests.extend(held::tests());
        tests.extend(ranges::tests());
        tests.extend(vapic::tests());
    }
    if let Some(folder) = &options.selftests {
        tests.extend(selftests::tests(folder, in_place));
    }
    tests
}

fn report(number: usize, test: &Test) -> bool {
    let start = Instant::now();
    let result = untainted(&test.run);
    match &result {
        Ok(()) => println!("ok {number} - {}", test.name),
        Err(why) => {
            println!("not ok {number} - {}", test.name);
            for line in format!("{why:#}").lines() {
                println!("# {line}");
            }
        }
    }
    println!("# {:.1} s", start.elapsed().as_secs_f32());
    result.is_ok()
}

/// A test after which the kernel has found a fault in itself has failed.
fn untainted(run: &dyn Fn() -> Result<()>) -> Result<()> {
    let before = taint()?;
    run()?;
    let after = taint()?;
    ensure!(before == after, "the kernel is tainted now: {after}");
    Ok(())
}

fn taint() -> Result<String> {
    let path = "/proc/sys/kernel/tainted";
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    Ok(text.trim().to_owned())
}
