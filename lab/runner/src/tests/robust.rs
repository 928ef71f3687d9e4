// SPDX-License-Identifier: GPL-2.0-or-later
//! Several at once, killed in the middle, reset, started again.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use serde_json::json;

use super::{Context, GUEST_LIMIT, Test, freed, guests};
use crate::guest;
use crate::memory::System;
use crate::probe::Need;
use crate::qemu::{EXIT_LIMIT, Qemu};
use crate::query;
use crate::vm::{Scenario, Vm};

pub(super) fn tests() -> Vec<Test> {
    let private = &[Need::PrivateMemory];
    vec![
        Test::new("robust/two-guests", private, two_guests),
        Test::new("robust/killed", &[Need::PrivateMemory, Need::Root], killed),
        Test::new("robust/reset-while-paused", private, reset_while_paused),
        Test::new("robust/again-after-reset", private, again_after_reset),
        Test::new(
            "robust/again-with-new-vm-file",
            private,
            again_with_new_vm_file,
        ),
    ]
}

fn hypercalls(context: &Context) -> Vm {
    guests::guest_vm(context, Scenario::Hypercall, 1)
}

/// Both must be content, and each QEMU count its own guest only.
fn two_guests(context: &Context) -> Result<()> {
    let vm = hypercalls(context);
    let mut first = context.start_as("first", &vm)?;
    let mut second = context.start_as("second", &vm)?;
    first.qmp.run("cont", json!({}))?;
    guest::run(&mut second, GUEST_LIMIT)?;
    let event = first.qmp.wait_event(&["SHUTDOWN", "RESET"], GUEST_LIMIT)?;
    if event.name == "RESET" {
        bail!("the first guest was reset, by itself or by a triple fault");
    }
    let mut counts = Vec::new();
    for qemu in [&mut first, &mut second] {
        let backend = query::backend(&mut qemu.qmp)?;
        let tap = guest::finish(qemu)?;
        if let Some(said) = tap.note("hypercalls") {
            ensure!(
                said == backend.hypercalls,
                "{said} hypercalls, {} counted",
                backend.hypercalls
            );
        }
        counts.push(backend.hypercalls);
    }
    ensure!(
        counts[0] > 0 && counts[0] == counts[1],
        "hypercalls of equal guests: {counts:?}"
    );
    Ok(())
}

/// SIGKILL while the guest converts: nothing of its memory stays.
fn killed(context: &Context) -> Result<()> {
    let before = System::read()?;
    let mut qemu = context.start(&hypercalls(context))?;
    qemu.qmp.run("cont", json!({}))?;
    converting(&mut qemu)?;
    let with = System::read()?;
    qemu.kill()?;
    // What a dead process had is given back in the background.
    let deadline = Instant::now() + EXIT_LIMIT;
    loop {
        let after = System::read()?;
        let grown = [
            ("page cache", before.files, after.files, 8 << 20),
            ("shared memory", before.shmem, after.shmem, 1 << 20),
            (
                "anonymous memory",
                before.anonymous,
                after.anonymous,
                4 << 20,
            ),
        ]
        .into_iter()
        .find(|(_, before, after, noise)| *after > before + noise);
        match grown {
            None => {
                println!("# before {before:?}, with QEMU {with:?}, after {after:?}");
                return Ok(());
            }
            Some((what, before, after, _)) if Instant::now() >= deadline => {
                bail!("{what}: {before} bytes before, {after} after");
            }
            Some(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn converting(qemu: &mut Qemu) -> Result<()> {
    let deadline = Instant::now() + GUEST_LIMIT;
    while Instant::now() < deadline {
        if query::backend(&mut qemu.qmp)?.conversions_to_private > 0 {
            return Ok(());
        }
    }
    bail!("the guest converts nothing")
}

fn reset_while_paused(context: &Context) -> Result<()> {
    let mut qemu = context.start(&hypercalls(context))?;
    for _ in 0..3 {
        guest::reset(&mut qemu)?;
        query::backend(&mut qemu.qmp)?;
    }
    guest::run(&mut qemu, GUEST_LIMIT)?;
    guest::finish(&mut qemu)?;
    Ok(())
}

/// After its end the guest is reset and finds everything as at the first start.
fn again_after_reset(context: &Context) -> Result<()> {
    runs_twice(context, &hypercalls(context))
}

/// The same where the reset replaces the VM's file descriptor, as it does for confidential guests
/// whose launch is measured: the private file belongs to the old one.
fn again_with_new_vm_file(context: &Context) -> Result<()> {
    let mut vm = hypercalls(context);
    vm.machine.push_str(",x-change-vmfd-on-reset=on");
    runs_twice(context, &vm)
}

fn runs_twice(context: &Context, vm: &Vm) -> Result<()> {
    let mut qemu = context.start(vm)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let first = query::backend(&mut qemu.qmp)?;
    guest::wait_line(&qemu, "1..", EXIT_LIMIT)?;

    guest::reset(&mut qemu)?;
    guest::run_again(&mut qemu, GUEST_LIMIT)?;
    let second = query::backend(&mut qemu.qmp)?;
    freed::files_match(&second, qemu.pid())?;
    ensure!(
        second.private_bytes == first.private_bytes,
        "private bytes: {} after the first run, {} after the second",
        first.private_bytes,
        second.private_bytes
    );
    // The second report is the rest of the port's output.
    guest::finish(&mut qemu)?;
    Ok(())
}
