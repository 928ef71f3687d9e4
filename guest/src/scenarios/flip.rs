// SPDX-License-Identifier: GPL-2.0-or-later
//! The same pages back and forth.

use super::Run;
use crate::tester::{Check, Tester};
use core::ops::Range;
use guestmemfd_guest::model::Intent::{self, Private, Shared};

/// Flips of a page, unless the command line has a number. There are an eighth as many of 2 MiB.
const COUNT: u64 = 64;
/// One page in the middle of the slice.
const PAGE: Range<usize> = 700..701;
/// The second 2 MiB.
const LARGE: Range<usize> = 512..1024;
/// Of 2 MiB, every so many pages are touched.
const STEP: usize = 73;

pub(super) fn run(run: &mut Run<'_>, strict: bool) {
    run.test("one page, by request", |tester| {
        flip(tester, PAGE, 1, request)
    });
    run.test("2 MiB, by request", |tester| {
        flip(tester, LARGE, 8, request)
    });
    if strict {
        run.test("one page, by touching", |tester| {
            flip(tester, PAGE, 1, nothing)
        });
        run.test("pages of 2 MiB, by touching", |tester| {
            flip(tester, LARGE, 8, nothing)
        });
    }
}

fn request(tester: &mut Tester<'_>, pages: Range<usize>, intent: Intent) -> Check {
    tester.request(pages, intent)
}

/// The accesses that follow convert the pages.
fn nothing(_: &mut Tester<'_>, _: Range<usize>, _: Intent) -> Check {
    Ok(())
}

fn flip(
    tester: &mut Tester<'_>,
    pages: Range<usize>,
    divisor: u64,
    convert: fn(&mut Tester<'_>, Range<usize>, Intent) -> Check,
) -> Check {
    tester.request(pages.clone(), Shared)?;
    let count = tester.plan.options.count.unwrap_or(COUNT).div_ceil(divisor);
    for tag in 1..=count {
        for intent in [Private, Shared] {
            convert(tester, pages.clone(), intent)?;
            for page in pages.clone().step_by(STEP) {
                tester.as_expected(page..page + 1, intent)?;
                tester.fill(page..page + 1, intent, tag);
            }
            for page in pages.clone().step_by(STEP) {
                tester.holds(page..page + 1, intent, tag)?;
            }
        }
    }
    Ok(())
}
