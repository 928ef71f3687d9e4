// SPDX-License-Identifier: MIT OR Apache-2.0

//! A bit for each page. The only file that knows by which crate bits are moved.

use bitvec::prelude::{BitSlice, Lsb0};

use crate::pages::ranges::FilePages;
use crate::pages::zeroed::Zeroed;

/// Bits in a word.
pub(crate) const WORD: u64 = u64::BITS as u64;

/// A bit for each page, and for those that would fill its last word. Bit `n % 64` of word `n / 64`
/// is page `n`'s.
#[derive(Debug)]
pub(crate) struct Bitmap(Zeroed<u64>);

impl Bitmap {
    /// All bits clear. `None` if there is no memory.
    pub(crate) fn new(pages: u64) -> Option<Self> {
        Zeroed::new(pages.div_ceil(WORD)).map(Self)
    }

    /// The bit of a page.
    ///
    /// # Panics
    /// If there is no such page.
    #[inline]
    pub(crate) fn get(&self, page: u64) -> bool {
        self.0[(page / WORD) as usize] >> (page % WORD) & 1 != 0
    }

    /// Sets the bits of a run. Most are of one page, for which a range of bits costs ten times as
    /// much.
    ///
    /// # Panics
    /// If the range does not lie inside.
    pub(crate) fn fill(&mut self, run: FilePages, value: bool) {
        let (start, end) = (run.start() as usize, run.end() as usize);
        let bits = BitSlice::<u64, Lsb0>::from_slice_mut(&mut self.0);
        match run.count() {
            1 => bits.set(start, value),
            _ => bits[start..end].fill(value),
        }
    }

    /// The words that hold the bits.
    pub(crate) fn words(&self) -> &[u64] {
        &self.0
    }

    /// The same, to be changed.
    pub(crate) fn words_mut(&mut self) -> &mut [u64] {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 300;

    proptest! {
        #[test]
        fn bits_match_a_plain_vector(
            fills in prop::collection::vec((0..PAGES, 1..PAGES, any::<bool>()), 0..30),
        ) {
            let mut bitmap = Bitmap::new(PAGES).unwrap();
            let mut model = vec![false; PAGES as usize];
            for (start, length, value) in fills {
                let run = FilePages::new(start, (start + length).min(PAGES)).unwrap();
                bitmap.fill(run, value);
                model[run.start() as usize..run.end() as usize].fill(value);
            }
            for (page, expected) in (0..).zip(&model) {
                prop_assert_eq!(bitmap.get(page), *expected);
            }
            let set = model.iter().filter(|bit| **bit).count() as u32;
            prop_assert_eq!(bitmap.words().iter().map(|word| word.count_ones()).sum::<u32>(), set);
        }
    }
}
