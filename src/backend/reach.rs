// SPDX-License-Identifier: MIT OR Apache-2.0

//! Lazy attributes: how far the first private touch of a page reaches.
//!
//! A large guest starts at once if nobody decides its pages before they are used. A touch then
//! decides the whole aligned chunk around it, so that the neighbours cost no exit of their own. The
//! chunk doubles while touches go on where the last one ended.

use crate::pages::ranges::{FilePages, PAGE_SIZE};

/// The chunk that is taken unless a user says otherwise, in bytes: what a large page covers.
pub const DEFAULT_CHUNK: u64 = 2 << 20;

/// Where doubling ends, in bytes, for chunks that do not begin larger: setting the attributes of so
/// much takes some milliseconds.
pub const LARGEST_CHUNK: u64 = 32 << 20;

/// As many vCPUs may touch memory in sequence, each its own, without disturbing each other.
const STREAMS: usize = 16;

/// The size of a first chunk, as a user gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk(u64);

impl Default for Chunk {
    fn default() -> Self {
        Self(DEFAULT_CHUNK / PAGE_SIZE)
    }
}

impl Chunk {
    /// From bytes: a power of two, of a page or more.
    pub fn from_bytes(bytes: u64) -> Option<Self> {
        (bytes.is_power_of_two() && bytes >= PAGE_SIZE).then_some(Self(bytes / PAGE_SIZE))
    }

    /// In bytes.
    pub fn bytes(self) -> u64 {
        self.0 * PAGE_SIZE
    }
}

/// What touches have reached so far.
#[derive(Debug)]
pub(crate) struct ChunkPredictor {
    first: u64,
    /// The latest comes first.
    streams: Vec<Stream>,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// The page behind the last chunk.
    end: u64,
    /// Pages of the last chunk, before it was cut.
    size: u64,
}

impl ChunkPredictor {
    pub(crate) fn new(chunk: Chunk) -> Self {
        Self {
            first: chunk.0,
            streams: Vec::with_capacity(STREAMS),
        }
    }

    /// The chunk around a page, cut to `within`, which holds the page.
    pub(crate) fn chunk(&mut self, page: u64, within: FilePages) -> FilePages {
        let known = self.streams.iter().position(|stream| stream.end == page);
        let size = match known.map(|at| self.streams.remove(at)) {
            Some(stream) => (stream.size * 2).min(self.first.max(LARGEST_CHUNK / PAGE_SIZE)),
            None => self.first,
        };
        let start = page & !(size - 1);
        let chunk = FilePages::new(start, start.saturating_add(size))
            .and_then(|chunk| chunk.intersection(within))
            .unwrap_or(within);
        self.streams.truncate(STREAMS - 1);
        let end = chunk.end();
        self.streams.insert(0, Stream { end, size });
        chunk
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = (1 << 20) / PAGE_SIZE;

    fn all(pages: u64) -> FilePages {
        FilePages::new(0, pages).unwrap()
    }

    #[test]
    fn sizes_that_are_no_power_of_two_are_refused() {
        for bad in [0, 1, 2048, 4097, 3 << 20, u64::MAX] {
            assert_eq!(Chunk::from_bytes(bad), None, "{bad}");
        }
        for good in [4096, 2 << 20, 1 << 63] {
            assert_eq!(Chunk::from_bytes(good).unwrap().bytes(), good);
        }
    }

    #[test]
    fn chunks_double_along_a_sequence_up_to_a_limit() {
        let mut predictor = ChunkPredictor::new(Chunk::default());
        let mut page = 0;
        let mut sizes = Vec::new();
        while page < 256 * MIB {
            let chunk = predictor.chunk(page, all(256 * MIB));
            sizes.push((chunk.end() - page) / MIB);
            page = chunk.end();
        }
        assert_eq!(sizes[..6], [2, 2, 4, 8, 16, 32]);
        assert!(sizes[6..].iter().all(|size| *size == 32));
    }

    #[test]
    fn sequences_of_several_vcpus_do_not_disturb_each_other() {
        let mut predictor = ChunkPredictor::new(Chunk::default());
        let mut next = [0, 1, 2, 3].map(|vcpu| vcpu * 1024 * MIB);
        for _ in 0..8 {
            for page in &mut next {
                *page = predictor.chunk(*page, all(4096 * MIB)).end();
            }
        }
        for (vcpu, page) in (0..).zip(next) {
            assert!(page - vcpu * 1024 * MIB > 64 * MIB);
        }
    }

    #[test]
    fn a_jump_begins_small_again() {
        let mut predictor = ChunkPredictor::new(Chunk::default());
        let end = predictor.chunk(0, all(512 * MIB)).end();
        assert!(predictor.chunk(end, all(512 * MIB)).count() > 2 * MIB);
        assert_eq!(predictor.chunk(301 * MIB, all(512 * MIB)).count(), 2 * MIB);
    }

    proptest! {
        #[test]
        fn a_chunk_holds_its_page_and_stays_inside(
            shift in 0u32..16,
            (start, length) in (0u64..1 << 20, 1u64..1 << 20),
            touches in prop::collection::vec(any::<u64>(), 1..100),
        ) {
            let within = FilePages::new(start, start + length).unwrap();
            let mut predictor = ChunkPredictor::new(Chunk::from_bytes(PAGE_SIZE << shift).unwrap());
            let mut next = start;
            for touch in touches {
                // Half of them go on where the last has ended.
                let page = match touch % 2 == 0 && within.contains(next) {
                    true => next,
                    false => start + touch % length,
                };
                let chunk = predictor.chunk(page, within);
                prop_assert!(chunk.contains(page) && within.covers(chunk));
                next = chunk.end();
            }
        }
    }
}
