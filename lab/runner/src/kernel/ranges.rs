// SPDX-License-Identifier: GPL-2.0-or-later
//! Attributes are ranges: what they cost is a matter of how many there are.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::io::Errno;

use super::Test;
use super::memory::File;
use super::slots::{GPA, bind};
use super::uapi::{self, PAGE, SW_PROTECTED};
use crate::failslab::Failures;

/// 64 GiB.
const LARGE: u64 = 16 << 20;

/// What all else in the kernel may allocate meanwhile.
const NOISE_KIB: u64 = 512;

/// With single private pages between shared ones, the tree has four levels.
const RUNS: u64 = 8192;

/// A file whose states are random, how often they change, and at how many pages is looked.
const PAGES: u64 = 1 << 16;
const STEPS: u64 = 10_000;
const LOOKS: u64 = 200;

/// The kernel frees nodes that are out of use after a while.
const SETTLE: Duration = Duration::from_millis(500);

pub(super) fn tests() -> Vec<Test> {
    vec![
        Test::new("kernel/64-gib-at-once", large),
        Test::new("kernel/many-ranges", many),
        Test::new("kernel/random-ranges", || random(None)),
        Test::new("kernel/random-ranges-without-memory", || random(Some(30))),
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

/// Trees grow and shrink in every way, and memory is refused on the way. Whatever was answered is so:
/// what was refused has changed nothing.
fn random(refused: Option<u32>) -> Result<()> {
    let vm = uapi::vm(SW_PROTECTED)?;
    let file = File::new(&vm, PAGES)?;
    let mut model = vec![false; usize::try_from(PAGES)?];
    let mut state = 1_u64;
    let mut below = |limit: u64| {
        // The constants of Knuth's MMIX; the upper half is random enough.
        state = state.wrapping_mul(6_364_136_223_846_793_005);
        state = state.wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % limit
    };
    let failures = refused.map(Failures::on).transpose()?;
    let mut denied = 0;
    for _ in 0..STEPS {
        let most = match below(100) {
            0 => PAGES,
            1..5 => 4096,
            5..30 => 64,
            _ => 1,
        };
        let count = 1 + below(most);
        let start = below(PAGES - count + 1);
        let private = below(2) == 0;
        match file.set(start..start + count, private) {
            Ok(()) => {
                let pages = usize::try_from(start)?..usize::try_from(start + count)?;
                model[pages].fill(private);
            }
            Err(refusal) if failures.is_some() && refusal.errno == Errno::NOMEM => denied += 1,
            Err(refusal) => bail!("{start}+{count}: {refusal:?}"),
        }
    }
    drop(failures);
    println!("# {STEPS} steps, {denied} denied");
    ensure!(refused.is_none() || denied > 0, "nothing was denied");
    for _ in 0..LOOKS {
        let page = below(PAGES);
        file.expect(page, model[usize::try_from(page)?])?;
    }
    drop(file);
    std::thread::sleep(SETTLE);
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
