// SPDX-License-Identifier: GPL-2.0-or-later
//! Requests that must be refused. Each is answered with an error number, changes nothing, and the
//! guest goes on.

use super::Run;
use crate::failure::Failure;
use crate::hypercall::{self, ENCRYPTED};
use crate::pci::Device;
use crate::tap;
use crate::tester::{Check, EINVAL, Tester};
use core::ops::Range;
use guestmemfd_guest::PAGE_SIZE;
use guestmemfd_guest::layout::EDGE_PAGES;
use guestmemfd_guest::model::Intent::{self, Private, Shared};

/// Two private pages, then two shared ones.
const WITNESSES: Range<usize> = 64..68;

const SECRET: u64 = 1;
const PUBLIC: u64 = 2;
const AGAIN: u64 = 3;

const INTENTS: [Intent; 2] = [Private, Shared];
const FOUR_GIB: u64 = 4 << 30;
/// Between the PCI devices' part of the address space and the APICs, on pc and q35.
const MMIO: u64 = 0xfeb0_0000;
/// Pages of a display's memory: 1 MiB of what it has.
const BAR_PAGES: u64 = 256;
/// Pages that no 64-bit address has.
const ALL_PAGES: u64 = 1 << 52;

pub(super) fn run(run: &mut Run<'_>) {
    run.test("pages to look at", |tester| prepare(tester, WITNESSES));
    run.test("unaligned address", |tester| {
        let gpa = tester.memory.gpa(WITNESSES.start);
        refuse_both(
            tester,
            WITNESSES,
            [gpa + 1, gpa + 0x800, gpa + 0xfff].map(|gpa| (gpa, 1)),
        )
    });
    run.test("no pages", |tester| {
        let gpa = tester.memory.gpa(WITNESSES.start);
        refuse_both(tester, WITNESSES, [(gpa, 0), (0, 0)])
    });
    run.test("ranges that wrap", |tester| {
        let gpa = tester.memory.gpa(WITNESSES.start);
        let frame = gpa / PAGE_SIZE;
        let last = PAGE_SIZE.wrapping_neg();
        let ranges = [
            (gpa, u64::MAX),
            (gpa, u64::MAX - frame),
            (gpa, u64::MAX - frame + 1),
            (last, 2),
            (last, u64::MAX),
            // These fit as frame numbers but not as bytes: 4 KiB times the number is 0, 4 KiB, or
            // ends beyond 2^64.
            (gpa, ALL_PAGES),
            (gpa, ALL_PAGES + 1),
            (gpa, ALL_PAGES - frame + 1),
            (gpa, ALL_PAGES - 1),
        ];
        refuse_both(tester, WITNESSES, ranges)
    });
    run.test("unknown attributes", |tester| {
        let gpa = tester.memory.gpa(WITNESSES.start);
        let bits = (5..64).map(|bit| 1_u64 << bit);
        // Page sizes are 4 KiB, 2 MiB and 1 GiB: 0, 1 and 2.
        for unknown in bits.chain(3..16) {
            for intent in INTENTS {
                tester.refused(gpa, 4, unknown | hypercall::attributes(intent))?;
            }
        }
        intact(tester, WITNESSES)
    });
    run.test("private beyond RAM", |tester| {
        for gpa in [MMIO, FOUR_GIB << 8, 1 << 45, 1 << 51, 1 << 63] {
            tester.refused(gpa, 1, ENCRYPTED)?;
        }
        // From the first page of RAM on, as much as there are addresses.
        tester.refused(0, ALL_PAGES - 1, ENCRYPTED)?;
        intact(tester, WITNESSES)
    });
    run.test("good requests still work", |tester| good(tester, WITNESSES));
}

/// The tests that need the end of RAM. The memory is the last four pages that the firmware leaves
/// to us.
pub(super) fn run_at_edge(run: &mut Run<'_>, ram_end: u64) {
    let edge = || 0..EDGE_PAGES;
    run.test("pages at the end of RAM", |tester| prepare(tester, edge()));
    run.test("private across the end of RAM", |tester| {
        let gpa = tester.memory.gpa(0);
        for beyond in [1, 16, 512] {
            let pages = (ram_end - gpa) / PAGE_SIZE + beyond;
            tester.refused(gpa, pages, ENCRYPTED)?;
            // From a shared page on: nothing of it may become private either.
            tester.refused(gpa + 2 * PAGE_SIZE, pages - 2, ENCRYPTED)?;
        }
        intact(tester, edge())
    });
    if ram_end < FOUR_GIB {
        run.test("private across the MMIO hole", |tester| {
            let gpa = tester.memory.gpa(0);
            for beyond in [0, 8] {
                tester.refused(gpa, (FOUR_GIB - gpa) / PAGE_SIZE + beyond, ENCRYPTED)?;
            }
            intact(tester, edge())
        });
        run.test("shared over MMIO is harmless", |tester| {
            shared_over_mmio(tester)?;
            intact(tester, edge())
        });
        if let Some(bar) = ram_bar() {
            tap::note(format_args!("bad: ram-bar={}", bar / PAGE_SIZE));
            run.test("so it is over a BAR that is RAM", |tester| {
                shared_over_ram(tester, bar)?;
                intact(tester, edge())
            });
        }
    }
    run.test("good requests still work at the end of RAM", |tester| {
        good(tester, edge())
    });
}

/// Puts data into the first two pages as private ones, and into the next two as shared ones.
fn prepare(tester: &mut Tester<'_>, pages: Range<usize>) -> Check {
    let (private, shared) = halves(pages);
    tester.request(private.clone(), Private)?;
    tester.fill(private, Private, SECRET);
    tester.request(shared.clone(), Shared)?;
    tester.fill(shared, Shared, PUBLIC);
    Ok(())
}

fn intact(tester: &mut Tester<'_>, pages: Range<usize>) -> Check {
    let (private, shared) = halves(pages);
    tester.holds(private, Private, SECRET)?;
    tester.holds(shared, Shared, PUBLIC)
}

fn halves(pages: Range<usize>) -> (Range<usize>, Range<usize>) {
    (pages.start..pages.start + 2, pages.start + 2..pages.end)
}

/// Sends each request for both views.
fn refuse_both(
    tester: &mut Tester<'_>,
    witnesses: Range<usize>,
    ranges: impl IntoIterator<Item = (u64, u64)>,
) -> Check {
    for (gpa, pages) in ranges {
        for intent in INTENTS {
            tester.refused(gpa, pages, hypercall::attributes(intent))?;
            intact(tester, witnesses.clone())?;
        }
    }
    Ok(())
}

/// There is nothing to convert, so both success and EINVAL make sense.
fn shared_over_mmio(tester: &mut Tester<'_>) -> Check {
    match hypercall::map_gpa_range(MMIO, 1, 0) {
        0 => Ok(()),
        EINVAL => tester.refused(MMIO, 1, 0),
        got => Err(Failure::Request {
            gpa: MMIO,
            pages: 1,
            attributes: 0,
            got,
            expected: "0 or -22 (EINVAL)",
        }),
    }
}

/// The memory of a display, if there is one.
fn ram_bar() -> Option<u64> {
    /// QEMU's, which has its memory in the first BAR.
    const ID: u32 = 0x1111_1234;
    let display = Device::find(|id| id == ID)?;
    Some(display.registers(0, 0).address())
}

/// It is shared already, as is what lies around it, and cannot be anything else.
fn shared_over_ram(tester: &mut Tester<'_>, bar: u64) -> Check {
    for (gpa, pages) in [(bar, 1), (bar, BAR_PAGES), (bar - PAGE_SIZE, BAR_PAGES + 2)] {
        let got = hypercall::map_gpa_range(gpa, pages, 0);
        if got != 0 {
            return Err(Failure::Request {
                gpa,
                pages,
                attributes: 0,
                got,
                expected: "0",
            });
        }
        // Often enough to be seen if QEMU says something each time.
        (0..10).try_for_each(|_| tester.refused(gpa, pages, ENCRYPTED))?;
    }
    Ok(())
}

/// The private pages become shared and the shared ones private.
fn good(tester: &mut Tester<'_>, pages: Range<usize>) -> Check {
    let (private, shared) = halves(pages);
    for (pages, intent) in [(private, Shared), (shared, Private)] {
        tester.request(pages.clone(), intent)?;
        tester.as_expected(pages.clone(), intent)?;
        tester.fill(pages.clone(), intent, AGAIN);
        tester.holds(pages, intent, AGAIN)?;
    }
    Ok(())
}
