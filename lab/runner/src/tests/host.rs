// SPDX-License-Identifier: GPL-2.0-or-later
//! What the host gets that reads or writes private memory: an error, and the page is as before.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tempfile::TempDir;

use super::dump::Elf;
use super::{
    Context, GUEST_LIMIT, SIZE, Test, freed, guard, guests, mapped_devices, mapped_migration,
};
use crate::guest;
use crate::probe::{self, Need};
use crate::qemu::{EXIT_LIMIT, Qemu};
use crate::query;
use crate::tap::Tap;
use crate::vm::{Scenario, Vm};

/// The gdbstub's socket.
const GDB: &str = "gdb";

/// Bytes that are looked at.
const LENGTH: u64 = 64;

pub(super) fn tests() -> Vec<Test> {
    let private = &[Need::PrivateMemory];
    let mut tests = vec![
        Test::new("host/access", private, access),
        Test::new("host/migration", private, |context| {
            let dir = TempDir::new()?;
            migration(&mut *context.start(&Vm::protected(SIZE))?, dir.path())
        }),
        Test::new("host/upstream-access", &[Need::TwoFiles], upstream_access),
    ];
    for (name, machine) in [("same", ""), ("new", ",x-change-vmfd-on-reset=on")] {
        let name = format!("host/reset-while-waiting-{name}-vm-file");
        tests.push(Test::new(name, private, move |context| {
            reset_while_waiting(context, machine)
        }));
    }
    tests
}

/// A page that is private, one that is shared, and what the host wrote to that.
struct Pages {
    private: u64,
    shared: u64,
    pattern: Vec<u8>,
}

impl Pages {
    /// As the guest says in this line.
    fn said(line: &str) -> Result<Self> {
        Ok(Self {
            private: guest::address(line, "private")?,
            shared: guest::address(line, "shared")?,
            pattern: crate::vm::host_pattern().into_bytes(),
        })
    }

    /// What the host gets of them by all ways that change nothing.
    fn look(&self, qemu: &mut Qemu, dir: &Path) -> Result<()> {
        monitor(qemu, self).context("the monitor")?;
        save(qemu, dir, self).context("memory in files")?;
        debugger(&dir.join(GDB), self).context("the gdbstub")?;
        dirty_rate(qemu).context("calc-dirty-rate")
    }
}

/// Pauses a guest.
fn stop(qemu: &mut Qemu) -> Result<()> {
    qemu.qmp.run("stop", json!({}))?;
    qemu.qmp.wait_event(&["STOP"], EXIT_LIMIT)?;
    Ok(())
}

fn access(context: &Context) -> Result<()> {
    let dir = TempDir::new()?;
    let vm = device_vm(context, &dir, "lazy-attributes=off,convert-timeout=200")?;
    let mut qemu = context.start(&with_gdb(vm, &dir))?;
    qemu.qmp.run("cont", json!({}))?;
    let mut tap = Tap::default();
    let line = guest::wait_line_into(&qemu, &mut tap, "# device: private", GUEST_LIMIT)?;
    let milliseconds = tap.note("ring-milliseconds");
    let milliseconds = milliseconds.context("the guest does not say how long it waited")?;
    events(&mut qemu)?;
    stop(&mut qemu)?;

    let pages = Pages::said(&line)?;
    let before = query::backend(&mut qemu.qmp)?;
    pages.look(&mut qemu, dir.path())?;
    let after = query::backend(&mut qemu.qmp)?;
    ensure!(before == after, "the host changed {before:?} to {after:?}");
    // This one reads all of the shared view, which allocates it: a memfd has no page of zeros.
    dump(&mut qemu, dir.path(), &pages).context("dump-guest-memory")?;
    let after = query::backend(&mut qemu.qmp)?;
    ensure!(
        after.shared_allocated <= SIZE.0 - after.private_bytes,
        "private pages are allocated in the shared file: {after:?}"
    );

    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    freed::files_match(&backend, qemu.pid())?;
    if !probe::in_place() {
        guard::holes_where_private(&mut qemu)?;
    }
    ensure!(
        backend.waits > 0 && backend.pinned_bytes == 0,
        "no conversion waited, or something is still pinned: {backend:?}"
    );
    let tap = guest::finish(&mut qemu)?;
    ensure!(tap.verdict()? >= 8, "the guest has left something out");
    ensure!(
        milliseconds <= 100,
        "it takes {milliseconds} ms to make the ring of a disk private"
    );
    Ok(())
}

/// The same on QEMU's own path, whose memory is an ordinary backend.
fn upstream_access(context: &Context) -> Result<()> {
    let dir = TempDir::new()?;
    let vm = device_vm(context, &dir, "")?
        .with_backend(&format!("memory-backend-memfd,id=ram0,size={}", SIZE.0));
    let mut qemu = context.start(&with_gdb(vm, &dir))?;
    qemu.qmp.run("cont", json!({}))?;
    let line = guest::wait_line(&qemu, "# device: private", GUEST_LIMIT)?;
    stop(&mut qemu)?;

    let pages = Pages::said(&line)?;
    pages.look(&mut qemu, dir.path())?;
    dump(&mut qemu, dir.path(), &pages).context("dump-guest-memory")?;

    guest::run(&mut qemu, GUEST_LIMIT)?;
    let tap = guest::finish(&mut qemu)?;
    ensure!(tap.verdict()? >= 8, "the guest has left something out");
    Ok(())
}

/// What went wrong so far has been told: devices were refused, and a buffer in use did not become
/// private.
fn events(qemu: &mut Qemu) -> Result<()> {
    let mut next = |name| qemu.qmp.wait_event(&[name], EXIT_LIMIT);
    let access = next("GUESTMEMFD_PRIVATE_ACCESS")?.data;
    ensure!(
        access["id"] == "ram0" && access["offset"].is_u64() && access["size"].is_u64(),
        "the access was {access}"
    );
    let failed = next("GUESTMEMFD_CONVERSION_FAILED")?.data;
    let error = failed["error"].as_str().unwrap_or_default();
    ensure!(
        failed["id"] == "ram0"
            && failed["to"] == "private"
            && failed["size"] == 4096
            && error.contains("the host has used them"),
        "the conversion was {failed}"
    );
    Ok(())
}

/// With a gdbstub at a socket.
fn with_gdb(vm: Vm, dir: &TempDir) -> Vm {
    vm.with_arguments(&format!(
        "-chardev socket,id=gdb,path={},server=on,wait=off -gdb chardev:gdb",
        dir.path().join(GDB).display()
    ))
}

/// The guest that gives private memory to devices, with a disk.
fn device_vm(context: &Context, dir: &TempDir, properties: &str) -> Result<Vm> {
    let image = dir.path().join("image");
    fs::write(&image, mapped_devices::disk_content())?;
    let vm = Vm::conformance(&context.files, Scenario::Device, false, SIZE, 1);
    let disk = mapped_devices::virtio_blk(&image);
    let vm = guests::with_properties(vm, properties);
    Ok(vm
        .with_arguments(&disk)
        .with_arguments(mapped_devices::SILENT_SOUND))
}

/// A vCPU waits for a buffer that will not be unpinned. The reset takes it out of its wait, unpins the
/// buffer, and the guest begins anew.
fn reset_while_waiting(context: &Context, machine: &str) -> Result<()> {
    let dir = TempDir::new()?;
    let mut vm = device_vm(context, &dir, "convert-timeout=3600000")?;
    vm.machine.push_str(machine);
    let mut qemu = context.start(&vm)?;
    for _ in 0..2 {
        waiting(&mut qemu)?;
        guest::reset(&mut qemu)?;
        let backend = query::backend(&mut qemu.qmp)?;
        ensure!(
            backend.pinned_bytes == 0,
            "pinned after a reset: {backend:?}"
        );
        qemu.alive()?;
    }
    qemu.quit()?;
    Ok(())
}

/// Lets the guest run until it waits, and goes on doing so.
fn waiting(qemu: &mut Qemu) -> Result<()> {
    let mut before = query::backend(&mut qemu.qmp)?;
    let waits = before.waits;
    qemu.qmp.run("cont", json!({}))?;
    let deadline = Instant::now() + GUEST_LIMIT;
    loop {
        let backend = query::backend(&mut qemu.qmp)?;
        if backend.waits > waits && backend == before {
            return Ok(());
        }
        before = backend.clone();
        let status = guest::status(qemu)?;
        ensure!(
            status == "running" && Instant::now() < deadline,
            "no conversion waits, the guest is {status}: {backend:?}"
        );
        thread::sleep(Duration::from_millis(500));
    }
}

/// `xp` and `x`, for which the guest maps all memory at its physical address; `gpa2hva` and `gpa2hpa`.
fn monitor(qemu: &mut Qemu, pages: &Pages) -> Result<()> {
    let first = u64::from_le_bytes(pages.pattern[..8].try_into()?);
    for command in ["xp", "x"] {
        let mut look = |address: u64| -> Result<String> {
            guest::monitor(qemu, &format!("{command} /gx {address:#x}"))
        };
        let private = look(pages.private)?;
        ensure!(
            private.contains("Cannot access memory"),
            "{command} of a private page: {private}"
        );
        let shared = look(pages.shared)?;
        ensure!(
            shared.ends_with(&format!("{first:#018x}")),
            "{command} of a shared page: {shared}, not {first:#018x}"
        );
    }
    for command in ["gpa2hva", "gpa2hpa"] {
        let mut find = |address: u64| guest::monitor(qemu, &format!("{command} {address:#x}"));
        let (private, shared) = (find(pages.private)?, find(pages.shared)?);
        ensure!(
            private.contains("not accessible to the host") && shared.contains(") is 0x"),
            "{command} of a private page: {private}, of a shared one: {shared}"
        );
    }
    Ok(())
}

/// The host does not take samples, and knows that KVM logs nothing.
fn dirty_rate(qemu: &mut Qemu) -> Result<()> {
    for mode in ["page-sampling", "dirty-bitmap"] {
        let arguments = json!({"calc-time": 1, "mode": mode});
        let answer = qemu.qmp.raw("calc-dirty-rate", arguments)?;
        let why = answer.err().context("it is not refused")?.desc;
        ensure!(why.contains("private to the guest"), "{mode}: {why}");
    }
    Ok(())
}

/// `pmemsave` and `memsave`.
fn save(qemu: &mut Qemu, dir: &Path, pages: &Pages) -> Result<()> {
    let file = dir.join("memory");
    for command in ["pmemsave", "memsave"] {
        let mut save = |address: u64| {
            let arguments = json!({"val": address, "size": LENGTH, "filename": file});
            qemu.qmp.raw(command, arguments)
        };
        let private = save(pages.private)?;
        ensure!(private.is_err(), "{command} of a private page succeeds");
        let shared = save(pages.shared)?;
        ensure!(shared.is_ok(), "{command} of a shared page: {shared:?}");
        ensure!(
            fs::read(&file)? == pages.pattern[..LENGTH as usize],
            "{command} saves something else than is there"
        );
    }
    Ok(())
}

/// Reads and writes as gdb does: `m` and `M` packets of its remote protocol.
fn debugger(socket: &Path, pages: &Pages) -> Result<()> {
    let mut gdb = UnixStream::connect(socket)?;
    gdb.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut ask = |packet: String| -> Result<String> {
        let sum = packet.bytes().fold(0_u8, u8::wrapping_add);
        gdb.write_all(format!("+${packet}#{sum:02x}").as_bytes())?;
        let mut answer = Vec::new();
        // An answer ends in # and two digits.
        while answer.iter().rev().nth(2) != Some(&b'#') {
            let mut byte = [0];
            gdb.read_exact(&mut byte)?;
            answer.push(byte[0]);
        }
        let text = String::from_utf8_lossy(&answer);
        let text = text.trim_start_matches('+').trim_start_matches('$');
        Ok(text[..text.len() - 3].to_owned())
    };
    let private = pages.private;
    for packet in [format!("m{private:x},8"), format!("M{private:x},2:abcd")] {
        let answer = ask(packet.clone())?;
        ensure!(answer.starts_with('E'), "{packet}: {answer}");
    }
    let hex: String = pages.pattern[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let answer = ask(format!("m{:x},8", pages.shared))?;
    ensure!(answer == hex, "a shared page: {answer}, not {hex}");
    // Leaves the guest as it is, paused.
    Ok(())
}

/// The private page is listed, and not among what is dumped.
fn dump(qemu: &mut Qemu, dir: &Path, pages: &Pages) -> Result<()> {
    let dump = Elf::of(qemu, dir)?;
    ensure!(
        dump.from(pages.private).is_none(),
        "the dump has the private page"
    );
    let shared = dump.from(pages.shared);
    let shared = shared.context("the dump lacks the shared page")?;
    ensure!(
        shared.get(..64) == pages.pattern.get(..64),
        "the dump has something else than the shared page holds"
    );
    ensure!(
        dump.listed().contains(&pages.private),
        "the dump does not list the private page"
    );
    Ok(())
}

/// Refused by every way there is, with the reason.
fn migration(qemu: &mut Qemu, dir: &Path) -> Result<()> {
    let uri = format!("file:{}", dir.join("state").display());
    let refusal = qemu.qmp.raw("migrate", json!({"uri": uri}))?;
    let migrate = refusal.err().context("it is not refused")?.desc;
    mapped_migration::image(qemu, &dir.join("disk.qcow2"))?;
    let snapshot = mapped_migration::snapshot_job(qemu, "snapshot-save")?;
    for (way, why) in [
        ("migrate", migrate),
        ("snapshot-save", snapshot.unwrap_or_default()),
        ("savevm", guest::monitor(qemu, "savevm snap0")?),
    ] {
        ensure!(why.contains("private"), "{way}: no reason in {why:?}");
    }
    Ok(())
}
