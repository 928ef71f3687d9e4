// SPDX-License-Identifier: GPL-2.0-or-later
//! Conversions by hypercall.

use super::Run;
use crate::tester::{Check, Tester};
use core::ops::Range;
use guestmemfd_guest::layout::SLICE_PAGES;
use guestmemfd_guest::model::Intent::{self, Private, Shared};

/// Pages in 2 MiB.
const LARGE: usize = 512;
/// The second 2 MiB of the slice.
const MIDDLE: Range<usize> = LARGE..2 * LARGE;

const NEIGHBOUR: u64 = 1;
const OLD: u64 = 2;
const SECRET: u64 = 3;
const NEW: u64 = 4;

pub(super) fn run(run: &mut Run<'_>) {
    run.test("4 KiB, there and back", |tester| round_trip(tester, 17..18));
    run.test("64 KiB, there and back", |tester| {
        round_trip(tester, 32..48)
    });
    run.test("2 MiB, there and back", |tester| round_trip(tester, MIDDLE));
    run.test("2 MiB unaligned, there and back", |tester| {
        round_trip(tester, 259..259 + LARGE)
    });
    run.test("across 2 MiB borders, there and back", |tester| {
        round_trip(tester, 1..SLICE_PAGES - 1)
    });
    run.test("odd pages, then even pages", odd_and_even);
    run.test("a range partly private, made private", |tester| {
        partly(tester, Private)
    });
    run.test("a range partly private, made shared", |tester| {
        partly(tester, Shared)
    });
    run.test("private and shared data stay side by side", leave_both);
}

/// To private and back, with everything that must be seen on the way.
fn round_trip(tester: &mut Tester<'_>, pages: Range<usize>) -> Check {
    let neighbours = [pages.start - 1..pages.start, pages.end..pages.end + 1];
    tester.all_shared(pages.start - 1..pages.end + 1)?;
    for neighbour in neighbours.clone() {
        tester.fill(neighbour, Shared, NEIGHBOUR);
    }
    tester.fill(pages.clone(), Shared, OLD);

    tester.request(pages.clone(), Private)?;
    tester.as_expected(pages.clone(), Private)?;
    tester.fill(pages.clone(), Private, SECRET);
    tester.holds(pages.clone(), Private, SECRET)?;
    tester.request(pages.clone(), Private)?;
    tester.holds(pages.clone(), Private, SECRET)?;

    tester.request(pages.clone(), Shared)?;
    tester.as_expected(pages.clone(), Shared)?;
    for page in pages.clone().step_by(8).chain([pages.end - 1]) {
        tester.host_writes(page)?;
    }
    tester.fill(pages.clone(), Shared, NEW);
    tester.request(pages.clone(), Shared)?;
    tester.holds(pages, Shared, NEW)?;
    for neighbour in neighbours {
        tester.holds(neighbour, Shared, NEIGHBOUR)?;
    }
    Ok(())
}

/// Holes: every second page of 2 MiB changes, the others stay.
fn odd_and_even(tester: &mut Tester<'_>) -> Check {
    let odd = || MIDDLE.skip(1).step_by(2);
    let even = || MIDDLE.step_by(2);
    tester.all_shared(MIDDLE)?;
    tester.fill(MIDDLE, Shared, OLD);

    convert_each(tester, odd(), Private)?;
    for page in even() {
        tester.holds(page..page + 1, Shared, OLD)?;
    }
    convert_each(tester, even(), Private)?;
    for page in MIDDLE {
        tester.holds(page..page + 1, Private, SECRET)?;
    }
    convert_each(tester, odd(), Shared)?;
    for page in even() {
        tester.holds(page..page + 1, Private, SECRET)?;
    }
    convert_each(tester, even(), Shared)?;
    tester.holds(MIDDLE, Shared, SECRET)
}

/// Converts pages one by one, looks at each, and fills it.
fn convert_each(
    tester: &mut Tester<'_>,
    pages: impl Iterator<Item = usize>,
    intent: Intent,
) -> Check {
    for page in pages {
        tester.request(page..page + 1, intent)?;
        tester.as_expected(page..page + 1, intent)?;
        tester.fill(page..page + 1, intent, SECRET);
    }
    Ok(())
}

/// A request for pages some of which are in that state already: those keep what they hold.
fn partly(tester: &mut Tester<'_>, intent: Intent) -> Check {
    const BLOCK: usize = 64;
    let private_blocks = || MIDDLE.step_by(2 * BLOCK).map(|start| start..start + BLOCK);
    let shared_blocks = || {
        MIDDLE
            .skip(BLOCK)
            .step_by(2 * BLOCK)
            .map(|start| start..start + BLOCK)
    };

    tester.all_shared(MIDDLE)?;
    for block in private_blocks() {
        tester.request(block.clone(), Private)?;
        tester.fill(block, Private, SECRET);
    }
    for block in shared_blocks() {
        tester.fill(block, Shared, OLD);
    }

    tester.request(MIDDLE, intent)?;
    for block in private_blocks() {
        match intent {
            Private => tester.holds(block, Private, SECRET)?,
            Shared => tester.as_expected(block, Shared)?,
        }
    }
    for block in shared_blocks() {
        match intent {
            Private => tester.as_expected(block, Private)?,
            Shared => tester.holds(block, Shared, OLD)?,
        }
    }
    Ok(())
}

/// The state that the scenario leaves for whoever counts: the middle 2 MiB private, what is around
/// it shared.
fn leave_both(tester: &mut Tester<'_>) -> Check {
    tester.all_shared(0..SLICE_PAGES)?;
    tester.request(MIDDLE, Private)?;
    tester.fill(MIDDLE, Private, SECRET);
    let around = [0..MIDDLE.start, MIDDLE.end..SLICE_PAGES];
    for pages in around.clone() {
        tester.request(pages.clone(), Shared)?;
        tester.fill(pages, Shared, NEW);
    }
    for pages in around {
        tester.holds(pages, Shared, NEW)?;
    }
    tester.holds(MIDDLE, Private, SECRET)
}
