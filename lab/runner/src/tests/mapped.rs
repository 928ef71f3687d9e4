// SPDX-License-Identifier: GPL-2.0-or-later
//! Ordinary guests on one guest_memfd that the host maps: boot, reset, population, placement.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{Context, GUEST_LIMIT, SIZE, Test};
use crate::guest;
use crate::memory::{self, Kind};
use crate::probe::Need;
use crate::qemu::{EXIT_LIMIT, Qemu};
use crate::query;
use crate::vm::{Scenario, Size, Vm};

/// Ways to give KVM the memory.
pub(super) const BINDS: [&str; 2] = ["off", "on"];

const MAPPED: &[Need] = &[Need::MappedMemory];
const COUNTED: &[Need] = &[Need::MappedMemory, Need::PageCounts];

pub(super) fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for bind in BINDS {
        for smp in [1, 4] {
            let name = format!("mapped/idle-{smp}-bind-{bind}");
            let run = move |context: &Context| idle(context, bind, smp);
            tests.push(Test::new(name, COUNTED, run));
        }
        let name = format!("mapped/memory-above-4g-bind-{bind}");
        let run = move |context: &Context| above_4g(context, bind);
        tests.push(Test::new(name, MAPPED, run));
        let name = format!("mapped/slots-bind-{bind}");
        let run = move |context: &Context| slots(context, bind);
        tests.push(Test::new(name, MAPPED, run));
        let name = format!("mapped/reset-bind-{bind}");
        let run = move |context: &Context| again_after_reset(context, bind, "");
        tests.push(Test::new(name, MAPPED, run));
    }
    let new_vm = ",x-change-vmfd-on-reset=on";
    tests.extend([
        Test::new("mapped/reset-with-new-vm-file", MAPPED, move |context| {
            again_after_reset(context, "off", new_vm)
        }),
        Test::new("mapped/demanded", MAPPED, demanded),
        Test::new("mapped/prealloc", COUNTED, prealloc),
        Test::new("mapped/prealloc-with-context", COUNTED, with_context),
        Test::new("mapped/prealloc-later", COUNTED, prealloc_later),
        Test::new(
            "mapped/numa-policy",
            &[Need::MappedMemory, Need::NumaPolicy],
            policy,
        ),
        Test::new(
            "mapped/numa-policy-ignored",
            &[Need::MappedMemory, Need::NoNumaPolicy],
            policy_ignored,
        ),
    ]);
    tests
}

/// A guest on the backend in an ordinary VM.
pub(super) fn guest_vm(context: &Context, scenario: Scenario, bind: &str) -> Vm {
    Vm::ordinary_guest(&context.files, scenario, SIZE)
        .with_backend_properties(&format!("bind={bind}"))
}

/// Its memory is one guest_memfd, all of it shared, and nothing was converted.
fn is_mapped(qemu: &mut Qemu) -> Result<()> {
    let backend = query::backend(&mut qemu.qmp)?;
    ensure!(
        backend.mode == "mapped" && backend.shared_bytes == backend.size,
        "not all of it is mapped: {backend:?}"
    );
    ensure!(
        (backend.hypercalls, backend.conversions_to_private) == (0, 0),
        "something was converted: {backend:?}"
    );
    let files = memory::backings(qemu.pid())?;
    let found: Vec<_> = files.iter().map(|file| (file.kind, file.size)).collect();
    ensure!(
        found == [(Kind::GuestMemfd, backend.size)],
        "one guest_memfd expected, found {files:?}"
    );
    Ok(())
}

fn idle(context: &Context, bind: &str, smp: u32) -> Result<()> {
    let mut vm = guest_vm(context, Scenario::Idle, bind);
    vm.smp = smp;
    let mut qemu = context.start(&vm)?;
    is_mapped(&mut qemu)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    is_mapped(&mut qemu)?;
    // Firmware and guest have used it.
    let used = allocated(&qemu)?;
    ensure!(
        (1 << 20..SIZE.0).contains(&used),
        "{used} bytes are allocated"
    );
    guest::finish(&mut qemu)?;
    Ok(())
}

/// Which slots carry the file, as QEMU's trace has it: with `bind=on` those of RAM, but for read-only ones and
/// second appearances; without it none.
fn slots(context: &Context, bind: &str) -> Result<()> {
    const READ_ONLY: u64 = 1 << 1;
    let vm = guest_vm(context, Scenario::Idle, bind).with_arguments("-trace kvm_set_user_memory");
    let mut qemu = context.start(&vm)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    guest::finish(&mut qemu)?;
    let trace = fs::read_to_string(context.log.join("qemu/stderr"))?;
    let mut bound = 0;
    for line in trace.lines().filter(|line| line.contains("Slot#")) {
        let value = |name: &str| {
            let mut words = line.split_whitespace();
            let word = words.find_map(|word| word.strip_prefix(name));
            word.with_context(|| format!("no {name} in {line}"))
        };
        let number = |name| -> Result<u64> {
            let digits = value(name)?.trim_start_matches("0x");
            Ok(u64::from_str_radix(digits, 16)?)
        };
        let has_file = value("guest_memfd=")? != "-1";
        ensure!(
            !has_file || number("flags=")? & READ_ONLY == 0,
            "a read-only slot carries the file: {line}"
        );
        if has_file {
            bound = bound.max(number("size=")?);
        }
    }
    let expected = bind == "on";
    ensure!(
        (bound >= SIZE.0 / 2) == expected && (bound > 0) == expected,
        "the largest slot with the file has {bound} bytes"
    );
    Ok(())
}

/// RAM in two pieces, and a page written in each.
fn above_4g(context: &Context, bind: &str) -> Result<()> {
    let vm = Vm::ordinary_guest(&context.files, Scenario::Dirty, Size(512 << 20))
        .with_backend_properties(&format!("bind={bind}"))
        .with_arguments("-fw_cfg name=opt/guestmemfd/stop,string=1");
    let mut qemu = context.start(&vm)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    is_mapped(&mut qemu)?;
    let tap = guest::finish(&mut qemu)?;
    ensure!(
        tap.verdict()? == 2,
        "the guest did not write to both pieces of its memory"
    );
    Ok(())
}

fn again_after_reset(context: &Context, bind: &str, machine: &str) -> Result<()> {
    let mut vm = guest_vm(context, Scenario::Idle, bind);
    vm.machine.push_str(machine);
    let mut qemu = context.start(&vm)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    guest::wait_line(&qemu, "1..", EXIT_LIMIT)?;
    guest::reset(&mut qemu)?;
    guest::run_again(&mut qemu, GUEST_LIMIT)?;
    is_mapped(&mut qemu)?;
    guest::finish(&mut qemu)?;
    Ok(())
}

fn demanded(context: &Context) -> Result<()> {
    let vm = Vm::ordinary(SIZE).with_backend_properties("mode=mapped");
    is_mapped(&mut *context.start(&vm)?)
}

fn allocated(qemu: &Qemu) -> Result<u64> {
    let files = memory::backings(qemu.pid())?;
    memory::allocated(&files, Kind::GuestMemfd).context("guest_memfd not counted")
}

fn populated(context: &Context, vm: &Vm) -> Result<()> {
    let mut qemu = context.start(vm)?;
    let used = allocated(&qemu)?;
    ensure!(used == SIZE.0, "{used} bytes are allocated, not all");
    qemu.alive()
}

fn prealloc(context: &Context) -> Result<()> {
    let vm = Vm::ordinary(SIZE).with_backend_properties("prealloc=on,prealloc-threads=3");
    populated(context, &vm)
}

fn with_context(context: &Context) -> Result<()> {
    let vm = Vm::ordinary(SIZE)
        .with_backend_properties("prealloc=on,prealloc-threads=2,prealloc-context=tc0")
        .with_arguments("-object thread-context,id=tc0,cpu-affinity=0");
    populated(context, &vm)
}

fn prealloc_later(context: &Context) -> Result<()> {
    let mut qemu = context.start(&Vm::ordinary(SIZE))?;
    let before = allocated(&qemu)?;
    ensure!(before < SIZE.0, "all is allocated from the start");
    let arguments = json!({"path": "/objects/ram0", "property": "prealloc", "value": true});
    qemu.qmp.run("qom-set", arguments)?;
    let after = allocated(&qemu)?;
    ensure!(after == SIZE.0, "{after} bytes are allocated, not all");
    Ok(())
}

/// All pages lie on the node that was asked for, whoever touches them.
fn policy(context: &Context) -> Result<()> {
    for node in [0, 1] {
        let properties = format!("prealloc=on,host-nodes={node},policy=bind");
        let vm = Vm::ordinary(SIZE).with_backend_properties(&properties);
        let mut qemu = context.start_as(&format!("node{node}"), &vm)?;
        let pages = memory::guest_memfd_nodes(qemu.pid())?;
        ensure!(
            pages == [(node, SIZE.0 / 4096)],
            "node {node} was asked for; pages by node: {pages:?}"
        );
        qemu.alive()?;
    }
    Ok(())
}

fn policy_ignored(context: &Context) -> Result<()> {
    let vm = Vm::ordinary(SIZE).with_backend_properties("host-nodes=0,policy=bind");
    let mut qemu = context.start(&vm)?;
    let ended = qemu.quit()?;
    ensure!(
        ended.stderr.contains("policy=bind has no effect") && ended.stderr.contains("7.1"),
        "no warning that names the version: {:?}",
        ended.stderr
    );
    Ok(())
}
