// SPDX-License-Identifier: GPL-2.0-or-later

//! The pages that one request moves.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::backend::Backend;
use crate::pages::ranges::{Few, FilePages, FileSpace, PAGE_SIZE};
use crate::pages::set::PageSet;
use crate::pages::states::{PageState, View};

/// Pages of one backend that system calls treat alike.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run<'a> {
    pub(crate) backend: &'a Arc<Backend>,
    pub(crate) pages: FilePages,
}

/// Pages that a request has marked as in transition, with the state that each had. Dropped
/// unfinished, it gives them back as they were.
#[derive(Debug)]
pub(crate) struct Moves<'a> {
    moves: Few<(Run<'a>, PageState)>,
    along: Option<Along<'a>>,
}

/// Undecided pages next to those that were asked for, which go along. They lie in one window.
#[derive(Debug)]
struct Along<'a> {
    backend: &'a Arc<Backend>,
    pages: PageSet<FileSpace>,
}

impl Along<'_> {
    fn runs(&self) -> Vec<FilePages> {
        self.pages.within(self.backend.pages())
    }
}

impl Drop for Moves<'_> {
    fn drop(&mut self) {
        if !self.is_empty() {
            self.finish(|was| was);
        }
    }
}

impl<'a> Moves<'a> {
    /// Marks all pages of `windows` that `takes_part` accepts. The caller has claimed them, so a
    /// page in transition is one that the request names twice.
    pub(crate) fn mark(
        windows: &'a [(Arc<Backend>, FilePages)],
        takes_part: impl Fn(PageState) -> bool,
    ) -> Self {
        let mut moves = Few::new();
        for (backend, pages) in windows {
            let takes_part = |state: PageState| state != PageState::Transition && takes_part(state);
            for (pages, was) in mark_runs(backend, *pages, takes_part) {
                moves.push((Run { backend, pages }, was));
            }
        }
        Self { moves, along: None }
    }

    /// Marks those of some pages that nobody has decided; they go along. A pinned page ends them, so
    /// that all pages that move follow each other: their attributes are set as a whole or not at all,
    /// and no vCPU can use some that are then set back.
    pub(crate) fn mark_along(&mut self, backend: &'a Arc<Backend>, pages: FilePages) {
        let mut along = PageSet::default();
        let marked = mark_runs(backend, pages, |state| state == PageState::Undecided);
        for (run, _) in &marked {
            along.insert(*run);
        }
        self.along = Some(Along {
            backend,
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
        let beyond: Few<_> = beyond.map(|pages| Run { backend, pages }).collect();
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
    pub(crate) fn first_pinned(&self) -> Option<Run<'a>> {
        self.moves.iter().find_map(|&(Run { backend, pages }, _)| {
            let pages = backend.pins.first_in(pages)?;
            Some(Run { backend, pages })
        })
    }

    /// Do any pages go along?
    pub(crate) fn have_along(&self) -> bool {
        self.along.is_some()
    }

    /// Pages that go along.
    pub(crate) fn along(&self) -> impl Iterator<Item = Run<'a>> {
        self.along.iter().flat_map(|along| {
            let backend = along.backend;
            let runs = along.runs().into_iter();
            runs.map(move |pages| Run { backend, pages })
        })
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
        let mut counted = None;
        for (Run { backend, pages }, _) in &self.moves {
            let counters = &backend.counters;
            counters.converted_pages.add(to, pages.count());
            if counted.replace(backend.id()) != Some(backend.id()) {
                counters.conversions.add(to, 1);
            }
        }
        if let Some(along) = &self.along {
            let counter = &along.backend.counters.pages_along;
            counter.fetch_add(along.pages.bytes() / PAGE_SIZE, Ordering::Relaxed);
        }
    }

    /// The pages that were asked for whose old state is accepted, neighbours joined.
    pub(crate) fn runs(&self, was: impl Fn(PageState) -> bool) -> Few<Run<'a>> {
        let moves = self.moves.iter().filter(|(_, state)| was(*state));
        join(moves.map(|(run, _)| *run))
    }

    /// All pages that move, neighbours joined.
    pub(crate) fn all_runs(&self) -> Few<Run<'a>> {
        if !self.have_along() {
            return self.runs(|_| true);
        }
        let asked = self.moves.iter().map(|(run, _)| *run);
        let mut runs: Few<_> = asked.chain(self.along()).collect();
        runs.sort_unstable_by_key(|run| run.pages);
        join(runs)
    }

    /// Ends the transition; `to` is given the old state.
    pub(crate) fn finish(&mut self, to: impl Fn(PageState) -> PageState) {
        if let Some(along) = self.along.take() {
            let mut states = along.backend.states.lock();
            for run in along.runs() {
                states.set_run(run, PageState::Transition, to(PageState::Undecided));
            }
        }
        for (run, was) in &self.moves {
            let mut states = run.backend.states.lock();
            states.set_run(run.pages, PageState::Transition, to(*was));
        }
        self.moves.clear();
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

/// Joins neighbours, so that each system call covers as much as it can.
fn join<'a>(runs: impl IntoIterator<Item = Run<'a>>) -> Few<Run<'a>> {
    let mut joined: Few<Run<'a>> = Few::new();
    for run in runs {
        let last = joined.last_mut();
        let last = last.filter(|last| last.backend.id() == run.backend.id());
        match last.and_then(|last| Some((last.pages.joined(run.pages)?, last))) {
            Some((pages, last)) => last.pages = pages,
            None => joined.push(run),
        }
    }
    joined
}
