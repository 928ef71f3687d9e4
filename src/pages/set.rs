// SPDX-License-Identifier: MIT OR Apache-2.0

//! A set of pages that is mostly a few long ranges.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::ops::Bound;

use crate::pages::ranges::{PAGE_SIZE, Pages};

/// A set of pages, kept as disjoint ranges that do not touch.
#[derive(Debug)]
pub(crate) struct PageSet<S> {
    /// From the first page of a range to the page behind it.
    ranges: BTreeMap<u64, u64>,
    pages: u64,
    space: PhantomData<S>,
}

impl<S> Default for PageSet<S> {
    fn default() -> Self {
        Self {
            ranges: BTreeMap::new(),
            pages: 0,
            space: PhantomData,
        }
    }
}

impl<S: Copy> PageSet<S> {
    /// Adds pages; some may be in the set already.
    pub(crate) fn insert(&mut self, pages: Pages<S>) {
        let (start, mut end) = (pages.start(), pages.end());
        let behind = |end| (Bound::Excluded(start), Bound::Included(end));
        while let Some((&next, &its_end)) = self.ranges.range(behind(end)).next() {
            self.ranges.remove(&next);
            self.pages -= its_end - next;
            end = end.max(its_end);
        }
        let before = self.ranges.range_mut(..=start).next_back();
        match before.filter(|(_, its_end)| **its_end >= start) {
            // Pages in sequence: the range grows where it is.
            Some((_, its_end)) => {
                self.pages += end.saturating_sub(*its_end);
                *its_end = end.max(*its_end);
            }
            None => {
                self.ranges.insert(start, end);
                self.pages += end - start;
            }
        }
    }

    /// Removes pages; some may not be in the set.
    pub(crate) fn remove(&mut self, pages: Pages<S>) {
        while let Some((start, end)) = self.first_from(pages.start(), pages.end()) {
            self.ranges.remove(&start);
            self.pages -= end - start;
            for (start, end) in [(start, pages.start()), (pages.end(), end)] {
                if start < end {
                    self.ranges.insert(start, end);
                    self.pages += end - start;
                }
            }
        }
    }

    /// Those of the given pages that are in the set.
    pub(crate) fn within(&self, pages: Pages<S>) -> Vec<Pages<S>> {
        if self.is_empty() {
            return Vec::new();
        }
        let mut next = pages.start();
        std::iter::from_fn(|| {
            let found = self.first_in(Pages::new(next, pages.end())?)?;
            next = found.end();
            Some(found)
        })
        .collect()
    }

    /// The first range of the given pages that are in the set.
    pub(crate) fn first_in(&self, pages: Pages<S>) -> Option<Pages<S>> {
        let (start, end) = self.first_from(pages.start(), pages.end())?;
        Pages::new(start.max(pages.start()), end.min(pages.end()))
    }

    /// The first range of the set that has pages from `start` up to but not including `end`.
    fn first_from(&self, start: u64, end: u64) -> Option<(u64, u64)> {
        // Mostly there is nothing, and to look for it in a tree costs more than to know it.
        if self.ranges.is_empty() {
            return None;
        }
        let before = self.ranges.range(..start).next_back();
        let before = before.filter(|(_, its_end)| **its_end > start);
        let found = before.or_else(|| self.ranges.range(start..end).next());
        found.map(|(start, end)| (*start, *end))
    }

    /// Is it empty?
    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Bytes in the set, without a scan.
    pub(crate) fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::ranges::FilePages;
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
            let ranges: Vec<_> = set.ranges.iter().collect();
            prop_assert!(ranges.windows(2).all(|w| w[0].1 < w[1].0));
            prop_assert_eq!(set.is_empty(), model.is_empty());
            let asked = FilePages::new(from, from + length).unwrap();
            let found = set.within(asked);
            let found: Vec<u64> = found.iter().flat_map(|r| r.start()..r.end()).collect();
            let expected: Vec<u64> = model.iter().copied().filter(|p| asked.contains(*p)).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
