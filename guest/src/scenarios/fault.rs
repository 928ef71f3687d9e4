// SPDX-License-Identifier: GPL-2.0-or-later
//! Conversions without any request: in strict mode an access says by its address which view it
//! means, and a page that is in the other one has to be converted before the access can complete.

use super::Run;
use crate::tester::{Check, Content, Tester};
use core::ops::Range;
use guestmemfd_guest::model::Intent::{self, Private, Shared};
use guestmemfd_guest::model::State;
use guestmemfd_guest::pattern::{self, Random, WORDS};

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

/// The first read after a change of view finds nothing of the other view; what is written stays.
fn round_trip(tester: &mut Tester<'_>, pages: Range<usize>) -> Check {
    let neighbours = [pages.start - 1..pages.start, pages.end..pages.end + 1];
    tester.fill(neighbours[0].clone(), Private, NEIGHBOUR);
    tester.fill(neighbours[1].clone(), Shared, NEIGHBOUR);

    tester.fill(pages.clone(), Private, SECRET);
    tester.holds(pages.clone(), Private, SECRET)?;
    tester.is_empty(pages.clone(), Shared)?;
    tester.fill(pages.clone(), Shared, PUBLIC);
    tester.holds(pages.clone(), Shared, PUBLIC)?;
    tester.is_empty(pages.clone(), Private)?;
    tester.fill(pages.clone(), Private, SECRET);
    tester.holds(pages, Private, SECRET)?;

    tester.holds(neighbours[0].clone(), Private, NEIGHBOUR)?;
    tester.holds(neighbours[1].clone(), Shared, NEIGHBOUR)
}

fn host_writes(tester: &mut Tester<'_>) -> Check {
    for page in MIDDLE.step_by(32) {
        tester.fill(page..page + 1, Private, SECRET);
        tester.is_empty(page..page + 1, Shared)?;
        tester.host_writes(page)?;
        tester.is_empty(page..page + 1, Private)?;
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
            // The bytes beside the word show what the page held: nothing, or what it was filled
            // with.
            for (page, index, shift, mine) in [
                (first, WORDS - 1, 32, WORD << 32),
                (first + 1, 0, 0, WORD >> 32),
            ] {
                let old = if page == wrong {
                    0
                } else {
                    pattern::word(SECRET, tester.memory.gpa(page), index)
                };
                let written = 0xffff_ffff << shift;
                let got = tester.memory.read(page, intent, index);
                let known = if tester.plan.options.discards {
                    u64::MAX
                } else {
                    written
                };
                tester.word_is(
                    page,
                    intent,
                    index,
                    got & known,
                    (old & !written | mine) & known,
                )?;
            }
        }
    }
    Ok(())
}

/// Reads and writes through both views in an order given by the seed; other pages must not notice.
fn random(tester: &mut Tester<'_>, cpu: usize) -> Check {
    let mut contents = [Content::Unknown; LARGE];
    let mut random = Random::new(tester.plan.options.seed.wrapping_add(cpu as u64));
    for access in 0..RANDOM_ACCESSES {
        let number = random.below(LARGE as u64) as usize;
        let page = MIDDLE.start + number;
        let intent = if random.below(2) == 0 {
            Private
        } else {
            Shared
        };
        let content = &mut contents[number];
        if changes_view(tester.model.state(page), intent) {
            *content = tester.fresh();
        }
        if random.below(2) == 0 {
            *content = Content::Tag(FIRST_RANDOM + access as u64);
            tester.fill(page..page + 1, intent, FIRST_RANDOM + access as u64);
        } else {
            tester.page_holds(page, intent, *content)?;
        }
    }
    for (number, content) in contents.into_iter().enumerate() {
        let page = MIDDLE.start + number;
        tester.page_holds(page, tester.view(page), content)?;
    }
    Ok(())
}

/// Does an access move a page, as far as the guest can see?
pub(super) fn changes_view(state: State, intent: Intent) -> bool {
    match intent {
        Private => state != State::Private,
        Shared => state == State::Private,
    }
}
