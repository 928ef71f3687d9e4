// SPDX-License-Identifier: GPL-2.0-or-later
//! Conversions while the kernel has no memory for QEMU: the guest gets an error number or touches
//! again, goes on, and both sides agree on what is private.

use std::path::Path;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{Context, GUEST_LIMIT, SIZE, Test, freed, guests};
use crate::cgroup::{Group, Limit};
use crate::failslab::Failures;
use crate::guest;
use crate::probe::{self, Need};
use crate::qemu::{EXIT_LIMIT, Qemu};
use crate::query;
use crate::setting;
use crate::strict::Strict;
use crate::tap::Tap;
use crate::vm::{Scenario, Size, Vm};

/// The attributes of so much need some megabytes.
const SWEPT: Size = Size(2 << 30);

/// What a request of the guest converts.
const REQUEST: u64 = 2 << 20;

/// What QEMU may still get after its cgroup is limited, and every so often again: a system call
/// that finds no memory fails, but a page fault waits for some.
const ROOM: u64 = 256 << 10;
const ROOM_EVERY: Duration = Duration::from_millis(200);

/// Allocations that fail, in percent. Each is tried twice, and a request needs some ten.
const REFUSED: u32 = 20;

pub(super) fn tests() -> Vec<Test> {
    let private = &[Need::PrivateMemory, Need::Root];
    let failing = &[Need::PrivateMemory, Need::Failslab, Need::Root];
    let strict = &[Need::StrictMode, Need::Failslab, Need::Root];
    vec![
        Test::new("no-memory/full-cgroup", private, full_cgroup),
        Test::new("no-memory/requests", failing, requests),
        Test::new("no-memory/faults", strict, faults),
        Test::new("no-memory/stuck", strict, stuck),
    ]
}

/// Linux 7.3 charges the entries in which it keeps attributes to the cgroup and denies requests when
/// it is full. Before, nobody was charged, and all were granted.
fn full_cgroup(context: &Context) -> Result<()> {
    let group = Group::new("conversions")?;
    let inside = group.enter()?;
    let mut qemu = start(context)?;
    drop(inside);
    // What finds no memory must fail, and nobody be killed for it.
    let path = format!("/proc/{}/oom_score_adj", qemu.pid());
    setting::write(Path::new(&path), "-1000")?;
    thread::scope(|scope| {
        let (limited, lifted) = mpsc::channel();
        sweep(&mut qemu, || {
            let limit = group.limit(group.current()? + ROOM)?;
            let group = &group;
            scope.spawn(move || raise_slowly(group, &limit, &lifted));
            Ok(limited)
        })
    })?;
    let met = group.value("memory.events", "max")?;
    println!("# limit met {met} times");
    Ok(())
}

/// Gives the group a little room again and again until the other side of `lifted` is gone.
fn raise_slowly(group: &Group, limit: &Limit<'_>, lifted: &Receiver<()>) {
    while lifted.recv_timeout(ROOM_EVERY) == Err(RecvTimeoutError::Timeout) {
        if let Err(why) = group.current().and_then(|now| limit.raise(now + ROOM)) {
            eprintln!("the cgroup gets no more room: {why:#}");
        }
    }
}

/// The kernel itself refuses to set attributes.
fn requests(context: &Context) -> Result<()> {
    let mut qemu = start(context)?;
    let refused = match probe::in_place() {
        // Few requests need any: ranges that become one take no more nodes.
        true => 100,
        false => REFUSED,
    };
    let denied = sweep(&mut qemu, || Failures::on(refused))?;
    ensure!(denied > 0, "no request was denied");
    Ok(())
}

fn start(context: &Context) -> Result<Box<Qemu>> {
    context.start(&Vm::conformance(
        &context.files,
        Scenario::Sweep,
        false,
        SWEPT,
        2,
    ))
}

/// The guest makes its memory private while `refuse` takes effect, and repeats what was denied when
/// it does no longer. How much that was.
fn sweep<R>(qemu: &mut Qemu, refuse: impl FnOnce() -> Result<R>) -> Result<u64> {
    qemu.qmp.run("cont", json!({}))?;
    guest::wait_line(qemu, "# sweep: begins", GUEST_LIMIT)?;
    qemu.qmp.run("stop", json!({}))?;
    let refusing = refuse()?;
    qemu.qmp.run("cont", json!({}))?;
    let mut tap = Tap::default();
    tap.line(&guest::wait_line(qemu, "# sweep: granted", GUEST_LIMIT)?);
    qemu.qmp.run("stop", json!({}))?;
    drop(refusing);

    let said = |name| {
        tap.note(name)
            .context("the guest does not say what it was told")
    };
    let (granted, denied) = (said("granted")?, said("denied")?);
    let backend = query::backend(&mut qemu.qmp)?;
    println!("# granted {granted}, denied {denied}; {backend:?}");
    ensure!(
        granted + denied >= 512,
        "{granted} requests granted, {denied} denied: too few"
    );
    ensure!(
        backend.private_bytes == granted * REQUEST && backend.refused == denied,
        "{granted} requests granted, {denied} denied: {backend:?}"
    );

    qemu.qmp.run("cont", json!({}))?;
    qemu.qmp.wait_event(&["SHUTDOWN"], GUEST_LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    guests::settled(&backend)?;
    ensure!(
        backend.conversions_to_private == granted + denied && backend.private_bytes == 0,
        "all {} requests must have been granted in the end: {backend:?}",
        granted + denied
    );
    guest::finish(qemu)?;
    Ok(denied)
}

/// A touch that cannot be served at all pauses the guest, which goes on once it can.
fn stuck(context: &Context) -> Result<()> {
    let _strict = Strict::on()?;
    let vm = Vm::conformance(&context.files, Scenario::Race, true, SIZE, 2);
    let vm = guests::with_properties(vm, "fault-timeout=2000");
    let mut qemu = context.start(&vm)?;
    qemu.qmp.run("cont", json!({}))?;
    guest::wait_line(&qemu, "TAP version", GUEST_LIMIT)?;
    let failures = Failures::on(100)?;
    let stuck = ["GUESTMEMFD_FAULT_STUCK"];
    let event = qemu.qmp.wait_event(&stuck, GUEST_LIMIT)?.data;
    ensure!(
        event["id"] == "ram0" && event["to"] == "private" && event["cpu-index"].is_u64(),
        "the event is {event}"
    );
    qemu.qmp.wait_event(&["STOP"], EXIT_LIMIT)?;
    let status = guest::status(&mut qemu)?;
    ensure!(status == "io-error", "the guest is {status}");
    drop(failures);
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    guests::settled(&backend)?;
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

/// Touches that convert memory come again until they are served.
fn faults(context: &Context) -> Result<()> {
    let _strict = Strict::on()?;
    let vm = Vm::conformance(&context.files, Scenario::Race, true, SIZE, 4);
    let mut qemu = context.start(&vm)?;
    qemu.qmp.run("cont", json!({}))?;
    // Not earlier: while the firmware runs, the VM's ioctls are for its slots as well.
    guest::wait_line(&qemu, "TAP version", GUEST_LIMIT)?;
    // Linux 7.3 needs no memory to clear attributes and keeps its nodes: all fail until one has.
    let failures = Failures::on(100)?;
    let event = qemu
        .qmp
        .wait_event(&["GUESTMEMFD_CONVERSION_FAILED"], GUEST_LIMIT)?;
    let error = event.data["error"].as_str().unwrap_or_default();
    ensure!(error.contains("allocate memory"), "failed for {error:?}");
    drop(failures);
    let failures = Failures::on(REFUSED)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    drop(failures);
    let backend = query::backend(&mut qemu.qmp)?;
    println!("# {backend:?}");
    guests::settled(&backend)?;
    freed::files_match(&backend, qemu.pid())?;
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}
