// SPDX-License-Identifier: GPL-2.0-or-later
//! What devices keep mapped for as long as they run: it becomes private at once, device by device, as
//! firmware does at its end, and all of it in one request, as a kernel does that has crashed.

use super::sweep::rest;
use super::{Run, disk, gpu};
use crate::ahci::Port;
use crate::failure::Failure;
use crate::pci::{Device, Registers};
use crate::tester::{Check, Tester};
use crate::virtio::{Kind, Queue, Running};
use crate::{apic, cpu, fwcfg, tap};
use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering};
use guestmemfd_guest::PAGE_SIZE;
use guestmemfd_guest::model::Intent::{Private, Shared};

/// `VIRTIO_F_RING_PACKED` and `VIRTIO_RING_F_INDIRECT_DESC`.
const PACKED: u64 = 1 << 34;
const INDIRECT: u32 = 1 << 28;

/// The disk's queues, three pages each.
const QUEUES: usize = 4;
const RINGS: Range<usize> = 0..3 * QUEUES;
/// A table of descriptors, and what a request reads to.
const TABLE: Range<usize> = 16..17;
const BUFFER: Range<usize> = 17..18;
/// The lists of an AHCI port.
const LISTS: Range<usize> = 20..22;
/// A frame of megasas's.
const FRAME: Range<usize> = 24..25;
/// A framebuffer with a page a line.
const SCREEN: Range<usize> = 32..96;
/// The storage of virtio-gpu's picture.
const PICTURE: Range<usize> = 128..128 + gpu::PAGES;
/// All of these.
const ALL: Range<usize> = 0..256;

/// How long a device may take to find out.
const PATIENCE: u64 = 10 * apic::TICKS_PER_SECOND;

/// The longest that a request took, in ticks of the time-stamp counter.
static LONGEST: AtomicU64 = AtomicU64::new(0);

pub(super) fn run(run: &mut Run<'_>) {
    run.test("split rings of several queues", |tester| rings(tester, 0));
    run.test("packed rings", |tester| rings(tester, PACKED));
    run.test("a table of descriptors", table);
    run.test("the lists of an AHCI port", lists);
    run.test("a frame of megasas's that waits for events", frame);
    run.test("a framebuffer", |tester| {
        tester.request(SCREEN, Shared)?;
        show(tester)?;
        at_once(tester, SCREEN.start..SCREEN.start + 1)?;
        // What is shared again can be shown again.
        tester.request(SCREEN, Shared)?;
        show(tester)?;
        at_once(tester, SCREEN)
    });
    run.test("the storage of a picture", |tester| {
        tester.request(PICTURE, Shared)?;
        let mut queue = Queue::open(Kind::Gpu, 0, 0).map_err(Failure::Missing)?;
        attach(tester, &mut queue)?;
        at_once(tester, PICTURE)?;
        match gpu::transfer(&mut queue).map_err(Failure::Missing)? {
            false => Ok(()),
            true => Err(Failure::Missing("the picture is still there")),
        }
    });
    run.test("all of it in one request", all);
    let milliseconds = LONGEST.load(Ordering::Relaxed) / per_millisecond();
    tap::note(format_args!("kept: longest-milliseconds={milliseconds}"));
}

/// Makes pages private, and notes how long it takes.
fn at_once(tester: &mut Tester<'_>, pages: Range<usize>) -> Check {
    let start = cpu::timestamp();
    tester.request(pages, Private)?;
    LONGEST.fetch_max(cpu::timestamp() - start, Ordering::Relaxed);
    Ok(())
}

/// How far the clock of [`cpu::timestamp`] comes in a millisecond: a CPU that waits for QEMU counts no
/// ticks.
pub(super) fn per_millisecond() -> u64 {
    const TICKS: u64 = 10;
    let measured = (0..5).map(|_| {
        rest(1);
        let start = cpu::timestamp();
        rest(TICKS);
        (cpu::timestamp() - start) * apic::TICKS_PER_SECOND / (TICKS * 1000)
    });
    // Where the machine is busy, ticks come late.
    measured.min().unwrap_or(1).max(1)
}

/// Shared pages of zeros.
fn clear(tester: &mut Tester<'_>, pages: Range<usize>) -> Check {
    tester.request(pages.clone(), Shared)?;
    tester.forget(pages.clone());
    for page in pages {
        for index in 0..(PAGE_SIZE / 8) as usize {
            tester.memory.write(page, Shared, index, 0);
        }
    }
    Ok(())
}

/// The disk with queues in test memory.
fn running(tester: &mut Tester<'_>, features: u64) -> Result<Running, Failure> {
    clear(tester, RINGS)?;
    let queues: [u64; QUEUES] = core::array::from_fn(|n| tester.memory.gpa(3 * n));
    // SAFETY: the pages are test memory.
    let disk = unsafe { Running::start(Kind::Disk, features, &queues) };
    let disk = disk.map_err(Failure::Missing)?;
    (0..QUEUES).for_each(|number| disk.notify(number));
    rest(apic::TICKS_PER_SECOND / 10);
    match disk.has_given_up() {
        false => Ok(disk),
        true => Err(Failure::Missing("the disk does not take its queues")),
    }
}

/// The disk looks at a queue that is private, and gives up.
fn gives_up(disk: &Running, number: usize) -> Check {
    let end = apic::ticks() + PATIENCE;
    disk.notify(number);
    while !disk.has_given_up() {
        if apic::ticks() > end {
            return Err(Failure::Missing("the disk has not found out"));
        }
        cpu::wait();
    }
    Ok(())
}

fn rings(tester: &mut Tester<'_>, features: u64) -> Check {
    let disk = running(tester, features)?;
    // The last queue, of which the others know nothing, then those.
    at_once(tester, RINGS.end - 3..RINGS.end)?;
    gives_up(&disk, QUEUES - 1)?;
    for page in RINGS.start..RINGS.end - 3 {
        at_once(tester, page..page + 1)?;
    }
    drop(disk);
    clear(tester, RINGS)?;
    disk::reads(tester)
}

/// A request whose descriptors lie elsewhere, then the same when they are private.
fn table(tester: &mut Tester<'_>) -> Check {
    clear(tester, TABLE.start..BUFFER.end)?;
    let mut queue = Queue::open(Kind::Disk, INDIRECT, 0).map_err(Failure::Missing)?;
    let table = tester.memory.gpa(TABLE.start);
    let header = disk::Header::new(disk::READ, 0);
    let mut status = 0xff_u8;
    let at = &raw mut status;
    let buffers = disk::buffers(
        &header,
        tester.memory.gpa(BUFFER.start),
        PAGE_SIZE,
        at as u64,
    );
    // SAFETY: the pages are test memory; header and status live until the device is done.
    unsafe { queue.indirect(table, &buffers) }.map_err(Failure::Missing)?;
    // SAFETY: the device is done with it.
    if unsafe { at.read_volatile() } != disk::GOOD {
        return Err(Failure::Missing("the disk answered with an error"));
    }
    at_once(tester, TABLE)?;
    // SAFETY: as before.
    match unsafe { queue.at_table(table, buffers.len()) } {
        Err(_) => Ok(()),
        Ok(()) => Err(Failure::Missing("the disk has found a request")),
    }
}

fn port(tester: &mut Tester<'_>) -> Result<Port, Failure> {
    clear(tester, LISTS)?;
    let [list, received] = [LISTS.start, LISTS.start + 1].map(|page| tester.memory.gpa(page));
    // SAFETY: the pages are test memory.
    unsafe { Port::start(list, received) }.map_err(Failure::Missing)
}

fn lists(tester: &mut Tester<'_>) -> Check {
    let port = port(tester)?;
    at_once(tester, LISTS)?;
    if port.issue() {
        return Err(Failure::Missing("the controller has read a private list"));
    }
    drop(port);
    // It works with shared ones.
    self::port(tester).map(drop)
}

/// Hands megasas a frame that stays with it: a request for events, of which there are none.
fn wait_for_events(tester: &mut Tester<'_>) -> Result<Registers, Failure> {
    const ID: u32 = 0x0060_1000;
    const INBOUND_QUEUE: u64 = 0x40;
    const DCMD: u64 = 5;
    const ONE_ENTRY: u64 = 1 << 56;
    const EVENT_WAIT: u64 = 0x0104_0500;
    const LENGTH: u64 = 512;
    let adapter = Device::find(|id| id == ID);
    let adapter = adapter.ok_or(Failure::Missing("no megasas on the first PCI bus"))?;
    let registers = adapter.registers(0, 0);
    let gpa = tester.memory.gpa(FRAME.start);
    clear(tester, FRAME)?;
    for (index, word) in [
        (0, DCMD | ONE_ENTRY),
        (3, EVENT_WAIT),
        (5, gpa | LENGTH << 32),
    ] {
        tester.memory.write(FRAME.start, Shared, index, word);
    }
    registers.put(INBOUND_QUEUE, gpa as u32);
    Ok(registers)
}

fn frame(tester: &mut Tester<'_>) -> Check {
    wait_for_events(tester)?;
    at_once(tester, FRAME)
}

/// Has ramfb show [`SCREEN`].
fn show(tester: &Tester<'_>) -> Check {
    const FORMAT: u32 = u32::from_le_bytes(*b"XR24");
    const SIDE: u32 = SCREEN.end as u32 - SCREEN.start as u32;
    let screen = Failure::Missing("no fw_cfg item etc/ramfb: add -device ramfb");
    let item = fwcfg::find("etc/ramfb").map_err(|_| screen)?;
    let (selector, _) = item.ok_or(screen)?;
    let mut config = [0; 28];
    config[..8].copy_from_slice(&tester.memory.gpa(SCREEN.start).to_be_bytes());
    let words = [FORMAT, 0, SIDE, SIDE, PAGE_SIZE as u32];
    for (place, word) in config[8..].chunks_exact_mut(4).zip(words) {
        place.copy_from_slice(&word.to_be_bytes());
    }
    fwcfg::write(selector, &config).map_err(|_| screen)
}

/// Gives virtio-gpu a picture.
fn attach(tester: &Tester<'_>, queue: &mut Queue) -> Check {
    let at = tester.memory.gpa(PICTURE.start);
    match gpu::attach(queue, at).map_err(Failure::Missing)? {
        true => Ok(()),
        false => Err(Failure::Missing("virtio-gpu does not take a picture")),
    }
}

/// Everything runs, and all becomes private in one request, but for the ring of virtio-gpu, which
/// lies elsewhere.
fn all(tester: &mut Tester<'_>) -> Check {
    tester.request(ALL, Shared)?;
    let disk = running(tester, 0)?;
    let port = port(tester)?;
    wait_for_events(tester)?;
    show(tester)?;
    let mut queue = Queue::open(Kind::Gpu, 0, 0).map_err(Failure::Missing)?;
    attach(tester, &mut queue)?;
    at_once(tester, ALL)?;
    gives_up(&disk, 0)?;
    drop((disk, port, queue));
    tester.request(ALL, Shared)?;
    disk::reads(tester)
}
