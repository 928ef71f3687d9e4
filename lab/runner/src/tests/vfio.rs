// SPDX-License-Identifier: GPL-2.0-or-later
//! Guests with a PCI device of level 1's, by VFIO: its DMA reaches what is shared and nothing else.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{Context, GUEST_LIMIT, SIZE, Test, freed, mapped, reset};
use crate::guest;
use crate::probe::Need;
use crate::qemu::Qemu;
use crate::query::{self, Backend};
use crate::strict::Strict;
use crate::vfio::{self, Mapped};
use crate::vm::{BACKEND, Scenario, Size, Vm};

/// As little as serves two CPUs on both sides of 4 GiB: every page is a mapping of its own.
const SMALL: Size = Size(96 << 20);

/// What VFIO maps besides the guest's memory (firmware), or not of it (where the screen would be).
const OTHERS: u64 = 1 << 20;

/// Mappings of an ordinary guest: each stretch of memory is one.
const FEW: u32 = 16;

pub(super) fn tests() -> Vec<Test> {
    let private = &[Need::PrivateMemory, Need::Vfio];
    let two_files = &[Need::TwoFiles, Need::Vfio];
    let two_files_iommufd = &[Need::TwoFiles, Need::Vfio, Need::Iommufd];
    let iommufd = &[Need::PrivateMemory, Need::Vfio, Need::Iommufd];
    let strict_mode = &[Need::PrivateMemory, Need::StrictMode, Need::Vfio];
    let mut tests = vec![
        Test::new("vfio/private", private, |context| {
            carries(context, &with_device(private_vm(context, SMALL), "")?)
        }),
        Test::new("vfio/strict", strict_mode, strict),
        Test::new("vfio/guard", two_files, guard_refused),
        Test::new("vfio/added-later", private, added_later),
        Test::new("vfio/too-large", private, too_large),
        Test::new("vfio/too-large-later", private, too_large_later),
        Test::new("vfio/dimm-too-large", private, dimm_too_large),
        Test::new("vfio/reset-same-vm-file", private, |context| {
            again(context, "")
        }),
        Test::new("vfio/reset-new-vm-file", private, |context| {
            again(context, ",x-change-vmfd-on-reset=on")
        })
        .only_in_full(),
        Test::new("vfio/iommufd-guard", two_files_iommufd, |context| {
            let vm = private_vm(context, SMALL).with_backend_properties("guard=fatal");
            carries(context, &with_iommufd(vm)?)
        }),
        Test::new("vfio/iommufd-large", iommufd, |context| {
            carries(context, &with_iommufd(private_vm(context, SIZE))?)
        })
        .only_in_full(),
    ];
    for bind in mapped::BINDS {
        tests.extend(ordinary_vms(bind));
    }
    tests
}

fn ordinary_vms(bind: &'static str) -> [Test; 2] {
    let vm = move |context: &Context| mapped::guest_vm(context, Scenario::Dma, bind);
    let [mut container, mut iommufd] = [
        Test::new(
            format!("vfio/ordinary-bind-{bind}"),
            &[Need::MappedMemory, Need::Vfio],
            move |context| ordinary(context, &with_device(vm(context), "")?),
        ),
        Test::new(
            format!("vfio/iommufd-ordinary-bind-{bind}"),
            &[Need::MappedMemory, Need::Vfio, Need::Iommufd],
            move |context| ordinary(context, &with_iommufd(vm(context))?),
        ),
    ];
    (container.full, iommufd.full) = (bind == "on", bind == "on");
    [container, iommufd]
}

/// The guest that gives the device private pages, on two CPUs.
fn private_vm(context: &Context, size: Size) -> Vm {
    Vm::conformance(&context.files, Scenario::Dma, false, size, 2)
}

/// A guest that has the device.
fn with_device(vm: Vm, properties: &str) -> Result<Vm> {
    let host = vfio::device()?;
    Ok(vm.with_arguments(&format!("-device vfio-pci,host={host}{properties}")))
}

fn with_iommufd(vm: Vm) -> Result<Vm> {
    with_device(
        vm.with_arguments("-object iommufd,id=iommufd0"),
        ",iommufd=iommufd0",
    )
}

/// Runs a guest with private memory. In the end all that is not private is mapped, page by page.
fn carries(context: &Context, vm: &Vm) -> Result<()> {
    let mut qemu = context.start(vm)?;
    let before = Mapped::of(qemu.pid())?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    check(&mut qemu, before)?;
    let tap = guest::finish(&mut qemu)?;
    ensure!(tap.verdict()? >= 20, "the guest has left something out");
    Ok(())
}

/// Nothing private is mapped, and nothing is missing.
fn check(qemu: &mut Qemu, before: Mapped) -> Result<()> {
    let backend = query::backend(&mut qemu.qmp)?;
    let after = Mapped::of(qemu.pid())?;
    println!(
        "# {before:?}, then {after:?} with {} bytes private",
        backend.private_bytes
    );
    ensure!(
        backend.private_bytes > 2 * OTHERS,
        "too little is private to be seen: {backend:?}"
    );
    for (mapped, private) in [(before, 0), (after, backend.private_bytes)] {
        all_mapped(mapped, backend.size - private)?;
    }
    ensure!(
        backend.stray_accesses == 0 && backend.transition_bytes == 0,
        "something is wrong with the backend: {backend:?}"
    );
    freed::files_match(&backend, qemu.pid())
}

/// So many bytes are mapped, each page for itself.
fn all_mapped(mapped: Mapped, expected: u64) -> Result<()> {
    let by_count = mapped.mappings.map(|number| 4096 * u64::from(number));
    for bytes in [mapped.bytes, by_count.unwrap_or(mapped.bytes)] {
        ensure!(
            bytes.abs_diff(expected) <= OTHERS,
            "{mapped:?} for {expected} bytes that are not private"
        );
    }
    Ok(())
}

/// Touches convert, pages start undecided, and all of them are visible at two addresses.
fn strict(context: &Context) -> Result<()> {
    let _strict = Strict::on()?;
    let _mappings = vfio::many_mappings()?;
    let vm = Vm::conformance(&context.files, Scenario::Dma, true, SMALL, 2);
    let mut qemu = context.start(&with_device(vm, "")?)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    let mapped = Mapped::of(qemu.pid())?;
    println!("# {mapped:?} with {} bytes private", backend.private_bytes);
    freed::files_match(&backend, qemu.pid())?;
    let tap = guest::finish(&mut qemu)?;
    ensure!(tap.verdict()? >= 21, "the guest has left something out");
    let left = |name| Some(4096 * tap.note(name)?);
    ensure!(
        backend.faults_private > 0
            && left("private-pages") == Some(backend.private_bytes)
            && left("shared-pages") == Some(backend.shared_bytes),
        "touches have decided other pages than those that were touched: {backend:?}"
    );
    Ok(())
}

/// The next guest has the device as well, and what was private is mapped again.
fn again(context: &Context, machine: &str) -> Result<()> {
    let mut vm = Vm::conformance(&context.files, Scenario::Dma, false, SMALL, 1);
    vm.machine.push_str(machine);
    let mut qemu = context.start(&with_device(vm.with_words("count=1"), "")?)?;
    let before = Mapped::of(qemu.pid())?;
    reset::whole(&mut qemu, false)?;
    check(&mut qemu, before)?;
    guest::reset(&mut qemu)?;
    all_mapped(Mapped::of(qemu.pid())?, SMALL.0).context("after a reset")?;
    reset::whole(&mut qemu, true)?;
    check(&mut qemu, before)?;
    qemu.quit()?;
    Ok(())
}

/// An ordinary guest: all of its memory is mapped, in a few large pieces.
fn ordinary(context: &Context, vm: &Vm) -> Result<()> {
    let mut qemu = context.start(vm)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let mapped = Mapped::of(qemu.pid())?;
    println!("# {mapped:?}");
    ensure!(
        mapped.mappings.is_none_or(|mappings| mappings <= FEW)
            && mapped.bytes.abs_diff(vm.size.0) <= OTHERS,
        "{mapped:?} for {} bytes of memory",
        vm.size.0
    );
    let tap = guest::finish(&mut qemu)?;
    ensure!(tap.verdict()? >= 2, "the guest has left something out");
    Ok(())
}

/// The kernel pins memory for a container without a way to wait for the guard.
fn guard_refused(context: &Context) -> Result<()> {
    let vm = private_vm(context, SMALL).with_backend_properties("guard=report");
    let ended = context.start_refused(&with_device(vm, "")?)?;
    ensure!(
        ended.status.code() == Some(1) && ended.stderr.contains("cannot map the populated parts"),
        "{}: {}",
        ended.status,
        ended.stderr
    );
    Ok(())
}

/// The message that names the limit.
fn is_clear(message: &str) -> Result<()> {
    for part in ["DMA mappings", "dma_entry_limit"] {
        ensure!(message.contains(part), "{part} is not in: {message}");
    }
    Ok(())
}

/// Each page would be a mapping of its own, and there may not be so many.
fn too_large(context: &Context) -> Result<()> {
    let ended = context.start_refused(&with_device(private_vm(context, SIZE), "")?)?;
    ensure!(
        ended.status.code() == Some(1),
        "QEMU ended with {}",
        ended.status
    );
    is_clear(&ended.stderr)
}

/// The same for a device that is added to a guest: the guest does not notice.
fn too_large_later(context: &Context) -> Result<()> {
    let (mut qemu, before) = run_without(context, SIZE)?;
    let refusal = qemu.qmp.raw("device_add", device_on_port()?)?;
    is_clear(&refusal.err().context("it is not refused")?.desc)?;
    let after = query::backend(&mut qemu.qmp)?;
    ensure!(
        (after.private_bytes, after.transition_bytes) == (before.private_bytes, 0),
        "{before:?} has become {after:?}"
    );
    let mapped = Mapped::of(qemu.pid())?;
    ensure!(mapped.bytes == 0, "something stays mapped: {mapped:?}");
    freed::files_match(&after, qemu.pid())?;
    run_again(&mut qemu)
}

/// Memory that cannot be mapped comes when the device is there: QEMU says so, and the device goes on
/// with what it has.
fn dimm_too_large(context: &Context) -> Result<()> {
    const DIMM: u64 = 512 << 20;
    let vm = private_vm(context, SMALL).with_arguments("-m 96M,slots=1,maxmem=16G");
    let mut qemu = context.start(&with_device(vm, "")?)?;
    let before = Mapped::of(qemu.pid())?;
    let object = json!({"qom-type": BACKEND, "id": "extra", "size": DIMM});
    qemu.qmp.run("object-add", object)?;
    let dimm = json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "extra", "addr": 8_u64 << 30});
    qemu.qmp.run("device_add", dimm)?;
    qemu.alive()?;
    all_mapped(Mapped::of(qemu.pid())?, SMALL.0).context("beside a DIMM that is not")?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    println!("# {before:?}, then {:?}", Mapped::of(qemu.pid())?);
    let ended = qemu.quit()?;
    is_clear(&ended.stderr)?;
    let tap = guest::report(&qemu);
    ensure!(tap.verdict()? >= 20, "the guest has left something out");
    Ok(())
}

/// A device that is added to a guest gets what is not private then.
fn added_later(context: &Context) -> Result<()> {
    let (mut qemu, _) = run_without(context, SMALL)?;
    qemu.qmp.run("device_add", device_on_port()?)?;
    let backend = query::backend(&mut qemu.qmp)?;
    all_mapped(
        Mapped::of(qemu.pid())?,
        backend.size - backend.private_bytes,
    )?;
    freed::files_match(&backend, qemu.pid())?;
    run_again(&mut qemu)
}

/// Runs a guest that leaves private memory, and has room for a device.
fn run_without(context: &Context, size: Size) -> Result<(Box<Qemu>, Backend)> {
    let vm = Vm::conformance(&context.files, Scenario::Reset, false, size, 1)
        .with_arguments("-device pcie-root-port,id=rp0");
    let mut qemu = context.start(&vm)?;
    reset::whole(&mut qemu, false)?;
    let backend = query::backend(&mut qemu.qmp)?;
    Ok((qemu, backend))
}

fn device_on_port() -> Result<Value> {
    Ok(json!({"driver": "vfio-pci", "host": vfio::device()?, "bus": "rp0"}))
}

fn run_again(qemu: &mut Qemu) -> Result<()> {
    guest::reset(qemu)?;
    reset::whole(qemu, true)?;
    qemu.quit()?;
    Ok(())
}
