// SPDX-License-Identifier: MIT OR Apache-2.0

//! Freeing memory: both views of some pages, or all that is private.

use std::sync::Arc;

use crate::backend::{Backend, Discard, RUNS_AT_ONCE};
use crate::error::Result;
use crate::listener::{Notifier, check_no_callback};
use crate::pages::ranges::FilePages;
use crate::pages::states::{PageState, View};
use crate::views::Mode;
use crate::vm::convert::punch_or_owe;
use crate::vm::moves::Moves;
use crate::vm::told::Later;
use crate::vm::{STEP_PAGES, Vm};

impl Vm {
    /// Frees both views of pages of a backend; they become undecided. Those of a mapped backend
    /// stay shared. In steps, like a conversion, but not interruptible: those who free memory for
    /// QEMU cannot do it again.
    ///
    /// # Errors
    /// [`Error::Punch`](crate::Error::Punch),
    /// [`Error::SetAttributes`](crate::Error::SetAttributes),
    /// [`Error::Listener`](crate::Error::Listener): earlier steps have taken effect; pages of the
    /// one that failed keep their states, but what was shared may be gone, and in place they may be
    /// shared. [`Error::OtherVm`](crate::Error::OtherVm).
    pub fn free_pages(&self, backend: &Arc<Backend>, pages: FilePages) -> Result<()> {
        backend.check_vm(self.id())?;
        check_no_callback(self.id())?;
        let mut rest = Some(pages);
        while let Some(pages) = rest {
            let end = match backend.mode().has_private_pages() {
                true => self.free_step(backend, pages.first(STEP_PAGES))?,
                false => self.free_mapped(backend, pages.first(STEP_PAGES))?,
            };
            rest = FilePages::new(end, pages.end());
        }
        Ok(())
    }

    fn free_mapped(&self, backend: &Backend, step: FilePages) -> Result<u64> {
        let _claim = self.claims.claim_for_sure(&[(backend.id(), step)]);
        backend.punch(step, View::Shared)?;
        Ok(step.end())
    }

    /// Returns the page behind the last that was freed.
    fn free_step(&self, backend: &Arc<Backend>, step: FilePages) -> Result<u64> {
        let notifier = self.begin()?;
        let _claim = self.claims.claim_for_sure(&[(backend.id(), step)]);
        self.repair_attributes(backend, step)?;
        let mut later = Later::new(self);
        let mut moves = Moves::new();
        let end = moves.mark(backend, step, |_| true);
        let step = step.first(end - step.start());
        if backend.mode() == Mode::InPlace {
            return self.free_in_place(backend, &mut moves, step, &notifier, &mut later);
        }
        // The host sees undecided pages: their shared view is emptied first, whatever the policy
        // says.
        backend.punch(step, View::Shared)?;
        self.to_shared(&mut moves, &notifier, &mut later)?;
        if backend.config().discard == Discard::Keep {
            punch_or_owe(backend, step, View::Private, &mut later);
        }
        moves.finish(|_| PageState::Undecided);
        Ok(end)
    }

    /// One page is behind both views: it is opened, then freed. All of `step` has been marked that
    /// is to be freed.
    fn free_in_place(
        &self,
        backend: &Backend,
        moves: &mut Moves<'_>,
        step: FilePages,
        notifier: &Notifier<'_>,
        later: &mut Later<'_>,
    ) -> Result<u64> {
        self.to_shared(moves, notifier, later)?;
        let freed = moves
            .runs(|_| true)
            .iter()
            .try_for_each(|run| backend.punch(run.pages, View::Shared));
        moves.finish(|was| match freed {
            Ok(()) => PageState::Undecided,
            // They are open, with what was in them.
            Err(_) if was == PageState::Private => PageState::Shared,
            Err(_) => was,
        });
        freed.map(|()| step.end())
    }

    /// Frees all that is private: those pages become undecided, and what is shared stays, as RAM
    /// survives a reset. For a guest that does not run. Takes time in proportion to the memory that
    /// is freed, in steps between which others get their turn; call it from a thread that may.
    ///
    /// # Errors
    /// As for [`Vm::free_pages`].
    pub fn free_private(&self, backend: &Arc<Backend>) -> Result<()> {
        backend.check_vm(self.id())?;
        check_no_callback(self.id())?;
        let mut rest = Some(backend.pages());
        while let Some(pages) = rest {
            let end = self.free_private_step(backend, pages.first(STEP_PAGES))?;
            rest = FilePages::new(end, pages.end());
        }
        Ok(())
    }

    /// Returns the page behind the last that was looked at.
    fn free_private_step(&self, backend: &Arc<Backend>, step: FilePages) -> Result<u64> {
        if backend.private_span(step).is_none() {
            return Ok(step.end());
        }
        let notifier = self.begin()?;
        let _claim = self.claims.claim_for_sure(&[(backend.id(), step)]);
        self.repair_attributes(backend, step)?;
        let Some(span) = backend.private_span(step) else {
            return Ok(step.end());
        };
        let is_scattered = backend.state_map(span, RUNS_AT_ONCE).rest.is_some();
        // What is shared beside it must stay, in place and where the shared view is kept.
        let two_files = backend.mode() == Mode::Private;
        let keeps = backend.config().discard == Discard::Keep;
        if is_scattered && two_files && !keeps && !notifier.is_listening() {
            self.free_private_span(backend, span)?;
            return Ok(step.end());
        }
        let end = self.free_private_runs(backend, span, &notifier)?;
        Ok(if end == span.end() { step.end() } else { end })
    }

    /// Run by run, as far as one step goes.
    fn free_private_runs(
        &self,
        backend: &Arc<Backend>,
        span: FilePages,
        notifier: &Notifier<'_>,
    ) -> Result<u64> {
        let mut later = Later::new(self);
        let mut moves = Moves::new();
        let end = moves.mark(backend, span, |state| state == PageState::Private);
        if backend.mode() == Mode::InPlace {
            let looked_at = span.first(end - span.start());
            return self.free_in_place(backend, &mut moves, looked_at, notifier, &mut later);
        }
        if backend.config().discard == Discard::Keep {
            for run in moves.runs(|_| true) {
                backend.punch(run.pages, View::Shared)?;
            }
            let freed = span.first(end - span.start());
            punch_or_owe(backend, freed, View::Private, &mut later);
        }
        self.to_shared(&mut moves, notifier, &mut later)?;
        moves.finish(|_| PageState::Undecided);
        Ok(end)
    }

    /// All at once where there are many runs: what lies between them is clear, and a hole.
    fn free_private_span(&self, backend: &Backend, span: FilePages) -> Result<()> {
        let cleared = self.set_attributes_of(backend, span, View::Shared);
        cleared.inspect_err(|_| backend.doubt_attributes(span))?;
        let mut later = Later::new(self);
        punch_or_owe(backend, span, View::Private, &mut later);
        backend.with_states(|states| {
            states.replace(span, PageState::Private, PageState::Undecided);
        });
        Ok(())
    }
}
