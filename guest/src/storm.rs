// SPDX-License-Identifier: GPL-2.0-or-later
//! Which ranges a CPU converts in the storm.
//!
//! Every CPU has a slice of its own. It checks what is in the middle third; the thirds around that
//! are converted by its neighbours too.

use crate::layout::SLICE_PAGES;
use crate::pattern::Random;
use core::ops::Range;

/// Pages of a third.
const THIRD: usize = SLICE_PAGES / 3;
/// Pages in a slice that only their owner converts.
pub const OWN: Range<usize> = THIRD..2 * THIRD;

/// A range that a CPU may convert, by the number of the page in all slices: it begins and ends
/// anywhere between the own thirds of its neighbours.
pub fn range(random: &mut Random, cpu: usize, cpus: usize) -> Range<usize> {
    let first = (cpu * SLICE_PAGES).saturating_sub(THIRD);
    let end = ((cpu + 1) * SLICE_PAGES + THIRD).min(cpus * SLICE_PAGES);
    let room = end - first;
    let largest = match random.below(10) {
        0..4 => 1,
        4..7 => 16,
        7..9 => THIRD,
        // More than 2 MiB.
        _ => room,
    };
    let pages = 1 + random.below(largest as u64) as usize;
    let start = first + random.below((room - pages + 1) as u64) as usize;
    start..start + pages
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(cpu: usize, cpus: usize) -> Vec<Range<usize>> {
        let mut random = Random::new(cpu as u64);
        (0..10_000).map(|_| range(&mut random, cpu, cpus)).collect()
    }

    #[test]
    fn nobody_else_converts_a_cpus_own_pages() {
        for cpus in [1, 2, 4] {
            for cpu in 0..cpus {
                for range in ranges(cpu, cpus) {
                    assert!(!range.is_empty() && range.end <= cpus * SLICE_PAGES);
                    for other in (0..cpus).filter(|&other| other != cpu) {
                        let own = other * SLICE_PAGES + OWN.start..other * SLICE_PAGES + OWN.end;
                        assert!(range.end <= own.start || own.end <= range.start);
                    }
                }
            }
        }
    }

    #[test]
    fn ranges_of_neighbours_overlap_and_sizes_differ() {
        let (first, second) = (ranges(0, 2), ranges(1, 2));
        let last = first.iter().map(|range| range.end).max().unwrap();
        let start = second.iter().map(|range| range.start).min().unwrap();
        assert!(start < SLICE_PAGES && SLICE_PAGES < last);
        assert!(first.iter().any(|range| range.len() == 1));
        assert!(first.iter().any(|range| range.len() > 512));
    }
}
