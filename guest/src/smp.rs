// SPDX-License-Identifier: GPL-2.0-or-later
//! The other CPUs: starting them, giving them work, and waiting for them.

use crate::cpu::MAX_CPUS;
use crate::plan::{self, Plan};
use crate::scenarios::{self, Scenario};
use crate::{apic, cpu, interrupts, tap};
use core::sync::atomic::{AtomicUsize, Ordering};

/// A page below 1 MiB that the firmware has finished with.
const TRAMPOLINE: u64 = 0x8000;
/// How long the CPUs may take to start.
const PATIENCE: u64 = 20 * apic::TICKS_PER_SECOND;

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
}

static ONLINE: AtomicUsize = AtomicUsize::new(1);
/// Which round of work is on, and what it is. A round begins when the number changes.
static ROUND: AtomicUsize = AtomicUsize::new(0);
/// `WORK` is a scenario's number, or this.
const MEASURE: usize = usize::MAX;
static WORK: AtomicUsize = AtomicUsize::new(0);
/// The last round that each CPU has finished.
static FINISHED: [AtomicUsize; MAX_CPUS] = [const { AtomicUsize::new(0) }; MAX_CPUS];

/// Starts all other CPUs and waits until there are so many.
pub(crate) fn start_others(cpus: usize) {
    if cpus == 1 {
        return;
    }
    // SAFETY: the firmware has finished with the page, and the trampoline fits.
    unsafe {
        let size = (&raw const trampoline_end).offset_from(&raw const trampoline) as usize;
        core::ptr::copy_nonoverlapping(&raw const trampoline, TRAMPOLINE as *mut u8, size);
    }
    apic::send_init();
    sleep_until(apic::ticks() + 2, || false);
    // A second start-up request reaches only those that have missed the first.
    for _ in 0..2 {
        apic::send_start_up(TRAMPOLINE);
        if sleep_until(apic::ticks() + PATIENCE / 2, || online() >= cpus) {
            return;
        }
    }
    tap::bail_out(format_args!("{} of {cpus} CPUs have started", online()))
}

/// CPUs that run.
pub(crate) fn online() -> usize {
    ONLINE.load(Ordering::Acquire)
}

/// Where the other CPUs arrive from `boot.s`.
pub(crate) extern "C" fn other_cpu(cpu: u32) -> ! {
    let cpu = cpu as usize;
    interrupts::init(cpu);
    apic::start_timer();
    ONLINE.fetch_add(1, Ordering::Release);
    let mut seen = 0;
    loop {
        let round = ROUND.load(Ordering::Acquire);
        if round == seen {
            cpu::wait();
            continue;
        }
        seen = round;
        match (WORK.load(Ordering::Relaxed), plan::published()) {
            (MEASURE, _) => scenarios::scale::on_this_cpu(cpu),
            (work, Some(plan)) if cpu < plan.cpus => {
                scenarios::run_on_this_cpu(plan, Scenario::ALL[work], cpu);
            }
            _ => {}
        }
        FINISHED[cpu].store(round, Ordering::Release);
    }
}

/// Runs a scenario on all CPUs that take part, and waits for the last.
pub(crate) fn run(plan: &'static Plan, scenario: Scenario) {
    round(scenario as usize, plan.cpus, || {
        scenarios::run_on_this_cpu(plan, scenario, 0);
    });
}

/// Measures on so many CPUs, and waits for the last.
pub(crate) fn measure(cpus: usize) {
    round(MEASURE, cpus, || scenarios::scale::on_this_cpu(0));
}

fn round(work: usize, cpus: usize, of_this_cpu: impl FnOnce()) {
    WORK.store(work, Ordering::Relaxed);
    let round = ROUND.fetch_add(1, Ordering::Release) + 1;
    of_this_cpu();
    for finished in &FINISHED[1..cpus] {
        // The watchdog ends a wait that has no end.
        while finished.load(Ordering::Acquire) != round {
            cpu::wait();
        }
    }
}

/// Where the CPUs of a scenario wait for each other.
#[derive(Debug)]
pub(crate) struct Barrier(AtomicUsize);

impl Barrier {
    /// Nobody is there yet.
    pub(crate) const fn new() -> Self {
        Self(AtomicUsize::new(0))
    }

    /// Waits until all of so many CPUs have come here equally often.
    pub(crate) fn wait(&self, cpus: usize) {
        let before = self.0.fetch_add(1, Ordering::AcqRel);
        let last = (before / cpus + 1) * cpus;
        let mut patience = 1000;
        while self.0.load(Ordering::Acquire) < last {
            // Others may need the processor on which this CPU runs.
            if patience == 0 {
                cpu::wait();
            } else {
                patience -= 1;
                core::hint::spin_loop();
            }
        }
    }
}

/// Waits for a condition; returns whether it came true in time.
fn sleep_until(deadline: u64, condition: impl Fn() -> bool) -> bool {
    while !condition() {
        if apic::ticks() >= deadline {
            return false;
        }
        cpu::wait();
    }
    true
}
