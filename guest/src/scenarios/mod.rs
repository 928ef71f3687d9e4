// SPDX-License-Identifier: GPL-2.0-or-later
//! Runs scenarios on all CPUs and reports what came of them.

mod bad;
mod balloon;
pub(crate) mod bench;
mod clock;
mod device;
mod dirty;
mod disk;
mod dma;
mod fault;
mod flip;
mod gpu;
mod hostile;
mod hypercall;
mod kept;
mod large;
mod race;
mod reset;
pub(crate) mod scale;
mod storm;
mod sweep;
mod tables;
mod vhost;
mod waiting;

pub(crate) use guestmemfd_guest::cmdline::Scenario;

use crate::cpu::MAX_CPUS;
use crate::failure::Failure;
use crate::hypercall::enabled;
use crate::memory::TestMemory;
use crate::plan::Plan;
use crate::tester::{Check, Content, Tester};
use crate::{smp, tap};
use core::ops::Range;
use guestmemfd_guest::layout::{Area, EDGE_PAGES, SLICE_PAGES};
use guestmemfd_guest::model::{Counts, Intent, Model, State, Touched};
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
    /// In scenarios that keep count of it.
    touched: Touched,
    slices: [[State; SLICE_PAGES]; AREAS],
    /// Used by the boot CPU alone.
    edges: [[State; EDGE_PAGES]; AREAS],
    /// Of the pages of one slice or edge, within a scenario.
    contents: [Content; SLICE_PAGES],
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
        touched: Touched {
            private: 0,
            shared: 0,
        },
        slices: [[State::Undecided; SLICE_PAGES]; AREAS],
        edges: [[State::Undecided; EDGE_PAGES]; AREAS],
        contents: [Content::Unknown; SLICE_PAGES],
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
    touched: &'a mut Touched,
}

impl Run<'_> {
    /// The guest has touched these pages since they were converted last, in the view that they are
    /// in.
    fn touched(&mut self, pages: Range<usize>) {
        for page in pages {
            match self.tester.view(page) {
                Intent::Private => self.touched.private += 1,
                Intent::Shared => self.touched.shared += 1,
            }
        }
    }

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
    if !scenario.converts() {
        return None;
    }
    let by_request = !matches!(scenario, Scenario::Fault | Scenario::Race);
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
    let in_rest = matches!(scenario, Scenario::Large | Scenario::Race | Scenario::Sweep);
    if in_rest
        && plan
            .areas
            .iter()
            .flatten()
            .last()
            .is_none_or(|area| area.rest(plan.cpus).size() == 0)
    {
        return Some(Failure::Missing(
            "no memory behind the slices: use more of it",
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
        touched,
        slices,
        edges,
        contents,
    } = &mut *state;
    for (index, area) in plan.areas.iter().enumerate() {
        let Some(area) = area else { continue };
        let strict = plan.is_strict(area);
        if matches!(scenario, Scenario::Fault | Scenario::Race) && !strict {
            continue;
        }
        // One area is enough to fill much memory, and the one above 4 GiB is the larger one.
        let last = plan.areas[index + 1..].iter().all(Option::is_none);
        if matches!(scenario, Scenario::Large | Scenario::Sweep) && !last {
            continue;
        }
        // There is one device, or one CPU's clock is enough.
        let device = matches!(
            scenario,
            Scenario::Balloon
                | Scenario::Reporting
                | Scenario::Disk
                | Scenario::Device
                | Scenario::Clock
                | Scenario::Kept
                | Scenario::Tables
                | Scenario::Vhost
        );
        if device && (cpu, index) != (0, 0) || scenario == Scenario::Waiting && index != 0 {
            continue;
        }
        let mut run = Run {
            cpu,
            area: area.name,
            tester: tester(plan, plan.slice(area, cpu), &mut slices[index], contents),
            log,
            touched,
        };
        match scenario {
            Scenario::Idle => {}
            Scenario::Hypercall => hypercall::run(&mut run),
            Scenario::Fault => fault::run(&mut run, cpu),
            Scenario::Bad => bad::run(&mut run),
            Scenario::Storm => storm::run(&mut run, cpu, strict, plan.all_slices(area)),
            Scenario::Hostile => {
                let memory = || [plan.all_slices(area), plan.nothing(area)];
                hostile::run(&mut run, cpu, strict.then(memory));
            }
            Scenario::Flip => flip::run(&mut run, strict),
            Scenario::Reset => reset::run(&mut run),
            Scenario::Large => large::run(&mut run, cpu, strict, plan.rest(area)),
            Scenario::Race => race::run(&mut run, cpu, plan.rest(area)),
            Scenario::Sweep => sweep::run(&mut run, cpu, plan.rest(area)),
            Scenario::Dirty => dirty::run(&mut run),
            Scenario::Balloon => balloon::inflate(&mut run),
            Scenario::Reporting => balloon::report(&mut run),
            Scenario::Disk => disk::run(&mut run),
            Scenario::Device => device::run(&mut run),
            Scenario::Clock => clock::run(&mut run),
            Scenario::Vhost => vhost::run(&mut run),
            Scenario::Dma => dma::run(&mut run, cpu, strict),
            Scenario::Tables => tables::run(&mut run),
            Scenario::Kept => kept::run(&mut run),
            Scenario::Waiting => waiting::run(&mut run, cpu),
        }
        *counts += run.tester.model.counts;
        if scenario == Scenario::Bad && cpu == 0 {
            let tester = tester(plan, plan.edge(area), &mut edges[index], contents);
            *counts += run_at_edge(area, tester, log, touched);
        }
    }
}

fn run_at_edge(area: &Area, tester: Tester<'_>, log: &mut Log, touched: &mut Touched) -> Counts {
    let mut run = Run {
        cpu: 0,
        area: area.name,
        tester,
        log,
        touched,
    };
    bad::run_at_edge(&mut run, area.ram_end);
    run.tester.model.counts
}

fn tester<'a>(
    plan: &'a Plan,
    memory: TestMemory,
    states: &'a mut [State],
    contents: &'a mut [Content],
) -> Tester<'a> {
    // Scenarios go around the tester as well.
    contents.fill(Content::Unknown);
    Tester {
        plan,
        memory,
        model: Model::new(states),
        contents,
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
    let mut touched = Touched::default();
    for state in CPUS.iter().take(plan.cpus) {
        let state = state.lock();
        sum += state.counts;
        touched.private += state.touched.private;
        touched.shared += state.touched.shared;
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
    tap::note(format_args!(
        "touched touched-private={} touched-shared={}",
        touched.private, touched.shared
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
