// SPDX-License-Identifier: GPL-2.0-or-later

//! Conversions: moving pages from one view to the other, and discarding both.
//!
//! To private: once the host has no pins, listeners let go, the attribute is set, the shared view is
//! punched. To shared: the attribute is cleared, listeners are told, the private view is punched. So
//! the host's mappings go before a page becomes private and come after it is shared. A request takes
//! effect as a whole or not at all; only the hole of a view that has been left may be punched later,
//! before that view is exposed again.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::backend::{Backend, BackendId, Discard, Queued};
use crate::error::{Error, Result};
use crate::exclusion::claims::Claim;
use crate::exclusion::pins::Waited;
use crate::listener::{Level, Told};
use crate::pages::ranges::{Few, FilePages, GuestPages};
use crate::pages::states::{PageState, View};
use crate::views::Mode;
use crate::vm::Vm;
use crate::vm::moves::{Moves, Run};
use crate::windows::{Layout, Part, Window};

/// What becomes of undecided pages next to those that are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Neighbours {
    /// A request for exactly these pages.
    Stay,
    /// A private touch: those around it are decided with it, as lazy attributes have it.
    GoAlong,
}

/// How a try has ended.
enum Tried {
    /// So many pages have changed.
    Done(u64),
    /// The host uses these pages. Nothing has changed.
    Pinned(Arc<Backend>, FilePages),
    /// The windows have changed meanwhile. Nothing else has.
    LayoutChanged,
}

/// Tells listeners that runs are no longer the host's.
fn let_go(runs: &[Run<'_>], told: &Told<'_>) {
    for run in runs {
        told.discard(run.backend, run.pages);
    }
}

/// Can pages of this window be private?
fn check_private(backend: &Backend, window: &Window) -> Result<()> {
    let guest = window.guest;
    match backend.mode() {
        Mode::Mapped => Err(Error::NeverPrivate {
            guest,
            backend: backend.config().name.clone(),
        }),
        Mode::Private if !window.bound => Err(Error::Unbound { guest }),
        Mode::Private => Ok(()),
    }
}

impl Vm {
    /// Makes the pages of a range of guest physical space private or shared. Returns how many pages
    /// have changed.
    ///
    /// Parts that no backend owns take part if the listener says so. Pages that become private are
    /// waited for while the host uses them, as long as their backend's configuration says. On an
    /// error nothing has changed.
    pub fn convert(&self, guest: GuestPages, to: View) -> Result<u64> {
        self.convert_with(guest, to, Neighbours::Stay)
    }

    pub(crate) fn convert_with(
        &self,
        guest: GuestPages,
        to: View,
        neighbours: Neighbours,
    ) -> Result<u64> {
        let mut first_wait = None;
        loop {
            match self.try_convert(guest, to, neighbours)? {
                Tried::Done(pages) => return Ok(pages),
                Tried::Pinned(backend, pages) => {
                    let start = *first_wait.get_or_insert_with(Instant::now);
                    self.wait_for_pins(guest, &backend, pages, start)?;
                }
                Tried::LayoutChanged => {}
            }
        }
    }

    fn try_convert(&self, guest: GuestPages, to: View, neighbours: Neighbours) -> Result<Tried> {
        let (parts, layout) = self.parts(guest);
        let windows = self.check(&parts, to)?;
        let is_already = |(backend, pages): &(Arc<Backend>, _)| backend.all_surely_in(*pages, to);
        if windows.iter().all(is_already) {
            // Costs no claim and no system call.
            return Ok(Tried::Done(0));
        }
        let told = Told::begin(self.listener.as_ref());
        let along = match neighbours {
            // If there is a listener, it has them mapped, and its devices may be using them.
            Neighbours::GoAlong if !told.is_heard() => self.undecided_around(guest),
            _ => None,
        };
        let wanted = windows.iter().chain(&along);
        let wanted = wanted.map(|(backend, pages)| (backend.id(), *pages));
        let Some(_claim) = self.claim_in(layout, guest, &wanted.collect::<Few<_>>())? else {
            return Ok(Tried::LayoutChanged);
        };
        for (backend, pages) in windows.iter().chain(&along) {
            self.make_sure(backend, *pages)?;
        }
        let mut moves = Moves::mark(&windows, |state| state != to.into());
        if moves.is_empty() {
            // Somebody else has moved them while this request waited.
            return Ok(Tried::Done(0));
        }
        if let Some((backend, pages)) = &along {
            moves.mark_along(backend, *pages);
        }
        match to {
            View::Private => {
                if let Some(Run { backend, pages }) = moves.first_pinned() {
                    return Ok(Tried::Pinned(backend.clone(), pages));
                }
                self.to_private(&mut moves, &told)?;
            }
            View::Shared => self.to_shared(&moves, &told)?,
        }
        let pages = moves.pages();
        moves.count(to);
        moves.finish(|_| to.into());
        Ok(Tried::Done(pages))
    }

    /// Waits until the host has let go of pages, with no claim and none of the listener's locks held:
    /// whoever lets go may need them.
    fn wait_for_pins(
        &self,
        guest: GuestPages,
        backend: &Backend,
        pages: FilePages,
        start: Instant,
    ) -> Result<()> {
        let timeout = backend.config().convert_timeout;
        backend.counters.waits.fetch_add(1, Ordering::Relaxed);
        let interrupted = || self.listener.interrupted();
        match backend
            .pins
            .wait(pages, start.checked_add(timeout), interrupted)
        {
            Waited::Unpinned => Ok(()),
            Waited::Interrupted => Err(Error::Interrupted { guest }),
            Waited::TimedOut => Err(Error::Pinned {
                backend: backend.config().name.clone(),
                pages,
                timeout,
            }),
        }
    }

    /// What a range shows, and in which layout.
    pub(crate) fn parts(&self, guest: GuestPages) -> (Few<Part>, Layout) {
        let windows = self.windows.read();
        (windows.resolve(guest), windows.layout())
    }

    /// Claims pages that a range shows in a layout. `None` if that is another by then: it cannot
    /// change under a claim, but it can while one is waited for.
    pub(crate) fn claim_in(
        &self,
        layout: Layout,
        guest: GuestPages,
        wanted: &[(BackendId, FilePages)],
    ) -> Result<Option<Claim<'_>>> {
        let claim = self
            .claims
            .claim(wanted, || self.listener.interrupted())
            .map_err(|_| Error::Interrupted { guest })?;
        let is_same = self.windows.read().layout() == layout;
        Ok(is_same.then_some(claim))
    }

    /// The pages around a range that nobody has decided, as far as a touch reaches. They lie in one
    /// window with it.
    fn undecided_around(&self, guest: GuestPages) -> Option<(Arc<Backend>, FilePages)> {
        let (window, page) = self.windows.read().around(guest)?;
        let backend = self.backend(window.backend)?;
        let pages = backend.undecided_around(page, window.file)?;
        Some((backend, pages))
    }

    /// Checks all parts of a request; returns those that backends own.
    fn check(&self, parts: &[Part], to: View) -> Result<Few<(Arc<Backend>, FilePages)>> {
        let mut windows = Few::new();
        for part in parts {
            match *part {
                Part::Gap(guest) => self.listener.gap(guest, to).map_err(|source| Error::Gap {
                    guest,
                    to,
                    source,
                })?,
                Part::Window(window) => {
                    // A backend outlives its windows.
                    let Some(backend) = self.backend(window.backend) else {
                        continue;
                    };
                    if to == View::Private {
                        check_private(&backend, &window)?;
                    }
                    windows.push((backend, window.file));
                }
            }
        }
        Ok(windows)
    }

    fn to_private(&self, moves: &mut Moves<'_>, told: &Told<'_>) -> Result<()> {
        let runs = moves.all_runs();
        for run in &runs {
            run.backend.prepare(run.pages, View::Private)?;
        }
        let_go(&runs, told);
        let Err(error) = self.set_attributes(&runs, View::Private) else {
            if moves.have_along() {
                self.leave_used_behind(moves);
            }
            // What went along is a hole in the shared view.
            self.leave(&moves.runs(|_| true), View::Shared);
            return Ok(());
        };
        // The guest may have used the private view before it was taken back.
        self.leave(&runs, View::Private);
        self.populate_again(&runs, told);
        Err(error)
    }

    /// Pages that go along but have data in the shared view are in use there: they become shared
    /// again. The attribute is set already, so nobody can begin to use one unseen. None goes along if
    /// there is a listener, who would have to be told.
    fn leave_used_behind(&self, moves: &mut Moves) {
        let mut used = Vec::new();
        for run in moves.along() {
            let backend = run.backend;
            let data = backend.data_within(run.pages, View::Shared);
            let data = data.unwrap_or_else(|error| {
                self.log_error(&error);
                vec![run.pages]
            });
            used.extend(data.into_iter().map(|pages| Run { backend, pages }));
        }
        if used.is_empty() {
            return;
        }
        self.set_attributes_back(&used, View::Shared);
        // The guest may have used the private view meanwhile.
        self.leave(&used, View::Private);
        moves.leave_behind(&used, PageState::Shared);
    }

    /// Tells listeners that pages are the host's again, which cannot be helped if they refuse.
    fn populate_again(&self, runs: &[Run<'_>], told: &Told<'_>) {
        for run in runs {
            if let Err(lost) = told.populate(run.backend, run.pages) {
                self.log_error(&lost);
            }
        }
    }

    fn to_shared(&self, moves: &Moves<'_>, told: &Told<'_>) -> Result<()> {
        // Undecided pages are shared already for KVM, and their private view is a hole.
        let runs = moves.runs(|was| was == PageState::Private);
        for run in &runs {
            run.backend.prepare(run.pages, View::Shared)?;
        }
        // Listeners are asked first: when one refuses, the guest has not seen anything yet.
        let result = self.populate(&runs, told).and_then(|()| {
            let set = self.set_attributes(&runs, View::Shared);
            set.inspect_err(|_| let_go(&runs, told))
        });
        match result {
            Ok(()) => self.leave(&runs, View::Private),
            // Devices may have used the shared view, or the guest, before it was taken back.
            Err(_) => self.leave(&runs, View::Shared),
        }
        result
    }

    /// Tells listeners that runs are the host's, or none of them.
    fn populate(&self, runs: &[Run<'_>], told: &Told<'_>) -> Result<()> {
        for (index, run) in runs.iter().enumerate() {
            if let Err(error) = told.populate(run.backend, run.pages) {
                let_go(&runs[..index], told);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Sets the attributes of runs at every place they appear at, or of none.
    fn set_attributes(&self, runs: &[Run<'_>], view: View) -> Result<()> {
        for (index, run) in runs.iter().enumerate() {
            if let Err(error) = self.set_attributes_of(run.backend, run.pages, view) {
                self.set_attributes_back(&runs[..=index], view.other());
                return Err(error);
            }
        }
        Ok(())
    }

    /// After a failure. Where this fails too, it is made up for before the pages are converted again.
    fn set_attributes_back(&self, runs: &[Run<'_>], view: View) {
        for run in runs {
            if let Err(later) = self.set_attributes_of(run.backend, run.pages, view) {
                run.backend.set_sure(run.pages, false);
                self.log_error(&later);
            }
        }
    }

    fn set_attributes_of(&self, backend: &Backend, pages: FilePages, view: View) -> Result<()> {
        let owner = self.owner();
        let places = self.windows.read().places(backend.id(), pages, view);
        places.into_iter().try_for_each(|guest| {
            owner
                .set_attributes(guest, view)
                .map_err(|source| Error::SetAttributes {
                    guest,
                    view,
                    source,
                })
        })
    }

    /// Brings attributes in line with states where that has failed before. The caller has claimed
    /// the pages.
    fn make_sure(&self, backend: &Backend, pages: FilePages) -> Result<()> {
        for unsure in backend.unsure_within(pages) {
            for (run, state) in backend.state_runs(unsure) {
                let view = match state {
                    PageState::Private => View::Private,
                    _ => View::Shared,
                };
                self.set_attributes_of(backend, run, view)?;
                // The guest may have used the other view meanwhile.
                backend.punch(run, view.other())?;
                backend.set_sure(run, true);
            }
        }
        Ok(())
    }

    /// Frees the view that pages have left, as the policy says.
    fn leave(&self, runs: &[Run<'_>], view: View) {
        for run in runs {
            match run.backend.config().discard {
                Discard::Now => self.punch_or_remember(run, view),
                Discard::Coalesced => self.queue_or_punch(run, view),
                Discard::Keep => {}
            }
        }
    }

    /// Leaves a hole to the worker, unless it has too much to do already.
    fn queue_or_punch(&self, run: &Run<'_>, view: View) {
        match run.backend.queue(run.pages, view) {
            Queued::Full => self.punch_or_remember(run, view),
            queued => self.worker.wake(queued),
        }
    }

    /// A hole that cannot be punched now does not undo a conversion: it is punched before the view
    /// is exposed again.
    fn punch_or_remember(&self, run: &Run<'_>, view: View) {
        if let Err(later) = run.backend.punch(run.pages, view) {
            run.backend.remember_unpunched(run.pages, view);
            self.listener.log(Level::Warning, &later.to_string());
        }
    }

    /// Frees both views of pages of a backend; they become undecided. Those of a mapped backend stay
    /// shared.
    pub fn discard(&self, backend: &Arc<Backend>, pages: FilePages) -> Result<()> {
        let mapped = backend.mode() == Mode::Mapped;
        let told = (!mapped).then(|| Told::begin(self.listener.as_ref()));
        // QEMU's callers cannot repeat a discard.
        let _claim = self.claims.claim_for_sure(&[(backend.id(), pages)]);
        let Some(told) = told else {
            return backend.punch(pages, View::Shared);
        };
        self.make_sure(backend, pages)?;
        let all = [(backend.clone(), pages)];
        let mut moves = Moves::mark(&all, |_| true);
        // The host sees undecided pages: their shared view is emptied first, whatever the policy
        // says.
        for run in moves.runs(|_| true) {
            run.backend.punch(run.pages, View::Shared)?;
        }
        self.to_shared(&moves, &told)?;
        if backend.config().discard == Discard::Keep {
            for run in moves.runs(|_| true) {
                self.punch_or_remember(&run, View::Private);
            }
        }
        moves.finish(|_| PageState::Undecided);
        Ok(())
    }

    /// Lets the host use pages of the shared view until they are
    /// [unpinned](Backend::unpin): none of them becomes private meanwhile. Refused if one is private.
    /// Waits for conversions that other threads have under way, which may end in the shared view, but
    /// for nothing else.
    ///
    /// # Panics
    /// If the range does not lie inside the backend.
    #[inline]
    pub fn pin(&self, backend: &Backend, pages: FilePages) -> Result<()> {
        if backend.mode() == Mode::Mapped || backend.add_pin(pages) {
            return Ok(());
        }
        self.pin_near_private(backend, pages)
    }

    /// The pin has been added, and there are closed pages near it.
    #[inline(never)]
    fn pin_near_private(&self, backend: &Backend, pages: FilePages) -> Result<()> {
        let Err(state) = backend.check_pin(pages) else {
            return Ok(());
        };
        // What this thread has in transition stays so: it is the listener that asks.
        if state == PageState::Transition && !self.claims.is_mine(backend.id(), pages) {
            // In its turn, or conversions that follow each other could keep it waiting for ever.
            let _claim = self.claims.claim_for_sure(&[(backend.id(), pages)]);
            if backend.add_pin(pages) || backend.check_pin(pages).is_ok() {
                return Ok(());
            }
        }
        Err(Error::NotShared {
            backend: backend.config().name.clone(),
            pages,
        })
    }

    /// May the host use all of these pages? Waits for conversions that other threads have under way.
    pub fn is_populated(&self, backend: &Backend, pages: FilePages) -> bool {
        // What is in transition may be this thread's own, whose listener asks.
        let mine = self.claims.is_mine(backend.id(), pages);
        let _claim = (!mine).then(|| self.claims.claim_for_sure(&[(backend.id(), pages)]));
        backend.all_in(pages, PageState::host_may_use)
    }
}
