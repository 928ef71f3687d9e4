// SPDX-License-Identifier: GPL-2.0-or-later
//! Many resets: nothing of QEMU grows, and no guest finds anything of the one before.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
use serde_json::json;

use super::storm::{FIXED, SLICES};
use super::{Context, GUEST_LIMIT, SIZE, Test, freed, guests};
use crate::guest;
use crate::memory::{self, Holdings, Kind, open_fds, process};
use crate::probe::{self, Need};
use crate::qemu::{EXIT_LIMIT, Qemu};
use crate::query;
use crate::tap::Tap;
use crate::vm::{BACKEND, Scenario, Size, Vm};

/// Resets before anything is compared: QEMU allocates some things when they are first needed.
const WARM_UP: usize = 4;

/// Anonymous memory comes and goes a little, with threads' heaps.
const NOISE: u64 = 1 << 20;

/// How long the monitor may be silent: 100 ms, and what other programs on the machine take.
const ANSWER: Duration = Duration::from_millis(400);

pub(super) fn tests() -> Vec<Test> {
    let test = |name: &str, machine: &'static str, smp, resets, runs| {
        let name = format!("reset/{name}");
        Test::new(name, &[Need::PrivateMemory], move |context| {
            reset(context, machine, smp, resets, runs)
        })
    };
    // A new VM takes the kernel seconds in level 1.
    let new_file = ",x-change-vmfd-on-reset=on";
    vec![
        test("same-vm-file", "", 2, 100, 2),
        test("new-vm-file", new_file, 2, 12, 2),
        test("same-vm-file-1", "", 1, 20, 2).only_in_full(),
        test("same-vm-file-4", "", 4, 20, 2).only_in_full(),
        test("same-vm-file-8", "", 8, 20, 2).only_in_full(),
        test("long-same-vm-file", "", 2, 100, 25).only_in_full(),
        test("long-new-vm-file", new_file, 2, 100, 5).only_in_full(),
        answers("monitor-answers", "2G"),
        Test::new(
            "reset/new-vm-file-refused",
            &[Need::PrivateMemory, Need::Root],
            cannot_rebuild,
        ),
    ]
}

/// A reset that is to replace the VM's file descriptor cannot have the new files, and QEMU says why.
fn cannot_rebuild(context: &Context) -> Result<()> {
    let mut vm = Vm::protected(SIZE);
    vm.machine.push_str(",x-change-vmfd-on-reset=on");
    // Each backend gets a file before the old ones go.
    let vm = vm.with_arguments(&format!("-object {BACKEND},id=spare,size=16M"));
    let mut qemu = context.start(&vm)?;
    let fds = open_fds(qemu.pid())?;
    let mut unused = (0..).zip(&fds).filter(|(number, fd)| *number != **fd);
    let first = unused
        .next()
        .map_or(fds.len(), |(number, _)| number as usize);
    // The VM's own number is free for the new one; one more for the firmware's file, and for the file
    // of one backend.
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit {
        current: Some(u64::try_from(first)? + 1),
        maximum,
    };
    prlimit(Some(process(qemu.pid())?), Resource::Nofile, limit)?;
    // It may end before it answers.
    let _ = qemu.qmp.raw("system_reset", json!({}));
    let log = context.log.join("qemu").join("stderr");
    let deadline = Instant::now() + EXIT_LIMIT;
    let said = loop {
        let said = fs::read_to_string(&log)?;
        if said.contains("unable to rebuild guest") {
            break said;
        }
        ensure!(Instant::now() < deadline, "QEMU has said: {said}");
        thread::sleep(Duration::from_millis(20));
    };
    println!("# {}", said.trim());
    let reasons = said.lines().filter(|line| !line.contains("unable to"));
    ensure!(
        reasons
            .into_iter()
            .any(|line| line.contains("Too many open files")),
        "no reason before that: {said}"
    );
    Ok(())
}

fn answers(name: &str, size: &'static str) -> Test {
    let needs = &[Need::PrivateMemory];
    Test::new(format!("reset/{name}"), needs, move |context| {
        monitor_answers(context, size.parse()?)
    })
}

/// While memory that is all private is freed for a reset, the monitor answers.
fn monitor_answers(context: &Context, size: Size) -> Result<()> {
    let vm = Vm::conformance(&context.files, Scenario::Sweep, false, size, 2)
        .with_backend_properties("prefault=on");
    let mut qemu = context.start(&vm)?;
    qemu.qmp.run("cont", json!({}))?;
    let deadline = Instant::now() + GUEST_LIMIT;
    // All but what lies below the slices.
    while query::backend(&mut qemu.qmp)?.private_bytes < size.0 * 9 / 10 {
        ensure!(Instant::now() < deadline, "the guest converts nothing");
        thread::sleep(Duration::from_millis(20));
    }
    qemu.qmp.run("system_reset", json!({}))?;
    let asked = Instant::now();
    let mut slowest = Duration::ZERO;
    loop {
        let start = Instant::now();
        qemu.qmp.run("query-status", json!({}))?;
        slowest = slowest.max(start.elapsed());
        if query::backend(&mut qemu.qmp)?.private_bytes == 0 {
            break;
        }
        ensure!(Instant::now() < deadline, "the reset does not come");
        thread::sleep(Duration::from_millis(5));
    }
    println!(
        "# {} MiB freed in {:?}, slowest answer {slowest:?}",
        size.0 >> 20,
        asked.elapsed()
    );
    ensure!(
        slowest < ANSWER,
        "the monitor was silent for {slowest:?}, {ANSWER:?} are allowed"
    );
    // The guest starts over, and goes on converting.
    while query::backend(&mut qemu.qmp)?.private_bytes == 0 {
        ensure!(
            Instant::now() < deadline,
            "after the reset the guest converts nothing"
        );
        thread::sleep(Duration::from_millis(20));
    }
    qemu.quit()?;
    Ok(())
}

/// What a guest does between two resets.
#[derive(Debug, Clone, Copy)]
enum Between {
    /// It stays paused.
    Nothing,
    /// It is reset while it runs.
    Part,
    /// It runs to its end.
    All,
}

impl Between {
    /// Of all resets, `runs` follow a complete run and as many a part of one.
    fn at(reset: usize, resets: usize, runs: usize) -> Self {
        match (reset % (resets / runs), resets / runs / 2) {
            (0, _) => Self::All,
            (n, half) if n == half => Self::Part,
            _ => Self::Nothing,
        }
    }
}

fn reset(context: &Context, machine: &str, smp: u32, resets: usize, runs: usize) -> Result<()> {
    let mut vm = Vm::conformance(&context.files, Scenario::Reset, false, SIZE, smp);
    vm.machine.push_str(machine);
    let mut qemu = context.start(&vm)?;
    let mut holdings = None;
    for number in 0..resets + WARM_UP {
        match Between::at(number, resets, runs) {
            Between::Nothing => {}
            Between::Part => part(&mut qemu)?,
            Between::All => whole(&mut qemu, number > 0)?,
        }
        guest::reset(&mut qemu)?;
        starts_over(&mut qemu, smp)?;
        let now = Holdings::of(qemu.pid())?;
        if number == WARM_UP {
            holdings = Some(now);
        }
        if let Some(before) = holdings {
            same(before, now).with_context(|| format!("after {number} resets"))?;
        }
    }
    println!("# {holdings:?}, then {:?}", Holdings::of(qemu.pid())?);
    whole(&mut qemu, true)?;
    qemu.quit()?;
    Ok(())
}

/// The guest must end itself, content with what it found.
pub(super) fn whole(qemu: &mut Qemu, again: bool) -> Result<()> {
    match again {
        true => guest::run_again(qemu, GUEST_LIMIT)?,
        false => guest::run(qemu, GUEST_LIMIT)?,
    }
    let backend = query::backend(&mut qemu.qmp)?;
    ensure!(backend.private_bytes > 0, "no secrets: {backend:?}");
    freed::files_match(&backend, qemu.pid())?;
    // What guests have said that were reset on their way comes before it.
    let mut tap = Tap::default();
    while let Some(line) = qemu.serial_line(EXIT_LIMIT) {
        if line.starts_with("TAP version") {
            tap = Tap::default();
        }
        tap.line(&line);
        if line.starts_with("1..") {
            tap.verdict()?;
            return Ok(());
        }
    }
    bail!("the guest's report has no end")
}

/// Lets the guest run until it has private memory.
fn part(qemu: &mut Qemu) -> Result<()> {
    qemu.qmp.run("cont", json!({}))?;
    let deadline = Instant::now() + GUEST_LIMIT;
    while query::backend(&mut qemu.qmp)?.private_bytes == 0 {
        ensure!(Instant::now() < deadline, "the guest converts nothing");
        thread::sleep(Duration::from_millis(20));
    }
    guest::reset(qemu)?;
    qemu.qmp.run("stop", json!({}))?;
    // SeaBIOS resets the machine once more when it finds that it has run before.
    let settle = Duration::from_millis(200);
    while qemu.qmp.poll_event(&["RESET"], settle)?.is_some() {}
    Ok(())
}

/// Right after a reset nothing is private, and the host has nothing that was.
fn starts_over(qemu: &mut Qemu, smp: u32) -> Result<()> {
    let backend = query::backend(&mut qemu.qmp)?;
    guests::settled(&backend)?;
    ensure!(
        backend.private_bytes == 0,
        "{} bytes are private after a reset",
        backend.private_bytes
    );
    let files = memory::backings(qemu.pid())?;
    freed::files_are(&files, SIZE.0)?;
    let most = match probe::in_place() {
        // What was shared stays, and a guest that was reset on its way has looked at its slices.
        true => u64::from(smp) * SLICES + FIXED,
        false => 0,
    };
    let allocated = memory::allocated(&files, Kind::GuestMemfd).unwrap_or(0);
    ensure!(
        allocated <= most,
        "guest_memfd has {allocated} bytes after a reset, {most} are allowed"
    );
    Ok(())
}

fn same(before: Holdings, now: Holdings) -> Result<()> {
    ensure!(
        now.fds <= before.fds && now.mappings <= before.mappings + 2,
        "QEMU had {before:?}, now {now:?}"
    );
    ensure!(
        now.anonymous <= before.anonymous + NOISE,
        "QEMU's own memory has grown from {} to {} bytes",
        before.anonymous,
        now.anonymous
    );
    Ok(())
}
