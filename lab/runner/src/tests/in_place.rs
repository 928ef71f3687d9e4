// SPDX-License-Identifier: GPL-2.0-or-later
//! What one file for both views brings, and what it asks for: memory policies act on all memory,
//! nothing is there twice, and the kernel itself keeps the host away from private pages.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use tempfile::TempDir;

use super::query::read_map;
use super::{Context, GUEST_LIMIT, SIZE, Test, guests, mapped_devices};
use crate::cgroup::Group;
use crate::guest;
use crate::intrusion;
use crate::kernel::held::hold;
use crate::kernel::memory::Map;
use crate::memory::{self, Kind};
use crate::probe::Need;
use crate::qemu::{EXIT_LIMIT, Qemu};
use crate::query::{self, State};
use crate::tap::Tap;
use crate::vm::{Scenario, Vm};

/// What QEMU needs besides the guest's memory, beyond what it has when the guest begins: 0.5 % of
/// memory, and a megabyte.
const BEYOND: u64 = SIZE.0 / 200 + (1 << 20);

/// Where a page is held: in memory that the guest's sweep converts.
const HELD_BEFORE_END: u64 = 16 << 20;

pub(super) fn tests() -> Vec<Test> {
    let private = &[Need::InPlace];
    let root = &[Need::InPlace, Need::Root];
    let test = |name, needs: &[Need], run: fn(&Context) -> Result<()>| {
        Test::new(format!("in-place/{name}"), needs, run)
    };
    vec![
        test("policy", &[Need::InPlace, Need::NumaPolicy], policy),
        test("prealloc", &[Need::InPlace, Need::PageCounts], prealloc),
        test("peak-memory", root, peak_memory),
        test("held-page", root, held_page),
        test("clock", private, clock),
        test("vhost-user", private, vhost_user),
        test("other-process", root, other_process),
        test("stray-access", root, stray_access),
        test("refused", private, refused),
        test("other-backends", private, other_backends),
        test("parameter-off", &[Need::TwoFiles], parameter_off),
    ]
}

/// All memory comes from the node that the policy names: what the host touches and what only the
/// guest does.
fn policy(context: &Context) -> Result<()> {
    let group = Group::new("policy")?;
    let vm = vm(context, Scenario::Hypercall)
        .with_backend_properties("policy=bind,host-nodes=1,prealloc=on");
    let mut qemu = start_in(&group, context, &vm)?;
    let nodes = memory::guest_memfd_nodes(qemu.pid())?;
    ensure!(
        nodes == [(1, SIZE.0 / 4096)],
        "pages by node after prealloc=on: {nodes:?}"
    );
    let before = group.file_bytes_of_node(0)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    let (other, node) = (group.file_bytes_of_node(0)?, group.file_bytes_of_node(1)?);
    println!("# node 0 {other}, node 1 {node}; {backend:?}");
    ensure!(
        node >= SIZE.0 && other <= before + (1 << 20),
        "the guest's memory has moved to another node: {other} bytes on node 0, {node} on node 1"
    );
    guest::finish(&mut qemu)?;

    // Without prealloc, what a guest touches first in private is on that node as well.
    let group = Group::new("policy-touched")?;
    let vm =
        self::vm(context, Scenario::Hypercall).with_backend_properties("policy=bind,host-nodes=1");
    let mut qemu = start_in(&group, context, &vm)?;
    let before = [group.file_bytes_of_node(0)?, group.file_bytes_of_node(1)?];
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let after = [group.file_bytes_of_node(0)?, group.file_bytes_of_node(1)?];
    println!("# by node before {before:?}, after {after:?}");
    ensure!(
        after[0] <= before[0] + (1 << 20) && after[1] >= before[1] + (8 << 20),
        "file pages by node: before {before:?}, after {after:?}"
    );
    guest::finish(&mut qemu)?;
    Ok(())
}

/// All memory is there before the guest runs, and stays there whatever it converts.
fn prealloc(context: &Context) -> Result<()> {
    let vm = vm(context, Scenario::Hypercall).with_backend_properties("prealloc=on");
    let mut qemu = context.start(&vm)?;
    let allocated = |qemu: &Qemu| -> Result<Option<u64>> {
        let files = memory::backings(qemu.pid())?;
        Ok(memory::allocated(&files, Kind::GuestMemfd))
    };
    ensure!(allocated(&qemu)? == Some(SIZE.0), "{:?}", allocated(&qemu)?);
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    ensure!(backend.private_bytes > 0, "nothing is private: {backend:?}");
    ensure!(allocated(&qemu)? == Some(SIZE.0), "{:?}", allocated(&qemu)?);
    guest::finish(&mut qemu)?;
    Ok(())
}

/// A guest that has all of its memory, and then makes it private and shared, never has more.
fn peak_memory(context: &Context) -> Result<()> {
    let group = Group::new("in-place")?;
    let vm = vm(context, Scenario::Sweep).with_backend_properties("prealloc=on");
    let mut qemu = start_in(&group, context, &vm)?;
    let before = group.current()?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    let peak = group.peak()?;
    println!("# before {before}, at most {peak}; {backend:?}");
    ensure!(
        backend.converted_to_private_bytes >= SIZE.0 / 4,
        "little was converted: {backend:?}"
    );
    ensure!(
        before >= SIZE.0 && peak <= before + BEYOND,
        "{before} bytes when the guest began, {peak} at most"
    );
    guest::finish(&mut qemu)?;
    Ok(())
}

/// A page that another process has in use for longer than the guest's request waits. The guest gets
/// an error number and goes on; later the request is granted.
fn held_page(context: &Context) -> Result<()> {
    let vm = vm(context, Scenario::Sweep).with_backend_properties("convert-timeout=200");
    let mut qemu = context.start(&vm)?;
    qemu.qmp.run("cont", json!({}))?;
    guest::wait_line(&qemu, "# sweep: begins", GUEST_LIMIT)?;
    qemu.qmp.run("stop", json!({}))?;
    let page = (SIZE.0 - HELD_BEFORE_END) / 4096;
    let map = Map::file(&memory::guest_memfd(qemu.pid())?, SIZE.0)?;
    map.write(page, 1);
    let pipe = hold(&map, page)?;
    qemu.qmp.run("cont", json!({}))?;

    let failed = ["GUESTMEMFD_CONVERSION_FAILED"];
    let data = qemu.qmp.wait_event(&failed, GUEST_LIMIT)?.data;
    let error = data["error"].as_str().unwrap_or_default();
    ensure!(
        data["to"] == "private" && error.contains(&format!("{:#x}", page * 4096)),
        "the event is {data}"
    );
    let mut tap = Tap::default();
    tap.line(&guest::wait_line(&qemu, "# sweep: granted", GUEST_LIMIT)?);
    ensure!(
        tap.note("denied") == Some(1),
        "{:?} requests were denied",
        tap.note("denied")
    );
    drop((pipe, map));
    qemu.qmp.wait_event(&["SHUTDOWN"], GUEST_LIMIT)?;
    guests::settled(&query::backend(&mut qemu.qmp)?)?;
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

/// KVM itself cannot write to a private page: the clock that the guest asked for stays away.
fn clock(context: &Context) -> Result<()> {
    let mut qemu = context.start(&vm(context, Scenario::Clock))?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    guests::settled(&query::backend(&mut qemu.qmp)?)?;
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

/// A disk in qemu-storage-daemon uses pages that are shared; for private ones it gets an error, which
/// it hands on.
fn vhost_user(context: &Context) -> Result<()> {
    let dir = TempDir::new()?;
    let (_daemon, chardev) = mapped_devices::disk_in_daemon(context, &dir)?;
    let vm = vm(context, Scenario::Vhost).with_arguments(&format!(
        "{chardev} -device vhost-user-blk-pci,chardev=vub,iommu_platform=off"
    ));
    let mut qemu = context.start(&vm)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    guests::settled(&backend)?;
    let tap = guest::finish(&mut qemu)?;
    ensure!(tap.verdict()? == 4, "the guest has left something out");
    Ok(())
}

/// Through QEMU's own mapping the kernel reads shared pages for whoever may, and no private ones.
fn other_process(context: &Context) -> Result<()> {
    let (mut qemu, private, shared) = with_private_page(context)?;
    let memory = File::open(format!("/proc/{}/mem", qemu.pid()))?;
    let mut byte = [0];
    memory
        .read_exact_at(&mut byte, shared)
        .context("a shared page cannot be read")?;
    ensure!(
        memory.read_at(&mut byte, private).is_err(),
        "a private page can be read"
    );
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

/// A thread of QEMU's that uses a private page, around all checks, is named before QEMU dies.
fn stray_access(context: &Context) -> Result<()> {
    let (mut qemu, private, _) = with_private_page(context)?;
    intrusion::make_thread_read(qemu.pid(), private)?;
    let ended = qemu.wait(EXIT_LIMIT)?;
    println!("# {}: {}", ended.status, ended.stderr.trim());
    ensure!(
        ended.status.signal().is_some(),
        "QEMU has ended with {}",
        ended.status
    );
    ensure!(
        ended.stderr.contains("has used private memory at offset")
            && ended.stderr.contains(&format!("thread {}", qemu.pid())),
        "QEMU has said: {}",
        ended.stderr
    );
    Ok(())
}

/// A guest that has ended, and where QEMU has a private page of it, and a shared one.
fn with_private_page(context: &Context) -> Result<(Box<Qemu>, u64, u64)> {
    let mut qemu = context.start(&vm(context, Scenario::Hypercall))?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let runs = read_map(&mut qemu, 1024)?;
    let offset = |state| {
        let mut runs = runs.iter();
        let run = runs.find(|run| run.state == state);
        run.map(|run| run.offset).context("no such page")
    };
    let mapping = mapping(qemu.pid())?;
    let (private, shared) = (offset(State::Private)?, offset(State::Shared)?);
    Ok((qemu, mapping + private, mapping + shared))
}

/// Where a process has mapped its guest_memfd.
fn mapping(pid: u32) -> Result<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    for line in maps.lines() {
        let of_file = line.contains("[kvm-gmem]") || line.contains("guest_memfd]");
        if let (true, Some((start, _))) = (of_file, line.split_once('-')) {
            return Ok(u64::from_str_radix(start, 16)?);
        }
    }
    bail!("no guest_memfd is mapped:\n{maps}")
}

/// QEMU refuses its command line and says so.
fn is_refused(context: &Context, vm: &Vm, words: &[&str]) -> Result<()> {
    let stderr = context.start_refused(vm)?.stderr;
    for word in words {
        ensure!(stderr.contains(word), "{word} is not in: {stderr}");
    }
    Ok(())
}

/// KVM has no guest_memfd for other backends here. They may be there, as libvirt's is in each of its
/// domains, and are refused as memory of the guest's.
fn other_backends(context: &Context) -> Result<()> {
    let other = format!(
        "-object memory-backend-ram,id=other,size={} -m 256M,slots=1,maxmem=1G",
        SIZE.0
    );
    let vm = vm(context, Scenario::Hypercall).with_arguments(&other);
    let mut qemu = context.start(&vm)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let device = json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "other"});
    let Err(why) = qemu.qmp.raw("device_add", device)? else {
        bail!("a DIMM of memory that cannot be private");
    };
    let words = ["'other'", "use memory-backend-guestmemfd"];
    for word in words {
        ensure!(why.desc.contains(word), "{word} is not in: {}", why.desc);
    }
    guest::finish(&mut qemu)?.verdict()?;
    let ram = format!("memory-backend-ram,id=ram0,size={}", SIZE.0);
    let vm = Vm::protected(SIZE).with_backend(&ram);
    is_refused(context, &vm, &["'ram0'", "use memory-backend-guestmemfd"])
}

/// With the kernel's parameter off, the mode is refused with the parameter's name, and whoever leaves
/// the choice to the library has two files.
fn parameter_off(context: &Context) -> Result<()> {
    let words = [
        "mode=in-place is not possible",
        "Linux 7.4",
        "kvm.gmem_in_place_conversion=1",
    ];
    for vm in [Vm::protected(SIZE), Vm::ordinary(SIZE)] {
        let vm = vm.with_backend_properties("mode=in-place");
        is_refused(context, &vm, &words)?;
    }
    let mut qemu = context.start(&Vm::protected(SIZE))?;
    let backend = query::backend(&mut qemu.qmp)?;
    ensure!(backend.mode == "private", "its mode is {}", backend.mode);
    qemu.quit()?;
    Ok(())
}

/// What belongs to two files, and a mode that this kernel does not have.
fn refused(context: &Context) -> Result<()> {
    for (properties, words) in [
        ("discard=keep", &["discard=keep", "discard=now"][..]),
        ("lazy-attributes=on", &["lazy-attributes=auto"]),
        ("guard=report", &["guard=report", "in place"]),
        (
            "mode=private",
            &[
                "mode=private is not possible",
                "use mode=in-place",
                "kvm.gmem_in_place_conversion=0",
            ],
        ),
        (
            "mode=mapped",
            &["mode=mapped is not possible", "mode=in-place"],
        ),
        ("bind=on", &["mode=mapped"]),
    ] {
        let vm = guests::with_properties(Vm::protected(SIZE), properties);
        is_refused(context, &vm, words).context(properties)?;
    }
    let ordinary = Vm::ordinary(SIZE).with_backend_properties("mode=in-place");
    let words = ["mode=in-place is not possible", "a confidential guest"];
    is_refused(context, &ordinary, &words)?;
    // An ordinary VM on this kernel is as it always was.
    let mut qemu = context.start(&Vm::ordinary(SIZE))?;
    let backend = query::backend(&mut qemu.qmp)?;
    ensure!(backend.mode == "mapped", "its mode is {}", backend.mode);
    qemu.quit()?;
    Ok(())
}

/// Starts a QEMU in a cgroup, all of whose memory is counted there.
fn start_in(group: &Group, context: &Context, vm: &Vm) -> Result<Box<Qemu>> {
    let _inside = group.enter()?;
    context.start(vm)
}

fn vm(context: &Context, scenario: Scenario) -> Vm {
    Vm::conformance(&context.files, scenario, false, SIZE, 1)
}
