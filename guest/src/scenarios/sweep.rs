// SPDX-License-Identifier: GPL-2.0-or-later
//! Much memory made private and shared again, without a touch, while the host has none to spare: some
//! requests are answered with an error number. The guest goes on, and repeats them once the host has
//! memory again.

use super::Run;
use crate::failure::Failure;
use crate::hypercall;
use crate::memory::TestMemory;
use crate::smp::Barrier;
use crate::tester::{Check, Tester};
use crate::{apic, cpu, tap};
use core::sync::atomic::{AtomicU64, Ordering};
use guestmemfd_guest::model::Intent::{self, Private, Shared};

/// Pages of a request: 2 MiB.
const STEP: usize = 512;
/// Requests of all CPUs at most.
const MAX_REQUESTS: usize = 8192;
/// How long the guest waits for whoever changes the host, in ticks.
const PAUSE: u64 = 3 * apic::TICKS_PER_SECOND;
/// How often a request is repeated.
const TRIES: usize = 50;

static BARRIER: Barrier = Barrier::new();
static ACCEPTED: AtomicU64 = AtomicU64::new(0);
static REFUSED: AtomicU64 = AtomicU64::new(0);

pub(super) fn run(run: &mut Run<'_>, cpu: usize, memory: TestMemory) {
    let plan = run.tester.plan;
    let mut sweep = Sweep {
        memory,
        requests: (memory.pages() / STEP).min(MAX_REQUESTS),
        cpu,
        cpus: plan.cpus,
        refused: [false; MAX_REQUESTS],
    };
    sweep.pause(|| tap::note(format_args!("sweep: begins")));
    run.test(
        "requests are granted, or refused with an error number",
        |tester| sweep.first(tester),
    );
    sweep.pause(|| {
        tap::note(format_args!(
            "sweep: granted={} denied={}",
            ACCEPTED.load(Ordering::Relaxed),
            REFUSED.load(Ordering::Relaxed)
        ));
    });
    run.test("what was refused is granted in the end", |tester| {
        sweep.again(tester)
    });
    run.test("all is shared again", |tester| {
        for number in sweep.mine() {
            granted(
                sweep.request(tester, number, Shared),
                &sweep,
                number,
                Shared,
            )?;
        }
        Ok(())
    });
}

struct Sweep {
    memory: TestMemory,
    requests: usize,
    cpu: usize,
    cpus: usize,
    refused: [bool; MAX_REQUESTS],
}

impl Sweep {
    fn mine(&self) -> impl Iterator<Item = usize> + use<> {
        (self.cpu..self.requests).step_by(self.cpus)
    }

    /// All CPUs stand still for a while after one of them has said something.
    fn pause(&self, say: impl FnOnce()) {
        BARRIER.wait(self.cpus);
        if self.cpu == 0 {
            say();
        }
        rest(PAUSE);
        BARRIER.wait(self.cpus);
    }

    fn request(&self, tester: &mut Tester<'_>, number: usize, intent: Intent) -> i64 {
        let gpa = self.memory.gpa(number * STEP);
        let got = hypercall::map_gpa_range(gpa, STEP as u64, hypercall::attributes(intent));
        tester.model.counts.hypercalls += 1;
        tester.model.counts.refused += u64::from(got != 0);
        got
    }

    fn first(&mut self, tester: &mut Tester<'_>) -> Check {
        for number in self.mine() {
            let got = self.request(tester, number, Private);
            self.refused[number] = got != 0;
            match got {
                0 => ACCEPTED.fetch_add(1, Ordering::Relaxed),
                // Below 0 and not beyond what error numbers there are.
                -4095..0 => REFUSED.fetch_add(1, Ordering::Relaxed),
                _ => return granted(got, self, number, Private),
            };
        }
        Ok(())
    }

    fn again(&mut self, tester: &mut Tester<'_>) -> Check {
        for number in self.mine() {
            let mut tries = 0;
            while self.refused[number] {
                let got = self.request(tester, number, Private);
                self.refused[number] = got != 0;
                tries += 1;
                if tries == TRIES {
                    granted(got, self, number, Private)?;
                }
                if got != 0 {
                    rest(apic::TICKS_PER_SECOND / 10);
                }
            }
        }
        Ok(())
    }
}

fn granted(got: i64, sweep: &Sweep, number: usize, intent: Intent) -> Check {
    if got == 0 {
        return Ok(());
    }
    Err(Failure::Request {
        gpa: sweep.memory.gpa(number * STEP),
        pages: STEP as u64,
        attributes: hypercall::attributes(intent),
        got,
        expected: "0",
    })
}

/// Does nothing for so many ticks.
pub(super) fn rest(ticks: u64) {
    let end = apic::ticks() + ticks;
    while apic::ticks() < end {
        cpu::wait();
    }
}
