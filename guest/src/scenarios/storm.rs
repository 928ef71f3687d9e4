// SPDX-License-Identifier: GPL-2.0-or-later
//! All CPUs at once: random ranges in both directions, by request and by touching. Each checks what
//! is in the pages that no other CPU converts; the ranges reach into those that others do.

use super::Run;
use crate::failure::Failure;
use crate::hypercall;
use crate::memory::TestMemory;
use crate::smp::Barrier;
use crate::tester::{Check, Tester};
use guestmemfd_guest::layout::SLICE_PAGES;
use guestmemfd_guest::model::Intent::{self, Private, Shared};
use guestmemfd_guest::pattern::Random;
use guestmemfd_guest::storm::{self, OWN};

/// Requests and accesses of a CPU in an area, unless the command line has a number.
const COUNT: u64 = 300;

static BARRIER: Barrier = Barrier::new();

pub(super) fn run(run: &mut Run<'_>, cpu: usize, strict: bool, all: TestMemory) {
    let seed = run.tester.plan.options.seed;
    let mut storm = Storm {
        cpu,
        strict,
        all,
        random: Random::new(seed << 16 | cpu as u64),
        tag: 0,
    };
    let cpus = run.tester.plan.cpus;
    run.test("random ranges in both directions", |tester| {
        let count = tester.plan.options.count.unwrap_or(COUNT);
        (0..count).try_for_each(|_| storm.step(tester))
    });
    BARRIER.wait(cpus);
    run.test("every page holds what its CPU put there", |tester| {
        for page in OWN {
            tester.as_expected(page..page + 1, tester.view(page))?;
        }
        Ok(())
    });
    run.test("what others have converted comes to rest", settle);
    run.touched(OWN);
}

struct Storm {
    cpu: usize,
    /// Does touching memory convert it?
    strict: bool,
    /// The slices of all CPUs.
    all: TestMemory,
    random: Random,
    tag: u64,
}

impl Storm {
    fn step(&mut self, tester: &mut Tester<'_>) -> Check {
        match self.random.below(10) {
            0..5 => self.request(tester),
            5..7 if self.strict => {
                self.touch_anywhere();
                Ok(())
            }
            _ => self.access(tester),
        }
    }

    fn intent(&mut self) -> Intent {
        if self.random.below(2) == 0 {
            Private
        } else {
            Shared
        }
    }

    /// Converts a range, which may belong to neighbours in part or as a whole.
    fn request(&mut self, tester: &mut Tester<'_>) -> Check {
        let range = storm::range(&mut self.random, self.cpu, tester.plan.cpus);
        let intent = self.intent();
        let gpa = self.all.gpa(range.start);
        let attributes = hypercall::attributes(intent);
        let pages = range.len() as u64;
        let got = hypercall::map_gpa_range(gpa, pages, attributes);
        if got != 0 {
            return Err(Failure::Request {
                gpa,
                pages,
                attributes,
                got,
                expected: "0",
            });
        }
        let slice = self.cpu * SLICE_PAGES;
        let first = range.start.saturating_sub(slice).min(SLICE_PAGES);
        let end = range.end.saturating_sub(slice).min(SLICE_PAGES);
        tester.converted(first..end, intent);
        Ok(())
    }

    /// Reads or writes a page that others convert too.
    fn touch_anywhere(&mut self) {
        let pages = self.all.pages();
        let page = self.random.below(pages as u64) as usize;
        let intent = self.intent();
        if OWN.contains(&(page % SLICE_PAGES)) {
            return;
        }
        if self.random.below(2) == 0 {
            self.all.write(page, intent, 0, self.tag);
        } else {
            self.all.read(page, intent, 0);
        }
    }

    /// Checks or fills a page of its own.
    fn access(&mut self, tester: &mut Tester<'_>) -> Check {
        let page = OWN.start + self.random.below(OWN.len() as u64) as usize;
        let intent = if self.strict {
            self.intent()
        } else {
            tester.view(page)
        };
        if self.random.below(2) == 0 {
            self.tag += 1;
            tester.fill(page..page + 1, intent, self.tag);
            Ok(())
        } else {
            tester.as_expected(page..page + 1, intent)
        }
    }
}

/// Every CPU brings the parts of its slice that others have converted into a known state, in which
/// nothing has been touched.
fn settle(tester: &mut Tester<'_>) -> Check {
    for pages in [0..OWN.start, OWN.end..SLICE_PAGES] {
        tester.request(pages.clone(), Shared)?;
        tester.request(pages.clone(), Private)?;
        let half = pages.start..pages.start + pages.len() / 2;
        tester.request(half, Shared)?;
    }
    Ok(())
}
