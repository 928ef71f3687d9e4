// SPDX-License-Identifier: GPL-2.0-or-later
//! Guests on a mapped guest_memfd that move to another QEMU while they write, by every way there is,
//! and what is refused where KVM cannot log dirty pages.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{Context, GUEST_LIMIT, Test, mapped};
use crate::guest;
use crate::probe::Need;
use crate::qemu::Qemu;
use crate::vm::{Scenario, Vm};

/// How long a migration may take.
const LIMIT: Duration = Duration::from_secs(240);
const POLL: Duration = Duration::from_millis(50);

pub(super) fn tests() -> Vec<Test> {
    let needs = &[Need::MappedMemory];
    vec![
        Test::new("mapped/migration", needs, precopy),
        Test::new("mapped/migration-to-memfd", needs, to_memfd),
        Test::new("mapped/migration-multifd", needs, multifd),
        Test::new("mapped/migration-file", needs, mapped_ram),
        Test::new("mapped/snapshot", needs, by_job),
        Test::new("mapped/snapshot-monitor", needs, by_monitor),
        Test::new("mapped/dirty-rate", needs, |context| {
            dirty_rate(context, "off", "dirty-bitmap")
        }),
        Test::new("mapped/dirty-rate-by-samples-bind-off", needs, |context| {
            dirty_rate(context, "off", "page-sampling")
        }),
        Test::new("mapped/dirty-rate-by-samples-bind-on", needs, |context| {
            dirty_rate(context, "on", "page-sampling")
        }),
        Test::new("mapped/postcopy-refused", needs, postcopy),
        Test::new(
            "mapped/background-snapshot-refused",
            needs,
            background_snapshot,
        ),
        Test::new("mapped/cpr-refused", needs, cpr),
        Test::new("mapped/bound-migration-refused", needs, bound),
        Test::new("mapped/bound-only-migratable", needs, only_migratable),
    ]
}

/// A guest that writes to its memory, and does not stop by itself.
fn source(context: &Context) -> Vm {
    mapped::guest_vm(context, Scenario::Dirty, "off")
}

/// What it moves to: there it is told to stop.
fn target(context: &Context, arguments: &str) -> Vm {
    source(context)
        .with_arguments("-fw_cfg name=opt/guestmemfd/stop,string=1")
        .with_arguments(arguments)
}

/// Starts the guest and waits until it writes.
fn writing(context: &Context, vm: &Vm) -> Result<Box<Qemu>> {
    let mut qemu = context.start_as("source", vm)?;
    qemu.qmp.run("cont", json!({}))?;
    guest::wait_line(&qemu, "# dirty: all memory is written", GUEST_LIMIT)?;
    Ok(qemu)
}

/// The guest goes on in this QEMU: nothing that it wrote is lost, and it ends well.
fn goes_on(mut qemu: Box<Qemu>) -> Result<()> {
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let tap = guest::finish(&mut qemu)?;
    ensure!(tap.seen() > 0, "the guest has tested nothing");
    Ok(())
}

fn migrate(qemu: &mut Qemu, uri: &str) -> Result<()> {
    qemu.qmp.run("migrate", json!({"uri": uri}))?;
    migrated(qemu)
}

/// Waits until a migration, outgoing or incoming, is complete.
fn migrated(qemu: &mut Qemu) -> Result<()> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = qemu.qmp.run("query-migrate", json!({}))?;
        match answer["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => bail!("the migration failed: {answer}"),
            _ if Instant::now() >= deadline => bail!("the migration does not end: {answer}"),
            _ => thread::sleep(POLL),
        }
    }
}

fn capabilities(qemu: &mut Qemu, names: &[&str]) -> Result<()> {
    let list: Vec<Value> = names
        .iter()
        .map(|name| json!({"capability": name, "state": true}))
        .collect();
    let arguments = json!({"capabilities": list});
    qemu.qmp.run("migrate-set-capabilities", arguments)?;
    // As far as the machine goes, not as a network would.
    let arguments = json!({"max-bandwidth": 1_u64 << 40, "downtime-limit": 2000});
    qemu.qmp.run("migrate-set-parameters", arguments)?;
    Ok(())
}

fn socket(dir: &Path) -> String {
    format!("unix:{}", dir.join("migration").display())
}

/// From `vm` to `target`, which waits for the guest.
fn live(context: &Context, target: &Vm, names: &[&str]) -> Result<()> {
    let dir = TempDir::new()?;
    let uri = socket(dir.path());
    let mut qemu = writing(context, &source(context))?;
    let mut other = context.start_as("target", target)?;
    capabilities(&mut qemu, names)?;
    capabilities(&mut other, names)?;
    other.qmp.run("migrate-incoming", json!({"uri": uri}))?;
    migrate(&mut qemu, &uri)?;
    migrated(&mut other)?;
    qemu.quit()?;
    goes_on(other)
}

fn precopy(context: &Context) -> Result<()> {
    live(context, &target(context, "-incoming defer"), &[])
}

/// The other QEMU may have its memory anywhere.
fn to_memfd(context: &Context) -> Result<()> {
    let backend = format!("memory-backend-memfd,id=ram0,size={}", super::SIZE.0);
    let target = target(context, "-incoming defer").with_backend(&backend);
    live(context, &target, &[])
}

fn multifd(context: &Context) -> Result<()> {
    live(context, &target(context, "-incoming defer"), &["multifd"])
}

/// Into a file in which every page has its place.
fn mapped_ram(context: &Context) -> Result<()> {
    let dir = TempDir::new()?;
    let uri = format!("file:{}", dir.path().join("state").display());
    let mut qemu = writing(context, &source(context))?;
    capabilities(&mut qemu, &["mapped-ram"])?;
    migrate(&mut qemu, &uri)?;
    qemu.quit()?;

    let mut other = context.start_as("target", &target(context, "-incoming defer"))?;
    capabilities(&mut other, &["mapped-ram"])?;
    other.qmp.run("migrate-incoming", json!({"uri": uri}))?;
    migrated(&mut other)?;
    goes_on(other)
}

/// Waits for a job of QEMU's; the error if it had one.
fn job(qemu: &mut Qemu, id: &str) -> Result<Option<String>> {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        let jobs = qemu.qmp.run("query-jobs", json!({}))?;
        let jobs = jobs.as_array().cloned().unwrap_or_default();
        let ours = jobs.iter().find(|job| job["id"] == id);
        let Some(ours) = ours else {
            bail!("QEMU has no job {id}");
        };
        if ours["status"] == "concluded" {
            qemu.qmp.run("job-dismiss", json!({"id": id}))?;
            return Ok(ours["error"].as_str().map(str::to_owned));
        }
        thread::sleep(POLL);
    }
    bail!("the job {id} does not end")
}

/// A qcow2 image that can hold the state of a guest, open as `disk0`.
pub(super) fn image(qemu: &mut Qemu, path: &Path) -> Result<()> {
    std::fs::write(path, "")?;
    let file = json!({"driver": "file", "node-name": "file0", "filename": path});
    qemu.qmp.run("blockdev-add", file)?;
    let options = json!({"driver": "qcow2", "file": "file0", "size": 64 << 20});
    let arguments = json!({"job-id": "create", "options": options});
    qemu.qmp.run("blockdev-create", arguments)?;
    if let Some(error) = job(qemu, "create")? {
        bail!("no qcow2 image: {error}");
    }
    let disk = json!({"driver": "qcow2", "node-name": "disk0", "file": "file0"});
    qemu.qmp.run("blockdev-add", disk)?;
    Ok(())
}

/// The error if there was one.
pub(super) fn snapshot_job(qemu: &mut Qemu, command: &str) -> Result<Option<String>> {
    let arguments =
        json!({"job-id": "snap", "tag": "snap0", "vmstate": "disk0", "devices": ["disk0"]});
    qemu.qmp.run(command, arguments)?;
    job(qemu, "snap")
}

fn by_job(context: &Context) -> Result<()> {
    snapshot(context, |qemu, way| {
        match snapshot_job(qemu, &format!("snapshot-{way}"))? {
            Some(error) => bail!("snapshot-{way}: {error}"),
            None => Ok(()),
        }
    })
}

/// `savevm` and `loadvm`, which say nothing if all is well.
fn by_monitor(context: &Context) -> Result<()> {
    snapshot(context, |qemu, way| {
        let said = guest::monitor(qemu, &format!("{way}vm snap0"))?;
        ensure!(said.is_empty(), "{way}vm: {said}");
        Ok(())
    })
}

/// The guest's state goes into an image, and goes on from there in another QEMU.
fn snapshot(context: &Context, run: impl Fn(&mut Qemu, &str) -> Result<()>) -> Result<()> {
    let dir = TempDir::new()?;
    let path = dir.path().join("disk.qcow2");
    let mut qemu = writing(context, &source(context))?;
    image(&mut qemu, &path)?;
    run(&mut qemu, "save")?;
    qemu.quit()?;

    let mut other = context.start_as("target", &target(context, ""))?;
    let disk = json!({"driver": "qcow2", "node-name": "disk0",
                      "file": {"driver": "file", "filename": path}});
    other.qmp.run("blockdev-add", disk)?;
    run(&mut other, "load")?;
    goes_on(other)
}

/// KVM's dirty log shows that the guest writes, and so does its memory.
fn dirty_rate(context: &Context, bind: &str, mode: &str) -> Result<()> {
    let vm = mapped::guest_vm(context, Scenario::Dirty, bind);
    let mut qemu = writing(context, &vm)?;
    let arguments = json!({"calc-time": 1, "mode": mode});
    qemu.qmp.run("calc-dirty-rate", arguments)?;
    let deadline = Instant::now() + LIMIT;
    loop {
        let answer = qemu.qmp.run("query-dirty-rate", json!({}))?;
        if answer["status"] == "measured" {
            let rate = answer["dirty-rate"].as_i64().unwrap_or_default();
            ensure!(rate > 0, "no page became dirty: {answer}");
            return qemu.alive();
        }
        ensure!(Instant::now() < deadline, "no dirty rate: {answer}");
        thread::sleep(POLL);
    }
}

/// There is no userfaultfd for a guest_memfd.
fn postcopy(context: &Context) -> Result<()> {
    let mut qemu = context.start_as("target", &target(context, "-incoming defer"))?;
    let arguments = json!({"capabilities": [{"capability": "postcopy-ram", "state": true}]});
    refused(&mut qemu, "migrate-set-capabilities", arguments, "TMPFS")
}

/// For the same reason.
fn background_snapshot(context: &Context) -> Result<()> {
    let mut qemu = context.start(&Vm::ordinary(super::SIZE))?;
    let arguments = json!({"capabilities": [{"capability": "background-snapshot", "state": true}]});
    refused(
        &mut qemu,
        "migrate-set-capabilities",
        arguments,
        "ackground",
    )
}

/// A QEMU that takes over without the memory would find none of it.
fn cpr(context: &Context) -> Result<()> {
    let dir = TempDir::new()?;
    let mut vm = Vm::ordinary(super::SIZE);
    // Or what is refused is the rest of QEMU's memory.
    vm.machine.push_str(",aux-ram-share=on");
    let mut qemu = context.start(&vm)?;
    let channel = |kind: &str| {
        let path = dir.path().join(kind);
        let address = json!({"transport": "socket", "type": "unix", "path": path});
        json!({"channel-type": kind, "addr": address})
    };
    for mode in ["cpr-transfer", "cpr-exec"] {
        let parameters = json!({"mode": mode, "cpr-exec-command": ["false"]});
        qemu.qmp.run("migrate-set-parameters", parameters)?;
        let channels = match mode {
            "cpr-transfer" => json!([channel("main"), channel("cpr")]),
            _ => json!([channel("main")]),
        };
        let arguments = json!({"channels": channels});
        let why = "guest_memfd, which is not supported with CPR";
        refused(&mut qemu, "migrate", arguments, why)?;
    }
    Ok(())
}

fn refused(qemu: &mut Qemu, command: &str, arguments: Value, word: &str) -> Result<()> {
    match qemu.qmp.raw(command, arguments)? {
        Ok(_) => bail!("{command} was accepted"),
        Err(why) => ensure!(
            why.desc.contains(word),
            "{command}: no {word} in {:?}",
            why.desc
        ),
    }
    qemu.alive()
}

/// Everything that needs the dirty log says so before it starts.
fn bound(context: &Context) -> Result<()> {
    let dir = TempDir::new()?;
    let mut vm = mapped::guest_vm(context, Scenario::Dirty, "on");
    let mut qemu = writing(context, &vm)?;
    let uri = json!({"uri": socket(dir.path())});
    refused(&mut qemu, "migrate", uri, "bind=off")?;
    let rate = json!({"calc-time": 1, "mode": "dirty-bitmap"});
    refused(&mut qemu, "calc-dirty-rate", rate, "bind=off")?;
    image(&mut qemu, &dir.path().join("disk.qcow2"))?;
    match snapshot_job(&mut qemu, "snapshot-save")? {
        Some(error) => ensure!(error.contains("bind=off"), "snapshot-save: {error}"),
        None => bail!("snapshot-save was accepted"),
    }
    qemu.quit()?;
    // And the guest is none the worse for being refused: it still ends well.
    vm = vm.with_arguments("-fw_cfg name=opt/guestmemfd/stop,string=1");
    goes_on(context.start_as("again", &vm)?)
}

fn only_migratable(context: &Context) -> Result<()> {
    let vm = Vm::ordinary(super::SIZE)
        .with_backend_properties("bind=on")
        .with_arguments("-only-migratable");
    let ended = context.start_refused(&vm)?;
    ensure!(
        ended.stderr.contains("use bind=off"),
        "the message is {:?}",
        ended.stderr
    );
    Ok(())
}
