// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a backend counts, and what it tells of that.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::pages::ranges::PAGE_SIZE;
use crate::pages::states::View;

/// One for each direction.
#[derive(Debug, Default)]
pub(crate) struct ByView<T = AtomicU64> {
    shared: T,
    private: T,
}

impl<T> ByView<T> {
    pub(super) fn of_mut(&mut self, view: View) -> &mut T {
        match view {
            View::Shared => &mut self.shared,
            View::Private => &mut self.private,
        }
    }

    pub(super) fn of(&self, view: View) -> &T {
        match view {
            View::Shared => &self.shared,
            View::Private => &self.private,
        }
    }
}

impl ByView {
    pub(crate) fn add(&self, view: View, n: u64) {
        self.of(view).fetch_add(n, Ordering::Relaxed);
    }
}

/// What a backend counts. Nothing is computed before somebody asks.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) conversions: ByView,
    pub(crate) converted_pages: ByView,
    pub(crate) neighbour_pages: AtomicU64,
    pub(crate) faults: ByView,
    pub(crate) hypercalls: AtomicU64,
    pub(crate) refused: AtomicU64,
    pub(crate) waits: AtomicU64,
    pub(crate) strays: AtomicU64,
    pub(crate) latencies: Latencies,
}

impl Counters {
    /// What is counted here; the rest is the backend's.
    pub(crate) fn read(&self) -> BackendStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BackendStats {
            conversions_to_shared: get(&self.conversions.shared),
            conversions_to_private: get(&self.conversions.private),
            converted_to_shared: get(&self.converted_pages.shared) * PAGE_SIZE,
            converted_to_private: get(&self.converted_pages.private) * PAGE_SIZE,
            converted_neighbours: get(&self.neighbour_pages) * PAGE_SIZE,
            faults_shared: get(&self.faults.shared),
            faults_private: get(&self.faults.private),
            hypercalls: get(&self.hypercalls),
            refused: get(&self.refused),
            waits: get(&self.waits),
            strays: get(&self.strays),
            latency_to_shared: self.latencies.read(View::Shared),
            latency_to_private: self.latencies.read(View::Private),
            ..BackendStats::default()
        }
    }
}

/// Number of a histogram's buckets.
pub const LATENCY_BUCKETS: usize = 24;

/// How long conversions have taken: bucket 0 counts those under 1 µs, bucket N those under 2^N µs,
/// and the last one the rest.
pub type Latency = [u64; LATENCY_BUCKETS];

type Buckets = [AtomicU64; LATENCY_BUCKETS];

/// How long conversions take, from when somebody wanted to know: nobody else pays for clocks.
#[derive(Debug, Default)]
pub(crate) struct Latencies {
    pub(crate) watched: AtomicBool,
    counts: ByView<Buckets>,
}

impl Latencies {
    /// A request begins.
    pub(crate) fn start(&self) -> Option<Instant> {
        self.watched.load(Ordering::Relaxed).then(Instant::now)
    }

    /// A request that began then has moved pages to a view.
    pub(crate) fn end(&self, started: Option<Instant>, to: View) {
        if let Some(started) = started {
            let bucket = &self.counts.of(to)[bucket(started.elapsed())];
            bucket.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn read(&self, to: View) -> Latency {
        let counts = self.counts.of(to);
        std::array::from_fn(|index| counts[index].load(Ordering::Relaxed))
    }
}

fn bucket(time: Duration) -> usize {
    let bits = u128::BITS - time.as_micros().leading_zeros();
    (bits as usize).min(LATENCY_BUCKETS - 1)
}

/// What a backend holds and has done.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BackendStats {
    /// Bytes in each state, in the order of `PageState::ALL`.
    pub state_bytes: [u64; 4],
    /// Bytes of the shared file that the kernel has allocated.
    pub shared_allocated: u64,
    /// Steps of requests that moved pages to the shared view; most requests are one step.
    pub conversions_to_shared: u64,
    /// The same for the private view.
    pub conversions_to_private: u64,
    /// Bytes moved to the shared view.
    pub converted_to_shared: u64,
    /// Bytes moved to the private view.
    pub converted_to_private: u64,
    /// Bytes that lazy attributes made private as neighbours of what was touched.
    pub converted_neighbours: u64,
    /// Memory faults that asked for the shared view.
    pub faults_shared: u64,
    /// Memory faults that asked for the private view.
    pub faults_private: u64,
    /// Requests by hypercall.
    pub hypercalls: u64,
    /// Requests that were refused.
    pub refused: u64,
    /// Requests that waited for pages that the host used.
    pub waits: u64,
    /// Accesses to private pages that a guard has caught.
    pub strays: u64,
    /// Bytes that the host uses through pins; those that are pinned twice count twice.
    pub pinned: u64,
    /// Bytes whose hole the kernel has refused to punch, and that is punched before they are
    /// exposed again.
    pub owed_holes: u64,
    /// How long requests that moved pages to the shared view have taken since
    /// `Backend::watch_latency`.
    pub latency_to_shared: Latency,
    /// The same for the private view.
    pub latency_to_private: Latency,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two_of_microseconds() {
        for (nanoseconds, expected) in [
            (0, 0),
            (999, 0),
            (1_000, 1),
            (1_999, 1),
            (2_000, 2),
            (1_023_999, 10),
            (1_024_000, 11),
            (u64::MAX, LATENCY_BUCKETS - 1),
        ] {
            assert_eq!(bucket(Duration::from_nanos(nanoseconds)), expected);
        }
    }

    #[test]
    fn latencies_are_measured_once_somebody_watches() {
        let latencies = Latencies::default();
        assert_eq!(latencies.start(), None);
        assert_eq!(latencies.read(View::Private).iter().sum::<u64>(), 0);
        latencies.watched.store(true, Ordering::Relaxed);
        latencies.end(latencies.start(), View::Private);
        assert_eq!(latencies.read(View::Private).iter().sum::<u64>(), 1);
        assert_eq!(latencies.read(View::Shared).iter().sum::<u64>(), 0);
    }
}
