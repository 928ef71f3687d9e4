// SPDX-License-Identifier: GPL-2.0-or-later
//! What conversions cost, by the time-stamp counter. Under an outer QEMU with `-icount shift=0` that
//! counts instructions, those of the hypervisor included.
//!
//! A conversion is always measured together with the first touch of its pages, and both parts are
//! reported: work that one hypervisor does at once and another when a page is touched must not
//! look like work saved.

use crate::{cpu, hypercall, memmap, paging, tap};
use core::ops::Range;
use guestmemfd_guest::PAGE_SIZE;
use guestmemfd_guest::cmdline::{Bench, Options};
use guestmemfd_guest::layout;
use guestmemfd_guest::model::Intent::{self, Private, Shared};
use guestmemfd_guest::samples::Samples;
use spin::Mutex;

/// Pages of the memory that is converted: 96 MiB.
const PAGES: usize = 96 << 20 >> 12;
const TWO_MIB: u64 = 2 << 20;
/// How often a loop of known length goes round.
const ROUNDS: u64 = 1_000_000;
/// How often an exit that changes nothing is measured.
const EXITS: usize = 64;
/// How many requests for what is already so are measured.
const REPEATS: usize = 16;
/// Places that are touched in order.
const SEQUENCE: usize = 2048;
/// Where the guest starts an exit to user space that means nothing: the port of power-on codes.
const IDLE_PORT: u16 = 0x80;
/// No request has this attribute.
const UNKNOWN_ATTRIBUTE: u64 = 1 << 40;

/// What was measured in one direction.
struct Meter {
    requests: Samples,
    touches: Samples,
    repeated: Samples,
}

impl Meter {
    const fn new() -> Self {
        Self {
            requests: Samples::new(),
            touches: Samples::new(),
            repeated: Samples::new(),
        }
    }

    fn forget(&mut self) {
        for samples in [&mut self.requests, &mut self.touches, &mut self.repeated] {
            samples.clear();
        }
    }
}

static TO_PRIVATE: Mutex<Meter> = Mutex::new(Meter::new());
static TO_SHARED: Mutex<Meter> = Mutex::new(Meter::new());

/// Requests of one size, spread over the memory.
struct Case {
    name: &'static str,
    /// Pages of a request.
    pages: usize,
    /// From the start of one to the start of the next.
    stride: usize,
    places: usize,
    /// How often all places are converted in both directions.
    rounds: usize,
    /// Whether the guest then touches every page.
    touch: bool,
}

const fn case(name: &'static str, pages: usize, stride: usize, places: usize) -> Case {
    Case {
        name,
        pages,
        stride,
        places,
        rounds: 1,
        touch: true,
    }
}

const CASES: [Case; 8] = [
    case("convert-4k", 1, 67, 256),
    case("convert-64k", 16, 256, 64),
    case("convert-2m", 512, 1024, 8),
    case("convert-64m", 64 << 8, 64 << 8, 1),
    case("sequential-4k", 1, 1, SEQUENCE),
    Case {
        rounds: 8,
        ..case("flip-2m", 512, 512, 1)
    },
    Case {
        touch: false,
        ..case("untouched-4k", 1, 67, 256)
    },
    Case {
        touch: false,
        ..case("untouched-2m", 512, 1024, 8)
    },
];

/// Names as above, but fewer places, so that a check takes seconds.
const CHECK_CASES: [Case; 3] = [
    case("convert-4k", 1, 67, 128),
    case("convert-2m", 512, 1024, 2),
    case("sequential-4k", 1, 1, 512),
];

const FAULT_CASES: [Case; 2] = [
    case("fault-4k", 1, 67, 256),
    case("fault-sequential-4k", 1, 1, SEQUENCE),
];

impl Case {
    fn starts(&self) -> impl Iterator<Item = usize> + use<> {
        (0..self.places * self.stride).step_by(self.stride)
    }
}

/// The memory that is converted.
#[derive(Clone, Copy)]
struct Memory {
    start: u64,
    /// Set in an address, it selects the shared view.
    shared_mask: u64,
}

impl Memory {
    /// The first room for it.
    fn find(map: &memmap::Map, within: layout::Range, shared_bit: Option<u32>) -> Option<Self> {
        let mut starts = map.usable().filter_map(|range| {
            let room = within.overlap(range)?;
            let start = room.start.checked_next_multiple_of(TWO_MIB)?;
            (start.checked_add(PAGES as u64 * PAGE_SIZE)? <= room.end).then_some(start)
        });
        let start = starts.next()?;
        let shared_mask = shared_bit.map_or(0, |bit| 1 << bit);
        for address in [start, start + PAGES as u64 * PAGE_SIZE - 1] {
            paging::map(address);
            paging::map(address | shared_mask);
        }
        Some(Self { start, shared_mask })
    }

    /// Asks for a conversion, and returns how long it took.
    fn request(self, pages: Range<usize>, intent: Intent) -> u64 {
        let gpa = self.start + pages.start as u64 * PAGE_SIZE;
        let before = cpu::timestamp();
        let result =
            hypercall::map_gpa_range(gpa, pages.len() as u64, hypercall::attributes(intent));
        let took = cpu::timestamp() - before;
        if result != 0 {
            tap::bail_out(format_args!(
                "request for {} pages at {gpa:#x}, {intent:?}: answered {result}",
                pages.len()
            ));
        }
        took
    }

    /// Writes to every page through a view, and returns how long it took.
    fn touch(self, pages: Range<usize>, intent: Intent) -> u64 {
        let mask = match intent {
            Private => 0,
            Shared => self.shared_mask,
        };
        let before = cpu::timestamp();
        for page in pages {
            let at = (self.start + page as u64 * PAGE_SIZE) | mask;
            // SAFETY: the page is RAM that the firmware leaves to us, mapped, and nothing lives
            // there.
            unsafe { (at as *mut u64).write_volatile(at) };
        }
        cpu::timestamp() - before
    }
}

/// Measures what was asked for. Returns whether that was possible.
pub(crate) fn run(bench: Bench, options: &Options, map: &memmap::Map) -> bool {
    tap::note(format_args!("bench={} started", bench.name()));
    if bench == Bench::Start {
        // The host looks at what it has used so far.
        cpu::go_round(10 * ROUNDS);
        return true;
    }
    let (within, shared_bit) = match bench {
        Bench::Fault => (layout::Range::HIGH, options.shared_bit),
        _ => (layout::Range::LOW, None),
    };
    let Some(memory) = Memory::find(map, within, shared_bit) else {
        tap::bail_out(format_args!(
            "bench={} needs 96 MiB of free memory from {:#x} on",
            bench.name(),
            within.start
        ));
    };
    match bench {
        Bench::Start => {}
        Bench::Request => requests(memory, &CASES),
        Bench::Check => requests(memory, &CHECK_CASES),
        Bench::Fault => faults(memory),
        Bench::Twice => twice(memory),
    }
    tap::note(format_args!("bench={} done", bench.name()));
    true
}

fn requests(memory: Memory, cases: &[Case]) {
    unit();
    exits();
    for case in cases {
        measure(case, |case, meter, intent| {
            by_request(memory, case, meter, intent)
        });
    }
}

fn faults(memory: Memory) {
    unit();
    first_touches(memory);
    for case in &FAULT_CASES {
        measure(case, |case, meter, intent| {
            for start in case.starts() {
                meter
                    .touches
                    .add(memory.touch(start..start + case.pages, intent));
            }
        });
    }
}

/// Touches, through the private view and in order, pages for which nobody has chosen a view.
fn first_touches(memory: Memory) {
    let samples = &mut TO_PRIVATE.lock().touches;
    // From the end of the memory; the other cases begin at its start.
    for page in PAGES - SEQUENCE..PAGES {
        samples.add(memory.touch(page..page + 1, Private));
    }
    line("fault-first-4k", "private", "touch", 1, samples);
}

fn twice(memory: Memory) {
    for intent in [Private, Shared, Private, Shared] {
        memory.request(0..PAGES, intent);
        memory.touch(0..PAGES, intent);
    }
}

/// Converts to private and back, once unmeasured, so that nothing is then touched or decided for the
/// first time, and as often as the case says.
fn measure(case: &Case, convert: impl Fn(&Case, &mut Meter, Intent)) {
    let (mut to_private, mut to_shared) = (TO_PRIVATE.lock(), TO_SHARED.lock());
    for round in 0..=case.rounds {
        convert(case, &mut to_private, Private);
        convert(case, &mut to_shared, Shared);
        if round == 0 {
            to_private.forget();
            to_shared.forget();
        }
    }
    for (meter, direction) in [(&mut to_private, "private"), (&mut to_shared, "shared")] {
        report(case, direction, "request", &mut meter.requests);
        report(case, direction, "touch", &mut meter.touches);
        report(case, direction, "repeat", &mut meter.repeated);
    }
}

fn by_request(memory: Memory, case: &Case, meter: &mut Meter, intent: Intent) {
    for start in case.starts() {
        let pages = start..start + case.pages;
        meter.requests.add(memory.request(pages.clone(), intent));
        if case.touch {
            meter.touches.add(memory.touch(pages, intent));
        }
    }
    for start in case.starts().take(REPEATS) {
        let pages = start..start + case.pages;
        meter.repeated.add(memory.request(pages, intent));
    }
}

/// What the time-stamp counter counts: a loop of known length.
fn unit() {
    let samples = &mut TO_PRIVATE.lock().requests;
    for _ in 0..3 {
        let before = cpu::timestamp();
        cpu::go_round(ROUNDS);
        samples.add(cpu::timestamp() - before);
    }
    line("loop", "none", "instruction", 2 * ROUNDS, samples);
}

/// Exits that change nothing.
fn exits() {
    let ways: [(&str, fn()); 3] = [
        ("kernel", || {
            cpu::cpuid(0);
        }),
        ("port", || cpu::out8(IDLE_PORT, 0)),
        ("refused", || {
            hypercall::map_gpa_range(0, 1, UNKNOWN_ATTRIBUTE);
        }),
    ];
    for (name, way) in ways {
        let samples = &mut TO_PRIVATE.lock().requests;
        for _ in 0..EXITS {
            let before = cpu::timestamp();
            way();
            samples.add(cpu::timestamp() - before);
        }
        line("exit", name, "exit", 1, samples);
    }
}

fn report(case: &Case, direction: &str, part: &str, samples: &mut Samples) {
    line(case.name, direction, part, case.pages as u64, samples);
}

/// A line for programs. `units` is what each sample is to be divided by.
fn line(row: &str, direction: &str, part: &str, units: u64, samples: &mut Samples) {
    let Some(all) = samples.take() else { return };
    tap::note(format_args!(
        "measured row={row} direction={direction} part={part} units={units} samples={} total={} \
         least={} median={} p99={} most={}",
        all.count, all.total, all.least, all.median, all.p99, all.most
    ));
}
