// SPDX-License-Identifier: GPL-2.0-or-later
//! Which memory the tests use: from 32 MiB on, every CPU its own slice, below 4 GiB and above it if
//! there is any.

use crate::PAGE_SIZE;

/// Bytes that one CPU tests in one area: three times 2 MiB, so that an unaligned 2 MiB has
/// neighbours.
pub const SLICE_SIZE: u64 = 6 << 20;
/// Pages in a slice.
pub const SLICE_PAGES: usize = (SLICE_SIZE / PAGE_SIZE) as usize;
/// Pages at the end of an area that are kept for requests across the end of RAM.
pub const EDGE_PAGES: usize = 4;

const FIRST: u64 = 32 << 20;
const FOUR_GIB: u64 = 4 << 30;
const TWO_MIB: u64 = 2 << 20;

/// A range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first address.
    pub start: u64,
    /// The first address behind it.
    pub end: u64,
}

/// Memory that the tests may use, on one side of 4 GiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    /// `low` or `high`.
    pub name: &'static str,
    /// Where the first slice begins; a multiple of 2 MiB.
    pub slices: u64,
    /// The last pages that the firmware leaves to us; `EDGE_PAGES` of them.
    pub edge: u64,
    /// Where RAM ends; behind the edge there may be a part that the firmware keeps.
    pub ram_end: u64,
}

impl Area {
    /// Looks for room for `cpus` slices and the edge. `usable` is what the firmware leaves to us,
    /// `ram` all RAM there is.
    pub fn find(
        name: &'static str,
        within: Range,
        usable: impl Iterator<Item = Range>,
        mut ram: impl Iterator<Item = Range>,
        cpus: usize,
    ) -> Option<Self> {
        let room = usable
            .filter_map(|range| within.overlap(range))
            .max_by_key(|range| range.size())?;
        let slices = room.start.checked_next_multiple_of(TWO_MIB)?;
        let edge = (room.end / PAGE_SIZE * PAGE_SIZE).checked_sub(EDGE_PAGES as u64 * PAGE_SIZE)?;
        let slices_end = slices.checked_add(SLICE_SIZE.checked_mul(cpus as u64)?)?;
        let ram = ram.find(|ram| ram.contains(room))?;
        (slices_end <= edge).then_some(Self {
            name,
            slices,
            edge,
            ram_end: ram.end,
        })
    }

    /// All slices of so many CPUs.
    #[must_use]
    pub fn all_slices(&self, cpus: usize) -> Range {
        Range {
            start: self.slices,
            end: self.slice(cpus),
        }
    }

    /// What lies between the slices of so many CPUs and the edge, in whole 2 MiB.
    #[must_use]
    pub fn rest(&self, cpus: usize) -> Range {
        let start = self.slice(cpus);
        Range {
            start,
            end: start.max(self.edge / TWO_MIB * TWO_MIB),
        }
    }

    /// The slice of a CPU.
    #[must_use]
    pub fn slice(&self, cpu: usize) -> u64 {
        self.slices + cpu as u64 * SLICE_SIZE
    }
}

impl Range {
    /// Where the tests look for memory below 4 GiB.
    pub const LOW: Self = Self {
        start: FIRST,
        end: FOUR_GIB,
    };
    /// Where the tests look for memory above 4 GiB.
    pub const HIGH: Self = Self {
        start: FOUR_GIB,
        end: 1 << 38,
    };

    /// Bytes in it.
    #[must_use]
    pub fn size(self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// What both have in common, if anything.
    #[must_use]
    pub fn overlap(self, other: Self) -> Option<Self> {
        let both = Self {
            start: self.start.max(other.start),
            end: self.end.min(other.end),
        };
        (both.start < both.end).then_some(both)
    }

    /// Does it hold all of another?
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn range(start: u64, end: u64) -> Range {
        Range { start, end }
    }

    fn find(within: Range, usable: &[Range], ram: &[Range], cpus: usize) -> Option<Area> {
        Area::find(
            "low",
            within,
            usable.iter().copied(),
            ram.iter().copied(),
            cpus,
        )
    }

    #[test]
    fn sixty_four_mib_serve_four_cpus() {
        let usable = [range(0, 0x9fc00), range(MIB, 64 * MIB - 0x21000)];
        let area = find(Range::LOW, &usable, &[range(0, 64 * MIB)], 4).unwrap();
        assert_eq!(area.slices, 32 * MIB);
        assert_eq!(area.slice(3), 50 * MIB);
        assert_eq!(area.edge, 64 * MIB - 0x25000);
        assert_eq!(area.ram_end, 64 * MIB);
        assert_eq!(area.all_slices(4), range(32 * MIB, 56 * MIB));
        assert_eq!(area.rest(4), range(56 * MIB, 62 * MIB));
        assert_eq!(find(Range::LOW, &usable, &[range(0, 64 * MIB)], 6), None);
        assert_eq!(find(Range::HIGH, &usable, &[range(0, 64 * MIB)], 1), None);
    }

    #[test]
    fn too_little_memory() {
        assert_eq!(find(Range::LOW, &[], &[], 1), None);
        assert_eq!(
            find(
                Range::LOW,
                &[range(MIB, 32 * MIB)],
                &[range(0, 32 * MIB)],
                1
            ),
            None
        );
        assert_eq!(
            find(
                Range::LOW,
                &[range(MIB, 38 * MIB)],
                &[range(0, 38 * MIB)],
                1
            ),
            None
        );
        assert!(
            find(
                Range::LOW,
                &[range(MIB, 39 * MIB)],
                &[range(0, 39 * MIB)],
                1
            )
            .is_some()
        );
        assert_eq!(
            find(
                Range::LOW,
                &[range(MIB, 99 * MIB)],
                &[range(0, 99 * MIB)],
                usize::MAX
            ),
            None
        );
    }

    #[test]
    fn above_four_gib() {
        let usable = [range(MIB, 2048 * MIB), range(4096 * MIB, 4352 * MIB)];
        let ram = [range(0, 2048 * MIB), range(4096 * MIB, 4352 * MIB)];
        let area = find(Range::HIGH, &usable, &ram, 2).unwrap();
        assert_eq!(area.slices, 4096 * MIB);
        assert_eq!(area.edge, 4352 * MIB - EDGE_PAGES as u64 * PAGE_SIZE);
        assert_eq!(area.ram_end, 4352 * MIB);
    }

    #[test]
    fn unaligned_ends_and_firmware_that_lies() {
        let area = find(
            Range::LOW,
            &[range(33 * MIB + 1, 60 * MIB + 5)],
            &[range(0, 64 * MIB)],
            1,
        )
        .unwrap();
        assert_eq!((area.slices, area.edge), (34 * MIB, 60 * MIB - 0x4000));
        assert_eq!(
            find(
                Range::LOW,
                &[range(MIB, 65 * MIB)],
                &[range(0, 64 * MIB)],
                1
            ),
            None
        );
    }
}
