// SPDX-License-Identifier: GPL-2.0-or-later
//! What many measurements of the same thing come to.

/// The most measurements that are kept.
pub const MOST: usize = 4096;

/// Measurements of the same thing.
#[derive(Debug)]
pub struct Samples {
    values: [u64; MOST],
    count: usize,
}

/// What they come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// How many there are.
    pub count: usize,
    /// Their sum.
    pub total: u64,
    /// The smallest.
    pub least: u64,
    /// As many are smaller as are larger.
    pub median: u64,
    /// One in a hundred is larger.
    pub p99: u64,
    /// The largest.
    pub most: u64,
}

impl Samples {
    /// None yet.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            values: [0; MOST],
            count: 0,
        }
    }

    /// Adds one; those beyond the room for them are lost.
    pub fn add(&mut self, value: u64) {
        if let Some(slot) = self.values.get_mut(self.count) {
            *slot = value;
            self.count += 1;
        }
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        self.count = 0;
    }

    /// Sums up what there is, if there is anything, and forgets it.
    pub fn take(&mut self) -> Option<Summary> {
        let values = &mut self.values[..self.count];
        self.count = 0;
        values.sort_unstable();
        // The smallest value that a share of all does not exceed.
        let rank = |percent: usize| (values.len() * percent).div_ceil(100).saturating_sub(1);
        Some(Summary {
            count: values.len(),
            total: values.iter().sum(),
            least: *values.first()?,
            median: values[rank(50)],
            p99: values[rank(99)],
            most: *values.last()?,
        })
    }
}

impl Default for Samples {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundred_values_in_any_order() {
        let mut samples = Samples::new();
        for value in (1..=100).rev() {
            samples.add(value);
        }
        let expected = Summary {
            count: 100,
            total: 5050,
            least: 1,
            median: 50,
            p99: 99,
            most: 100,
        };
        assert_eq!(samples.take(), Some(expected));
        assert_eq!(samples.take(), None);
    }

    #[test]
    fn one_value_is_everything() {
        let mut samples = Samples::new();
        samples.add(7);
        let summary = samples.take().unwrap();
        assert_eq!(
            (summary.least, summary.median, summary.p99, summary.most),
            (7, 7, 7, 7)
        );
    }

    #[test]
    fn what_has_no_room_is_lost() {
        let mut samples = Samples::new();
        for _ in 0..MOST + 1 {
            samples.add(1);
        }
        assert_eq!(samples.take().unwrap().total, MOST as u64);
    }
}
