// SPDX-License-Identifier: GPL-2.0-or-later
//! Pages given back to the host through virtio-balloon: by inflating it, and as free pages
//! reported. The host sees in its file that they are gone and their neighbours are not.

use super::Run;
use crate::failure::Failure;
use crate::tap;
use crate::tester::{Check, Tester};
use crate::virtio::{Buffer, Kind, Queue};
use core::ops::Range;
use guestmemfd_guest::PAGE_SIZE;
use guestmemfd_guest::layout::SLICE_PAGES;
use guestmemfd_guest::model::Intent::Shared;

/// The second 2 MiB of the slice are given back.
const GIVEN: Range<usize> = 512..1024;
/// The first of them are used again.
const USED_AGAIN: Range<usize> = 512..528;

const INFLATE_QUEUE: u16 = 0;
const FREE_PAGE_REPORTING: u32 = 1 << 5;
/// Behind the queues for inflating, deflating and statistics.
const REPORTING_QUEUE: u16 = 3;

const TAG: u64 = 1;

pub(super) fn inflate(run: &mut Run<'_>) {
    run.test("pages in the balloon are gone, others stay", |tester| {
        give_back(tester, |tester| {
            let mut queue = open(0, INFLATE_QUEUE)?;
            let mut frames = [0_u32; GIVEN.end - GIVEN.start];
            for (frame, page) in frames.iter_mut().zip(GIVEN) {
                *frame = (tester.memory.gpa(page) / PAGE_SIZE) as u32;
            }
            // As many as Linux gives at once.
            for part in frames.chunks(256) {
                let buffer = Buffer {
                    address: part.as_ptr() as u64,
                    length: size_of_val(part) as u32,
                    writable: false,
                };
                // SAFETY: the device reads the frames; those pages are ours and hold a pattern.
                unsafe { queue.request(&[buffer]) }.map_err(Failure::Missing)?;
            }
            Ok(())
        })
    });
}

pub(super) fn report(run: &mut Run<'_>) {
    run.test("reported pages are gone, others stay", |tester| {
        give_back(tester, |tester| {
            let mut queue = open(FREE_PAGE_REPORTING, REPORTING_QUEUE)?;
            let buffer = Buffer {
                address: tester.memory.gpa(GIVEN.start),
                length: (GIVEN.len() as u64 * PAGE_SIZE) as u32,
                writable: true,
            };
            // SAFETY: the pages are ours and hold a pattern.
            unsafe { queue.request(&[buffer]) }.map_err(Failure::Missing)?;
            Ok(())
        })
    });
}

fn give_back(
    tester: &mut Tester<'_>,
    give: impl FnOnce(&mut Tester<'_>) -> Result<(), Failure>,
) -> Check {
    tester.mark(0..SLICE_PAGES, TAG);
    give(tester)?;
    tester.is_marked(0..GIVEN.start, TAG)?;
    tester.is_marked(GIVEN.end..SLICE_PAGES, TAG)?;
    tester.is_empty(USED_AGAIN, Shared)?;
    tester.mark(USED_AGAIN, TAG);
    tester.is_marked(USED_AGAIN, TAG)?;
    tap::note(format_args!(
        "slice-start={:#x} slice-end={:#x} gone-start={:#x} gone-end={:#x}",
        tester.memory.gpa(0),
        tester.memory.gpa(SLICE_PAGES - 1) + PAGE_SIZE,
        tester.memory.gpa(USED_AGAIN.end),
        tester.memory.gpa(GIVEN.end)
    ));
    Ok(())
}

fn open(features: u32, queue: u16) -> Result<Queue, Failure> {
    Queue::open(Kind::Balloon, features, queue).map_err(Failure::Missing)
}
