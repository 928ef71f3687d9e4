// SPDX-License-Identifier: MIT OR Apache-2.0

//! States of a backend, saved and restored: for snapshots.
//!
//! The format: eight bytes that name it, the number of pages, then a word for each run of states,
//! `pages << 2 | state`, all little endian. Data are not in it; they are the user's to save.

use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;

use crate::backend::{Backend, RUNS_AT_ONCE};
use crate::error::{Error, Result};
use crate::listener::check_no_callback;
use crate::pages::ranges::FilePages;
use crate::pages::states::PageState;
use crate::vm::convert::{SHORT_PIN, drain_pins};
use crate::vm::moves::{Moves, Run};
use crate::vm::told::Later;
use crate::vm::wait::pinned;
use crate::vm::{STEP_PAGES, Vm};

const MAGIC: u64 = u64::from_le_bytes(*b"gmfdsta1");

impl Vm {
    /// Writes the states of all pages of a backend, in a form that [`Vm::restore_states`] reads.
    /// The guest must not run.
    ///
    /// # Errors
    /// [`Error::InUse`] if a page is being converted, [`Error::StateStream`] with the writer's
    /// error, [`Error::OtherVm`].
    pub fn save_states(&self, backend: &Backend, out: &mut dyn Write) -> Result<()> {
        backend.check_vm(self.id())?;
        let mut put = |word: u64| {
            let written = out.write_all(&word.to_le_bytes());
            written.map_err(|source| stream_error(backend, "save", source))
        };
        put(MAGIC)?;
        put(backend.pages().count())?;
        let mut rest = Some(backend.pages());
        while let Some(pages) = rest {
            let map = backend.state_map(pages, RUNS_AT_ONCE);
            for (run, state) in map.runs {
                if state == PageState::Transition {
                    return Err(Error::InUse {
                        what: "states cannot be saved",
                        user: "pages are being converted",
                    });
                }
                put(run.count() << 2 | state as u64)?;
            }
            rest = map.rest;
        }
        Ok(())
    }

    /// Gives the pages of a backend the states that were saved of another of the same size, and the
    /// guest the views that follow from them. The guest must not run. Reads no more than was saved.
    ///
    /// The view that a page comes to, or stays in, keeps what it holds: write the data that belong
    /// there before or afterwards. The view that a page leaves is freed as in a conversion; in
    /// place there is none.
    ///
    /// # Errors
    /// [`Error::BadStates`] for what [`Vm::save_states`] has not written for such a backend,
    /// [`Error::StateStream`] with the reader's error, [`Error::Pinned`] and [`Error::Held`] if
    /// somebody uses a page that is to become private, and those of [`Vm::free_pages`]. Pages
    /// before the bad place have their new states then, the others the ones that they had.
    pub fn restore_states(&self, backend: &Arc<Backend>, from: &mut dyn Read) -> Result<()> {
        backend.check_vm(self.id())?;
        check_no_callback(self.id())?;
        let mut words = || {
            let mut word = [0; 8];
            from.read_exact(&mut word)
                .map_err(|error| match error.kind() {
                    ErrorKind::UnexpectedEof => bad(backend, "they end too early".into()),
                    _ => stream_error(backend, "restore", error),
                })?;
            Ok::<_, Error>(u64::from_le_bytes(word))
        };
        if words()? != MAGIC {
            return Err(bad(backend, "they do not begin as saved states do".into()));
        }
        let (count, pages) = (words()?, backend.pages());
        if count != pages.count() {
            let found = format!(
                "they are of {count} pages, the backend has {}",
                pages.count()
            );
            return Err(bad(backend, found));
        }
        let mut rest = Some(pages);
        while let Some(left) = rest {
            let word = words()?;
            let state = PageState::ALL[(word & 3) as usize];
            let count = word >> 2;
            if count == 0 || count > left.count() || !allowed(backend, state) {
                return Err(bad(
                    backend,
                    format!("{word:#x} is no run of them at {left}"),
                ));
            }
            self.restore_run(backend, left.first(count), state)?;
            rest = left.without_first(count);
        }
        Ok(())
    }

    /// As conversions move pages, so that what a failure or a panic leaves behind is what theirs
    /// leave.
    fn restore_run(&self, backend: &Arc<Backend>, run: FilePages, to: PageState) -> Result<()> {
        let mut rest = Some(run);
        while let Some(pages) = rest {
            let end = self.restore_step(backend, pages.first(STEP_PAGES), to)?;
            rest = FilePages::new(end, run.end());
        }
        Ok(())
    }

    /// Returns the page behind the last that has its new state.
    fn restore_step(&self, backend: &Arc<Backend>, step: FilePages, to: PageState) -> Result<u64> {
        if backend.first_run(step) == (step, to) && backend.first_doubtful(step).is_none() {
            return Ok(step.end());
        }
        let notifier = self.begin()?;
        let _claim = self.claims.claim_for_sure(&[(backend.id(), step)]);
        self.repair_attributes(backend, step)?;
        let mut later = Later::new(self);
        let mut moves = Moves::new();
        let end = moves.mark(backend, step, |state| state != to);
        if to.host_may_use() {
            self.to_shared(&mut moves, &notifier, &mut later)?;
        } else if let Some(Run { backend, pages }) = drain_pins(&moves) {
            return Err(pinned(backend, pages, SHORT_PIN));
        } else {
            self.to_private(&mut moves, &notifier, &mut later)?;
        }
        moves.finish(|_| to);
        Ok(end)
    }
}

/// Can pages of a backend be in a state between requests?
fn allowed(backend: &Backend, state: PageState) -> bool {
    match state {
        PageState::Transition => false,
        PageState::Private | PageState::Undecided => backend.mode().has_private_pages(),
        PageState::Shared => true,
    }
}

fn stream_error(backend: &Backend, what: &'static str, source: io::Error) -> Error {
    Error::StateStream {
        what,
        backend: backend.config().name.clone(),
        source,
    }
}

fn bad(backend: &Backend, found: String) -> Error {
    Error::BadStates {
        backend: backend.config().name.clone(),
        found,
    }
}
