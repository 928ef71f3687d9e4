// SPDX-License-Identifier: GPL-2.0-or-later
//! What a guest finds that runs after another one in the same machine: none of its secrets. Then it
//! leaves some itself.

use super::Run;
use crate::tester::{Check, Tester};
use guestmemfd_guest::layout::SLICE_PAGES;
use guestmemfd_guest::model::Intent::{self, Private, Shared};
use guestmemfd_guest::pattern::{self, WORDS};

/// The same in every guest, so that each knows those of the one before.
const SECRET: u64 = 0x5ec4_e700;

/// Every so many pages there is a secret.
const STEP: usize = 3;

pub(super) fn run(run: &mut Run<'_>) {
    run.test("no secret of an earlier guest shows", |tester| {
        no_secret(tester, Shared)
    });
    run.test("nor does one in private memory", |tester| {
        tester.request(0..SLICE_PAGES, Private)?;
        (0..SLICE_PAGES)
            .step_by(STEP)
            .try_for_each(|page| tester.as_expected(page..page + 1, Private))?;
        no_secret(tester, Private)
    });
    run.test("secrets are left", |tester| {
        for page in (0..SLICE_PAGES).step_by(STEP) {
            tester.fill(page..page + 1, Private, SECRET);
            tester.holds(page..page + 1, Private, SECRET)?;
        }
        Ok(())
    });
}

fn no_secret(tester: &mut Tester<'_>, intent: Intent) -> Check {
    for page in (0..SLICE_PAGES).step_by(STEP) {
        let gpa = tester.memory.gpa(page);
        let word = |index| tester.memory.read(page, intent, index);
        let is_secret = |&index: &usize| word(index) == pattern::word(SECRET, gpa, index);
        if let Some(index) = (0..WORDS).find(is_secret) {
            tester.word_is(page, intent, index, word(index), 0)?;
        }
    }
    Ok(())
}
