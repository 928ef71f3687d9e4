// SPDX-License-Identifier: GPL-2.0-or-later
//! What many measurements of the same thing come to.

/// The most measurements that are kept one by one.
pub const MOST: usize = 4096;

/// Measurements of the same thing. Of more than there is room for, every second one is kept, every fourth
/// and so on, which is enough to rank them.
#[derive(Debug)]
pub struct Samples {
    values: [u64; MOST],
    kept: usize,
    /// One of so many is kept.
    every: usize,
    count: usize,
    total: u64,
    least: u64,
    most: u64,
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
            kept: 0,
            every: 1,
            count: 0,
            total: 0,
            least: u64::MAX,
            most: 0,
        }
    }

    /// Adds one.
    pub fn add(&mut self, value: u64) {
        if self.count.is_multiple_of(self.every) {
            self.keep(value);
        }
        self.count += 1;
        self.total += value;
        self.least = self.least.min(value);
        self.most = self.most.max(value);
    }

    fn keep(&mut self, value: u64) {
        if self.kept == MOST {
            self.kept = MOST / 2;
            self.every *= 2;
            for index in 0..self.kept {
                self.values[index] = self.values[2 * index];
            }
        }
        self.values[self.kept] = value;
        self.kept += 1;
    }

    /// Forgets all of them.
    pub fn clear(&mut self) {
        (self.kept, self.every, self.count) = (0, 1, 0);
        (self.total, self.least, self.most) = (0, u64::MAX, 0);
    }

    /// Sums up what there is, if there is anything, and forgets it.
    pub fn take(&mut self) -> Option<Summary> {
        let values = &mut self.values[..self.kept];
        values.sort_unstable();
        // The smallest value that a share of all does not exceed.
        let rank = |percent: usize| (values.len() * percent).div_ceil(100).checked_sub(1);
        let summary = Summary {
            count: self.count,
            total: self.total,
            least: self.least,
            median: values[rank(50)?],
            p99: values[rank(99)?],
            most: self.most,
        };
        self.clear();
        Some(summary)
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
    fn more_than_there_is_room_for_still_counts() {
        let mut samples = Samples::new();
        let count = 5 * MOST;
        for value in 1..=count {
            samples.add(value as u64);
        }
        let summary = samples.take().unwrap();
        assert_eq!(summary.count, count);
        assert_eq!(summary.total, (count * (count + 1) / 2) as u64);
        assert_eq!((summary.least, summary.most), (1, count as u64));
        let share = |value: u64| value as f64 / count as f64;
        assert!((share(summary.median) - 0.5).abs() < 0.01, "{summary:?}");
        assert!((share(summary.p99) - 0.99).abs() < 0.01, "{summary:?}");
    }

    #[test]
    fn after_many_a_few_are_kept_one_by_one_again() {
        let mut samples = Samples::new();
        for _ in 0..=MOST {
            samples.add(1);
        }
        samples.clear();
        for value in [5, 9, 7] {
            samples.add(value);
        }
        assert_eq!(samples.take().unwrap().median, 7);
    }
}
