// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the library's own data structures cost on this machine, without a kernel: states beside plain
//! words and beside vm-memory's bitmap, windows, claims, pins. `cargo bench`.

mod common;

use std::hint::black_box;
use std::num::NonZeroUsize;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use guestmemfd::exclusion::claims::Claims;
use guestmemfd::pages::ranges::BackendId;
use guestmemfd::pages::states::{PageState, PageStates};
use guestmemfd::windows::{Binding, Window, WindowTable};
use guestmemfd::{FilePages, GuestPages, PAGE_SIZE};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};

const GIB: u64 = (1 << 30) / PAGE_SIZE;
const TIB: u64 = GIB << 10;
const SIZES: [(&str, u64); 3] = [("64 GiB", 64 * GIB), ("1 TiB", TIB), ("16 TiB", 16 * TIB)];

/// Pages of 2 MiB.
const LARGE: u64 = 512;
/// Different ranges that are changed, all over the backend.
const RANGES: u64 = 1024;
/// Changes of state that a query of a whole backend reports.
const RUNS: u64 = 4096;

const BACKEND: BackendId = BackendId(0);

fn file(start: u64, count: u64) -> FilePages {
    FilePages::new(start, start + count).expect("a range")
}

fn guest(start: u64, count: u64) -> GuestPages {
    GuestPages::new(start, start + count).expect("a range")
}

/// Ranges of `count` pages in an order without a pattern.
fn scattered(pages: u64, count: u64) -> impl Fn(u64) -> u64 {
    let stride = pages / RANGES;
    move |index| index.wrapping_mul(0x9e37_79b9_7f4a_7c15) % RANGES * stride % (pages - count)
}

fn states(c: &mut Criterion) {
    for count in [1, LARGE] {
        let mut group = c.benchmark_group(format!("private and back, {count} pages"));
        for (name, pages) in SIZES {
            let place = scattered(pages, count);
            let mut states = PageStates::new(pages, PageState::Shared).expect("memory");
            let mut index = 0;
            group.bench_function(BenchmarkId::new("states", name), |b| {
                b.iter(|| {
                    index += 1;
                    let run = file(place(index), count);
                    states.set_run(run, PageState::Shared, PageState::Private);
                    states.set_run(run, PageState::Private, PageState::Shared);
                })
            });
            let mut words = vec![0_u64; usize::try_from(pages / 64).expect("64 bits")];
            group.bench_function(BenchmarkId::new("plain words, one bitmap", name), |b| {
                b.iter(|| {
                    index += 1;
                    set_words(&mut words, place(index), count, true);
                    set_words(&mut words, place(index), count, false);
                })
            });
            let bytes = usize::try_from(pages * PAGE_SIZE).expect("64 bits");
            let page = NonZeroUsize::new(PAGE_SIZE as usize).expect("not 0");
            let atomic = AtomicBitmap::new(bytes, page);
            group.bench_function(BenchmarkId::new("vm-memory, one bitmap", name), |b| {
                b.iter(|| {
                    index += 1;
                    let (start, length) = (place(index) * PAGE_SIZE, count * PAGE_SIZE);
                    let (start, length) = (start as usize, length as usize);
                    atomic.mark_dirty(start, length);
                    atomic.reset_addr_range(start, length);
                })
            });
        }
    }
}

/// What a bitmap without counters and checks takes.
fn set_words(words: &mut [u64], start: u64, count: u64, value: bool) {
    let end = start + count;
    let (first, last) = ((start / 64) as usize, ((end - 1) / 64) as usize);
    for (index, word) in (first..).zip(&mut words[first..=last]) {
        let from = if index == first { start % 64 } else { 0 };
        let to = if index == last { (end - 1) % 64 } else { 63 };
        let mask = (u64::MAX << from) & (u64::MAX >> (63 - to));
        *word = if value { *word | mask } else { *word & !mask };
    }
    black_box(words);
}

fn queries(c: &mut Criterion) {
    let mut group = c.benchmark_group("runs of a whole backend");
    group.sample_size(10);
    for (name, pages) in SIZES {
        let mut states = PageStates::new(pages, PageState::Shared).expect("memory");
        for run in 0..RUNS / 2 {
            let run = file(run * (pages / (RUNS / 2)), LARGE);
            states.set_run(run, PageState::Shared, PageState::Private);
        }
        group.bench_function(BenchmarkId::new("4096 runs", name), |b| {
            b.iter(|| {
                let runs = states.runs(file(0, pages)).count() as u64;
                assert_eq!(runs, RUNS);
            })
        });
        group.bench_function(BenchmarkId::new("a count", name), |b| {
            b.iter(|| black_box(states.count(PageState::Private)))
        });
    }
}

fn windows(c: &mut Criterion) {
    let mut group = c.benchmark_group("resolve 2 MiB");
    for count in [4_u64, 64, 1024] {
        let mut table = WindowTable::default();
        for window in 0..count {
            let at = guest(window * 2 * GIB, GIB);
            let window = Window::new(at, BACKEND, window * GIB, Binding::Bound).expect("a window");
            table.add(window).expect("room");
        }
        let mut index = 0;
        group.bench_function(BenchmarkId::new("windows", count), |b| {
            b.iter(|| {
                index += 1;
                let request = guest(index % count * 2 * GIB + LARGE, LARGE);
                black_box(table.resolve(request).len())
            })
        });
    }
}

fn claims(c: &mut Criterion) {
    let mut group = c.benchmark_group("claim and release");
    for others in [0_u64, 4, 64] {
        let claims = Claims::default();
        let never = || false;
        let held: Vec<_> = (1..=others)
            .map(|other| claims.claim(&[(BACKEND, file(other * GIB, LARGE))], never))
            .collect();
        group.bench_function(BenchmarkId::new("beside others", others), |b| {
            b.iter(|| claims.claim(&[(BACKEND, file(0, LARGE))], never).is_some())
        });
        drop(held);
    }
}

/// Close to a private page every state is looked at; elsewhere a counter says that there is none.
fn pins(c: &mut Criterion) {
    let mut group = c.benchmark_group("pin and unpin");
    for (name, pages) in SIZES {
        let (vm, backend) = common::backend(pages).expect("a backend");
        for count in [1, LARGE] {
            for (place, start) in [("beside a private page", 1), ("elsewhere", GIB)] {
                let id = BenchmarkId::new(format!("{count} pages {place}"), name);
                group.bench_function(id, |b| {
                    b.iter(|| {
                        vm.pin(&backend, file(start, count)).expect("shared pages");
                        backend.unpin(file(start, count)).expect("a pin");
                    })
                });
            }
        }
    }
}

criterion_group!(benches, states, queries, windows, claims, pins);
criterion_main!(benches);
