// SPDX-License-Identifier: GPL-2.0-or-later
//! Guests whose memory lies on several backends, some of which come and go.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{Context, GUEST_LIMIT, SIZE, Test, freed, guests};
use crate::guest;
use crate::probe::{self, Need};
use crate::qemu::{EXIT_LIMIT, Qemu};
use crate::query::{self, Backend};
use crate::strict::Strict;
use crate::vm::{BACKEND, Scenario, Vm};

/// Where a DIMM lies, and its size.
const AT: u64 = 8 << 30;
const DIMM: u64 = 64 << 20;

/// Bytes of the first NUMA node: it ends inside the test memory of the guest's first CPU, so that
/// requests span both nodes.
const FIRST_NODE: u64 = 36 << 20;

/// Registers of ACPI memory hotplug on q35: the slot, and what to do with it. The conformance guest
/// has no ACPI, so the monitor writes what it would.
const SLOT: u16 = 0xa00;
const CONTROL: u16 = 0xa14;
const EJECT: u8 = 1 << 3;

pub(super) fn tests() -> Vec<Test> {
    let strict = &[Need::PrivateMemory, Need::StrictMode];
    vec![
        Test::new("several/numa-nodes", strict, numa),
        Test::new("several/dimm", strict, dimm),
        Test::new("several/other-backend", &[Need::TwoFiles], other),
        Test::new("several/dimms-come-and-go", strict, |context| {
            come_and_go(context, &hotplug_vm(context, Scenario::Storm), |_| Ok(()))
        }),
        Test::new("several/dimm-goes-in-use", strict, |context| {
            let words = format!("{} count=40000", dimm_word());
            let vm = hotplug_vm(context, Scenario::Hostile).with_words(&words);
            come_and_go(context, &vm, until_converted)
        }),
    ]
}

/// Two nodes on two backends, and requests across them.
fn numa(context: &Context) -> Result<()> {
    let _strict = Strict::on()?;
    let second = SIZE.0 - FIRST_NODE;
    let mut vm = Vm::conformance(&context.files, Scenario::Storm, true, SIZE, 2);
    vm.backend = None;
    for (id, size) in [("ram0", FIRST_NODE), ("ram1", second)] {
        vm = vm.with_arguments(&format!(
            "-object {BACKEND},id={id},size={size} -numa node,memdev={id}"
        ));
    }
    let mut qemu = context.start(&vm)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backends = query::backends(&mut qemu.qmp)?;
    both_used(&backends, &qemu)?;
    // One request counts where it begins; what it converts counts where it lies.
    ensure!(
        backends.iter().all(|b| b.hypercalls > 0),
        "all requests begin in one node: {backends:?}"
    );
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

/// A DIMM that the guest converts like the rest of its memory.
fn dimm(context: &Context) -> Result<()> {
    let _strict = Strict::on()?;
    let vm = hotplug_vm(context, Scenario::Storm).with_words(&dimm_word());
    let mut qemu = context.start(&vm)?;
    plug(&mut qemu)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backends = query::backends(&mut qemu.qmp)?;
    both_used(&backends, &qemu)?;
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

/// A DIMM that QEMU converts itself, beside memory that the library converts.
fn other(context: &Context) -> Result<()> {
    let vm = Vm::conformance(&context.files, Scenario::Hypercall, false, SIZE, 2);
    let vm = taking_dimms(vm).with_words(&dimm_word());
    let mut qemu = context.start(&vm)?;
    plug_object(
        &mut qemu,
        json!({"qom-type": "memory-backend-memfd", "id": "extra", "size": DIMM}),
    )?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    println!("# {backend:?}");
    guests::settled(&backend)?;
    let tap = guest::finish(&mut qemu)?;
    tap.verdict()?;
    let pages = tap.note("to-private-pages");
    let pages = pages.context("the guest does not say what it converted")?;
    let library = backend.converted_to_private_bytes / 4096;
    ensure!(
        0 < library && library < pages,
        "the library converted {library} of {pages} pages"
    );
    Ok(())
}

/// DIMMs are added and removed while the guest converts other memory, or theirs.
fn come_and_go(
    context: &Context,
    vm: &Vm,
    plugged: impl Fn(&mut Qemu) -> Result<()>,
) -> Result<()> {
    let _strict = Strict::on()?;
    let mut qemu = context.start(vm)?;
    qemu.qmp.run("cont", json!({}))?;
    let mut rounds = 0;
    while guest::status(&mut qemu)? == "running" {
        plug(&mut qemu)?;
        plugged(&mut qemu)?;
        unplug(&mut qemu)?;
        rounds += 1;
    }
    println!("# {rounds} DIMMs");
    ensure!(rounds > 0, "the guest ended before there was a DIMM");
    let backend = query::backend(&mut qemu.qmp)?;
    guests::settled(&backend)?;
    freed::files_match(&backend, qemu.pid())?;
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

/// Waits until pages of the DIMM have been converted both ways, which a running guest must do.
fn until_converted(qemu: &mut Qemu) -> Result<()> {
    let deadline = Instant::now() + EXIT_LIMIT;
    while guest::status(qemu)? == "running" {
        let dimm = query::named(&mut qemu.qmp, "extra")?;
        if dimm.converted_to_private_bytes > 0 && dimm.converted_to_shared_bytes > 0 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "nothing is converted: {dimm:?}");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A guest in a machine that takes DIMMs.
fn hotplug_vm(context: &Context, scenario: Scenario) -> Vm {
    taking_dimms(Vm::conformance(&context.files, scenario, true, SIZE, 2))
}

fn taking_dimms(vm: Vm) -> Vm {
    vm.with_arguments("-m 256M,slots=2,maxmem=16G")
}

/// Tells the guest where the DIMM is.
fn dimm_word() -> String {
    format!("dimm={AT:#x}+{DIMM}")
}

fn plug(qemu: &mut Qemu) -> Result<()> {
    let mut object = json!({"qom-type": BACKEND, "id": "extra", "size": DIMM});
    if !probe::in_place() {
        // It has to end with its backend, also while others run.
        object["guard"] = json!("report");
    }
    plug_object(qemu, object)
}

fn plug_object(qemu: &mut Qemu, object: Value) -> Result<()> {
    qemu.qmp.run("object-add", object)?;
    let device = json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "extra", "addr": AT});
    qemu.qmp.run("device_add", device)?;
    Ok(())
}

fn unplug(qemu: &mut Qemu) -> Result<()> {
    qemu.qmp.run("device_del", json!({"id": "dimm0"}))?;
    for line in [
        format!("o/w {SLOT:#x} 0"),
        format!("o/b {CONTROL:#x} {EJECT:#x}"),
    ] {
        let arguments = json!({"command-line": line});
        let answer = qemu.qmp.run("human-monitor-command", arguments)?;
        ensure!(answer == "", "{line}: {answer}");
    }
    qemu.qmp.wait_event(&["DEVICE_DELETED"], EXIT_LIMIT)?;
    qemu.qmp.run("object-del", json!({"id": "extra"}))?;
    Ok(())
}

/// Have pages of both backends been converted both ways, and is the host's memory what their states
/// say?
fn both_used(backends: &[Backend], qemu: &Qemu) -> Result<()> {
    println!("# {backends:?}");
    ensure!(backends.len() == 2, "two backends expected: {backends:?}");
    for backend in backends {
        guests::settled(backend)?;
        ensure!(
            backend.converted_to_private_bytes > 0 && backend.converted_to_shared_bytes > 0,
            "nothing was converted in {}: {backends:?}",
            backend.id
        );
    }
    freed::all_files_match(backends, qemu.pid()).context("both backends together")
}
