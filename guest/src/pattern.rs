// SPDX-License-Identifier: GPL-2.0-or-later
//! Numbers that look random and are the same in every run with the same seed.

/// 64-bit words in a page.
pub const WORDS: usize = 512;

/// What word `index` of the page at `gpa` holds after it has been filled with `tag`.
///
/// Every page, word and tag gives another value, so data that turns up in the wrong place is seen.
#[must_use]
pub fn word(tag: u64, gpa: u64, index: usize) -> u64 {
    mix(mix(tag ^ gpa).wrapping_add(index as u64))
}

/// The output function of SplitMix64.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// A sequence of pseudo-random numbers.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The sequence that belongs to a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(mix(seed))
    }

    /// The next number, of all that 64 bits can hold.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0)
    }

    /// The next number, below `limit`. A limit of 0 gives 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        // The bias of the remainder does not matter for choosing pages.
        self.any().checked_rem(limit).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn words_differ_by_page_tag_and_index() {
        let mut seen = HashSet::new();
        for tag in 1..4 {
            for page in 0..8 {
                for index in 0..WORDS {
                    assert!(seen.insert(word(tag, page * 4096, index)));
                }
            }
        }
        assert!(!seen.contains(&0), "zero is what an empty page reads as");
    }

    #[test]
    fn random_repeats_with_its_seed_only() {
        let draw = |seed| {
            let mut random = Random::new(seed);
            (0..32).map(|_| random.below(1000)).collect::<Vec<_>>()
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert!(draw(3).iter().all(|&number| number < 1000));
        assert_eq!(Random::new(1).below(0), 0);
    }
}
