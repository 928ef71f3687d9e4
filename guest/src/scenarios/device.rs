// SPDX-License-Identifier: GPL-2.0-or-later
//! Devices and private memory: what is private stays out of their reach, and what they use does not
//! become private.

use super::sweep::rest;
use super::{Run, disk};
use crate::failure::Failure;
use crate::hypercall;
use crate::tester::{Check, Tester};
use crate::virtio::{Buffer, Kind, Queue};
use crate::{apic, fwcfg, tap, vapic};
use guestmemfd_guest::model::Intent::{Private, Shared};
use guestmemfd_guest::{DISK_PART, PAGE_SIZE};

/// What a request is answered with while a device uses its pages.
const EBUSY: i64 = -16;
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
        let (gpa, attributes) = (rom & !(PAGE_SIZE - 1), hypercall::attributes(Private));
        tester.model.counts.hypercalls += 1;
        match hypercall::map_gpa_range(gpa, 1, attributes) {
            // The second time shows that the first has left QEMU in order.
            0 => (0..2).for_each(|_| vapic::announce()),
            got => {
                return Err(Failure::Request {
                    gpa,
                    pages: 1,
                    attributes,
                    got,
                    expected: "0",
                });
            }
        }
        tester.holds(PRIVATE..PRIVATE + 1, Private, SECRET)
    });
    run.test("a disk does not write to private pages", |tester| {
        let (first, pages) = (disk::FIRST_PAGE, disk::PAGES);
        tester.request(first..first + pages, Private)?;
        tester.fill(first..first + pages, Private, SECRET);
        breaks(tester)?;
        tester.holds(first..first + pages, Private, SECRET)
    });
    run.test("once they are shared it does", |tester| {
        let (first, pages) = (disk::FIRST_PAGE, disk::PAGES);
        tester.request(first..first + pages, Shared)?;
        disk::reads(tester)
    });
    run.test("rings of a device do not become private", |tester| {
        let queue = Queue::open(Kind::Disk, 0, 0).map_err(Failure::Missing)?;
        let gpa = queue.rings();
        let attributes = hypercall::attributes(Private);
        let got = hypercall::map_gpa_range(gpa, 1, attributes);
        tester.model.counts.hypercalls += 1;
        tester.model.counts.refused += 1;
        drop(queue);
        if got != EBUSY {
            return Err(Failure::Request {
                gpa,
                pages: 1,
                attributes,
                got,
                expected: "-16 (EBUSY)",
            });
        }
        disk::reads(tester)
    });
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

/// A disk that is to read into private memory gives up, until it is reset.
fn breaks(tester: &mut Tester<'_>) -> Check {
    let mut queue = Queue::open(Kind::Disk, 0, 0).map_err(Failure::Missing)?;
    let header = disk::Header::read(0);
    let mut status = 0xff_u8;
    let buffer = |address, length, writable| Buffer {
        address,
        length,
        writable,
    };
    let buffers = [
        buffer(&raw const header as u64, size_of_val(&header) as u32, false),
        buffer(tester.memory.gpa(disk::FIRST_PAGE), DISK_PART as u32, true),
        buffer(&raw mut status as u64, 1, true),
    ];
    // SAFETY: the pages are test memory; header and status outlive the queue's use of them.
    match unsafe { queue.request(&buffers) } {
        Err(_) => Ok(()),
        Ok(()) => Err(Failure::Missing("the device has carried out the request")),
    }
}
