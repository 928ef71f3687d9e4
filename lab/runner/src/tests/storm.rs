// SPDX-License-Identifier: GPL-2.0-or-later
//! All vCPUs convert at once, while QEMU is stopped, continued and asked.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use super::{Context, GUEST_LIMIT, SIZE, Test, freed, guests};
use crate::guest;
use crate::memory::{self, Kind};
use crate::probe::{self, Need};
use crate::qemu::{EXIT_LIMIT, Qemu};
use crate::query::{self, Backend};
use crate::strict::Strict;
use crate::tap::Tap;
use crate::vm::{Scenario, Vm};

/// What firmware and the guest's image have in the shared view.
pub(super) const FIXED: u64 = 4 << 20;

/// What a CPU of the conformance guest uses, below 4 GiB and above.
pub(super) const SLICES: u64 = 2 * (6 << 20);

/// How long `stop`, `cont` and queries may take. A conversion of 6 MiB, which they may have to wait
/// for, takes a part of a second under two levels of emulation.
const PROMPTLY: Duration = Duration::from_secs(10);

/// Times of stopping and continuing that a run must see; on a busy machine there are few.
const PAUSES: usize = 1;

pub(super) fn tests() -> Vec<Test> {
    let needs = &[Need::PrivateMemory, Need::StrictMode];
    let mut tests = Vec::new();
    for smp in [1, 4, 8] {
        tests.push(Test::new(format!("storm/{smp}"), needs, move |context| {
            storm(context, &storm_vm(context, smp))
        }));
    }
    let two_files = &[Need::TwoFiles, Need::StrictMode];
    tests.push(Test::new("storm/not-lazy-4", two_files, |context| {
        let vm = guests::with_properties(storm_vm(context, 4), "lazy-attributes=off");
        storm(context, &vm)
    }));
    for (name, chunk) in [("storm/race-4", "2M"), ("storm/race-64k-4", "64K")] {
        let properties = format!("lazy-attributes=on,lazy-chunk={chunk}");
        tests.push(Test::new(name, two_files, move |context| {
            let vm = guests::with_properties(race_vm(context, 4), &properties);
            let backend = race(context, &vm)?;
            ensure!(
                backend.converted_along_bytes > 0,
                "no page went along with a private touch: {backend:?}"
            );
            Ok(())
        }));
    }
    let in_place = &[Need::InPlace, Need::StrictMode];
    tests.push(Test::new("storm/race-in-place-4", in_place, |context| {
        race(context, &race_vm(context, 4)).map(drop)
    }));
    tests
}

fn storm_vm(context: &Context, smp: u32) -> Vm {
    Vm::conformance(&context.files, Scenario::Storm, true, SIZE, smp)
}

fn race_vm(context: &Context, smp: u32) -> Vm {
    Vm::conformance(&context.files, Scenario::Race, true, SIZE, smp)
}

fn storm(context: &Context, vm: &Vm) -> Result<()> {
    let _strict = Strict::on()?;
    let mut qemu = context.start(vm)?;
    let interruptions = run_interrupted(&mut qemu)?;
    println!("# {interruptions:?}");
    ensure!(
        interruptions.pauses >= PAUSES,
        "the guest was paused only {} times while it converted",
        interruptions.pauses
    );
    let (backend, tap) = at_rest(&mut qemu, vm.smp)?;
    // All were granted. But what waits while its vCPU is stopped counts as refused, and again when it
    // is repeated.
    let said = tap.note("hypercalls").context("no hypercalls")?;
    ensure!(
        (said..=said + backend.refused).contains(&backend.hypercalls),
        "the guest made {said} hypercalls: {backend:?}"
    );
    ensure!(
        backend.refused <= interruptions.stops * u64::from(vm.smp),
        "more was refused than {} stops can have interrupted: {backend:?}",
        interruptions.stops
    );
    ensure!(
        backend.faults_private > 0 && backend.faults_shared > 0,
        "no memory faults both ways: {backend:?}"
    );
    Ok(())
}

/// Shared data in undecided pages survives private touches next to it.
fn race(context: &Context, vm: &Vm) -> Result<Backend> {
    let _strict = Strict::on()?;
    let mut qemu = context.start(vm)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    println!("# {backend:?}");
    guests::settled(&backend)?;
    freed::files_match(&backend, qemu.pid())?;
    ensure!(
        backend.faults_private > 0,
        "no private touches: {backend:?}"
    );
    guest::finish(&mut qemu)?;
    Ok(backend)
}

/// After the guest's end: QEMU answers, nothing is under way, and the host has memory for what the
/// guest has touched and no more. Ends QEMU.
pub(super) fn at_rest(qemu: &mut Qemu, smp: u32) -> Result<(Backend, Tap)> {
    qemu.alive()?;
    let backend = query::backend(&mut qemu.qmp)?;
    println!("# {backend:?}");
    guests::settled(&backend)?;
    freed::files_match(&backend, qemu.pid())?;
    let files = memory::backings(qemu.pid())?;
    let tap = guest::finish(qemu)?;
    if probe::in_place() {
        // A page that was touched once stays, whatever it becomes.
        let most = u64::from(smp) * SLICES + FIXED;
        let allocated = memory::allocated(&files, Kind::GuestMemfd).unwrap_or(0);
        ensure!(
            allocated <= most,
            "guest_memfd has {allocated} bytes, the guest can have touched {most}"
        );
        return Ok((backend, tap));
    }
    for (kind, name, fixed) in [
        (Kind::GuestMemfd, "touched-private", 0),
        (Kind::Memfd, "touched-shared", FIXED),
    ] {
        let touched = tap
            .note(name)
            .context("the guest does not say what it touched")?;
        let Some(allocated) = memory::allocated(&files, kind) else {
            continue;
        };
        ensure!(
            allocated <= touched * 4096 + fixed,
            "{kind:?} has {allocated} bytes, of which the guest has touched {touched} pages and \
             firmware and the guest's image at most {fixed} bytes"
        );
    }
    Ok((backend, tap))
}

/// What happened to a guest on its way.
#[derive(Debug, Default)]
struct Interruptions {
    /// While it converted.
    pauses: usize,
    stops: u64,
    queries: usize,
    longest: Duration,
}

impl Interruptions {
    /// Runs a command that must be answered promptly.
    fn run(&mut self, qemu: &mut Qemu, command: &str) -> Result<Value> {
        let start = Instant::now();
        let answer = qemu.qmp.run(command, json!({}));
        let took = start.elapsed();
        self.longest = self.longest.max(took);
        self.stops += u64::from(command == "stop");
        ensure!(took < PROMPTLY, "{command} took {took:?}");
        answer
    }

    fn query(&mut self, qemu: &mut Qemu) -> Result<Backend> {
        let start = Instant::now();
        let backend = query::backend(&mut qemu.qmp)?;
        let took = start.elapsed();
        self.longest = self.longest.max(took);
        ensure!(took < PROMPTLY, "query-guestmemfd took {took:?}");
        self.queries += 1;
        Ok(backend)
    }
}

/// Lets a paused guest run to its end, and stops and continues it on the way as often as it can without
/// taking more than half of the time.
fn run_interrupted(qemu: &mut Qemu) -> Result<Interruptions> {
    let deadline = Instant::now() + GUEST_LIMIT;
    let mut seen = Interruptions::default();
    let mut before = 0;
    let mut run = Duration::from_millis(50);
    seen.run(qemu, "cont")?;
    while Instant::now() < deadline {
        if ended(qemu, run)? {
            return Ok(seen);
        }
        let start = Instant::now();
        seen.query(qemu)?;
        seen.run(qemu, "stop")?;
        let paused = seen.query(qemu)?;
        ensure!(
            paused.transition_bytes == 0,
            "{} bytes are in transition while the guest is paused",
            paused.transition_bytes
        );
        let now = paused.conversions_to_private + paused.conversions_to_shared;
        if ended(qemu, Duration::ZERO)? {
            return Ok(seen);
        }
        seen.pauses += usize::from(now > before);
        before = now;
        for command in ["cont", "stop", "cont"] {
            if let Err(why) = seen.run(qemu, command) {
                // It cannot be continued after its end, which may come at any time.
                return match ended(qemu, EXIT_LIMIT)? {
                    true => Ok(seen),
                    false => Err(why),
                };
            }
        }
        run = run.max(start.elapsed());
    }
    bail!(
        "the guest did not end within {} s: {seen:?}, {:?}",
        GUEST_LIMIT.as_secs(),
        query::backend(&mut qemu.qmp)?
    )
}

fn ended(qemu: &mut Qemu, limit: Duration) -> Result<bool> {
    match qemu.qmp.poll_event(&["SHUTDOWN", "RESET"], limit)? {
        None => Ok(false),
        Some(event) if event.data["reason"] == "guest-shutdown" => Ok(true),
        Some(event) => bail!(
            "the guest did not end itself: {}, {}",
            event.name,
            event.data
        ),
    }
}
