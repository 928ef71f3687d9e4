// SPDX-License-Identifier: GPL-2.0-or-later

//! The pages that one request moves.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::addr::{Few, FilePages, FileSpace, PAGE_SIZE, merge_adjacent};
use crate::backend::Backend;
use crate::page_set::PageSet;
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
    along: Option<Along>,
}

/// Undecided pages next to those that were asked for, which go along. They lie in one window.
#[derive(Debug)]
struct Along {
    backend: Arc<Backend>,
    pages: PageSet<FileSpace>,
}

impl Along {
    fn runs(&self) -> Vec<FilePages> {
        self.pages.within(self.backend.pages())
    }
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
            let takes_part = |state: PageState| state != PageState::Transition && takes_part(state);
            for (pages, was) in mark_runs(backend, *pages, takes_part) {
                let backend = backend.clone();
                moves.push((Run { backend, pages }, was));
            }
        }
        Self { moves, along: None }
    }

    /// Marks those of some pages that nobody has decided; they go along. A pinned page ends them, so
    /// that all pages that move follow each other: their attributes are set as a whole or not at all,
    /// and no vCPU can use some that are then set back.
    pub(crate) fn mark_along(&mut self, backend: &Arc<Backend>, pages: FilePages) {
        let mut along = PageSet::default();
        let marked = mark_runs(backend, pages, |state| state == PageState::Undecided);
        for (run, _) in &marked {
            along.insert(*run);
        }
        self.along = Some(Along {
            backend: backend.clone(),
            pages: along,
        });
        let Some(free) = self.unpinned_around_asked(backend, pages) else {
            return;
        };
        let beyond = marked.iter().flat_map(|(run, _)| {
            let before = FilePages::new(run.start(), run.end().min(free.start()));
            let behind = FilePages::new(run.start().max(free.end()), run.end());
            [before, behind].into_iter().flatten()
        });
        let beyond: Few<_> = beyond
            .map(|pages| Run {
                backend: backend.clone(),
                pages,
            })
            .collect();
        self.leave_behind(&beyond, PageState::Undecided);
    }

    /// The pages around those that were asked for that the host does not use. Some of them may be
    /// pinned: they are waited for.
    fn unpinned_around_asked(&self, backend: &Backend, within: FilePages) -> Option<FilePages> {
        let first = self.moves.first()?.0.pages;
        let last = self.moves.last()?.0.pages;
        let mut start = within.start();
        let before = |start| FilePages::new(start, first.start());
        while let Some(pinned) = before(start).and_then(|rest| backend.pins.first_in(rest)) {
            start = pinned.end();
        }
        let behind = FilePages::new(last.end(), within.end());
        let pinned = behind.and_then(|rest| backend.pins.first_in(rest));
        FilePages::new(start, pinned.map_or(within.end(), |pinned| pinned.start()))
    }

    /// The first of the pages that were asked for that the host uses.
    pub(crate) fn first_pinned(&self) -> Option<Run> {
        self.moves.iter().find_map(|(run, _)| {
            let pages = run.backend.pins.first_in(run.pages)?;
            let backend = run.backend.clone();
            Some(Run { backend, pages })
        })
    }

    /// Pages that go along.
    pub(crate) fn along(&self) -> Vec<Run> {
        let along = self.along.iter();
        along
            .flat_map(|along| {
                along.runs().into_iter().map(|pages| Run {
                    backend: along.backend.clone(),
                    pages,
                })
            })
            .collect()
    }

    /// Ends the transition of some pages that go along, which stay behind after all.
    pub(crate) fn leave_behind(&mut self, pages: &[Run], state: PageState) {
        let Some(along) = &mut self.along else { return };
        let mut states = along.backend.states.lock();
        for left in pages {
            along.pages.remove(left.pages);
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
        if let Some(along) = &self.along {
            let counter = &along.backend.counters.pages_along;
            counter.fetch_add(along.pages.bytes() / PAGE_SIZE, Ordering::Relaxed);
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
        let Some(along) = &self.along else {
            return self.runs(|_| true);
        };
        let asked = self.moves.iter().map(|(run, _)| run.pages);
        let mut pages: Few<_> = asked.chain(along.runs()).collect();
        pages.sort_unstable();
        let mut runs = Few::new();
        join(&mut runs, &along.backend, pages);
        runs
    }

    /// Ends the transition; `to` is given the old state.
    pub(crate) fn finish(&mut self, to: impl Fn(PageState) -> PageState) {
        if let Some(along) = self.along.take() {
            let mut states = along.backend.states.lock();
            for run in along.runs() {
                states.set_run(run, PageState::Transition, to(PageState::Undecided));
            }
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

/// Marks the runs of some pages that `takes_part` accepts; returns them with the state each had.
fn mark_runs(
    backend: &Backend,
    pages: FilePages,
    takes_part: impl Fn(PageState) -> bool,
) -> Few<(FilePages, PageState)> {
    let mut states = backend.states.lock();
    let runs = states.runs(pages).filter(|(_, state)| takes_part(*state));
    let runs: Few<_> = runs.collect();
    for (run, was) in &runs {
        states.set_run(*run, *was, PageState::Transition);
    }
    runs
}

fn join(runs: &mut Few<Run>, backend: &Arc<Backend>, pages: impl IntoIterator<Item = FilePages>) {
    let merged = merge_adjacent(pages);
    runs.extend(merged.into_iter().map(|pages| Run {
        backend: backend.clone(),
        pages,
    }));
}
