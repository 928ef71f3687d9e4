// SPDX-License-Identifier: GPL-2.0-or-later
//! How long CPUs take that convert memory of their own at the same time.

use super::bench::{Memory, PAGES};
use crate::cpu::{self, MAX_CPUS};
use crate::smp::{self, Barrier};
use crate::tap;
use core::sync::atomic::{AtomicU64, Ordering};
use guestmemfd_guest::model::Intent::{Private, Shared};
use spin::Mutex;

/// The most CPUs that have a share of the memory.
const MOST_CPUS: usize = 4;
const SHARE: usize = PAGES / MOST_CPUS;

/// Requests of one size.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    pages: usize,
    stride: usize,
    places: usize,
    rounds: usize,
}

const CASES: [Case; 2] = [
    Case {
        name: "scale-4k",
        pages: 1,
        stride: 11,
        places: 256,
        rounds: 2,
    },
    Case {
        name: "scale-2m",
        pages: 512,
        stride: 512,
        places: 4,
        rounds: 1,
    },
];

#[derive(Clone, Copy)]
struct Task {
    memory: Memory,
    case: Case,
    cpus: usize,
}

static TASK: Mutex<Option<Task>> = Mutex::new(None);
static READY: Barrier = Barrier::new();
/// When each CPU began, and when it was done.
static TIMES: [[AtomicU64; 2]; MAX_CPUS] = [const { [const { AtomicU64::new(0) }; 2] }; MAX_CPUS];

/// Measures all cases on so many CPUs, which run.
pub(super) fn run(memory: Memory, cpus: usize) {
    if cpus > MOST_CPUS {
        tap::bail_out(format_args!(
            "smp={cpus}: bench=scale takes 1 to {MOST_CPUS}"
        ));
    }
    for case in CASES {
        *TASK.lock() = Some(Task { memory, case, cpus });
        smp::measure(cpus);
        let times = |which: usize| {
            TIMES[..cpus]
                .iter()
                .map(move |times| times[which].load(Ordering::Relaxed))
        };
        let took = times(1).max().unwrap_or(0) - times(0).min().unwrap_or(0);
        let pages = 2 * cpus * case.rounds * case.places * case.pages;
        tap::note(format_args!(
            "measured row={} direction=none part=ticks units={pages} samples=1 total={took} \
             least={took} median={took} p99={took} most={took}",
            case.name
        ));
    }
}

/// A CPU's part.
pub(crate) fn on_this_cpu(cpu: usize) {
    let Some(task) = *TASK.lock() else { return };
    if cpu >= task.cpus {
        return;
    }
    // Once unmeasured, so that nothing is then touched or decided for the first time.
    convert(task, cpu);
    READY.wait(task.cpus);
    TIMES[cpu][0].store(cpu::timestamp(), Ordering::Relaxed);
    for _ in 0..task.case.rounds {
        convert(task, cpu);
    }
    TIMES[cpu][1].store(cpu::timestamp(), Ordering::Relaxed);
}

/// Makes all places private, then shared again, and touches them.
fn convert(task: Task, cpu: usize) {
    let Case {
        pages,
        stride,
        places,
        ..
    } = task.case;
    for intent in [Private, Shared] {
        for place in 0..places {
            let start = cpu * SHARE + place * stride;
            task.memory.request(start..start + pages, intent);
            task.memory.touch(start..start + pages, intent);
        }
    }
}
