// SPDX-License-Identifier: GPL-2.0-or-later
//! Writes to memory, and looks whether it is still there, until the host says stop: for migration
//! and snapshots. In a guest that has come from another QEMU, the stop comes from the new one.

use super::Run;
use crate::failure::Failure;
use crate::tester::{Check, Tester};
use crate::{fwcfg, tap};
use core::ops::Range;
use guestmemfd_guest::layout::SLICE_PAGES;

/// The fw_cfg item that says stop.
const STOP: &str = "opt/guestmemfd/stop";

/// Pages that are written in one step.
const STEP: usize = 64;
const STEPS: usize = SLICE_PAGES / STEP;

pub(super) fn run(run: &mut Run<'_>) {
    let first = run.cpu == 0 && run.area == "low";
    run.test("memory keeps what is written to it", |tester| {
        until_stopped(tester, first)
    });
}

fn until_stopped(tester: &mut Tester<'_>, first: bool) -> Check {
    let mut tags = [0; STEPS];
    for (step, tag) in tags.iter_mut().enumerate() {
        *tag = 1 + step as u64;
        tester.mark(pages(step), *tag);
    }
    if first {
        tap::note(format_args!("dirty: all memory is written, going on"));
    }
    let mut next = STEPS as u64;
    while !stopped()? {
        let step = next as usize % STEPS;
        tester.is_marked(pages(step), tags[step])?;
        next += 1;
        tags[step] = next;
        tester.mark(pages(step), next);
    }
    for (step, &tag) in tags.iter().enumerate() {
        tester.is_marked(pages(step), tag)?;
    }
    Ok(())
}

fn pages(step: usize) -> Range<usize> {
    step * STEP..(step + 1) * STEP
}

fn stopped() -> Result<bool, Failure> {
    match fwcfg::find(STOP) {
        Ok(item) => Ok(item.is_some()),
        Err(_) => Err(Failure::Missing("fw_cfg cannot be read")),
    }
}
