// SPDX-License-Identifier: GPL-2.0-or-later
//! What devices keep mapped for as long as they run does not keep a guest from leaving: its pages
//! become private at once. And what a guest gets while a request waits for something else.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tempfile::TempDir;

use super::{Context, GUEST_LIMIT, SIZE, Test, guests, mapped_devices};
use crate::guest;
use crate::probe::Need;
use crate::qemu::Qemu;
use crate::query;
use crate::tap::Tap;
use crate::vm::{Scenario, Vm};

/// How long a request may take, in milliseconds.
const AT_ONCE: u64 = 100;

/// What the guest tests.
const TESTS: u64 = 8;

pub(super) fn tests() -> Vec<Test> {
    let private = &[Need::PrivateMemory];
    vec![
        Test::new("host/kept", private, |context| kept(context, "")),
        Test::new("host/kept-iothread", private, |context| {
            kept(context, ",iothread=io0")
        }),
        Test::new("host/upstream-kept", &[Need::TwoFiles], upstream),
        Test::new("host/interrupted-while-waiting", private, |context| {
            interrupted(context, "")
        }),
        Test::new(
            "host/interrupted-while-waiting-irqchip-split",
            private,
            |context| interrupted(context, ",kernel-irqchip=split"),
        ),
        Test::new("host/kicked-while-waiting", private, kicked),
    ]
}

/// The guest with a disk of several queues, and what else keeps memory mapped. The AHCI controller is
/// the machine's own.
fn vm(context: &Context, dir: &TempDir, disk: &str) -> Result<Vm> {
    let image = dir.path().join("image");
    fs::write(&image, mapped_devices::disk_content())?;
    let vm = Vm::conformance(&context.files, Scenario::Kept, false, SIZE, 1);
    let vm = vm.with_arguments("-object iothread,id=io0");
    let queues = "num-queues=4,queue-size=256,packed=on";
    let arguments = format!("{},{queues}{disk}", mapped_devices::virtio_blk(&image));
    Ok(vm
        .with_arguments(&arguments)
        .with_arguments("-device megasas -device ramfb -device virtio-gpu-pci"))
}

fn kept(context: &Context, disk: &str) -> Result<()> {
    let dir = TempDir::new()?;
    let mut qemu = context.start(&vm(context, &dir, disk)?)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    println!("# {backend:?}");
    guests::settled(&backend)?;
    ensure!(
        backend.refused == 0 && backend.pinned_bytes == 0,
        "a request was refused, or something is still pinned: {backend:?}"
    );
    in_time(&guest::finish(&mut qemu)?)
}

/// The same on QEMU's own path, whose memory is an ordinary backend.
fn upstream(context: &Context) -> Result<()> {
    let dir = TempDir::new()?;
    let backend = format!("memory-backend-memfd,id=ram0,size={}", SIZE.0);
    let mut qemu = context.start(&vm(context, &dir, "")?.with_backend(&backend))?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    in_time(&guest::finish(&mut qemu)?)
}

fn in_time(tap: &Tap) -> Result<()> {
    ensure!(tap.verdict()? == TESTS, "the guest has left something out");
    let longest = tap.note("longest-milliseconds");
    let longest = longest.context("the guest does not say how long it took")?;
    println!("# the longest request took {longest} ms");
    ensure!(
        longest <= AT_ONCE,
        "it takes {longest} ms to make private what a device has mapped"
    );
    Ok(())
}

/// A vCPU that is wanted elsewhere over and over, more often than its wait may last, gets its answer
/// in time all the same.
fn kicked(context: &Context) -> Result<()> {
    let mut qemu = context.start(&waiting_vm(context, "", 1000))?;
    kick_until_answered(&mut qemu)?;
    qemu.quit()?;
    Ok(())
}

/// Runs a guest up to the answer to its request.
fn kick_until_answered(qemu: &mut Qemu) -> Result<()> {
    const KICKS: Duration = Duration::from_millis(100);
    /// The wait is a few seconds long at most; the machine may be busy.
    const LIMIT: Duration = Duration::from_secs(20);
    qemu.qmp.run("cont", json!({}))?;
    guest::wait_line(qemu, "# waiting: begins", GUEST_LIMIT)?;
    let start = Instant::now();
    loop {
        // For its registers a vCPU has to leave what it does.
        guest::monitor(qemu, "info registers -a")?;
        match qemu.serial_line(KICKS) {
            Some(line) if line == "# waiting: answered" => break,
            _ => {}
        }
        ensure!(start.elapsed() < LIMIT, "the guest gets no answer");
    }
    let backend = query::backend(&mut qemu.qmp)?;
    println!("# answered after {:?}: {backend:?}", start.elapsed());
    ensure!(
        backend.waits > 4,
        "the request was not kicked out of its wait: {backend:?}"
    );
    Ok(())
}

/// A guest with two CPUs, of which one waits for so many milliseconds.
fn waiting_vm(context: &Context, machine: &str, timeout: u32) -> Vm {
    let mut vm = Vm::conformance(&context.files, Scenario::Waiting, false, SIZE, 2);
    vm.machine.push_str(machine);
    let properties = format!("lazy-attributes=off,convert-timeout={timeout}");
    guests::with_properties(vm, &properties).with_arguments(mapped_devices::SILENT_SOUND)
}

/// Interrupts that come while a request waits all arrive, also where QEMU injects them.
fn interrupted(context: &Context, machine: &str) -> Result<()> {
    let mut qemu = context.start(&waiting_vm(context, machine, 3000))?;
    kick_until_answered(&mut qemu)?;
    qemu.qmp.wait_event(&["SHUTDOWN"], GUEST_LIMIT)?;
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}
