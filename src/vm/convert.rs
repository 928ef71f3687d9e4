// SPDX-License-Identifier: MIT OR Apache-2.0

//! Conversions: moving pages from one view to the other.
//!
//! All of a request is checked before anything moves. It is then carried out in steps of at most 64
//! MiB (1 GiB in place, where nothing is freed) and at most 1,024 runs of states: a step takes
//! effect as a whole or not at all, and between two of them nothing is claimed and an interruption
//! is seen. So no request takes memory or time without a bound, whatever the guest has done to the
//! states before.
//!
//! A step to private: once the host has no pins, listeners let go, the attribute is set, the shared
//! view is punched. To shared: listeners are told, the attribute is cleared, the private view is
//! punched. So the host's mappings go before a page becomes private. A hole that cannot be punched
//! then is owed: it is punched before that view is exposed again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::exclusion::pins::Waited;
use crate::listener::{Notifier, check_no_callback};
use crate::pages::ranges::{FilePages, GuestPages, SmallList};
use crate::pages::states::{PageState, View};
use crate::views::Mode;
use crate::vm::moves::{Moves, Run};
use crate::vm::told::{Later, Told};
use crate::vm::wait::Wait;
use crate::vm::{STEP_PAGES, STEP_PAGES_IN_PLACE, Vm};
use crate::windows::{Part, Window};

/// How long a pin lasts that is worth a wait with pages in transition. Others wait for them
/// meanwhile.
pub(super) const SHORT_PIN: Duration = Duration::from_millis(5);

/// What a request decides besides the pages that it names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Decide {
    /// Nothing: a request for exactly these pages.
    Exactly,
    /// Undecided pages around them too, as lazy attributes have it: a private touch.
    Around,
}

/// How a step has ended.
enum Step {
    /// So many pages have changed; what is left to do.
    Done(u64, Option<GuestPages>),
    /// The host uses these pages. Nothing has changed.
    Pinned(Arc<Backend>, FilePages),
    /// Somebody uses a page, says the kernel: [`Error::Held`]. Nothing has changed.
    Held(Arc<Backend>, Error),
    /// The windows have changed meanwhile. Nothing else has.
    LayoutChanged,
}

/// A window of a request, and its backend.
type Shown = (Arc<Backend>, Window);

impl Vm {
    /// Makes the pages of a range of guest physical space private or shared. Returns how many pages
    /// have changed.
    ///
    /// Parts that no backend owns take part if the listener says so. Pages that become private are
    /// waited for while the host uses them, as long as their backend's configuration says.
    ///
    /// # Errors
    /// [`Error::Gap`], [`Error::Unbound`], [`Error::NeverPrivate`]: all of the request is checked
    /// before anything moves. [`Error::Pinned`], [`Error::SetAttributes`], [`Error::Punch`],
    /// [`Error::Listener`]: earlier steps of a large request have taken effect, the one that failed
    /// has changed nothing. [`Error::Interrupted`] likewise: asked again, what is done costs
    /// nothing.
    pub fn convert(&self, guest: GuestPages, to: View) -> Result<u64> {
        self.convert_with(guest, to, Decide::Exactly)
    }

    pub(super) fn convert_with(&self, guest: GuestPages, to: View, decide: Decide) -> Result<u64> {
        check_no_callback(self.id())?;
        let mut changed = 0;
        let mut rest = guest;
        let mut wait = Wait::default();
        loop {
            match self.try_step(rest, to, decide)? {
                Step::Done(pages, None) => return Ok(changed + pages),
                Step::Done(pages, Some(left)) => {
                    changed += pages;
                    (rest, wait) = (left, Wait::default());
                    // Not before something has moved: whoever asks again gets on, however often it
                    // is interrupted.
                    if pages > 0 && self.is_interrupted() {
                        return Err(Error::Interrupted { guest });
                    }
                }
                Step::Pinned(backend, pages) => {
                    self.wait_for_pins(guest, &backend, pages, &mut wait)?
                }
                Step::Held(backend, error) => {
                    self.wait_for_holder(guest, &backend, error, &mut wait)?
                }
                Step::LayoutChanged => {}
            }
        }
    }

    fn try_step(&self, request: GuestPages, to: View, decide: Decide) -> Result<Step> {
        let (parts, layout) = self.parts(request);
        let (windows, left) = cut(self.check(&parts, to)?, request);
        let is_already = |(backend, window): &Shown| backend.is_surely_in(window.file, to);
        if windows.iter().all(is_already) {
            // Costs no claim and no system call.
            return Ok(Step::Done(0, left));
        }
        let notifier = self.begin()?;
        let around = match decide {
            // If there is a listener, it has them mapped, and its devices may be using them.
            Decide::Around if !notifier.is_listening() => self.undecided_around(request),
            _ => None,
        };
        let asked = windows
            .iter()
            .map(|(backend, window)| (backend, window.file));
        let touched = asked.chain(around.iter().map(|(backend, pages)| (backend, *pages)));
        let wanted: SmallList<_> = touched.clone().map(|(b, pages)| (b.id(), pages)).collect();
        let Some(_claim) = self.claim_in(layout, request, &wanted)? else {
            return Ok(Step::LayoutChanged);
        };
        for (backend, pages) in touched {
            self.repair_attributes(backend, pages)?;
        }
        let mut later = Later::new(self);
        let mut moves = Moves::new();
        let left = mark(&mut moves, &windows, to, request).or(left);
        if moves.is_empty() {
            // Somebody else has moved them while this request waited.
            return Ok(Step::Done(0, left));
        }
        if let Some((backend, pages)) = &around {
            moves.mark_neighbours(backend, *pages);
        }
        match to {
            View::Private => {
                if let Some(Run { backend, pages }) = drain_pins(&moves) {
                    return Ok(Step::Pinned(backend.clone(), pages));
                }
                match self.to_private(&mut moves, &notifier, &mut later) {
                    Err(error @ Error::Held { .. }) => {
                        let (backend, _) = &windows[0];
                        return Ok(Step::Held(backend.clone(), error));
                    }
                    moved => moved?,
                }
            }
            View::Shared => self.to_shared(&mut moves, &notifier, &mut later)?,
        }
        let pages = moves.pages();
        moves.count(to);
        moves.finish(|_| to.into());
        Ok(Step::Done(pages, left))
    }

    /// The pages around a range that nobody has decided, as far as a touch reaches. They lie in one
    /// window with it.
    fn undecided_around(&self, guest: GuestPages) -> Option<(Arc<Backend>, FilePages)> {
        let (window, page) = self.places.read().windows.around(guest)?;
        let backend = self.backend(window.backend)?;
        let pages = backend.undecided_around(page, window.file)?;
        Some((backend, pages))
    }

    /// Checks all parts of a request; returns those that backends own.
    fn check(&self, parts: &[Part], to: View) -> Result<SmallList<Shown>> {
        let mut windows = SmallList::new();
        for part in parts {
            match *part {
                Part::Gap(guest) => self.ask_for_gap(guest, to)?,
                Part::Window(window) => {
                    // A backend outlives its windows.
                    let Some(backend) = self.backend(window.backend) else {
                        continue;
                    };
                    if to == View::Private {
                        self.check_private(&backend, &window)?;
                    }
                    windows.push((backend, window));
                }
            }
        }
        Ok(windows)
    }

    fn ask_for_gap(&self, guest: GuestPages, to: View) -> Result<()> {
        let answer = self.listener.call(|user| user.gap(guest, to));
        answer.map_err(|source| Error::Gap { guest, to, source })
    }

    /// Can pages of this window be private?
    fn check_private(&self, backend: &Backend, window: &Window) -> Result<()> {
        let guest = window.guest;
        if !backend.mode().has_private_pages() {
            return Err(Error::NeverPrivate {
                guest,
                backend: backend.config().name.clone(),
            });
        }
        if !window.is_bound() {
            return Err(Error::Unbound { guest });
        }
        if backend.mode() == Mode::InPlace {
            let places = self.places.read();
            if let Some(unbound) = places.windows.unbound_place(backend.id(), window.file) {
                return Err(Error::ShownUnbound { guest, unbound });
            }
        }
        Ok(())
    }

    pub(super) fn to_private(
        &self,
        moves: &mut Moves<'_>,
        notifier: &Notifier<'_>,
        later: &mut Later<'_>,
    ) -> Result<()> {
        let runs = moves.all_runs();
        for run in &runs {
            run.backend.punch_owed(run.pages, View::Private)?;
        }
        let told = Told::unmap(notifier, &runs);
        moves.attributes_change();
        if let Err(error) = self.set_attributes(&runs, View::Private, later) {
            moves.attributes_are_back();
            // The guest may have used the private view before it was taken back.
            free_left_view(&runs, View::Private, later);
            told.take_back()
                .into_iter()
                .for_each(|lost| later.error(lost));
            return Err(error);
        }
        if moves.have_neighbours() {
            self.give_used_back(moves, later);
        }
        told.keep();
        // The neighbours are holes in the shared view.
        free_left_view(&moves.runs(|_| true), View::Shared, later);
        Ok(())
    }

    /// Neighbours that have data in the shared view by now are in use there: they become shared
    /// again. They had none before the attribute was set, so their guest uses one page both ways at
    /// once. The attribute is set already, so nobody can begin to use one unseen. There are no
    /// neighbours if there is a listener, who would have to be told.
    fn give_used_back(&self, moves: &mut Moves, later: &mut Later<'_>) {
        let mut used = Vec::new();
        for run in moves.neighbours() {
            let backend = run.backend;
            let data = backend.data_within(run.pages, View::Shared);
            let data = data.unwrap_or_else(|error| {
                later.error(error);
                vec![run.pages]
            });
            used.extend(data.into_iter().map(|pages| Run { backend, pages }));
        }
        if used.is_empty() {
            return;
        }
        self.set_attributes_back(&used, View::Shared, later);
        // The guest may have used the private view meanwhile.
        free_left_view(&used, View::Private, later);
        moves.unmark(&used, PageState::Shared);
    }

    pub(super) fn to_shared(
        &self,
        moves: &mut Moves<'_>,
        notifier: &Notifier<'_>,
        later: &mut Later<'_>,
    ) -> Result<()> {
        // Undecided pages are shared already for KVM, and their private view is a hole.
        let runs = moves.runs(|was| was == PageState::Private);
        for run in &runs {
            run.backend.punch_owed(run.pages, View::Shared)?;
        }
        let result = self.open_to_host(moves, &runs, notifier, later);
        let left = match result {
            Ok(()) => View::Private,
            // Devices may have used the shared view, or the guest, before it was taken back.
            Err(_) => View::Shared,
        };
        free_left_view(&runs, left, later);
        result
    }

    /// Lets guest and host use the shared view of runs, or neither of them.
    fn open_to_host(
        &self,
        moves: &mut Moves<'_>,
        runs: &[Run<'_>],
        notifier: &Notifier<'_>,
        later: &mut Later<'_>,
    ) -> Result<()> {
        // In place a listener's mapping would fault before the attribute is clear.
        let is_in_place = |run: &Run<'_>| run.backend.mode() == Mode::InPlace;
        let (after, before): (SmallList<_>, SmallList<_>) =
            runs.iter().copied().partition(is_in_place);
        // Listeners are asked first: when one refuses, the guest has not seen anything yet.
        let told_before = Told::map(notifier, &before)?;
        moves.attributes_change();
        if let Err(error) = self.set_attributes(runs, View::Shared, later) {
            moves.attributes_are_back();
            told_before.take_back();
            return Err(error);
        }
        match Told::map(notifier, &after) {
            Ok(told_after) => {
                told_before.keep();
                told_after.keep();
                Ok(())
            }
            Err(error) => {
                self.set_attributes_back(runs, View::Private, later);
                moves.attributes_are_back();
                told_before.take_back();
                Err(error)
            }
        }
    }
}

/// Lets accesses that are under way come to their end: no new one begins while the pages are in
/// transition, or hosts that use them all the time would keep them for ever. Returns what stays
/// pinned; that is waited for with the pages given back.
pub(super) fn drain_pins<'a>(moves: &Moves<'a>) -> Option<Run<'a>> {
    let mut pinned = moves.first_pinned()?;
    let deadline = Instant::now() + SHORT_PIN;
    while pinned.backend.pins().wait(pinned.pages, deadline, || false) == Waited::Unpinned {
        pinned = moves.first_pinned()?;
    }
    Some(pinned)
}

/// Cuts the windows of a request behind the first pages, as many as a step may have. Returns them
/// with what is left of the request.
fn cut(windows: SmallList<Shown>, request: GuestPages) -> (SmallList<Shown>, Option<GuestPages>) {
    if request.count() <= STEP_PAGES {
        return (windows, None);
    }
    let in_place = |(backend, _): &Shown| backend.mode() == Mode::InPlace;
    let mut room = match windows.iter().all(in_place) {
        true => STEP_PAGES_IN_PLACE,
        false => STEP_PAGES,
    };
    let mut step = SmallList::new();
    for (backend, window) in windows {
        let Some(first) = window.first(room) else {
            // No room is left: the next step begins here.
            return (step, GuestPages::new(window.guest.start(), request.end()));
        };
        let (end, cut_short) = (first.guest.end(), first.guest != window.guest);
        room -= first.guest.count();
        step.push((backend, first));
        if cut_short {
            return (step, GuestPages::new(end, request.end()));
        }
    }
    (step, None)
}

/// Marks what moves of the windows of a step. Returns what is left of the request if there are more
/// runs of states than a step may have.
fn mark<'a>(
    moves: &mut Moves<'a>,
    windows: &'a [Shown],
    to: View,
    request: GuestPages,
) -> Option<GuestPages> {
    for (backend, window) in windows {
        let end = moves.mark(backend, window.file, |state| state != to.into());
        if end < window.file.end() {
            let done = end - window.file.start();
            return GuestPages::new(window.guest.start() + done, request.end());
        }
    }
    None
}

/// Frees the view that pages have left, as the policy says. A hole that cannot be punched now does
/// not undo a conversion; it is owed.
fn free_left_view(runs: &[Run<'_>], view: View, later: &mut Later<'_>) {
    for run in runs {
        if run.backend.frees_left_view() {
            punch_or_owe(run.backend, run.pages, view, later);
        }
    }
}

/// Punches a hole now, or before the view is exposed again.
pub(super) fn punch_or_owe(backend: &Backend, pages: FilePages, view: View, later: &mut Later<'_>) {
    if let Err(why) = backend.punch(pages, view) {
        backend.owe_hole(pages, view);
        later.warn(why);
    }
}
