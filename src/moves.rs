// SPDX-License-Identifier: GPL-2.0-or-later

//! The pages that one request moves.

use std::sync::Arc;

use crate::addr::{FilePages, merge_adjacent};
use crate::backend::Backend;
use crate::state::{PageState, View};

/// Pages of one backend that system calls treat alike.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) backend: Arc<Backend>,
    pub(crate) pages: FilePages,
}

/// Pages that a request has marked as in transition, with the state that each had. Dropped
/// unfinished, it gives them back as they were.
#[derive(Debug)]
pub(crate) struct Moves {
    moves: Vec<(Run, PageState)>,
}

impl Drop for Moves {
    fn drop(&mut self) {
        self.finish(|was| was);
    }
}

impl Moves {
    /// Marks all pages of `windows` that `takes_part` accepts. The caller has claimed them, so a
    /// page in transition is one that the request names twice.
    pub(crate) fn mark(
        windows: &[(Arc<Backend>, FilePages)],
        takes_part: impl Fn(PageState) -> bool,
    ) -> Self {
        let mut moves = Vec::new();
        for (backend, pages) in windows {
            let mut states = backend.states.lock();
            let runs: Vec<_> = states
                .runs(*pages)
                .filter(|(_, state)| *state != PageState::Transition && takes_part(*state))
                .collect();
            for (pages, was) in runs {
                states.set_run(pages, was, PageState::Transition);
                let backend = backend.clone();
                moves.push((Run { backend, pages }, was));
            }
        }
        Self { moves }
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> u64 {
        self.moves.iter().map(|(run, _)| run.pages.count()).sum()
    }

    /// Counts a conversion of them.
    pub(crate) fn count(&self, to: View) {
        for moves in self.by_backend() {
            let counters = &moves[0].0.backend.counters;
            let pages = moves.iter().map(|(run, _)| run.pages.count()).sum();
            counters.conversions.add(to, 1);
            counters.converted_pages.add(to, pages);
        }
    }

    /// The pages whose old state is accepted, neighbours joined.
    pub(crate) fn runs(&self, was: impl Fn(PageState) -> bool) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        for moves in self.by_backend() {
            let pages = moves.iter().filter(|(_, state)| was(*state));
            let merged = merge_adjacent(pages.map(|(run, _)| run.pages));
            runs.extend(merged.into_iter().map(|pages| Run {
                backend: moves[0].0.backend.clone(),
                pages,
            }));
        }
        runs
    }

    /// Ends the transition; `to` is given the old state.
    pub(crate) fn finish(&mut self, to: impl Fn(PageState) -> PageState) {
        for (run, was) in self.moves.drain(..) {
            let mut states = run.backend.states.lock();
            states.set_run(run.pages, PageState::Transition, to(was));
        }
    }

    /// Never an empty slice.
    fn by_backend(&self) -> impl Iterator<Item = &[(Run, PageState)]> {
        let same = |a: &(Run, _), b: &(Run, _)| a.0.backend.id() == b.0.backend.id();
        self.moves.chunk_by(same)
    }
}
