// SPDX-License-Identifier: GPL-2.0-or-later
//! Attributes are ranges: what they cost is a matter of how many there are.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::Test;
use super::memory::File;
use super::slots::{GPA, bind};
use super::uapi::{self, PAGE, SW_PROTECTED};

/// 64 GiB.
const LARGE: u64 = 16 << 20;

/// What all else in the kernel may allocate meanwhile.
const NOISE_KIB: u64 = 512;

/// With single private pages between shared ones, the tree has four levels.
const RUNS: u64 = 8192;

/// The kernel frees nodes that are out of use after a while.
const SETTLE: Duration = Duration::from_millis(500);

pub(super) fn tests() -> Vec<Test> {
    vec![
        Test::new("kernel/64-gib-at-once", large),
        Test::new("kernel/many-ranges", many),
    ]
}

/// It takes neither time nor memory.
fn large() -> Result<()> {
    let vm = uapi::vm(SW_PROTECTED)?;
    let file = File::new(&vm, LARGE)?;
    bind(&vm, 1, GPA, &file)?;
    let before = kernel_memory()?;
    let start = Instant::now();
    for private in [true, true, false] {
        file.convert(0..LARGE, private)?;
    }
    file.convert(1..LARGE, true)?;
    let time = start.elapsed();
    let after = kernel_memory()?;
    println!("# {time:?}, {before} KiB before and {after} KiB after");
    ensure!(time < Duration::from_secs(1), "it took {time:?}");
    ensure!(
        after < before + NOISE_KIB,
        "the kernel had {before} KiB and has {after} KiB now"
    );
    for (page, private) in [(0, false), (1, true), (LARGE - 1, true)] {
        file.expect(page, private)?;
    }
    Ok(())
}

/// What the kernel's allocator has, in KiB.
fn kernel_memory() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    let field = text.lines().find_map(|line| line.strip_prefix("Slab:"));
    let number = field.and_then(|field| field.trim().strip_suffix(" kB"));
    let number = number.context("/proc/meminfo has no Slab")?;
    number.parse().context("Slab")
}

/// A tree of many ranges becomes one of a single range, or goes with its file.
fn many() -> Result<()> {
    for close in [false, true] {
        let vm = uapi::vm(SW_PROTECTED)?;
        let file = File::new(&vm, 2 * RUNS)?;
        for run in 0..RUNS {
            file.convert(2 * run..2 * run + 1, true)?;
        }
        for page in [0, 1, 2 * RUNS - 2, 2 * RUNS - 1] {
            file.expect(page, page % 2 == 0)?;
        }
        if !close {
            file.convert(0..file.pages, true)?;
            file.expect(1, true)?;
            file.convert(0..file.pages, false)?;
            file.expect(0, false)?;
        }
        drop(file);
        std::thread::sleep(SETTLE);
    }
    println!("# {} MiB in single pages", (2 * RUNS * PAGE) >> 20);
    Ok(())
}
