// SPDX-License-Identifier: GPL-2.0-or-later
//! Accesses to private memory that go around all checks: found, told of, and without a trace.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde_json::json;
use tempfile::TempDir;

use super::query::{RUNS, read_map};
use super::{Context, GUEST_LIMIT, SIZE, Test, freed, guests, mapped_devices};
use crate::guest;
use crate::memory;
use crate::probe::Need;
use crate::qemu::{EXIT_LIMIT, Qemu};
use crate::query::{self, Backend, State};
use crate::strict::Strict;
use crate::vm::{Scenario, Vm};

/// How long a guard may take to find something.
const FIND_LIMIT: Duration = Duration::from_secs(30);

pub(super) fn tests() -> Vec<Test> {
    let private = &[Need::TwoFiles];
    vec![
        Test::new("guard/quiet", &[Need::TwoFiles, Need::StrictMode], quiet),
        Test::new("guard/clock", private, clock),
        Test::new("guard/clock-fatal", private, clock_fatal),
        Test::new("guard/other-process", private, other_process),
        Test::new("guard/vhost-user", private, vhost_user),
        Test::new("guard/new-vm-file", private, new_vm_file),
        Test::new("guard/refused", private, refused),
    ]
}

/// Guests and QEMU use what they may, and are not caught. With several CPUs, one of which touches what
/// another makes private, KVM can be caught with the page that it has looked up before. The same goes
/// for its workers that look up pages while a vCPU halts; where the guest may halt by itself
/// (`cpu-pm=on`), KVM has none.
fn quiet(context: &Context) -> Result<()> {
    let _strict = Strict::on()?;
    let vm = Vm::conformance(&context.files, Scenario::Storm, true, SIZE, 1)
        .with_arguments("-overcommit cpu-pm=on");
    let mut qemu = context.start(&guests::with_properties(vm, "guard=report"))?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    ensure!(
        backend.stray_accesses == 0,
        "somebody was caught: {}",
        fs::read_to_string(context.log.join("qemu/stderr"))?
    );
    freed::files_match(&backend, qemu.pid())?;
    given_back(&mut qemu)?;
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

/// KVM writes the guest's clock to a private page, in the vCPU's thread.
fn clock(context: &Context) -> Result<()> {
    let mut qemu = context.start(&clock_vm(context, "guard=report"))?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backend = wait_for_stray(&mut qemu)?;
    given_back(&mut qemu)?;
    let stderr = fs::read_to_string(context.log.join("qemu/stderr"))?;
    ensure!(
        stderr.contains("(CPU 0/KVM) has used private memory"),
        "{} accesses were caught, and QEMU said: {stderr}",
        backend.stray_accesses
    );
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

fn clock_fatal(context: &Context) -> Result<()> {
    let mut qemu = context.start(&clock_vm(context, "guard=fatal"))?;
    qemu.qmp.run("cont", json!({}))?;
    let ended = qemu.wait(GUEST_LIMIT)?;
    ensure!(
        ended.status.signal() == Some(libc::SIGABRT)
            && ended.stderr.contains("has used private memory at offset"),
        "QEMU ended with {}: {}",
        ended.status,
        ended.stderr
    );
    Ok(())
}

fn clock_vm(context: &Context, properties: &str) -> Vm {
    let vm = Vm::conformance(&context.files, Scenario::Clock, false, SIZE, 1);
    guests::with_properties(vm, properties)
}

/// This process writes to a private page through the file.
fn other_process(context: &Context) -> Result<()> {
    let vm = Vm::conformance(&context.files, Scenario::Hypercall, false, SIZE, 1);
    let mut qemu = context.start(&guests::with_properties(vm, "guard=report"))?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let runs = read_map(&mut qemu, RUNS)?;
    let private = runs.iter().find(|run| run.state == State::Private);
    let private = private.context("nothing is private")?;
    // While the guest ran, a worker of KVM's may have been caught.
    let before = query::backend(&mut qemu.qmp)?.stray_accesses;
    memfd(qemu.pid())?.write_all_at(&[1], private.offset)?;

    let event = qemu
        .qmp
        .wait_event(&["GUESTMEMFD_STRAY_ACCESS"], FIND_LIMIT)?;
    let expected = json!({"id": "ram0", "offset": private.offset, "size": 4096});
    let mut data = event.data;
    let gpa = data.as_object_mut().and_then(|data| data.remove("gpa"));
    ensure!(
        data == expected && gpa.is_some(),
        "{data} instead of {expected}, gpa {gpa:?}"
    );
    let backend = wait(&mut qemu, |backend| backend.stray_accesses > before)?;
    ensure!(
        backend.stray_accesses == before + 1,
        "found more than once, {before} before: {backend:?}"
    );
    given_back(&mut qemu)?;
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

/// A disk in qemu-storage-daemon, which the guest gives shared pages and then private ones.
fn vhost_user(context: &Context) -> Result<()> {
    let dir = TempDir::new()?;
    let (_daemon, chardev) = mapped_devices::disk_in_daemon(context, &dir)?;
    let vm = Vm::conformance(&context.files, Scenario::Vhost, false, SIZE, 1);
    let disk = |properties: &str| {
        let device = format!("-device vhost-user-blk-pci,chardev=vub{properties}");
        guests::with_properties(vm.clone(), "guard=report,lazy-attributes=off")
            .with_arguments(&format!("{chardev} {device}"))
    };
    // The daemon does not offer the feature that devices of confidential guests have by default.
    let stderr = context.start_refused(&disk(""))?.stderr;
    ensure!(
        stderr.contains("iommu_platform=true is not supported"),
        "a disk with defaults is refused with: {stderr}"
    );
    let mut qemu = context.start(&disk(",iommu_platform=off"))?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backend = wait_for_stray(&mut qemu)?;
    given_back(&mut qemu)?;
    ensure!(
        backend.pinned_bytes == 0,
        "something is still pinned: {backend:?}"
    );
    let stderr = fs::read_to_string(context.log.join("qemu/stderr"))?;
    ensure!(
        stderr.contains("has used private memory at offset"),
        "{} accesses were caught, and QEMU said: {stderr}",
        backend.stray_accesses
    );
    let tap = guest::finish(&mut qemu)?;
    ensure!(tap.verdict()? == 4, "the guest has left something out");
    Ok(())
}

/// A reset that gives the guest a new VM and a new guest_memfd leaves the guard at its post.
fn new_vm_file(context: &Context) -> Result<()> {
    let mut vm = clock_vm(context, "guard=report");
    vm.machine.push_str(",x-change-vmfd-on-reset=on");
    let mut qemu = context.start(&vm)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    guest::wait_line(&qemu, "1..", EXIT_LIMIT)?;
    let before = wait_for_stray(&mut qemu)?.stray_accesses;
    guest::reset(&mut qemu)?;
    guest::run_again(&mut qemu, GUEST_LIMIT)?;
    wait(&mut qemu, |backend| backend.stray_accesses > before)
        .context("nobody was caught after the reset")?;
    given_back(&mut qemu)?;
    guest::finish(&mut qemu)?;
    Ok(())
}

/// The shared file of a QEMU that has one.
fn memfd(pid: u32) -> Result<fs::File> {
    for fd in memory::open_fds(pid)? {
        let path = format!("/proc/{pid}/fd/{fd}");
        if fs::read_link(&path).is_ok_and(|to| to.starts_with("/memfd:guestmemfd-shared (deleted)"))
        {
            return Ok(OpenOptions::new().read(true).write(true).open(path)?);
        }
    }
    bail!("QEMU has no memfd for shared memory")
}

fn wait_for_stray(qemu: &mut Qemu) -> Result<Backend> {
    wait(qemu, |backend| backend.stray_accesses > 0).context("nobody was caught")
}

/// Nothing is left of stray accesses: where the guest has private pages, the shared file has holes.
fn given_back(qemu: &mut Qemu) -> Result<()> {
    let file = memfd(qemu.pid())?;
    let deadline = Instant::now() + FIND_LIMIT;
    while let Some(offset) = data_in_private(qemu, &file)? {
        ensure!(
            Instant::now() < deadline,
            "at {offset:#x} the shared file has data, and the page is private"
        );
        thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// Where the guest has private pages, the shared file has holes.
pub(super) fn holes_where_private(qemu: &mut Qemu) -> Result<()> {
    let file = memfd(qemu.pid())?;
    match data_in_private(qemu, &file)? {
        Some(offset) => bail!("at {offset:#x} the shared file has data, and the page is private"),
        None => Ok(()),
    }
}

/// The first byte of data where there must be none.
fn data_in_private(qemu: &mut Qemu, file: &fs::File) -> Result<Option<u64>> {
    for run in read_map(qemu, RUNS)? {
        let data = rustix::fs::seek(file, SeekFrom::Data(run.offset));
        let data = match data {
            Ok(data) => data,
            // Nothing up to the end.
            Err(Errno::NXIO) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if run.state == State::Private && data < run.offset + run.size {
            return Ok(Some(data));
        }
    }
    Ok(None)
}

fn wait(qemu: &mut Qemu, holds: impl Fn(&Backend) -> bool) -> Result<Backend> {
    let deadline = Instant::now() + FIND_LIMIT;
    loop {
        let backend = query::backend(&mut qemu.qmp)?;
        if holds(&backend) {
            return Ok(backend);
        }
        ensure!(Instant::now() < deadline, "{backend:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

fn refused(context: &Context) -> Result<()> {
    for (properties, words) in [
        (
            "guard=report,discard=keep",
            ["guard=report", "discard=keep"],
        ),
        ("guard=sometimes", ["guard", "sometimes"]),
    ] {
        let vm = guests::with_properties(Vm::protected(SIZE), properties);
        let stderr = context.start_refused(&vm)?.stderr;
        ensure!(
            words.iter().all(|word| stderr.contains(word)),
            "{properties} is refused with: {stderr}"
        );
    }
    Ok(())
}
