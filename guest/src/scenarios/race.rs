// SPDX-License-Identifier: GPL-2.0-or-later
//! Memory that nobody has decided: some CPUs write to pages through the shared view while others touch
//! pages next to them through the private view. With lazy attributes a private touch decides its
//! neighbours too, and must not take away what has been written to them.

use super::Run;
use crate::failure::Failure;
use crate::memory::TestMemory;
use crate::smp::Barrier;
use crate::tester::Check;
use guestmemfd_guest::model::Intent::{self, Private, Shared};
use guestmemfd_guest::pattern::{self, Random};

/// Groups of pages that are raced for, unless the command line has a number.
const COUNT: u64 = 512;
/// Pages in a group. Undecided ones around it are decided with it if the hypervisor's chunk is
/// larger, so the groups that follow each other lie as far from each other as they can.
const GROUP: usize = 16;
/// Groups in 2 MiB.
const GROUPS: usize = 512 / GROUP;
/// Pages of a group that a CPU writes.
const WRITES: usize = 4;
/// Every so many pages of a group one is touched privately, all others are only ever shared.
const PRIVATE_STEP: u64 = 4;

static BARRIER: Barrier = Barrier::new();

/// What a CPU does in the race.
struct Racer {
    memory: TestMemory,
    cpu: usize,
    seed: u64,
    groups: usize,
}

pub(super) fn run(run: &mut Run<'_>, cpu: usize, memory: TestMemory) {
    let plan = run.tester.plan;
    let count = plan.options.count.unwrap_or(COUNT) as usize;
    let racer = Racer {
        memory,
        cpu,
        seed: plan.options.seed,
        groups: count.min(memory.pages() / GROUP),
    };
    run.test("shared and private writes side by side", |_| {
        for group in 0..racer.groups {
            // All at the same group at the same time.
            BARRIER.wait(plan.cpus);
            racer.pages(group).for_each(|(page, view)| {
                racer.memory.write(page, view, 0, racer.word(page));
            });
        }
        Ok(())
    });
    BARRIER.wait(plan.cpus);
    run.test("every write is there", |_| racer.check());
}

impl Racer {
    /// The pages of a group that this CPU writes, and the view through which it does. CPUs take
    /// turns at being the one that touches privately.
    fn pages(&self, group: usize) -> impl Iterator<Item = (usize, Intent)> {
        let mut random = Random::new(self.seed ^ ((group as u64) << 8 | self.cpu as u64));
        let view = if (self.cpu + group).is_multiple_of(2) {
            Shared
        } else {
            Private
        };
        let chunks = self.memory.pages() / (GROUP * GROUPS);
        let first = (group % chunks * GROUPS + group / chunks) * GROUP;
        let private = pattern::word(self.seed, first as u64, 0) % PRIVATE_STEP;
        (0..WRITES).map(move |_| {
            loop {
                let number = random.below(GROUP as u64);
                if (number % PRIVATE_STEP == private) == (view == Private) {
                    return (first + number as usize, view);
                }
            }
        })
    }

    fn word(&self, page: usize) -> u64 {
        pattern::word(self.seed, self.memory.gpa(page), 1)
    }

    fn check(&self) -> Check {
        for (page, intent) in (0..self.groups).flat_map(|group| self.pages(group)) {
            let got = self.memory.read(page, intent, 0);
            if got != self.word(page) {
                return Err(Failure::Memory {
                    intent,
                    gpa: self.memory.gpa(page),
                    got,
                    expected: self.word(page),
                });
            }
        }
        Ok(())
    }
}
