// SPDX-License-Identifier: GPL-2.0-or-later
//! DIMMs of guests with private memory that come, go, and come again.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{Context, GUEST_LIMIT, SIZE, Test, guests};
use crate::failslab::Failures;
use crate::guest;
use crate::probe::Need;
use crate::qemu::{EXIT_LIMIT, Qemu};
use crate::query;
use crate::vm::{BACKEND, Scenario, Vm};

const DIMM: u64 = 64 << 20;
/// Where it is, and where it comes back.
const AT: u64 = 8 << 30;
const ELSEWHERE: u64 = 12 << 30;

pub(super) fn tests() -> Vec<Test> {
    let failing = &[Need::TwoFiles, Need::Failslab, Need::Root];
    vec![
        Test::new("hotplug/no-memory", failing, no_memory),
        Test::new("hotplug/upstream-cpr", &[Need::TwoFiles], upstream_cpr),
    ]
}

/// A guest that uses a DIMM which the firmware knows nothing of.
fn vm(context: &Context) -> Vm {
    guests::guest_vm(context, Scenario::Hypercall, 1)
        .with_words(&format!("dimm={AT:#x}+{DIMM}"))
        .with_arguments("-m 256M,slots=2,maxmem=16G")
}

fn add(qemu: &mut Qemu, kind: &str) -> Result<()> {
    let object = json!({"qom-type": kind, "id": "extra", "size": DIMM});
    qemu.qmp.run("object-add", object)?;
    Ok(())
}

fn plug(qemu: &mut Qemu, address: u64) -> Result<()> {
    let device = json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "extra", "addr": address,
                        "slot": 0});
    qemu.qmp.run("device_add", device)?;
    Ok(())
}

/// Takes it away, as the guest's ACPI code does (QEMU's docs/specs/acpi_mem_hotplug.rst).
fn eject(qemu: &mut Qemu) -> Result<()> {
    for command in ["o /w 0xa00 0", "o /b 0xa14 8"] {
        let said = guest::monitor(qemu, command)?;
        ensure!(said.is_empty(), "{command}: {said}");
    }
    qemu.qmp.wait_event(&["DEVICE_DELETED"], EXIT_LIMIT)?;
    Ok(())
}

/// A DIMM that was private in part comes back elsewhere, and the kernel has no memory for its
/// attributes there. It needs none: what was private of it has been freed.
fn no_memory(context: &Context) -> Result<()> {
    let mut qemu = context.start(&vm(context))?;
    add(&mut qemu, BACKEND)?;
    plug(&mut qemu, AT)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let private = extra(&mut qemu)?;
    ensure!(private > 0, "nothing of the DIMM is private");
    eject(&mut qemu)?;
    let failures = Failures::on(100)?;
    let result = plug(&mut qemu, ELSEWHERE);
    drop(failures);
    result.context("without memory of the kernel's")?;
    let left = extra(&mut qemu)?;
    println!("# {private} bytes of it were private, {left} are");
    ensure!(left == 0, "{left} bytes of it are private");
    qemu.alive()?;
    for backend in query::backends(&mut qemu.qmp)? {
        guests::settled(&backend)?;
    }
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

/// Bytes of the DIMM that are private.
fn extra(qemu: &mut Qemu) -> Result<u64> {
    let backends = query::backends(&mut qemu.qmp)?;
    let extra = backends.iter().find(|backend| backend.id == "extra");
    Ok(extra.context("the DIMM's backend is gone")?.private_bytes)
}

/// On QEMU's own path, a DIMM that comes back keeps QEMU from being replaced by one that would find
/// its private memory gone.
fn upstream_cpr(context: &Context) -> Result<()> {
    let mut vm = Vm::protected(SIZE)
        .with_backend(&format!("memory-backend-memfd,id=ram0,size={}", SIZE.0))
        .with_arguments("-m 256M,slots=2,maxmem=16G");
    vm.machine.push_str(",aux-ram-share=on");
    let mut qemu = context.start(&vm)?;
    let mode = json!({"mode": "cpr-transfer"});
    qemu.qmp.run("migrate-set-parameters", mode)?;
    add(&mut qemu, "memory-backend-memfd")?;
    for _ in 0..2 {
        plug(&mut qemu, AT)?;
        is_blocked(&mut qemu)?;
        eject(&mut qemu)?;
    }
    qemu.quit()?;
    Ok(())
}

/// The DIMM's memory is among the reasons why QEMU cannot be replaced.
fn is_blocked(qemu: &mut Qemu) -> Result<()> {
    let answer = qemu.qmp.run("query-migrate", json!({}))?;
    let reasons = answer["blocked-reasons"].as_array();
    let reasons = reasons.context("nothing blocks a migration")?;
    let mut texts = reasons.iter().filter_map(|reason| reason.as_str());
    ensure!(
        texts.any(|text| text.contains("extra") && text.contains("CPR")),
        "the DIMM's memory is not among {reasons:?}"
    );
    Ok(())
}
