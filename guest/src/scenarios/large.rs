// SPDX-License-Identifier: GPL-2.0-or-later
//! Few touches, spread over all the memory that there is. What lies between them must cost the host
//! nothing.

use super::Run;
use crate::failure::Failure;
use crate::memory::TestMemory;
use crate::tester::{Check, GRANTED, Tester};
use guestmemfd_guest::cmdline::Contents;
use guestmemfd_guest::model::Intent::{self, Private, Shared};
use guestmemfd_guest::pattern;

/// Pages that all CPUs touch, unless the command line has a number. Half of them are private.
const COUNT: u64 = 1024;

/// Pages that a CPU touches.
struct Sparse {
    memory: TestMemory,
    strict: bool,
    /// Is what nobody has touched empty? Firmware may have left something.
    empty: bool,
    first: usize,
    cpus: usize,
    stride: usize,
    count: usize,
}

pub(super) fn run(run: &mut Run<'_>, cpu: usize, strict: bool, memory: TestMemory) {
    let plan = run.tester.plan;
    let count = plan.options.count.unwrap_or(COUNT) as usize;
    let sparse = Sparse {
        memory,
        strict,
        empty: plan.options.contents != Contents::Unknown,
        first: cpu,
        cpus: plan.cpus,
        stride: (memory.pages() / count).max(1),
        count: count.min(memory.pages()),
    };
    let what = match sparse.empty {
        true => "every touched page is empty",
        false => "pages are touched",
    };
    run.test(what, |tester| sparse.touch(tester));
    run.test("every touched page keeps what was written", |_| {
        sparse.check()
    });
    let count = |intent| sparse.pages().filter(|each| each.1 == intent).count() as u64;
    run.touched.private += count(Private);
    run.touched.shared += count(Shared);
}

impl Sparse {
    /// The pages, and the views through which they are touched.
    fn pages(&self) -> impl Iterator<Item = (usize, Intent)> + '_ {
        (self.first..self.count).step_by(self.cpus).map(|number| {
            // The place within the stride differs too.
            let page = number * self.stride + number * 7 % self.stride;
            (page, if number % 2 == 0 { Private } else { Shared })
        })
    }

    fn touch(&self, tester: &mut Tester<'_>) -> Check {
        for (page, intent) in self.pages() {
            if !self.strict {
                tester.convert(self.memory.gpa(page), intent, GRANTED)?;
            } else if intent == Private {
                tester.model.counts.faults_private += 1;
            }
            if self.empty {
                self.word_is(page, intent, 0)?;
            }
            self.memory.write(page, intent, 0, self.tag(page));
        }
        Ok(())
    }

    fn check(&self) -> Check {
        self.pages()
            .try_for_each(|(page, intent)| self.word_is(page, intent, self.tag(page)))
    }

    fn tag(&self, page: usize) -> u64 {
        pattern::word(1, self.memory.gpa(page), 0)
    }

    fn word_is(&self, page: usize, intent: Intent, expected: u64) -> Check {
        let got = self.memory.read(page, intent, 0);
        if got == expected {
            return Ok(());
        }
        Err(Failure::Memory {
            intent,
            gpa: self.memory.gpa(page),
            got,
            expected,
        })
    }
}
