// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pictures of a backend: which of its pages are in which state.

use std::sync::atomic::Ordering;

use crate::backend::stats::BackendStats;
use crate::backend::{Backend, RUNS_AT_ONCE};
use crate::pages::ranges::{FilePages, PAGE_SIZE};
use crate::pages::states::{PageState, View};

/// How many pages are looked at before conversions get their turn.
const PAGES_AT_ONCE: u64 = 1 << 20;

/// States of a range of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StateMap {
    /// Neighbouring pages of one state, in order. Neighbouring runs differ.
    pub runs: Vec<(FilePages, PageState)>,
    /// What did not find room, if anything.
    pub rest: Option<FilePages>,
}

impl Backend {
    /// The states of a range, in up to `limit` runs. Conversions go on meanwhile, so that of a
    /// large range the end is seen later than the beginning.
    ///
    /// # Panics
    /// If the range does not lie inside the backend.
    pub fn state_map(&self, pages: FilePages, limit: usize) -> StateMap {
        let mut runs: Vec<(FilePages, PageState)> = Vec::new();
        let mut rest = Some(pages);
        while let Some(pages) = rest {
            let end = pages.end().min(pages.start() + PAGES_AT_ONCE);
            let Some(slice) = FilePages::new(pages.start(), end) else {
                break;
            };
            let found: Vec<_> = {
                let states = self.states.lock();
                states.runs(slice).take(RUNS_AT_ONCE).collect()
            };
            for (run, state) in found {
                // The last run may go on where this look at the states began.
                let last = match runs.last() {
                    Some((_, last)) if *last == state => runs.pop(),
                    _ => None,
                };
                if last.is_none() && runs.len() == limit {
                    return StateMap { runs, rest };
                }
                let start = last.map_or(run.start(), |(last, _)| last.start());
                let whole = FilePages::new(start, run.end());
                runs.extend(whole.map(|whole| (whole, state)));
                rest = FilePages::new(run.end(), pages.end());
            }
        }
        StateMap { runs, rest }
    }
}

impl Backend {
    /// Starts to measure how long conversions take.
    pub fn watch_latency(&self) {
        let watched = &self.counters.latencies.watched;
        watched.store(true, Ordering::Relaxed);
    }

    /// Bytes per state and counters.
    pub fn stats(&self) -> BackendStats {
        let state_bytes = {
            let states = self.states.lock();
            PageState::ALL.map(|state| states.count(state) * PAGE_SIZE)
        };
        BackendStats {
            state_bytes,
            // A file that cannot be asked is shown as empty: a query must not fail for it.
            shared_allocated: self.views().file(View::Shared).allocated().unwrap_or(0),
            pinned: self.pins.bytes(),
            owed_holes: self.debts.hole_bytes(),
            ..self.counters.read()
        }
    }
}
