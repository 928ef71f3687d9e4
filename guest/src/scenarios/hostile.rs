// SPDX-License-Identifier: GPL-2.0-or-later
//! A guest that means harm: any numbers in the registers of hypercalls, and touches of any memory in
//! any view. Nothing may come of it but error numbers.

use super::Run;
use crate::failure::Failure;
use crate::hypercall;
use crate::memory::TestMemory;
use crate::smp::Barrier;
use crate::tester::{Check, Tester};
use guestmemfd_guest::hostile::{MAP_GPA_RANGE, World};
use guestmemfd_guest::layout::SLICE_PAGES;
use guestmemfd_guest::model::Intent::{Private, Shared};
use guestmemfd_guest::pattern::Random;

/// Calls and touches of all CPUs in all areas, unless the command line has a number.
const COUNT: u64 = 10_000;
const SECRET: u64 = 1;

static BARRIER: Barrier = Barrier::new();

/// `strict`: the slices of all CPUs and a page behind the end of RAM, if touching memory converts it.
pub(super) fn run(run: &mut Run<'_>, cpu: usize, strict: Option<[TestMemory; 2]>) {
    let plan = run.tester.plan;
    let world = plan.world();
    let mut random = Random::new(plan.options.seed << 16 | cpu as u64);
    run.test("any numbers, any touches", |tester| {
        let count = plan.options.count.unwrap_or(COUNT);
        let parts = plan.cpus * plan.areas.iter().flatten().count();
        for _ in 0..count.div_ceil(parts as u64) {
            match &strict {
                Some([all, nothing]) if random.below(8) == 0 => touch(all, nothing, &mut random),
                _ => call(tester, &world, &mut random)?,
            }
        }
        Ok(())
    });
    BARRIER.wait(plan.cpus);
    // A DIMM need not be there any more.
    if !world.dimm || run.area == "low" {
        run.test("good requests still work", good);
    }
}

fn call(tester: &mut Tester<'_>, world: &World, random: &mut Random) -> Check {
    let call = world.call(random);
    let expected = world.answer(&call);
    let got = hypercall::call(call.number, call.arguments);
    if call.number == MAP_GPA_RANGE {
        // The others count as well, so this is what QEMU must have counted at least.
        tester.model.counts.hypercalls += u64::from(got == 0);
    }
    if expected.allows(got) {
        return Ok(());
    }
    Err(Failure::Call {
        call,
        got,
        expected,
    })
}

/// Test memory, or nothing: what lies behind the end of RAM, in either view. Some pages in one after
/// the other, or hardly any touch would convert one back.
fn touch(all: &TestMemory, nothing: &TestMemory, random: &mut Random) {
    let (intent, other) = match random.below(2) {
        0 => (Private, Shared),
        _ => (Shared, Private),
    };
    let page = random.below(all.pages() as u64) as usize;
    let index = random.below(512) as usize;
    match random.below(16) {
        0 => nothing.write(0, intent, index, random.any()),
        1 => drop(nothing.read(0, intent, index)),
        2..6 => all.write_across(page.min(all.pages() - 2), intent, random.any()),
        6..11 => {
            all.write(page, intent, index, random.any());
            all.read(page, other, index);
        }
        _ => drop(all.read(page, intent, index)),
    }
}

/// Brings all pages into a known state, in which they keep what is written.
fn good(tester: &mut Tester<'_>) -> Check {
    tester.request(0..SLICE_PAGES, Shared)?;
    tester.request(0..SLICE_PAGES, Private)?;
    for page in (0..SLICE_PAGES).step_by(64) {
        tester.as_expected(page..page + 1, Private)?;
        tester.fill(page..page + 1, Private, SECRET);
        tester.holds(page..page + 1, Private, SECRET)?;
    }
    Ok(())
}
