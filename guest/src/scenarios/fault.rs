// SPDX-License-Identifier: GPL-2.0-or-later
//! Conversions without any request: in strict mode an access says by its address which view it
//! means, and a page that is in the other one has to be converted before the access can complete.

use super::Run;
use crate::tester::{Check, Tester};
use core::ops::Range;
use guestmemfd_guest::model::Intent::{Private, Shared};
use guestmemfd_guest::pattern::{Random, WORDS};

/// Pages in 2 MiB.
const LARGE: usize = 512;
/// The second 2 MiB of the slice.
const MIDDLE: Range<usize> = LARGE..2 * LARGE;
/// Accesses in random order.
const RANDOM_ACCESSES: usize = 2048;

const NEIGHBOUR: u64 = 1;
const SECRET: u64 = 2;
const PUBLIC: u64 = 3;
/// Tags from here on belong to the random accesses.
const FIRST_RANDOM: u64 = 1000;

pub(super) fn run(run: &mut Run<'_>, cpu: usize) {
    run.test("4 KiB, private, shared, private", |tester| {
        round_trip(tester, 17..18)
    });
    run.test("64 KiB unaligned, private, shared, private", |tester| {
        round_trip(tester, 37..53)
    });
    run.test("2 MiB, private, shared, private", |tester| {
        round_trip(tester, MIDDLE)
    });
    run.test("QEMU's writes show through the shared view", host_writes);
    run.test("odd pages private, even pages shared", odd_and_even);
    run.test("a write across two pages", write_across);
    run.test("random accesses to 2 MiB", |tester| random(tester, cpu));
}

/// The first read after a change of view finds what a conversion leaves; what is written stays.
fn round_trip(tester: &mut Tester<'_>, pages: Range<usize>) -> Check {
    let neighbours = [pages.start - 1..pages.start, pages.end..pages.end + 1];
    tester.fill(neighbours[0].clone(), Private, NEIGHBOUR);
    tester.fill(neighbours[1].clone(), Shared, NEIGHBOUR);

    tester.fill(pages.clone(), Private, SECRET);
    tester.holds(pages.clone(), Private, SECRET)?;
    tester.as_expected(pages.clone(), Shared)?;
    tester.fill(pages.clone(), Shared, PUBLIC);
    tester.holds(pages.clone(), Shared, PUBLIC)?;
    tester.as_expected(pages.clone(), Private)?;
    tester.fill(pages.clone(), Private, SECRET);
    tester.holds(pages, Private, SECRET)?;

    tester.holds(neighbours[0].clone(), Private, NEIGHBOUR)?;
    tester.holds(neighbours[1].clone(), Shared, NEIGHBOUR)
}

fn host_writes(tester: &mut Tester<'_>) -> Check {
    for page in MIDDLE.step_by(32) {
        tester.fill(page..page + 1, Private, SECRET);
        tester.as_expected(page..page + 1, Shared)?;
        tester.host_writes(page)?;
        tester.as_expected(page..page + 1, Private)?;
    }
    Ok(())
}

fn odd_and_even(tester: &mut Tester<'_>) -> Check {
    let view = |page: usize| if page % 2 == 1 { Private } else { Shared };
    for page in MIDDLE {
        tester.fill(page..page + 1, view(page), SECRET);
    }
    for page in MIDDLE {
        tester.holds(page..page + 1, view(page), SECRET)?;
    }
    Ok(())
}

/// One instruction, two pages, one of which is in the other view: it is carried out once both are
/// right.
fn write_across(tester: &mut Tester<'_>) -> Check {
    const WORD: u64 = 0x0123_4567_89ab_cdef;
    let first = MIDDLE.start;
    for (intent, other) in [(Private, Shared), (Shared, Private)] {
        for wrong in [first, first + 1] {
            for page in [first, first + 1] {
                let view = if page == wrong { other } else { intent };
                tester.fill(page..page + 1, view, SECRET);
            }
            for page in [first, first + 1] {
                tester.touch(page, intent);
            }
            tester.memory.write_across(first, intent, WORD);
            // The bytes beside the word show what the page held.
            for (page, index, shift, mine) in [
                (first, WORDS - 1, 32, WORD << 32),
                (first + 1, 0, 0, WORD >> 32),
            ] {
                let written = 0xffff_ffff << shift;
                let got = tester.memory.read(page, intent, index);
                let (old, known) = match tester.expected_word(page, index) {
                    Some(old) => (old, u64::MAX),
                    None => (0, written),
                };
                let expected = old & !written | mine;
                tester.word_is(page, intent, index, got & known, expected & known)?;
            }
            tester.forget(first..first + 2);
        }
    }
    Ok(())
}

/// Reads and writes through both views in an order given by the seed; other pages must not notice.
fn random(tester: &mut Tester<'_>, cpu: usize) -> Check {
    let mut random = Random::new(tester.plan.options.seed.wrapping_add(cpu as u64));
    for access in 0..RANDOM_ACCESSES {
        let page = MIDDLE.start + random.below(LARGE as u64) as usize;
        let intent = if random.below(2) == 0 {
            Private
        } else {
            Shared
        };
        if random.below(2) == 0 {
            tester.fill(page..page + 1, intent, FIRST_RANDOM + access as u64);
        } else {
            tester.as_expected(page..page + 1, intent)?;
        }
    }
    for page in MIDDLE {
        tester.as_expected(page..page + 1, tester.view(page))?;
    }
    Ok(())
}
