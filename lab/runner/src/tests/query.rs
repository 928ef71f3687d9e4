// SPDX-License-Identifier: GPL-2.0-or-later
//! What QMP and HMP show of backends that do nothing.

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{Context, SIZE, Test};
use crate::memory::{self, Kind};
use crate::probe::Need;
use crate::query;
use crate::vm::Vm;

pub(super) fn tests() -> Vec<Test> {
    vec![
        Test::new("query/no-backend", &[], no_backend),
        Test::new("query/fresh-backend", &[Need::PrivateMemory], fresh_backend),
        Test::new("query/two-backends", &[Need::PrivateMemory], two_backends),
        Test::new("query/monitor", &[Need::PrivateMemory], monitor),
    ]
}

fn no_backend(context: &Context) -> Result<()> {
    let mut vm = Vm::ordinary(SIZE);
    vm.accel = "tcg";
    vm.backend = None;
    let mut qemu = context.start(&vm)?;
    let backends = query::backends(&mut qemu.qmp)?;
    ensure!(
        backends.is_empty(),
        "without a backend the answer is {backends:?}"
    );
    ensure!(qemu.quit()?.status.success(), "QEMU did not end well");
    Ok(())
}

fn fresh_backend(context: &Context) -> Result<()> {
    let mut qemu = context.start(&Vm::protected(SIZE))?;
    let backend = query::backend(&mut qemu.qmp)?;
    ensure!(backend.id == "ram0", "its id is {}", backend.id);
    ensure!(backend.mode == "private", "its mode is {}", backend.mode);
    ensure!(
        backend.discard == "now",
        "its discard is {}",
        backend.discard
    );
    ensure!(backend.size == SIZE.0, "its size is {}", backend.size);
    let private = [
        backend.private_bytes,
        backend.transition_bytes,
        backend.unpunched_bytes,
        backend.conversions_to_private,
        backend.conversions_to_shared,
        backend.hypercalls,
        backend.faults_private,
        backend.faults_shared,
    ];
    ensure!(
        private.iter().all(|n| *n == 0),
        "before the guest runs: {backend:?}"
    );

    let files = memory::backings(qemu.pid())?;
    for kind in [Kind::Memfd, Kind::GuestMemfd] {
        let sizes: Vec<u64> = files
            .iter()
            .filter(|f| f.kind == kind)
            .map(|f| f.size)
            .collect();
        ensure!(
            sizes == [SIZE.0],
            "one {kind:?} of {} bytes expected, found {sizes:?}",
            SIZE.0
        );
    }
    Ok(())
}

fn two_backends(context: &Context) -> Result<()> {
    let vm = Vm::protected(SIZE)
        .with_arguments("-object memory-backend-guestmemfd,id=spare,size=16M,discard=keep");
    let mut qemu = context.start(&vm)?;
    let backends = query::backends(&mut qemu.qmp)?;
    let find = |id: &str| backends.iter().find(|b| b.id == id);
    let ram = find("ram0").context("no ram0 in query-guestmemfd")?;
    let spare = find("spare").context("no spare in query-guestmemfd")?;
    ensure!(
        backends.len() == 2,
        "query-guestmemfd shows {} backends",
        backends.len()
    );
    ensure!(
        ram.size == SIZE.0 && spare.size == 16 << 20,
        "sizes {} and {}",
        ram.size,
        spare.size
    );
    ensure!(
        spare.discard == "keep",
        "spare's discard is {}",
        spare.discard
    );
    qemu.qmp.run("object-del", json!({"id": "spare"}))?;
    let left = query::backend(&mut qemu.qmp)?;
    ensure!(
        left.id == "ram0",
        "after object-del of spare {} is left",
        left.id
    );
    Ok(())
}

fn monitor(context: &Context) -> Result<()> {
    let mut qemu = context.start(&Vm::protected(SIZE))?;
    let answer = qemu.qmp.run(
        "human-monitor-command",
        json!({"command-line": "info guestmemfd"}),
    )?;
    let text = answer
        .as_str()
        .context("human-monitor-command without text")?;
    ensure!(
        text.contains("ram0"),
        "info guestmemfd does not name ram0: {text}"
    );
    Ok(())
}
