// SPDX-License-Identifier: GPL-2.0-or-later
//! What conversions cost, by the time-stamp counter. Under an outer QEMU with `-icount shift=0` that
//! counts instructions, those of the hypervisor included.
//!
//! A conversion is always measured together with the first touch of its pages, and both parts are
//! reported: work that one hypervisor does at once and another when a page is touched must not
//! look like work saved.

use super::{disk, scale};
use crate::virtio::{Kind, Queue};
use crate::{cpu, hypercall, memmap, paging, tap};
use core::ops::Range;
use guestmemfd_guest::PAGE_SIZE;
use guestmemfd_guest::cmdline::{Bench, Options};
use guestmemfd_guest::layout;
use guestmemfd_guest::marks::Mark;
use guestmemfd_guest::model::Intent::{self, Private, Shared};
use guestmemfd_guest::samples::Samples;
use spin::Mutex;

/// Pages of the memory that is converted: 96 MiB.
pub(super) const PAGES: usize = 96 << 20 >> 12;
/// Pages of the memory that is converted page by page.
const GIB_PAGES: usize = 1 << 30 >> 12;
/// Pages of the memory that is converted at once, and never touched: 64 GiB.
const VAST_PAGES: usize = 64 << 30 >> 12;
const TWO_MIB: u64 = 2 << 20;
/// How often a loop of known length goes round.
const ROUNDS: u64 = 1_000_000;
/// How long work that was put off may take: longer than the backend puts any off.
const SETTLE_ROUNDS: u64 = 20 * ROUNDS;
/// How often an exit that changes nothing is measured.
const EXITS: usize = 64;
/// How many reads of a disk are measured.
const READS: usize = 256;
/// How many requests for what is already so are measured.
const REPEATS: usize = 16;
/// Places that are touched in order.
const SEQUENCE: usize = 2048;
/// Where the guest starts an exit to user space that means nothing: the port of power-on codes.
const IDLE_PORT: u16 = 0x80;
/// No request has this attribute.
const UNKNOWN_ATTRIBUTE: u64 = 1 << 40;

/// Parts of a measurement.
#[derive(Clone, Copy)]
enum Part {
    Request,
    Touch,
    /// The same request again.
    Repeat,
    /// What others do after all requests, while the guest idles.
    Later,
}

const PARTS: [(Part, &str); 4] = [
    (Part::Request, "request"),
    (Part::Touch, "touch"),
    (Part::Repeat, "repeat"),
    (Part::Later, "later"),
];

/// What was measured in one direction.
struct Meter {
    samples: [Samples; PARTS.len()],
    /// The first kind of its marks.
    kinds: u8,
}

impl Meter {
    const fn new(kinds: u8) -> Self {
        Self {
            samples: [const { Samples::new() }; PARTS.len()],
            kinds,
        }
    }

    fn add(&mut self, part: Part, value: u64) {
        cpu::mark(Mark::End(self.kinds + part as u8));
        self.samples[part as usize].add(value);
    }

    fn forget(&mut self) {
        self.samples.iter_mut().for_each(Samples::clear);
    }

    /// A line for programs, if there is anything. `units` is what each sample is to be divided by.
    fn line(&mut self, of: Part, row: &str, direction: &str, part: &str, units: u64) {
        let Some(all) = self.samples[of as usize].take() else {
            return;
        };
        cpu::mark(Mark::Take(self.kinds + of as u8));
        tap::note(format_args!(
            "measured row={row} direction={direction} part={part} units={units} samples={} \
             total={} least={} median={} p99={} most={}",
            all.count, all.total, all.least, all.median, all.p99, all.most
        ));
    }
}

static TO_PRIVATE: Mutex<Meter> = Mutex::new(Meter::new(0));
static TO_SHARED: Mutex<Meter> = Mutex::new(Meter::new(PARTS.len() as u8));

/// Requests of one size, spread over the memory.
#[derive(Clone, Copy)]
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

/// As `sequential-4k`, but far longer.
const SEQUENTIAL_CASES: [Case; 1] = [case("sequential-4k-1g", 1, 1, GIB_PAGES)];

const FAULT_CASES: [Case; 2] = [
    case("fault-4k", 1, 67, 256),
    case("fault-sequential-4k", 1, 1, SEQUENCE),
];

impl Case {
    /// The same pages in one request, if they lie side by side.
    fn at_once(self) -> Self {
        if self.stride > self.pages {
            return self;
        }
        let pages = self.pages * self.places;
        Self {
            pages,
            stride: pages,
            places: 1,
            ..self
        }
    }

    fn starts(&self) -> impl Iterator<Item = usize> + use<> {
        (0..self.places * self.stride).step_by(self.stride)
    }
}

/// The memory that is converted.
#[derive(Clone, Copy)]
pub(super) struct Memory {
    start: u64,
    /// Set in an address, it selects the shared view.
    shared_mask: u64,
}

impl Memory {
    /// The first room for so many pages of it.
    fn find(
        map: &memmap::Map,
        pages: usize,
        within: layout::Range,
        shared_bit: Option<u32>,
    ) -> Option<Self> {
        let size = pages as u64 * PAGE_SIZE;
        let mut starts = map.usable().filter_map(|range| {
            let room = within.overlap(range)?;
            let start = room.start.checked_next_multiple_of(TWO_MIB)?;
            (start.checked_add(size)? <= room.end).then_some(start)
        });
        let start = starts.next()?;
        let shared_mask = shared_bit.map_or(0, |bit| 1 << bit);
        for address in [start, start + size - 1] {
            paging::map(address);
            paging::map(address | shared_mask);
        }
        Some(Self { start, shared_mask })
    }

    /// Asks for a conversion, and returns how long it took.
    pub(super) fn request(self, pages: Range<usize>, intent: Intent) -> u64 {
        let gpa = self.start + pages.start as u64 * PAGE_SIZE;
        cpu::mark(Mark::Begin);
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
    pub(super) fn touch(self, pages: Range<usize>, intent: Intent) -> u64 {
        let mask = match intent {
            Private => 0,
            Shared => self.shared_mask,
        };
        cpu::mark(Mark::Begin);
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
        Bench::Vast => (layout::Range::HIGH, None),
        _ => (layout::Range::LOW, None),
    };
    let pages = match bench {
        Bench::Sequential => GIB_PAGES,
        Bench::Vast => VAST_PAGES,
        _ => PAGES,
    };
    let Some(memory) = Memory::find(map, pages, within, shared_bit) else {
        tap::bail_out(format_args!(
            "bench={} needs {} MiB of free memory from {:#x} on",
            bench.name(),
            (pages as u64 * PAGE_SIZE) >> 20,
            within.start
        ));
    };
    match bench {
        Bench::Start => {}
        Bench::Request => {
            exits();
            requests(memory, &CASES, true);
        }
        Bench::Sequential => requests(memory, &SEQUENTIAL_CASES, true),
        Bench::Check => requests(memory, &CHECK_CASES, false),
        Bench::Fault => faults(memory),
        Bench::Twice => twice(memory),
        Bench::Touch => first_touches(memory, "ordinary-touch-4k", "none"),
        Bench::Scale => scale::run(memory, options.smp.unwrap_or(1)),
        Bench::Disk => disk_reads(memory),
        Bench::Vast => vast(memory),
    }
    tap::note(format_args!("bench={} done", bench.name()));
    true
}

/// With `settle`, work that was put off counts too.
fn requests(memory: Memory, cases: &[Case], settle: bool) {
    unit();
    let quiet = settle.then(quiet);
    for case in cases {
        measure(case, |case, meter, intent| {
            by_request(memory, case, meter, intent);
            if let Some(quiet) = quiet {
                meter.add(Part::Later, idle().saturating_sub(quiet));
            }
        });
    }
}

/// How long idling takes when nothing was put off.
fn quiet() -> u64 {
    let mut meter = TO_PRIVATE.lock();
    let took = idle();
    meter.add(Part::Later, took);
    meter.line(Part::Later, "quiet", "none", "idle", 1);
    took
}

/// Does nothing, and returns how long that took: what others did meanwhile is in it.
fn idle() -> u64 {
    cpu::mark(Mark::Begin);
    let before = cpu::timestamp();
    cpu::go_round(SETTLE_ROUNDS);
    cpu::timestamp() - before
}

fn faults(memory: Memory) {
    unit();
    first_touches(memory, "fault-first-4k", "private");
    let quiet = quiet();
    for case in &FAULT_CASES {
        measure(case, |case, meter, intent| {
            for start in case.starts() {
                let pages = start..start + case.pages;
                meter.add(Part::Touch, memory.touch(pages, intent));
            }
            meter.add(Part::Later, idle().saturating_sub(quiet));
        });
    }
}

/// Touches in order pages that nobody has touched, and for which nobody has chosen a view.
fn first_touches(memory: Memory, row: &str, direction: &str) {
    let mut meter = TO_PRIVATE.lock();
    // From the end of the memory; the other cases begin at its start.
    for page in PAGES - SEQUENCE..PAGES {
        meter.add(Part::Touch, memory.touch(page..page + 1, Private));
    }
    meter.line(Part::Touch, row, direction, "touch", 1);
}

fn twice(memory: Memory) {
    for intent in [Private, Shared, Private, Shared] {
        memory.request(0..PAGES, intent);
        memory.touch(0..PAGES, intent);
    }
}

/// Converts to private and back, once unmeasured and as quickly as possible, so that nothing is then touched
/// or decided for the first time, and as often as the case says.
fn measure(case: &Case, convert: impl Fn(&Case, &mut Meter, Intent)) {
    let (mut to_private, mut to_shared) = (TO_PRIVATE.lock(), TO_SHARED.lock());
    for round in 0..=case.rounds {
        let case = if round == 0 { &case.at_once() } else { case };
        convert(case, &mut to_private, Private);
        convert(case, &mut to_shared, Shared);
        if round == 0 {
            cpu::mark(Mark::Forget);
            to_private.forget();
            to_shared.forget();
        }
    }
    for (meter, direction) in [(&mut to_private, "private"), (&mut to_shared, "shared")] {
        for (part, name) in PARTS {
            let places = match part {
                Part::Later => case.places,
                _ => 1,
            };
            meter.line(
                part,
                case.name,
                direction,
                name,
                (places * case.pages) as u64,
            );
        }
    }
}

fn by_request(memory: Memory, case: &Case, meter: &mut Meter, intent: Intent) {
    for start in case.starts() {
        let pages = start..start + case.pages;
        meter.add(Part::Request, memory.request(pages.clone(), intent));
        if case.touch {
            meter.add(Part::Touch, memory.touch(pages, intent));
        }
    }
    for start in case.starts().take(REPEATS) {
        let pages = start..start + case.pages;
        meter.add(Part::Repeat, memory.request(pages, intent));
    }
}

/// One request for all of much memory, in each direction. The host looks at what it has used after the
/// first of them.
fn vast(memory: Memory) {
    unit();
    cpu::go_round(10 * ROUNDS);
    for (meter, intent, direction) in [
        (&TO_PRIVATE, Private, "private"),
        (&TO_SHARED, Shared, "shared"),
    ] {
        let mut meter = meter.lock();
        meter.add(Part::Request, memory.request(0..VAST_PAGES, intent));
        meter.line(Part::Request, "untouched-64g", direction, "whole", 1);
        cpu::go_round(10 * ROUNDS);
    }
}

/// Reads from a disk into memory that has been touched. The first read is not measured.
fn disk_reads(memory: Memory) {
    unit();
    let mut queue = Queue::open(Kind::Disk, 0, 0).unwrap_or_else(|why| {
        tap::bail_out(format_args!("bench=disk: {why}"));
    });
    for (row, pages) in [("disk-read-4k", 1), ("disk-read-64k", 16)] {
        memory.touch(0..pages, Shared);
        let mut meter = TO_PRIVATE.lock();
        for read in 0..=READS {
            cpu::mark(Mark::Begin);
            let before = cpu::timestamp();
            // SAFETY: the memory is RAM that the firmware leaves to us, and nothing lives there.
            let result = unsafe { disk::read(&mut queue, memory.start, pages as u64 * PAGE_SIZE) };
            let took = cpu::timestamp() - before;
            if let Err(why) = result {
                tap::bail_out(format_args!("{row}: {why}"));
            }
            if read > 0 {
                meter.add(Part::Request, took);
            }
        }
        meter.line(Part::Request, row, "none", "io", 1);
    }
}

/// What the time-stamp counter counts: a loop of known length.
fn unit() {
    let mut meter = TO_PRIVATE.lock();
    for _ in 0..3 {
        cpu::mark(Mark::Begin);
        let before = cpu::timestamp();
        cpu::go_round(ROUNDS);
        meter.add(Part::Request, cpu::timestamp() - before);
    }
    meter.line(Part::Request, "loop", "none", "instruction", 2 * ROUNDS);
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
        let mut meter = TO_PRIVATE.lock();
        for _ in 0..EXITS {
            cpu::mark(Mark::Begin);
            let before = cpu::timestamp();
            way();
            meter.add(Part::Request, cpu::timestamp() - before);
        }
        meter.line(Part::Request, "exit", name, "exit", 1);
    }
}
