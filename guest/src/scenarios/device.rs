// SPDX-License-Identifier: GPL-2.0-or-later
//! Devices and private memory: what is private stays out of their reach, and what they use does not
//! become private.

use super::kept::per_millisecond;
use super::sweep::rest;
use super::{Run, disk};
use crate::failure::Failure;
use crate::tester::{Check, Expected, GRANTED, Tester};
use crate::virtio::{Buffer, Kind, Queue};
use crate::{apic, cpu, fwcfg, tap, vapic};
use core::sync::atomic::AtomicU32;
use guestmemfd_guest::model::Intent::{Private, Shared};
use guestmemfd_guest::{DISK_PART, PAGE_SIZE};

/// What a request is answered with while a device uses its pages.
const EBUSY: Expected = (-16, "-16 (EBUSY)");
/// A page that stays private, and one that stays shared.
const PRIVATE: usize = 0;
const SHARED: usize = 1;
/// What the private page is filled with.
const SECRET: u64 = 0x5ec7e7;
/// How long the host may look at both, in ticks.
const PAUSE: u64 = 5 * apic::TICKS_PER_SECOND;

pub(super) fn run(run: &mut Run<'_>) {
    run.test("fw_cfg does not write to a private page", |tester| {
        tester.request(PRIVATE..PRIVATE + 1, Private)?;
        tester.fill(PRIVATE..PRIVATE + 1, Private, SECRET);
        let item = tester.plan.host.selector;
        if tester.memory.host_writes(PRIVATE, item, 64).is_ok() {
            return Err(Failure::Missing("QEMU says that it has written to it"));
        }
        tester.holds(PRIVATE..PRIVATE + 1, Private, SECRET)
    });
    run.test("nor does it read its orders there", |tester| {
        // SAFETY: the page is test memory; no order that it could hold is a transfer.
        unsafe { fwcfg::order_at(tester.memory.gpa(PRIVATE)) };
        tester.holds(PRIVATE..PRIVATE + 1, Private, SECRET)
    });
    run.test("nor for an option ROM's size", |tester| {
        let rom = vapic::rom().ok_or(Failure::Missing("no option ROM of QEMU's vAPIC"))?;
        tester.convert(rom & !(PAGE_SIZE - 1), Private, GRANTED)?;
        // The second time shows that the first has left QEMU in order.
        (0..2).for_each(|_| vapic::announce());
        tester.holds(PRIVATE..PRIVATE + 1, Private, SECRET)
    });
    run.test("a disk does not write to private pages", |tester| {
        let (first, pages) = (disk::FIRST_PAGE, disk::PAGES);
        tester.request(first..first + pages, Private)?;
        tester.fill(first..first + pages, Private, SECRET);
        disk_fails(tester, disk::READ)?;
        tester.holds(first..first + pages, Private, SECRET)
    });
    run.test("nor from them to the disk", |tester| {
        disk_fails(tester, disk::WRITE)?;
        let (first, pages) = (disk::FIRST_PAGE, disk::PAGES);
        tester.request(first..first + pages, Shared)?;
        disk::reads(tester)
    });
    run.test("rings become private at once, and the disk says so", rings);
    run.test("a buffer in use does not become private", keeps_buffer);
    run.test("the host leaves the private page alone", |tester| {
        tester.request(SHARED..SHARED + 1, Shared)?;
        tester.host_writes(SHARED)?;
        tap::note(format_args!(
            "device: private={:#x} shared={:#x}",
            tester.memory.gpa(PRIVATE),
            tester.memory.gpa(SHARED)
        ));
        rest(PAUSE);
        tester.holds(PRIVATE..PRIVATE + 1, Private, SECRET)
    });
}

/// A request from or to private memory is answered with an error, and the disk goes on working.
fn disk_fails(tester: &mut Tester<'_>, kind: u32) -> Check {
    let mut queue = Queue::open(Kind::Disk, 0, 0).map_err(Failure::Missing)?;
    let private = tester.memory.gpa(disk::FIRST_PAGE);
    let shared = tester.memory.gpa(SHARED);
    for (address, bytes, expected) in [
        (private, DISK_PART, disk::IO_ERROR),
        (shared, PAGE_SIZE, disk::GOOD),
    ] {
        // What is shared is read from the disk, which then holds what it held.
        let kind = if address == shared { disk::READ } else { kind };
        let header = disk::Header::new(kind, 0);
        // SAFETY: the pages are test memory.
        let status = unsafe { disk::request(&mut queue, &header, address, bytes) };
        if status.map_err(Failure::Missing)? != expected {
            return Err(Failure::Missing("the disk gives another answer"));
        }
    }
    Ok(())
}

/// The ring of a disk that is in use becomes private within a tenth of a second. The disk gives up,
/// and works again once it is reset.
fn rings(tester: &mut Tester<'_>) -> Check {
    let mut queue = Queue::open(Kind::Disk, 0, 0).map_err(Failure::Missing)?;
    let gpa = queue.rings();
    let header = disk::Header::new(disk::READ, 0);
    let shared = tester.memory.gpa(SHARED);
    // SAFETY: the page is test memory.
    unsafe { disk::request(&mut queue, &header, shared, PAGE_SIZE) }.map_err(Failure::Missing)?;

    let start = cpu::timestamp();
    tester.convert(gpa, Private, GRANTED)?;
    let milliseconds = (cpu::timestamp() - start) / per_millisecond();
    tap::note(format_args!("device: ring-milliseconds={milliseconds}"));
    // SAFETY: the page is test memory.
    if unsafe { disk::request(&mut queue, &header, shared, PAGE_SIZE) }.is_ok() {
        return Err(Failure::Missing("the disk has found a request"));
    }
    drop(queue);
    tester.convert(gpa, Shared, GRANTED)?;
    disk::reads(tester)
}

/// A sound card has a buffer for as long as nothing is played.
fn keeps_buffer(tester: &mut Tester<'_>) -> Check {
    let queue = buffer_in_use(tester)?;
    is_refused(tester)?;
    drop(queue);
    let gpa = tester.memory.gpa(SHARED);
    tester.convert(gpa, Private, GRANTED)?;
    tester.convert(gpa, Shared, GRANTED)
}

/// The page cannot become private.
pub(super) fn is_refused(tester: &mut Tester<'_>) -> Check {
    tester.convert(tester.memory.gpa(SHARED), Private, EBUSY)
}

/// Gives the page to a sound card, which plays nothing.
pub(super) fn buffer_in_use(tester: &mut Tester<'_>) -> Result<Queue, Failure> {
    const TRANSMIT: u16 = 2;
    static STATUS: [AtomicU32; 2] = [const { AtomicU32::new(0) }; 2];
    let mut queue = Queue::open(Kind::Sound, 0, TRANSMIT).map_err(Failure::Missing)?;
    let buffer = |address, length, writable| Buffer {
        address,
        length,
        writable,
    };
    let buffers = [
        buffer(tester.memory.gpa(SHARED), PAGE_SIZE as u32, false),
        buffer(STATUS.as_ptr() as u64, 8, true),
    ];
    // A stream that the card has: other buffers it gives back at once.
    tester.memory.write(SHARED, Shared, 0, 0);
    // SAFETY: the page is test memory; nobody else uses the status.
    unsafe { queue.give(&buffers) };
    Ok(queue)
}
