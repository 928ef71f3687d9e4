// SPDX-License-Identifier: MIT OR Apache-2.0

//! The pages that one step of a request moves.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::backend::{Backend, RUNS_AT_ONCE};
use crate::pages::ranges::{FilePages, FileSpace, PAGE_SIZE, SmallList};
use crate::pages::set::PageSet;
use crate::pages::states::{PageState, View};

/// Pages of one backend that system calls treat alike.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run<'a> {
    pub(crate) backend: &'a Arc<Backend>,
    pub(crate) pages: FilePages,
}

/// Pages that a step has marked as in transition, with the state that each had. Dropped unfinished,
/// it gives them back as they were.
#[derive(Debug)]
pub(super) struct Moves<'a> {
    moves: SmallList<(Run<'a>, PageState)>,
    neighbours: Option<Neighbours<'a>>,
    /// How many more runs may be looked at.
    room: usize,
    /// Attributes have been changed, and neither committed nor set back.
    attributes_changed: bool,
}

/// Undecided pages next to those that were asked for, which a private touch decides as well. They
/// lie in one window.
#[derive(Debug)]
struct Neighbours<'a> {
    backend: &'a Arc<Backend>,
    pages: PageSet<FileSpace>,
}

impl Neighbours<'_> {
    fn runs(&self) -> Vec<FilePages> {
        self.pages.within(self.backend.pages())
    }
}

impl Drop for Moves<'_> {
    fn drop(&mut self) {
        if self.moves.is_empty() {
            return;
        }
        if self.attributes_changed {
            // A callback has panicked on the way.
            for run in self.all_runs() {
                run.backend.doubt_attributes(run.pages);
            }
        }
        self.finish(|was| was);
    }
}

impl<'a> Moves<'a> {
    pub(super) fn new() -> Self {
        Self {
            moves: SmallList::new(),
            neighbours: None,
            room: RUNS_AT_ONCE,
            attributes_changed: false,
        }
    }

    /// Marks those pages of a range that `takes_part` accepts, as far as there is room for more
    /// runs of states. The caller has claimed them, so a page in transition is one that the request
    /// names twice. Returns the page behind the last that was looked at.
    pub(super) fn mark(
        &mut self,
        backend: &'a Arc<Backend>,
        pages: FilePages,
        takes_part: impl Fn(PageState) -> bool,
    ) -> u64 {
        let takes_part = |state: PageState| state != PageState::Transition && takes_part(state);
        let (marked, end) = mark_runs(backend, pages, &mut self.room, takes_part);
        let marked = marked.into_iter();
        self.moves
            .extend(marked.map(|(pages, was)| (Run { backend, pages }, was)));
        end
    }

    /// Marks the undecided pages among some as neighbours. A pinned page ends them, and so does one
    /// with data in the shared view: whoever has used it as shared may go on with it as private
    /// without asking, and what he stores would be lost when the page is given back. All pages that
    /// move then follow each other: their attributes are set as a whole or not at all, and no vCPU
    /// can use some that are then set back.
    pub(super) fn mark_neighbours(&mut self, backend: &'a Arc<Backend>, pages: FilePages) {
        let mut neighbours = PageSet::default();
        let undecided = |state| state == PageState::Undecided;
        let (marked, _) = mark_runs(backend, pages, &mut self.room, undecided);
        for (run, _) in &marked {
            neighbours.insert(*run);
        }
        self.neighbours = Some(Neighbours {
            backend,
            pages: neighbours,
        });
        let Some(free) = self.unused_around_asked(backend, pages) else {
            return;
        };
        let beyond = marked.iter().flat_map(|(run, _)| run.minus(free));
        let beyond: SmallList<_> = beyond
            .flatten()
            .map(|pages| Run { backend, pages })
            .collect();
        self.unmark(&beyond, PageState::Undecided);
    }

    /// The pages around those that were asked for that neither the host has pinned nor anybody has
    /// stored shared data in. Those that were asked for may be pinned: they are waited for.
    fn unused_around_asked(&self, backend: &Backend, within: FilePages) -> Option<FilePages> {
        let first = self.moves.first()?.0.pages;
        let last = self.moves.last()?.0.pages;
        let mut start = within.start();
        let before = |start| FilePages::new(start, first.start());
        while let Some(pinned) = before(start).and_then(|rest| backend.pins().first_in(rest)) {
            start = pinned.end();
        }
        let behind = FilePages::new(last.end(), within.end());
        let pinned = behind.and_then(|rest| backend.pins().first_in(rest));
        let end = pinned.map_or(within.end(), |pinned| pinned.start());
        // A file that cannot be asked has data everywhere.
        let data = |start, end| {
            let pages = FilePages::new(start, end)?;
            let data = backend.data_within(pages, View::Shared);
            Some(data.unwrap_or_else(|_| vec![pages]))
        };
        let used_before = data(start, first.start()).and_then(|data| data.last().copied());
        let used_behind = data(last.end(), end).and_then(|data| data.first().copied());
        FilePages::new(
            used_before.map_or(start, FilePages::end),
            used_behind.map_or(end, FilePages::start),
        )
    }

    /// The first of the pages that were asked for that the host uses.
    pub(super) fn first_pinned(&self) -> Option<Run<'a>> {
        self.moves.iter().find_map(|&(Run { backend, pages }, _)| {
            let pages = backend.pins().first_in(pages)?;
            Some(Run { backend, pages })
        })
    }

    /// Are any neighbours decided along with what was asked for?
    pub(super) fn have_neighbours(&self) -> bool {
        self.neighbours.is_some()
    }

    /// They.
    pub(super) fn neighbours(&self) -> impl Iterator<Item = Run<'a>> {
        self.neighbours.iter().flat_map(|neighbours| {
            let backend = neighbours.backend;
            let runs = neighbours.runs().into_iter();
            runs.map(move |pages| Run { backend, pages })
        })
    }

    /// Ends the transition of some neighbours, which do not move after all.
    pub(super) fn unmark(&mut self, pages: &[Run], state: PageState) {
        let Some(neighbours) = &mut self.neighbours else {
            return;
        };
        neighbours.backend.with_states(|states| {
            for run in pages {
                neighbours.pages.remove(run.pages);
                states.set_run(run.pages, PageState::Transition, state);
            }
        });
    }

    /// Was nothing of what was looked at to be moved?
    pub(super) fn is_empty(&self) -> bool {
        self.moves.is_empty()
    }

    /// Number of pages that were asked for and move.
    pub(super) fn pages(&self) -> u64 {
        self.moves.iter().map(|(run, _)| run.pages.count()).sum()
    }

    /// Counts a conversion of them.
    pub(super) fn count(&self, to: View) {
        let mut counted = None;
        for (Run { backend, pages }, _) in &self.moves {
            let counters = backend.counters();
            counters.converted_pages.add(to, pages.count());
            if counted.replace(backend.id()) != Some(backend.id()) {
                counters.conversions.add(to, 1);
            }
        }
        if let Some(neighbours) = &self.neighbours {
            let counter = &neighbours.backend.counters().neighbour_pages;
            counter.fetch_add(neighbours.pages.bytes() / PAGE_SIZE, Ordering::Relaxed);
        }
    }

    /// The pages that were asked for whose old state is accepted, adjacent ones joined.
    pub(super) fn runs(&self, was: impl Fn(PageState) -> bool) -> SmallList<Run<'a>> {
        let moves = self.moves.iter().filter(|(_, state)| was(*state));
        join(moves.map(|(run, _)| *run))
    }

    /// All pages that move, adjacent ones joined.
    pub(super) fn all_runs(&self) -> SmallList<Run<'a>> {
        if !self.have_neighbours() {
            return self.runs(|_| true);
        }
        let asked = self.moves.iter().map(|(run, _)| *run);
        let mut runs: SmallList<_> = asked.chain(self.neighbours()).collect();
        runs.sort_unstable_by_key(|run| run.pages);
        join(runs)
    }

    /// Attributes are about to be changed: unless that is committed or set back, nobody knows them.
    pub(super) fn attributes_change(&mut self) {
        self.attributes_changed = true;
    }

    /// They have been set back, or what could not be set back is in doubt.
    pub(super) fn attributes_are_back(&mut self) {
        self.attributes_changed = false;
    }

    /// Ends the transition; `to` is given the old state.
    pub(super) fn finish(&mut self, to: impl Fn(PageState) -> PageState) {
        if let Some(neighbours) = self.neighbours.take() {
            neighbours.backend.with_states(|states| {
                for run in neighbours.runs() {
                    states.set_run(run, PageState::Transition, to(PageState::Undecided));
                }
            });
        }
        for (run, was) in &self.moves {
            run.backend
                .with_states(|states| states.set_run(run.pages, PageState::Transition, to(*was)));
        }
        self.moves.clear();
    }
}

/// Marks the runs of some pages that `takes_part` accepts; returns them with the state each had,
/// and the page behind the last that there was room to look at.
fn mark_runs(
    backend: &Backend,
    pages: FilePages,
    room: &mut usize,
    takes_part: impl Fn(PageState) -> bool,
) -> (SmallList<(FilePages, PageState)>, u64) {
    backend.with_states(|states| {
        let (mut marked, mut rest) = (SmallList::new(), Some(pages));
        while let Some(left) = rest.filter(|_| *room > 0) {
            let (run, was) = states.first_run(left);
            if takes_part(was) {
                states.set_run(run, was, PageState::Transition);
                marked.push((run, was));
            }
            *room -= 1;
            rest = FilePages::new(run.end(), pages.end());
        }
        (marked, rest.map_or(pages.end(), FilePages::start))
    })
}

/// Joins adjacent runs, so that each system call covers as much as it can.
fn join<'a>(runs: impl IntoIterator<Item = Run<'a>>) -> SmallList<Run<'a>> {
    let mut joined: SmallList<Run<'a>> = SmallList::new();
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
