// SPDX-License-Identifier: GPL-2.0-or-later
//! A device that goes its own way to memory, as those do that VFIO has handed to the guest: it reaches
//! what is shared, whatever is converted next to it, and nothing that is private.
//!
//! In ordinary guests it only carries data.

use super::Run;
use crate::cpu::MAX_CPUS;
use crate::edu::Edu;
use crate::failure::Failure;
use crate::hypercall;
use crate::smp::Barrier;
use crate::tester::{Check, Tester};
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use guestmemfd_guest::model::Intent::{Private, Shared};
use guestmemfd_guest::pattern::{self, WORDS};

/// Transfers of the tests that repeat something, unless the command line has a number. Each takes
/// the device 100 ms.
const COUNT: u64 = 4;
/// What the device takes its data from, and where it brings it.
const SOURCE: usize = 0;
const TARGET: usize = 100;
const OTHER: usize = 200;
/// Around the target.
const NEIGHBOURS: [Range<usize>; 2] = [TARGET - 20..TARGET, TARGET + 1..TARGET + 20];
/// In a chunk of lazy attributes that nothing else touches.
const UNDECIDED: usize = 700;
/// Pages that are private in the end.
const LEFT: Range<usize> = 1024..1536;
/// What private pages are filled with.
const SECRET: u64 = 0x5ec7e7;

/// The page that each CPU converts while the device writes to it.
static TARGETS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
static DONE: AtomicBool = AtomicBool::new(false);
static BARRIER: Barrier = Barrier::new();

/// `strict`: touching memory converts it.
pub(super) fn run(run: &mut Run<'_>, cpu: usize, strict: bool) {
    if cpu == 0 {
        alone(run, strict);
    }
    if run.tester.plan.cpus > 1 && hypercall::enabled() {
        together(run, cpu);
    }
}

/// What one CPU can try.
fn alone(run: &mut Run<'_>, strict: bool) {
    run.test("a device carries data from page to page", |tester| {
        carries(tester, &open()?, 1)
    });
    if !hypercall::enabled() {
        return;
    }
    run.test("it does not write to a private page", does_not_write);
    run.test("nor does it read one", does_not_read);
    run.test("once the page is shared it does both", |tester| {
        tester.request(TARGET..TARGET + 1, Shared)?;
        tester.as_expected(TARGET..TARGET + 1, Shared)?;
        carries(tester, &open()?, 4)
    });
    run.test("time and again", |tester| {
        let edu = open()?;
        for tag in 0..count(tester) {
            make_secret(tester, TARGET)?;
            tester.request(TARGET..TARGET + 1, Shared)?;
            carries(tester, &edu, 100 + tag)?;
        }
        Ok(())
    });
    run.test("a page becomes private under a transfer", |tester| {
        let edu = open()?;
        load(tester, &edu, 5);
        write(tester, &edu, TARGET);
        make_secret(tester, TARGET)?;
        edu.wait();
        tester.holds(TARGET..TARGET + 1, Private, SECRET)?;
        tester.request(TARGET..TARGET + 1, Shared)?;
        tester.as_expected(TARGET..TARGET + 1, Shared)
    });
    run.test("others do without harm to it", |tester| {
        let edu = open()?;
        load(tester, &edu, 6);
        write(tester, &edu, TARGET);
        while edu.is_busy() {
            for intent in [Private, Shared] {
                for pages in NEIGHBOURS {
                    tester.request(pages, intent)?;
                }
            }
        }
        edu.wait();
        arrived(tester, TARGET, 6)
    });
    run.test("much memory becomes private", |tester| {
        tester.request(LEFT, Private)
    });
    if strict {
        run.test("a page that nobody has decided stays in reach", |tester| {
            let edu = open()?;
            load(tester, &edu, 7);
            write(tester, &edu, UNDECIDED);
            tester.fill(UNDECIDED + 1..UNDECIDED + 20, Private, SECRET);
            edu.wait();
            arrived(tester, UNDECIDED, 7)
        });
    }
}

/// The first CPU has the device write to pages that the others convert.
fn together(run: &mut Run<'_>, cpu: usize) {
    let cpus = run.tester.plan.cpus;
    TARGETS[cpu].store(run.tester.memory.gpa(TARGET), Ordering::Release);
    DONE.store(false, Ordering::Release);
    BARRIER.wait(cpus);
    match cpu {
        0 => {
            run.test(
                "a device writes to pages that other CPUs convert",
                |tester| {
                    let result = write_to_others(tester, cpus);
                    DONE.store(true, Ordering::Release);
                    result
                },
            );
        }
        _ => run.test(
            "pages convert while a device writes to them",
            convert_until_done,
        ),
    }
    BARRIER.wait(cpus);
}

fn write_to_others(tester: &mut Tester<'_>, cpus: usize) -> Check {
    let edu = open()?;
    load(tester, &edu, 8);
    for transfer in 0..2 * count(tester) as usize {
        let target = TARGETS[1 + transfer % (cpus - 1)].load(Ordering::Acquire);
        // SAFETY: the page is test memory of another CPU's.
        unsafe { edu.write(target) };
        edu.wait();
    }
    // What is refused does not keep the device from what is allowed.
    write(tester, &edu, TARGET);
    edu.wait();
    arrived(tester, TARGET, 8)
}

/// Private, the page must keep what it holds; shared, it is the device's.
fn convert_until_done(tester: &mut Tester<'_>) -> Check {
    while !DONE.load(Ordering::Acquire) {
        make_secret(tester, TARGET)?;
        for _ in 0..4 {
            tester.holds(TARGET..TARGET + 1, Private, SECRET)?;
        }
        tester.request(TARGET..TARGET + 1, Shared)?;
    }
    Ok(())
}

fn does_not_write(tester: &mut Tester<'_>) -> Check {
    let edu = open()?;
    load(tester, &edu, 2);
    make_secret(tester, TARGET)?;
    write(tester, &edu, TARGET);
    edu.wait();
    tester.holds(TARGET..TARGET + 1, Private, SECRET)
}

/// The page is private and holds the secret. What the device has instead does not matter.
fn does_not_read(tester: &mut Tester<'_>) -> Check {
    let edu = open()?;
    // SAFETY: the page is test memory.
    unsafe { edu.read(tester.memory.gpa(TARGET)) };
    tester.fill(OTHER..OTHER + 1, Shared, 3);
    write(tester, &edu, OTHER);
    edu.wait();
    let gpa = tester.memory.gpa(TARGET);
    for index in 0..WORDS {
        let got = tester.memory.read(OTHER, Shared, index);
        if got == pattern::word(SECRET, gpa, index) {
            return Err(Failure::Missing("the device has read private memory"));
        }
    }
    tester.holds(TARGET..TARGET + 1, Private, SECRET)
}

fn open() -> Result<Edu, Failure> {
    Edu::open().map_err(Failure::Missing)
}

fn count(tester: &Tester<'_>) -> u64 {
    tester.plan.options.count.unwrap_or(COUNT)
}

/// Makes a page private and fills it.
fn make_secret(tester: &mut Tester<'_>, page: usize) -> Check {
    tester.request(page..page + 1, Private)?;
    tester.fill(page..page + 1, Private, SECRET);
    Ok(())
}

/// Brings the pattern of a tag to the target, which must be shared.
fn carries(tester: &mut Tester<'_>, edu: &Edu, tag: u64) -> Check {
    load(tester, edu, tag);
    write(tester, edu, TARGET);
    edu.wait();
    arrived(tester, TARGET, tag)
}

/// Puts the pattern of a tag into the device.
fn load(tester: &mut Tester<'_>, edu: &Edu, tag: u64) {
    tester.fill(SOURCE..SOURCE + 1, Shared, tag);
    // SAFETY: the page is test memory.
    unsafe { edu.read(tester.memory.gpa(SOURCE)) };
    edu.wait();
}

/// Has the device begin to write to a page.
fn write(tester: &Tester<'_>, edu: &Edu, page: usize) {
    // SAFETY: the page is test memory.
    unsafe { edu.write(tester.memory.gpa(page)) };
}

/// A shared page must hold what the device was loaded with.
fn arrived(tester: &mut Tester<'_>, page: usize, tag: u64) -> Check {
    tester.touch(page, Shared);
    tester.forget(page..page + 1);
    let source = tester.memory.gpa(SOURCE);
    (0..WORDS).try_for_each(|index| {
        let got = tester.memory.read(page, Shared, index);
        tester.word_is(page, Shared, index, got, pattern::word(tag, source, index))
    })
}
