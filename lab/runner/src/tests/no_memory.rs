// SPDX-License-Identifier: GPL-2.0-or-later
//! Conversions while the kernel has no more memory for QEMU.
//!
//! A memory cgroup is full. Linux 7.2 charges the entries in which it keeps attributes to no cgroup, so
//! requests may be granted all the same; what is said here holds for kernels that refuse too: the
//! guest gets an error number and goes on, and both sides agree on what is private.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{Context, GUEST_LIMIT, Test, guests};
use crate::cgroup::Group;
use crate::guest;
use crate::probe::Need;
use crate::query;
use crate::tap::Tap;
use crate::vm::{Scenario, Size, Vm};

/// The attributes of so much need some megabytes.
const SIZE: Size = Size(2 << 30);

/// What a request of the guest converts.
const REQUEST: u64 = 2 << 20;

/// What QEMU may still get after the limit is set.
const ROOM: u64 = 64 << 10;

pub(super) fn tests() -> Vec<Test> {
    let needs = &[Need::PrivateMemory, Need::Root];
    vec![Test::new("no-memory/conversions", needs, conversions)]
}

fn conversions(context: &Context) -> Result<()> {
    let group = Group::new("conversions")?;
    let vm = Vm::conformance(&context.files, Scenario::Sweep, false, SIZE, 2);
    let mut qemu = {
        let _inside = group.enter()?;
        context.start(&vm)?
    };
    // What finds no memory must fail, and nobody be killed for it.
    let path = format!("/proc/{}/oom_score_adj", qemu.pid());
    fs::write(&path, "-1000").with_context(|| format!("cannot write {path}"))?;

    qemu.qmp.run("cont", json!({}))?;
    guest::wait_line(&qemu, "# sweep: begins", GUEST_LIMIT)?;
    qemu.qmp.run("stop", json!({}))?;
    group.limit(Some(group.current()? + ROOM))?;
    qemu.qmp.run("cont", json!({}))?;
    let mut tap = Tap::default();
    tap.line(&guest::wait_line(&qemu, "# sweep: granted", GUEST_LIMIT)?);
    qemu.qmp.run("stop", json!({}))?;

    let said = |name| {
        tap.note(name)
            .context("the guest does not say what it was told")
    };
    let (granted, denied) = (said("granted")?, said("denied")?);
    let backend = query::backend(&mut qemu.qmp)?;
    println!(
        "# granted {granted}, denied {denied}, limit met {} times; {backend:?}",
        group.value("memory.events", "max")?
    );
    ensure!(
        granted + denied >= 512,
        "{granted} requests granted, {denied} denied: too few"
    );
    ensure!(
        backend.private_bytes == granted * REQUEST && backend.refused == denied,
        "{granted} requests granted, {denied} denied: {backend:?}"
    );

    group.limit(None)?;
    qemu.qmp.run("cont", json!({}))?;
    qemu.qmp.wait_event(&["SHUTDOWN"], GUEST_LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    guests::settled(&backend)?;
    ensure!(
        backend.conversions_to_private == granted + denied && backend.private_bytes == 0,
        "all {} requests must have been granted in the end: {backend:?}",
        granted + denied
    );
    guest::finish(&mut qemu)?;
    Ok(())
}
