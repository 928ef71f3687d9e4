// SPDX-License-Identifier: MIT OR Apache-2.0

//! Ranges of pages, in guest physical space and in a backend, with checked arithmetic.
//!
//! A range is never empty and never wraps, so code that holds one need not check again. The two
//! spaces are different types: a guest physical page number cannot be taken for an offset.

use std::fmt;
use std::marker::PhantomData;

/// Bytes in a page. States are kept for pages of this size, the smallest that KVM converts.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

const PAGE_SHIFT: u32 = 12;

/// Page numbers lie below this: byte addresses are 64 bits wide.
const PAGE_LIMIT: u64 = 1 << (64 - PAGE_SHIFT);

/// Which VM of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VmId(pub(crate) u64);

/// Which backend of its VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendId(pub u32);

/// Guest physical space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GuestSpace {}

/// Offsets into the files of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FileSpace {}

/// Pages in guest physical space.
pub type GuestPages = Pages<GuestSpace>;

/// Pages of a backend, the same in its private and in its shared file.
pub type FilePages = Pages<FileSpace>;

/// Why two numbers are no range of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// No page in it.
    #[error("range at {start:#x} is empty")]
    Empty {
        /// First byte.
        start: u64,
    },
    /// Start or size is no multiple of [`PAGE_SIZE`].
    #[error("range {start:#x}+{size:#x} is not aligned to pages of {PAGE_SIZE:#x} bytes")]
    Unaligned {
        /// First byte.
        start: u64,
        /// Bytes.
        size: u64,
    },
    /// The end does not fit into 64 bits.
    #[error("range {start:#x}+{size:#x} ends beyond 64 bits")]
    Wraps {
        /// First byte.
        start: u64,
        /// Bytes, or pages where the number of bytes does not fit either.
        size: u64,
    },
}

/// A list of what a step is about: mostly one thing, for which it needs no allocation.
pub(crate) type SmallList<T> = smallvec::SmallVec<[T; 1]>;

/// A range of pages in one space: not empty, half open, in page numbers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pages<S> {
    start: u64,
    end: u64,
    space: PhantomData<S>,
}

impl<S> Pages<S> {
    /// The pages from `start` up to but not including `end` (page numbers); `None` if there is none
    /// or if the end lies beyond 64-bit addresses.
    pub fn new(start: u64, end: u64) -> Option<Self> {
        (start < end && end < PAGE_LIMIT).then_some(Self {
            start,
            end,
            space: PhantomData,
        })
    }

    /// From bytes: both numbers must be multiples of [`PAGE_SIZE`].
    ///
    /// # Errors
    /// Why they are no range of pages.
    pub fn from_bytes(start: u64, size: u64) -> Result<Self, RangeError> {
        if start % PAGE_SIZE != 0 || size % PAGE_SIZE != 0 {
            return Err(RangeError::Unaligned { start, size });
        }
        if size == 0 {
            return Err(RangeError::Empty { start });
        }
        let end = start
            .checked_add(size)
            .ok_or(RangeError::Wraps { start, size })?;
        Self::new(start >> PAGE_SHIFT, end >> PAGE_SHIFT).ok_or(RangeError::Wraps { start, size })
    }

    /// From a byte address and a number of pages, as `KVM_HC_MAP_GPA_RANGE` gives them.
    ///
    /// # Errors
    /// As for [`Pages::from_bytes`].
    pub fn from_address_and_pages(start: u64, pages: u64) -> Result<Self, RangeError> {
        let size = pages
            .checked_mul(PAGE_SIZE)
            .ok_or(RangeError::Wraps { start, size: pages })?;
        Self::from_bytes(start, size)
    }

    /// The smallest range that covers these bytes; `None` if there are none or they wrap.
    pub fn covering_bytes(start: u64, size: u64) -> Option<Self> {
        let last = start.checked_add(size.checked_sub(1)?)?;
        Self::new(start >> PAGE_SHIFT, (last >> PAGE_SHIFT) + 1)
    }

    /// First page.
    pub fn start(self) -> u64 {
        self.start
    }

    /// The page behind the last.
    pub fn end(self) -> u64 {
        self.end
    }

    /// Number of pages.
    pub fn count(self) -> u64 {
        self.end - self.start
    }

    /// First byte.
    pub fn start_bytes(self) -> u64 {
        self.start << PAGE_SHIFT
    }

    /// Number of bytes.
    pub fn bytes(self) -> u64 {
        self.count() << PAGE_SHIFT
    }

    /// Is the page in the range?
    pub fn contains(self, page: u64) -> bool {
        self.start <= page && page < self.end
    }

    /// Is the other range wholly inside?
    pub fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Do the two share a page?
    pub fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The pages in both.
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// The pages of both, if the others begin where these end.
    pub(crate) fn joined(self, next: Self) -> Option<Self> {
        (self.end == next.start).then_some(Self {
            end: next.end,
            ..self
        })
    }

    /// The first pages of the range, at most `count`, which is not 0.
    pub(crate) fn first(self, count: u64) -> Self {
        Self {
            end: self.end.min(self.start.saturating_add(count.max(1))),
            ..self
        }
    }

    /// The pages behind the first `count`; `None` if there are none.
    pub(crate) fn without_first(self, count: u64) -> Option<Self> {
        Self::new(self.start.saturating_add(count), self.end)
    }

    /// The range in pieces of at most `count` pages, which is not 0.
    pub(crate) fn pieces(self, count: u64) -> impl Iterator<Item = Self>
    where
        S: Copy,
    {
        let mut rest = Some(self);
        std::iter::from_fn(move || {
            let piece = rest?.first(count);
            rest = rest?.without_first(piece.count());
            Some(piece)
        })
    }

    /// The pages of `self` before and behind `other`.
    pub fn minus(self, other: Self) -> [Option<Self>; 2] {
        [
            Self::new(self.start, self.end.min(other.start)),
            Self::new(self.start.max(other.end), self.end),
        ]
    }

    /// The same pages, numbered so that `from` becomes `to`, in another space. `None` where that
    /// leaves the space.
    pub(crate) fn translate<T>(self, from: u64, to: u64) -> Option<Pages<T>> {
        let start = self.start.checked_sub(from)?.checked_add(to)?;
        Pages::new(start, start.checked_add(self.count())?)
    }
}

impl<S> fmt::Debug for Pages<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

/// In bytes, as users give and read ranges: `0x100000+0x2000`.
impl<S> fmt::Display for Pages<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Shifts by hand: `self` is a reference to a generic type, its accessors take values.
        let (start, size) = (
            self.start << PAGE_SHIFT,
            (self.end - self.start) << PAGE_SHIFT,
        );
        write!(f, "{start:#x}+{size:#x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Range = Pages<FileSpace>;

    fn range(start: u64, end: u64) -> Range {
        Range::new(start, end).unwrap()
    }

    #[test]
    fn numbers_that_are_no_range_are_refused_by_name() {
        use RangeError::*;
        let table = [
            (0x1000, 0, Empty { start: 0x1000 }),
            (
                0x1001,
                0x1000,
                Unaligned {
                    start: 0x1001,
                    size: 0x1000,
                },
            ),
            (
                0x1000,
                0x1800,
                Unaligned {
                    start: 0x1000,
                    size: 0x1800,
                },
            ),
            (
                0xffff_ffff_ffff_f000,
                0x2000,
                Wraps {
                    start: 0xffff_ffff_ffff_f000,
                    size: 0x2000,
                },
            ),
            (
                0xffff_ffff_ffff_f000,
                0x1000,
                Wraps {
                    start: 0xffff_ffff_ffff_f000,
                    size: 0x1000,
                },
            ),
        ];
        for (start, size, error) in table {
            assert_eq!(Range::from_bytes(start, size), Err(error));
        }
    }

    #[test]
    fn a_page_count_whose_bytes_overflow_is_refused() {
        for pages in [1 << 52, u64::MAX, (1 << 52) + 1] {
            assert!(matches!(
                Range::from_address_and_pages(0x1000, pages),
                Err(RangeError::Wraps { .. })
            ));
        }
    }

    #[test]
    fn neighbours_are_joined_and_others_are_not() {
        assert_eq!(range(0, 2).joined(range(2, 5)), Some(range(0, 5)));
        for other in [range(3, 5), range(1, 5), range(0, 2)] {
            assert_eq!(range(0, 2).joined(other), None);
        }
    }

    proptest! {
        #[test]
        fn minus_and_intersection_split_a_range(
            (a, b) in (0u64..50, 1u64..50),
            (c, d) in (0u64..50, 1u64..50),
        ) {
            let (x, y) = (range(a, a + b), range(c, c + d));
            let [before, behind] = x.minus(y);
            for page in 0..110 {
                let inside = |r: Option<Range>| r.is_some_and(|r| r.contains(page));
                prop_assert_eq!(inside(x.intersection(y)), x.contains(page) && y.contains(page));
                let is_rest = x.contains(page) && !y.contains(page);
                prop_assert_eq!(inside(before) || inside(behind), is_rest);
            }
        }

        #[test]
        fn covering_bytes_is_the_smallest(start in any::<u64>(), size in any::<u64>()) {
            match Range::covering_bytes(start, size) {
                None => {
                    let end = start.checked_add(size);
                    let is_too_large = end.is_none_or(|end| end > u64::MAX - PAGE_SIZE);
                    prop_assert!(size == 0 || is_too_large);
                }
                Some(r) => {
                    prop_assert!(r.start_bytes() <= start && start - r.start_bytes() < PAGE_SIZE);
                    let (end, wanted) = (r.start_bytes() + r.bytes(), start + size);
                    prop_assert!(end >= wanted && end - wanted < PAGE_SIZE);
                }
            }
        }
    }
}
