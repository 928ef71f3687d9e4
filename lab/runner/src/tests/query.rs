// SPDX-License-Identifier: GPL-2.0-or-later
//! What QMP and HMP show of backends that do nothing.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::{Context, GUEST_LIMIT, SIZE, Test, freed, guests};
use crate::guest;
use crate::memory;
use crate::probe::{self, Need};
use crate::qemu::Qemu;
use crate::query::{self, QueryMap, Run, State};
use crate::vm::{Scenario, Vm};

pub(super) fn tests() -> Vec<Test> {
    vec![
        Test::new("query/no-backend", &[], no_backend),
        Test::new("query/fresh-backend", &[Need::PrivateMemory], fresh_backend),
        Test::new("query/two-backends", &[Need::PrivateMemory], two_backends),
        Test::new("query/monitor", &[Need::PrivateMemory], monitor),
        Test::new("query/map", &[Need::PrivateMemory], map),
        Test::new("query/bad-maps", &[Need::PrivateMemory], bad_maps),
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
    let mode = match probe::in_place() {
        true => "in-place",
        false => "private",
    };
    ensure!(backend.mode == mode, "its mode is {}", backend.mode);
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
    freed::files_are(&files, SIZE.0)
}

fn two_backends(context: &Context) -> Result<()> {
    let discard = match probe::in_place() {
        true => "now",
        false => "keep",
    };
    let vm = Vm::protected(SIZE).with_arguments(&format!(
        "-object memory-backend-guestmemfd,id=spare,size=16M,discard={discard}"
    ));
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
        spare.discard == discard,
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
    let backend = query::backend(&mut qemu.qmp)?;
    ensure!(
        backend.latency_to_private.is_empty() && !text.contains("time to"),
        "times are shown that nobody has asked for: {backend:?}, {text}"
    );
    Ok(())
}

/// Where the guest's pages are says the map; it agrees with the sums, read at once or in parts.
fn map(context: &Context) -> Result<()> {
    let vm = Vm::conformance(&context.files, Scenario::Hypercall, false, SIZE, 1);
    let mut qemu = context.start(&guests::with_properties(vm, "measure-latency=on"))?;
    let fresh = query::backend(&mut qemu.qmp)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let after = query::backend(&mut qemu.qmp)?;
    let whole = read_map(&mut qemu, 4096)?;
    ensure!(
        whole.len() > 4 && whole.windows(2).all(|pair| pair[0].state != pair[1].state),
        "these runs are too few, or could be one: {whole:?}"
    );
    ensure!(
        read_map(&mut qemu, 3)? == whole,
        "read in parts, the map is another"
    );
    for (state, bytes) in [
        (State::Undecided, after.undecided_bytes),
        (State::Shared, after.shared_bytes),
        (State::Private, after.private_bytes),
        (State::Transition, after.transition_bytes),
    ] {
        let runs = whole.iter().filter(|run| run.state == state);
        let sum: u64 = runs.map(|run| run.size).sum();
        ensure!(
            sum == bytes,
            "the map has {sum} bytes {state:?}, query-guestmemfd {bytes}"
        );
    }
    for (latency, conversions) in [
        (
            &after.latency_to_private,
            after.conversions_to_private - fresh.conversions_to_private,
        ),
        (
            &after.latency_to_shared,
            after.conversions_to_shared - fresh.conversions_to_shared,
        ),
    ] {
        ensure!(
            latency.iter().sum::<u64>() == conversions && conversions > 0,
            "{conversions} conversions took {latency:?}"
        );
    }
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

/// Runs of states that one answer has room for.
pub(super) const RUNS: u32 = 65536;

/// The whole map of ram0, in parts of so many runs.
pub(super) fn read_map(qemu: &mut Qemu, max_runs: u32) -> Result<Vec<Run>> {
    let mut runs: Vec<Run> = Vec::new();
    let mut offset = 0;
    loop {
        let part = qemu.qmp.execute(&QueryMap {
            id: "ram0",
            offset,
            max_runs,
        })?;
        let limit = usize::try_from(max_runs)?;
        ensure!(
            part.size == SIZE.0 && part.runs.len() <= limit,
            "asked for {max_runs} runs: {part:?}"
        );
        for run in part.runs {
            ensure!(
                run.offset == offset && run.size > 0,
                "at {offset:#x} comes {run:?}"
            );
            offset += run.size;
            runs.push(run);
        }
        match part.next {
            Some(next) => ensure!(next == offset, "next is {next:#x} behind {offset:#x}"),
            None => {
                ensure!(offset == SIZE.0, "the map ends at {offset:#x}");
                return Ok(runs);
            }
        }
    }
}

fn bad_maps(context: &Context) -> Result<()> {
    let mut qemu = context.start(&Vm::protected(SIZE))?;
    for (arguments, word) in [
        (json!({"id": "ram1"}), "ram1"),
        (json!({"id": "cgs0"}), "cgs0"),
        (json!({"id": ""}), "id"),
        (json!({"id": "ram0", "offset": SIZE.0}), "empty"),
        (json!({"id": "ram0", "offset": 1}), "aligned"),
        (json!({"id": "ram0", "size": 0}), "empty"),
        (json!({"id": "ram0", "size": SIZE.0 + 4096}), "outside"),
        (
            json!({"id": "ram0", "offset": u64::MAX - 4095, "size": 4096}),
            "64 bits",
        ),
        (json!({"id": "ram0", "max-runs": 0}), "max-runs"),
        (json!({"id": "ram0", "max-runs": 65537}), "65536"),
        (json!({"id": "ram0", "size": "all"}), "size"),
        (json!({}), "id"),
    ] {
        let shown = arguments.to_string();
        match qemu.qmp.raw("x-query-guestmemfd-map", arguments)? {
            Ok(answer) => bail!("{shown} is answered with {answer}"),
            Err(refusal) => ensure!(
                refusal.desc.contains(word),
                "{shown} is refused without {word:?}: {}",
                refusal.desc
            ),
        }
    }
    qemu.alive()?;
    Ok(())
}
