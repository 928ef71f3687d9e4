// SPDX-License-Identifier: GPL-2.0-or-later
//! A Linux guest that works in private memory.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::{Context, Test, freed, guests};
use crate::guest;
use crate::linux::{self, Files, Job, VIRTIO};
use crate::memory::{self, Kind};
use crate::probe::Need;
use crate::qemu::Qemu;
use crate::query::{self, human};
use crate::tap::Tap;
use crate::vm::{BACKEND, Size, Vm};

const SIZE: Size = Size(512 << 20);

/// What a guest does not use when it has filled its memory, and what moves meanwhile.
const NOISE: u64 = 64 << 20;

/// How long a guest may take to do all that it does.
const LIMIT: Duration = Duration::from_secs(600);

/// None where there is no such guest: a runner by hand need not have one.
pub(super) fn tests(files: &Files) -> Vec<Test> {
    if !files.are_named() {
        return Vec::new();
    }
    let needs = &[Need::PrivateMemory, Need::PageCounts];
    let work = |smp| {
        Test::new(format!("linux/work-{smp}"), needs, move |context| {
            work(context, smp)
        })
    };
    let mapped = |bind| {
        Test::new(
            format!("linux/mapped-bind-{bind}"),
            &[Need::MappedMemory],
            move |context| in_mapped_memory(context, bind),
        )
    };
    vec![
        work(1),
        work(2).only_in_full(),
        mapped("off"),
        mapped("on").only_in_full(),
        Test::new("linux/virtio-mem", needs, virtio_mem).only_in_full(),
        Test::new("linux/balloon", needs, balloon).only_in_full(),
        Test::new("linux/balloon-everything", needs, balloon_everything).only_in_full(),
        Test::new("linux/reporting", needs, reporting).only_in_full(),
    ]
}

fn work(context: &Context, smp: u32) -> Result<()> {
    let vm = context.files.linux.vm(Job::Work, SIZE, smp)?;
    let mut qemu = context.start(&vm)?;
    guest::run_through_reboot(&mut qemu, LIMIT)?;
    end(&mut qemu, Tap::default())
}

/// An ordinary VM, with a screen.
fn in_mapped_memory(context: &Context, bind: &str) -> Result<()> {
    let vm = context.files.linux.ordinary_vm(Job::Work, SIZE, 2)?;
    let vm = vm
        .with_backend_properties(&format!("bind={bind}"))
        .with_arguments("-device VGA");
    let mut qemu = context.start(&vm)?;
    guest::run_through_reboot(&mut qemu, LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    ensure!(
        backend.mode == "mapped" && backend.shared_bytes == SIZE.0,
        "not an ordinary VM's memory: {backend:?}"
    );
    let screen = guest::monitor(&mut qemu, "xp /80xh 0xb8000")?;
    // Light grey letters: SeaBIOS has written there, and the screen keeps what the kernel leaves alone.
    ensure!(
        screen.contains("0x07"),
        "nothing is on the screen: {screen}"
    );
    linux::finish(&mut qemu, Tap::default())?;
    Ok(())
}

/// Memory that comes and goes by virtio-mem, on a backend of its own. The guest uses it as shared.
fn virtio_mem(context: &Context) -> Result<()> {
    const MORE: u64 = 256 << 20;
    const GIVEN: u64 = 128 << 20;
    let vm = context
        .files
        .linux
        .vm(Job::Grow, SIZE, 1)?
        .with_arguments(&format!(
            "-m {}M,maxmem=4G -object {BACKEND},id=more,size={MORE} \
         -device virtio-mem-pci,id=vmem,memdev=more,{VIRTIO}",
            SIZE.0 >> 20
        ));
    let mut tap = Tap::default();
    let mut qemu = context.start(&vm)?;
    qemu.qmp.run("cont", json!({}))?;
    let request = |qemu: &mut Qemu, size: u64| {
        let path = json!({"path": "/machine/peripheral/vmem", "property": "requested-size", "value": size});
        qemu.qmp.run("qom-set", path)
    };
    let allocated = |qemu: &mut Qemu| -> Result<u64> {
        Ok(query::named(&mut qemu.qmp, "more")?.shared_allocated)
    };
    guest::wait_line_into(&qemu, &mut tap, "# ready", LIMIT)?;
    request(&mut qemu, GIVEN)?;
    guest::wait_line_into(&qemu, &mut tap, "# grown", LIMIT)?;
    let grown = allocated(&mut qemu)?;
    request(&mut qemu, 0)?;
    guest::run(&mut qemu, LIMIT)?;
    let shrunk = allocated(&mut qemu)?;
    ensure!(
        grown > GIVEN / 2 && shrunk == 0,
        "the guest was given {GIVEN} bytes; the file had {grown}, and has {shrunk} now"
    );
    linux::finish(&mut qemu, tap)?;
    Ok(())
}

/// What must hold after every run.
fn end(qemu: &mut Qemu, tap: Tap) -> Result<()> {
    qemu.alive()?;
    let backend = query::backend(&mut qemu.qmp)?;
    guests::settled(&backend)?;
    freed::files_match(&backend, qemu.pid())?;
    let tap = linux::finish(qemu, tap)?;
    let percent = linux::percent_private(&backend);
    println!("# {percent} % private; {backend:?}");
    linux::check(&backend, &tap)
}

/// The guest with a balloon.
fn balloon_vm(context: &Context, job: Job, properties: &str) -> Result<Vm> {
    let vm = context.files.linux.vm(job, SIZE, 1)?;
    Ok(vm.with_arguments(&format!("-device virtio-balloon-pci,{VIRTIO}{properties}")))
}

/// What a guest has of the host.
#[derive(Debug)]
struct Has {
    private: u64,
    /// By both files together.
    allocated: u64,
}

impl Has {
    fn now(qemu: &mut Qemu) -> Result<Self> {
        let backend = query::backend(&mut qemu.qmp)?;
        let files = memory::backings(qemu.pid())?;
        let allocated = |kind| memory::allocated(&files, kind).context("not counted");
        Ok(Self {
            private: backend.private_bytes,
            allocated: allocated(Kind::Memfd)? + allocated(Kind::GuestMemfd)?,
        })
    }

    /// Waits until the files have no more than this, with so much private at least.
    fn until_allocated(qemu: &mut Qemu, most: u64, private: u64) -> Result<Self> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let has = Self::now(qemu)?;
            if has.allocated <= most && has.private >= private {
                return Ok(has);
            }
            ensure!(
                Instant::now() < deadline,
                "the guest was to give memory back until its files have {}, with {} private: {has:?}",
                human(most),
                human(private)
            );
            thread::sleep(Duration::from_millis(200));
        }
    }
}

/// Starts the guest, and waits until it has filled its memory and emptied it again.
fn filled(context: &Context, vm: &Vm, tap: &mut Tap) -> Result<(Box<Qemu>, Has)> {
    let mut qemu = context.start(vm)?;
    qemu.qmp.run("cont", json!({}))?;
    guest::wait_line_into(&qemu, tap, "# ready", LIMIT)?;
    let full = Has::now(&mut qemu)?;
    ensure!(
        full.allocated >= SIZE.0 / 8 * 5,
        "the guest has not filled its memory, so this run shows nothing: {full:?}"
    );
    Ok((qemu, full))
}

/// Half of the memory goes to the host and comes back; what has come back is private.
fn balloon(context: &Context) -> Result<()> {
    let mut tap = Tap::default();
    let vm = balloon_vm(context, Job::Balloon, "")?;
    let (mut qemu, full) = filled(context, &vm, &mut tap)?;

    let half = SIZE.0 / 2;
    qemu.qmp.run("balloon", json!({"value": half}))?;
    guest::wait_line_into(&qemu, &mut tap, "# inflated", LIMIT)?;
    let inflated = Has::until_allocated(&mut qemu, half, 0)?;
    println!("# full {full:?}, inflated {inflated:?}");
    ensure!(
        inflated.private + half <= full.private + NOISE,
        "half of the memory is in the balloon, but {} are private after {}",
        human(inflated.private),
        human(full.private)
    );
    ensure!(
        inflated.allocated + half <= full.allocated + NOISE,
        "half of the memory is in the balloon, but the files have {} after {}",
        human(inflated.allocated),
        human(full.allocated)
    );

    qemu.qmp.run("balloon", json!({"value": SIZE.0}))?;
    guest::run(&mut qemu, LIMIT)?;
    end(&mut qemu, tap)
}

/// What goes into the balloon to tell the guest that it may go on.
const SIGNAL: u64 = 4 << 20;

/// The guest is to give all of its memory, which it cannot survive. QEMU can.
fn balloon_everything(context: &Context) -> Result<()> {
    let mut tap = Tap::default();
    let vm = balloon_vm(context, Job::Balloon, "")?;
    let (mut qemu, full) = filled(context, &vm, &mut tap)?;
    qemu.qmp.run("balloon", json!({"value": 1 << 20}))?;
    let least = Has::until_allocated(&mut qemu, SIZE.0 / 4, 0)?;
    println!("# full {full:?}, then {least:?}");
    // It runs out of memory, and starts anew or stands still.
    thread::sleep(Duration::from_secs(10));
    qemu.alive()?;
    qemu.qmp.run("balloon", json!({"value": SIZE.0}))?;
    qemu.qmp.run("stop", json!({}))?;
    let backend = query::backend(&mut qemu.qmp)?;
    guests::settled(&backend)?;
    freed::files_match(&backend, qemu.pid())?;
    ensure!(qemu.quit()?.status.success(), "QEMU did not end well");
    Ok(())
}

/// What the guest has freed goes to the host, and is private all the same.
fn reporting(context: &Context) -> Result<()> {
    let mut tap = Tap::default();
    let vm = balloon_vm(context, Job::Report, ",free-page-reporting=on")?;
    let (mut qemu, full) = filled(context, &vm, &mut tap)?;
    // The guest waits meanwhile. Of what is free, as much as is under way in a report is shared.
    let most = full.allocated - SIZE.0 / 4;
    let private = SIZE.0 / 100 * linux::PRIVATE_PERCENT;
    let reported = Has::until_allocated(&mut qemu, most, private)?;
    println!("# full {full:?}, reported {reported:?}");
    qemu.qmp.run("balloon", json!({"value": SIZE.0 - SIGNAL}))?;
    guest::run(&mut qemu, LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    freed::files_match(&backend, qemu.pid())?;
    // Its last counts are not compared: a report may have been under way.
    linux::finish(&mut qemu, tap)?;
    Ok(())
}
