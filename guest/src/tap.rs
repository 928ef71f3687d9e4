// SPDX-License-Identifier: GPL-2.0-or-later
//! The report, in the Test Anything Protocol. The plan comes last: how many tests there are depends
//! on the machine.

use crate::failure::Failure;
use crate::{cpu, scenarios, serial};
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

static TESTS: AtomicUsize = AtomicUsize::new(0);
static GIVEN_UP: AtomicBool = AtomicBool::new(false);

/// Begins the report.
pub(crate) fn start() {
    // The firmware has left its last line open.
    serial::line(format_args!("\nTAP version 13"));
}

/// Reports one test, and what was wrong if it failed.
pub(crate) fn test(failure: Option<&Failure>, text: fmt::Arguments<'_>) {
    let number = TESTS.fetch_add(1, Ordering::Relaxed) + 1;
    match failure {
        None => serial::line(format_args!("ok {number} - {text}")),
        Some(failure) => {
            serial::line(format_args!("not ok {number} - {text}"));
            serial::line(format_args!("{failure}"));
        }
    }
}

/// A remark.
pub(crate) fn note(text: fmt::Arguments<'_>) {
    serial::line(format_args!("# {text}"));
}

/// Ends the report.
pub(crate) fn end() {
    serial::line(format_args!("1..{}", TESTS.load(Ordering::Relaxed)));
}

/// Says what each CPU was doing, gives up and ends QEMU. Works in any state.
pub(crate) fn bail_out(why: fmt::Arguments<'_>) -> ! {
    if GIVEN_UP.swap(true, Ordering::Relaxed) {
        // Another CPU, or this one a moment ago, is already doing it.
        cpu::halt();
    }
    scenarios::for_each_current(|cpu, check| {
        serial::urgent_line(format_args!("# cpu{cpu} was at: {check}"));
    });
    serial::urgent_line(format_args!("Bail out! {why}"));
    cpu::finish(false)
}
