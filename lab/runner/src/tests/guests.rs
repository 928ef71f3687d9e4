// SPDX-License-Identifier: GPL-2.0-or-later
//! The conformance guest's scenarios, and whether QEMU counted what the guest did.

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::{Context, GUEST_LIMIT, SIZE, Test, freed};
use crate::guest;
use crate::probe::Need;
use crate::query::{self, Backend};
use crate::strict::Strict;
use crate::tap::Tap;
use crate::vm::{BACKEND, Scenario, Size, Vm};

pub(super) fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for scenario in [
        Scenario::Idle,
        Scenario::Hypercall,
        Scenario::Fault,
        Scenario::Bad,
    ] {
        for smp in [1, 4] {
            let name = format!("guest/{}-{smp}", scenario.name());
            tests.push(Test::new(name, scenario.needs(), move |context| {
                run(context, scenario, smp)
            }));
        }
    }
    let strict = Scenario::Fault.needs();
    tests.push(Test::new("guest/all-strict-4", strict, all_in_strict_mode));
    for smp in [1, 4, 8] {
        let name = format!("guest/flip-{smp}");
        let test = Test::new(name, strict, move |context| flip(context, smp));
        tests.push(if smp == 8 { test.only_in_full() } else { test });
    }
    let above = Test::new("guest/memory-above-4g", strict, memory_above_4g);
    tests.push(above.only_in_full());
    for smp in [1, 4] {
        let name = format!("guest/fault-lazy-{smp}");
        let needs = &[Need::TwoFiles, Need::StrictMode];
        tests.push(Test::new(name, needs, move |context| lazy(context, smp)));
    }
    let two_files = &[Need::TwoFiles];
    tests.push(Test::new("guest/keep-hypercall-1", two_files, keep));
    let private = &[Need::PrivateMemory];
    tests.push(Test::new("guest/bar-in-ram", private, |context| {
        bar_in_ram(context, guest_vm(context, Scenario::Bad, 1))
    }));
    tests.push(Test::new(
        "guest/upstream-bar-in-ram",
        two_files,
        |context| {
            bar_in_ram(
                context,
                on_upstreams_path(guest_vm(context, Scenario::Bad, 1)),
            )
        },
    ));
    for scenario in [Scenario::Hypercall, Scenario::Bad] {
        let name = format!("guest/upstream-{}-1", scenario.name());
        tests.push(Test::new(name, two_files, move |context| {
            upstream(context, scenario)
        }));
    }
    tests
}

/// Strict mode for a scenario that needs it.
pub(super) fn strict(scenario: Scenario) -> Result<Option<Strict>> {
    let needed = scenario.needs().contains(&Need::StrictMode);
    needed.then(Strict::on).transpose()
}

/// The guest of a test: in strict mode only where it must be, so that both rules are tested. Its
/// pages are converted one by one, so that the guest knows what QEMU must have counted.
pub(super) fn guest_vm(context: &Context, scenario: Scenario, smp: u32) -> Vm {
    let strict = scenario.needs().contains(&Need::StrictMode);
    let vm = Vm::conformance(&context.files, scenario, strict, SIZE, smp);
    with_properties(vm, "lazy-attributes=off")
}

/// With these properties of the backend.
pub(super) fn with_properties(vm: Vm, properties: &str) -> Vm {
    let size = vm.size.0;
    vm.with_backend(&format!("{BACKEND},id=ram0,size={size},{properties}"))
}

fn run(context: &Context, scenario: Scenario, smp: u32) -> Result<()> {
    let _strict = strict(scenario)?;
    let (backend, tap) = run_vm(context, &guest_vm(context, scenario, smp))?;
    says_little(context)?;
    agrees(scenario, &backend, &tap)
}

/// QEMU says the same of hundreds of bad requests once.
fn says_little(context: &Context) -> Result<()> {
    let said = context.said()?;
    ensure!(said <= 5, "QEMU has said {said} lines");
    Ok(())
}

/// Runs a guest to its end; everything that holds for all of them is checked.
fn run_vm(context: &Context, vm: &Vm) -> Result<(Backend, Tap)> {
    let mut qemu = context.start(vm)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    qemu.alive()?;
    let cpus = qemu.qmp.run("query-cpus-fast", json!({}))?;
    let cpus = cpus.as_array().map_or(0, Vec::len);
    ensure!(
        cpus == usize::try_from(vm.smp)?,
        "{cpus} CPUs after the guest's end"
    );
    let backend = query::backend(&mut qemu.qmp)?;
    if backend.discard != "keep" {
        freed::files_match(&backend, qemu.pid())?;
    }
    let tap = guest::finish(&mut qemu)?;
    println!("# {backend:?}");
    settled(&backend)?;
    Ok((backend, tap))
}

/// Every scenario in one guest, in strict mode.
fn all_in_strict_mode(context: &Context) -> Result<()> {
    let _strict = Strict::on()?;
    let vm = Vm::conformance(&context.files, Scenario::All, true, SIZE, 4);
    let vm = with_properties(vm, "lazy-attributes=off");
    let (backend, tap) = run_vm(context, &vm)?;
    agrees(Scenario::All, &backend, &tap)?;
    caused(Scenario::Hypercall, &backend)
}

/// The same pages back and forth, by request and by touching.
fn flip(context: &Context, smp: u32) -> Result<()> {
    let _strict = Strict::on()?;
    let vm = Vm::conformance(&context.files, Scenario::Flip, true, SIZE, smp);
    let vm = with_properties(vm, "lazy-attributes=off");
    let (backend, tap) = run_vm(context, &vm)?;
    agrees(Scenario::Flip, &backend, &tap)
}

/// RAM in two windows, below and above the hole for PCI: q35 splits 3 GiB.
fn memory_above_4g(context: &Context) -> Result<()> {
    let _strict = Strict::on()?;
    let vm = Vm::conformance(&context.files, Scenario::All, true, Size(3 << 30), 2);
    let vm = with_properties(vm, "lazy-attributes=off");
    let (backend, tap) = run_vm(context, &vm)?;
    agrees(Scenario::All, &backend, &tap)
}

/// A backend that frees nothing, and a guest that knows.
fn keep(context: &Context) -> Result<()> {
    let vm = guest_vm(context, Scenario::Hypercall, 1);
    let mut vm = with_properties(vm, "discard=keep");
    if let Some((_, append)) = &mut vm.kernel {
        append.push_str(" contents=unknown");
    }
    let (backend, tap) = run_vm(context, &vm)?;
    agrees(Scenario::Hypercall, &backend, &tap)
}

/// Lazy attributes, as they are by default: pages next to those that the guest touches become
/// private with them, which it does not know. It finds its data all the same.
fn lazy(context: &Context, smp: u32) -> Result<()> {
    let _strict = Strict::on()?;
    let vm = Vm::conformance(&context.files, Scenario::Fault, true, SIZE, smp);
    let (backend, tap) = run_vm(context, &vm)?;
    caused(Scenario::Fault, &backend)?;
    ensure!(
        backend.lazy_chunk == Some(2 << 20) && backend.converted_along_bytes > 0,
        "no page went along: {backend:?}"
    );
    let said = |name| tap.note(name).with_context(|| format!("no {name}"));
    ensure!(
        backend.faults_private < said("faults-private")?,
        "pages that went along saved no fault: {backend:?}"
    );
    ensure!(
        backend.private_bytes / 4096 >= said("private-pages")?,
        "{backend:?}"
    );
    Ok(())
}

/// Nothing is under way or owed after the end.
pub(super) fn settled(backend: &Backend) -> Result<()> {
    ensure!(
        backend.transition_bytes == 0,
        "{} bytes in transition",
        backend.transition_bytes
    );
    ensure!(
        backend.unpunched_bytes == 0,
        "{} bytes unpunched",
        backend.unpunched_bytes
    );
    Ok(())
}

/// Did guest and QEMU count the same?
fn agrees(scenario: Scenario, backend: &Backend, tap: &Tap) -> Result<()> {
    same_counts(scenario, tap, |name| {
        Some(match name {
            "hypercalls" => backend.hypercalls,
            "faults-private" => backend.faults_private,
            "faults-shared" => backend.faults_shared,
            "refused" => backend.refused,
            "to-private" => backend.conversions_to_private,
            "to-shared" => backend.conversions_to_shared,
            "to-private-pages" => backend.converted_to_private_bytes / 4096,
            "to-shared-pages" => backend.converted_to_shared_bytes / 4096,
            "private-pages" => backend.private_bytes / 4096,
            _ => return None,
        })
    })?;
    caused(scenario, backend)
}

/// Has the guest's hypervisor counted what the guest says?
pub(super) fn same_counts(
    scenario: Scenario,
    tap: &Tap,
    counted: impl Fn(&str) -> Option<u64>,
) -> Result<()> {
    for name in [
        "hypercalls",
        "faults-private",
        "faults-shared",
        "refused",
        "to-private",
        "to-shared",
        "to-private-pages",
        "to-shared-pages",
        "private-pages",
    ] {
        let Some(said) = tap.note(name) else {
            bail!("the guest does not say its {name}");
        };
        let counted = counted(name).with_context(|| format!("nobody counted {name}"))?;
        // Of some bad requests the guest cannot know whether QEMU sees them.
        let bad = matches!(scenario, Scenario::Bad | Scenario::All);
        let more = bad && matches!(name, "hypercalls" | "refused");
        ensure!(
            counted == said || more && counted > said,
            "{name}: the guest says {said}, its hypervisor {counted}"
        );
    }
    Ok(())
}

/// Did the scenario do what it is for?
fn caused(scenario: Scenario, backend: &Backend) -> Result<()> {
    let both_ways = backend.conversions_to_private > 0 && backend.conversions_to_shared > 0;
    match scenario {
        Scenario::Hypercall => {
            ensure!(
                backend.hypercalls > 0 && both_ways,
                "no hypercalls both ways: {backend:?}"
            );
        }
        Scenario::Idle => ensure!(backend.hypercalls == 0, "an idle guest made hypercalls"),
        Scenario::Fault | Scenario::All => {
            let both_faults = backend.faults_private > 0 && backend.faults_shared > 0;
            ensure!(
                both_faults && both_ways,
                "no memory faults both ways: {backend:?}"
            );
        }
        Scenario::Bad => ensure!(backend.refused > 0, "nothing was refused: {backend:?}"),
        Scenario::Dirty | Scenario::Balloon | Scenario::Reporting | Scenario::Disk => {}
        _ => ensure!(both_ways, "no conversions both ways: {backend:?}"),
    }
    Ok(())
}

/// A request to share what is shared already, which a BAR is however QEMU provides it.
fn bar_in_ram(context: &Context, vm: Vm) -> Result<()> {
    let mut qemu = context.start(&vm.with_arguments("-device bochs-display,romfile="))?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let tap = guest::finish(&mut qemu)?;
    tap.note("ram-bar")
        .context("the guest has found no display")?;
    says_little(context)
}

/// With an ordinary backend, which QEMU itself converts.
fn on_upstreams_path(vm: Vm) -> Vm {
    vm.with_backend(&format!("memory-backend-memfd,id=ram0,size={}", SIZE.0))
}

/// The same guest on QEMU's own path.
fn upstream(context: &Context, scenario: Scenario) -> Result<()> {
    let vm = on_upstreams_path(guest_vm(context, scenario, 1));
    let mut qemu = context.start(&vm)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backends = query::backends(&mut qemu.qmp)?;
    ensure!(
        backends.is_empty(),
        "query-guestmemfd shows another backend: {backends:?}"
    );
    guest::finish(&mut qemu)?;
    says_little(context)
}
