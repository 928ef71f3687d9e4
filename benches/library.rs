// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a whole backend of 1 TiB takes: its state in bytes, and a map query in time. Prints rows for
//! `cargo xtask bench library`.

mod common;
mod rows;

use std::fs;
use std::hint::black_box;
use std::time::Instant;

use guestmemfd::pages::states::{PageState, PageStates};
use guestmemfd::{FilePages, PAGE_SIZE};

use rows::row;

const PAGES: u64 = (1 << 40) / PAGE_SIZE;
/// Changes of state along the backend.
const RUNS: u64 = 4096;
const QUERIES: usize = 21;

fn main() {
    // `cargo test --benches` asks for nothing.
    if !std::env::args().any(|word| word == "--bench") {
        return;
    }
    let before = resident();
    let (vm, backend) = common::backend(PAGES).expect("a backend");
    for to in [1 << 4, 0] {
        vm.map_gpa_range(0, PAGES, to).expect("a conversion");
    }
    let state = resident().saturating_sub(before);
    drop((vm, backend));
    let mut states = PageStates::new(PAGES, PageState::Shared).expect("memory");
    for run in 0..RUNS / 2 {
        let start = run * (PAGES / (RUNS / 2));
        let run = FilePages::new(start, start + 512).expect("a range");
        states.set_run(run, PageState::Shared, PageState::Private);
    }
    let all = FilePages::new(0, PAGES).expect("a range");
    let mut times: Vec<u64> = (0..QUERIES)
        .map(|_| {
            let before = Instant::now();
            assert_eq!(black_box(states.runs(all)).count() as u64, RUNS);
            u64::try_from(before.elapsed().as_nanos()).expect("64 bits")
        })
        .collect();
    times.sort_unstable();
    row("query-map-1t", "none", "nanoseconds", times[QUERIES / 2]);
    row("state-1t", "none", "memory", state);
}

/// Bytes of memory of this process's own. What nobody has touched is not there: counters of pages that
/// were never pinned, for instance.
fn resident() -> u64 {
    let text = fs::read_to_string("/proc/self/status").expect("procfs");
    let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let line = line.expect("RssAnon").trim().trim_end_matches(" kB");
    line.parse::<u64>().expect("a number") * 1024
}
