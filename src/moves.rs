// SPDX-License-Identifier: GPL-2.0-or-later

//! The pages that one request moves.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::addr::{Few, FilePages, merge_adjacent};
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
    moves: Few<(Run, PageState)>,
    /// Undecided pages next to those that were asked for, which go along.
    along: Few<Run>,
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
        let mut moves = Few::new();
        for (backend, pages) in windows {
            let mut states = backend.states.lock();
            let runs: Few<_> = states
                .runs(*pages)
                .filter(|(_, state)| *state != PageState::Transition && takes_part(*state))
                .collect();
            for (pages, was) in runs {
                states.set_run(pages, was, PageState::Transition);
                let backend = backend.clone();
                moves.push((Run { backend, pages }, was));
            }
        }
        let along = Few::new();
        Self { moves, along }
    }

    /// Marks those of some pages that nobody has decided; they go along.
    pub(crate) fn mark_along(&mut self, backend: &Arc<Backend>, pages: FilePages) {
        let mut states = backend.states.lock();
        let undecided = |(_, state): &(_, PageState)| *state == PageState::Undecided;
        let runs: Few<_> = states.runs(pages).filter(undecided).collect();
        for (pages, was) in runs {
            states.set_run(pages, was, PageState::Transition);
            let backend = backend.clone();
            self.along.push(Run { backend, pages });
        }
    }

    /// Pages that go along.
    pub(crate) fn along(&self) -> &[Run] {
        &self.along
    }

    /// Ends the transition of some pages that go along, which stay behind after all.
    pub(crate) fn leave_behind(&mut self, pages: &[Run], state: PageState) {
        for left in pages {
            let same = |run: &Run| run.backend.id() == left.backend.id();
            let rest = self.along.drain(..).flat_map(|run| {
                let parts = match same(&run) {
                    true => run.pages.minus(left.pages),
                    false => [Some(run.pages), None],
                };
                parts.into_iter().flatten().map(move |pages| Run {
                    backend: run.backend.clone(),
                    pages,
                })
            });
            self.along = rest.collect();
            let mut states = left.backend.states.lock();
            states.set_run(left.pages, PageState::Transition, state);
        }
    }

    /// Was anything of what was asked for still to be moved?
    pub(crate) fn is_empty(&self) -> bool {
        self.moves.is_empty()
    }

    /// Number of pages that were asked for and move.
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
        for run in &self.along {
            let counter = &run.backend.counters.pages_along;
            counter.fetch_add(run.pages.count(), Ordering::Relaxed);
        }
    }

    /// The pages that were asked for whose old state is accepted, neighbours joined.
    pub(crate) fn runs(&self, was: impl Fn(PageState) -> bool) -> Few<Run> {
        let mut runs = Few::new();
        for moves in self.by_backend() {
            let pages = moves.iter().filter(|(_, state)| was(*state));
            join(
                &mut runs,
                &moves[0].0.backend,
                pages.map(|(run, _)| run.pages),
            );
        }
        runs
    }

    /// All pages that move, neighbours joined.
    pub(crate) fn all_runs(&self) -> Few<Run> {
        // Only a request in a single window has pages that go along.
        let Some(first) = self.along.first() else {
            return self.runs(|_| true);
        };
        let asked = self.moves.iter().map(|(run, _)| run.pages);
        let along = self.along.iter().map(|run| run.pages);
        let mut pages: Few<_> = asked.chain(along).collect();
        pages.sort_unstable();
        let mut runs = Few::new();
        join(&mut runs, &first.backend, pages);
        runs
    }

    /// Ends the transition; `to` is given the old state.
    pub(crate) fn finish(&mut self, to: impl Fn(PageState) -> PageState) {
        for run in self.along.drain(..) {
            let mut states = run.backend.states.lock();
            let to = to(PageState::Undecided);
            states.set_run(run.pages, PageState::Transition, to);
        }
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

fn join(runs: &mut Few<Run>, backend: &Arc<Backend>, pages: impl IntoIterator<Item = FilePages>) {
    let merged = merge_adjacent(pages);
    runs.extend(merged.into_iter().map(|pages| Run {
        backend: backend.clone(),
        pages,
    }));
}
