// SPDX-License-Identifier: GPL-2.0-or-later

//! A set of pages that is mostly a few long ranges.

use crate::addr::{Pages, merge_adjacent};

/// A set of pages, kept as disjoint sorted ranges.
#[derive(Debug)]
pub struct PageSet<S> {
    ranges: Vec<Pages<S>>,
}

impl<S> Default for PageSet<S> {
    fn default() -> Self {
        Self { ranges: Vec::new() }
    }
}

impl<S: Copy + Ord> PageSet<S> {
    /// Adds pages; some may be in the set already.
    pub fn insert(&mut self, pages: Pages<S>) {
        self.remove(pages);
        let at = self.ranges.partition_point(|r| *r < pages);
        self.ranges.insert(at, pages);
        self.ranges = merge_adjacent(self.ranges.drain(..));
    }

    /// Removes pages; some may not be in the set.
    pub fn remove(&mut self, pages: Pages<S>) {
        if !self.ranges.iter().any(|r| r.overlaps(pages)) {
            return;
        }
        self.ranges = self
            .ranges
            .iter()
            .flat_map(|r| r.minus(pages))
            .flatten()
            .collect();
    }

    /// Those of the given pages that are in the set.
    pub fn within(&self, pages: Pages<S>) -> Vec<Pages<S>> {
        self.ranges
            .iter()
            .filter_map(|r| r.intersection(pages))
            .collect()
    }

    /// Bytes in the set.
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|r| r.bytes()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::FilePages;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn ranges_match_a_set_of_pages(
            changes in prop::collection::vec((any::<bool>(), 0u64..60, 1u64..20), 0..30),
            (from, length) in (0u64..70, 1u64..20),
        ) {
            let mut set = PageSet::default();
            let mut model = BTreeSet::new();
            for (insert, start, length) in changes {
                let pages = FilePages::new(start, start + length).unwrap();
                if insert {
                    set.insert(pages);
                    model.extend(start..start + length);
                } else {
                    set.remove(pages);
                    model.retain(|p| !pages.contains(*p));
                }
            }
            prop_assert_eq!(set.bytes(), model.len() as u64 * crate::PAGE_SIZE);
            prop_assert!(set.ranges.windows(2).all(|w| w[0].end() < w[1].start()));
            let asked = FilePages::new(from, from + length).unwrap();
            let found: Vec<u64> = set.within(asked).iter().flat_map(|r| r.start()..r.end()).collect();
            let expected: Vec<u64> = model.iter().copied().filter(|p| asked.contains(*p)).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
