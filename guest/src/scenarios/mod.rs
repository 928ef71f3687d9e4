// SPDX-License-Identifier: GPL-2.0-or-later
//! Runs scenarios on all CPUs and reports what came of them.

mod bad;
pub(crate) mod bench;
mod fault;
mod hypercall;

pub(crate) use guestmemfd_guest::cmdline::Scenario;

use crate::cpu::MAX_CPUS;
use crate::failure::Failure;
use crate::hypercall::enabled;
use crate::memory::TestMemory;
use crate::plan::Plan;
use crate::tester::{Check, Tester};
use crate::{smp, tap};
use guestmemfd_guest::layout::{Area, EDGE_PAGES, SLICE_PAGES};
use guestmemfd_guest::model::{Counts, Model, State};
use spin::Mutex;

const AREAS: usize = 2;
const MAX_OUTCOMES: usize = 64;

/// One test that has run.
#[derive(Debug, Clone, Copy)]
struct Outcome {
    area: &'static str,
    text: &'static str,
    failure: Option<Failure>,
}

/// What a CPU has to report at the end of a scenario.
#[derive(Debug)]
struct Log {
    outcomes: [Option<Outcome>; MAX_OUTCOMES],
    count: usize,
}

/// What a CPU knows about its pages, from scenario to scenario.
struct CpuState {
    log: Log,
    counts: Counts,
    slices: [[State; SLICE_PAGES]; AREAS],
    /// Used by the boot CPU alone.
    edges: [[State; EDGE_PAGES]; AREAS],
}

static CPUS: [Mutex<CpuState>; MAX_CPUS] = [const {
    Mutex::new(CpuState {
        log: Log {
            outcomes: [None; MAX_OUTCOMES],
            count: 0,
        },
        counts: Counts {
            hypercalls: 0,
            refused: 0,
            to_private: 0,
            to_shared: 0,
            to_private_pages: 0,
            to_shared_pages: 0,
            faults_private: 0,
            faults_shared: 0,
        },
        slices: [[State::Undecided; SLICE_PAGES]; AREAS],
        edges: [[State::Undecided; EDGE_PAGES]; AREAS],
    })
}; MAX_CPUS];

/// What each CPU is doing, for whoever has to explain why the guest is stuck.
static CURRENT: [Mutex<&'static str>; MAX_CPUS] = [const { Mutex::new("") }; MAX_CPUS];

/// A scenario on one CPU in one area.
struct Run<'a> {
    cpu: usize,
    area: &'static str,
    tester: Tester<'a>,
    log: &'a mut Log,
}

impl Run<'_> {
    /// Carries out a test and keeps its outcome.
    fn test(&mut self, text: &'static str, body: impl FnOnce(&mut Tester<'_>) -> Check) {
        *CURRENT[self.cpu].lock() = text;
        let failure = body(&mut self.tester).err();
        *CURRENT[self.cpu].lock() = "";
        let outcome = Outcome {
            area: self.area,
            text,
            failure,
        };
        self.log.outcomes[self.log.count] = Some(outcome);
        self.log.count += 1;
    }
}

/// Runs what the command line asks for. Returns whether everything was as it should be.
pub(crate) fn run_all(plan: &'static Plan) -> bool {
    let mut success = true;
    for scenario in Scenario::ALL {
        if !plan.options.runs(scenario) {
            continue;
        }
        if let Some(failure) = lacking(plan, scenario) {
            tap::test(
                Some(&failure),
                format_args!("{}: can run here", scenario.name()),
            );
            success = false;
            continue;
        }
        if scenario == Scenario::Idle {
            let cpus = smp::online();
            tap::test(None, format_args!("idle: every CPU runs, cpus={cpus}"));
            continue;
        }
        smp::run(plan, scenario);
        success &= report(plan, scenario);
    }
    summarise(plan);
    success
}

/// What the machine lacks for a scenario.
fn lacking(plan: &Plan, scenario: Scenario) -> Option<Failure> {
    let by_request = match scenario {
        Scenario::Idle => return None,
        Scenario::Fault => false,
        Scenario::Hypercall | Scenario::Bad => true,
    };
    if !plan.kvm {
        return Some(Failure::Missing(
            "only KVM converts memory, and it does not run this guest: use -accel kvm",
        ));
    }
    if !plan.shared_bit_works {
        return Some(Failure::Missing(
            "no memory where the shared bit is set: give the same shared-bit to sw-protected-guest",
        ));
    }
    if !by_request && !plan.areas.iter().flatten().any(|area| plan.is_strict(area)) {
        return Some(Failure::Missing(
            "no test memory at or above strict-from= (default 4 GiB): use max-ram-below-4g=",
        ));
    }
    (by_request && !enabled()).then_some(Failure::Missing(
        "the hypervisor has not enabled KVM_HC_MAP_GPA_RANGE: use a machine with private memory",
    ))
}

/// A CPU's part of a scenario.
pub(crate) fn run_on_this_cpu(plan: &'static Plan, scenario: Scenario, cpu: usize) {
    let mut state = CPUS[cpu].lock();
    let CpuState {
        log,
        counts,
        slices,
        edges,
    } = &mut *state;
    for (index, area) in plan.areas.iter().enumerate() {
        let Some(area) = area else { continue };
        if scenario == Scenario::Fault && !plan.is_strict(area) {
            continue;
        }
        let mut run = Run {
            cpu,
            area: area.name,
            tester: tester(plan, plan.slice(area, cpu), &mut slices[index]),
            log,
        };
        match scenario {
            Scenario::Idle => {}
            Scenario::Hypercall => hypercall::run(&mut run),
            Scenario::Fault => fault::run(&mut run, cpu),
            Scenario::Bad => bad::run(&mut run),
        }
        *counts += run.tester.model.counts;
        if scenario == Scenario::Bad && cpu == 0 {
            *counts += run_at_edge(plan, area, &mut edges[index], log);
        }
    }
}

fn run_at_edge(plan: &Plan, area: &Area, states: &mut [State], log: &mut Log) -> Counts {
    let mut run = Run {
        cpu: 0,
        area: area.name,
        tester: tester(plan, plan.edge(area), states),
        log,
    };
    bad::run_at_edge(&mut run, area.ram_end);
    run.tester.model.counts
}

fn tester<'a>(plan: &'a Plan, memory: TestMemory, states: &'a mut [State]) -> Tester<'a> {
    Tester {
        plan,
        memory,
        model: Model::new(states),
    }
}

/// Prints what the CPUs have found, in order. Returns whether all was well.
fn report(plan: &Plan, scenario: Scenario) -> bool {
    let mut success = true;
    for (cpu, state) in CPUS.iter().enumerate().take(plan.cpus) {
        let mut state = state.lock();
        for Outcome {
            area,
            text,
            failure,
        } in state.log.outcomes.iter().flatten()
        {
            let name = scenario.name();
            tap::test(
                failure.as_ref(),
                format_args!("{name} cpu{cpu} {area}: {text}"),
            );
            success &= failure.is_none();
        }
        state.log.outcomes.fill(None);
        state.log.count = 0;
    }
    success
}

/// Prints the numbers that the hypervisor's counters must agree with.
fn summarise(plan: &Plan) {
    let mut sum = Counts::default();
    let (mut private, mut shared) = (0, 0);
    for state in CPUS.iter().take(plan.cpus) {
        let state = state.lock();
        sum += state.counts;
        let pages = state
            .slices
            .iter()
            .flatten()
            .chain(state.edges.iter().flatten());
        for page in pages {
            private += u64::from(*page == State::Private);
            shared += u64::from(*page == State::Shared);
        }
    }
    tap::note(format_args!(
        "hypercalls={} refused={}",
        sum.hypercalls, sum.refused
    ));
    tap::note(format_args!(
        "conversions to-private={} to-shared={} to-private-pages={} to-shared-pages={}",
        sum.to_private, sum.to_shared, sum.to_private_pages, sum.to_shared_pages
    ));
    tap::note(format_args!(
        "faults-private={} faults-shared={}",
        sum.faults_private, sum.faults_shared
    ));
    tap::note(format_args!(
        "left private-pages={private} shared-pages={shared}"
    ));
}

/// Calls `action` for every CPU that is busy.
pub(crate) fn for_each_current(mut action: impl FnMut(usize, &'static str)) {
    for (cpu, current) in CURRENT.iter().enumerate() {
        if let Some(check) = current.try_lock()
            && !check.is_empty()
        {
            action(cpu, *check);
        }
    }
}
