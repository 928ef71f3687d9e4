// SPDX-License-Identifier: GPL-2.0-or-later
//! What the lab's kernel answers, without QEMU: once with in-place conversion, once without.

use std::time::Duration;

use anyhow::Result;

use crate::level1::{Lab, RUNNER, Task, memory_for, quote};
use crate::progress::Step;

use super::report::{Tally, Tap};
use super::steps::{Bench, follow_tap, judge};

/// How long one run may take.
const LIMIT: Duration = Duration::from_secs(10 * 60);

/// Both.
pub(super) fn test(bench: &Bench, step: &Step) -> Result<Tally> {
    let lab = Lab::complete(bench.ctx, step, bench.parts(step)?)?;
    let mut tally = Tally::default();
    for in_place in [true, false] {
        tally.add(run(bench, step, &lab, in_place));
    }
    Ok(tally)
}

fn run(bench: &Bench, step: &Step, lab: &Lab, in_place: bool) -> Tally {
    let value = if in_place { "on" } else { "off" };
    step.say(format_args!("running with in-place conversion {value}"));
    let words = [
        RUNNER,
        "kernel",
        "--in-place",
        value,
        "--selftests",
        "/run/lab",
    ];
    let mut words: Vec<&str> = words.into();
    for filter in bench.filter() {
        words.extend(["--filter", filter]);
    }
    let task = Task {
        name: format!("the kernel's answers, in-place conversion {value}"),
        script: quote(words),
        memory: memory_for(0),
        limit: Some(LIMIT),
        programs: lab.kernel.selftests.clone(),
        in_place: Some(in_place),
        ..Task::default()
    };
    let mut tap = Tap::default();
    match lab.run(bench.ctx, &task, |line| follow_tap(&mut tap, step, line)) {
        Ok(status) => judge(tap, status == 0, &format!("exit status {status}")),
        Err(error) => {
            step.note(format_args!("{error:#}"));
            judge(tap, false, "level 1 did not come to its end")
        }
    }
}
