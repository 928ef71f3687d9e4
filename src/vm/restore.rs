// SPDX-License-Identifier: MIT OR Apache-2.0

//! States of a backend, saved and restored: for snapshots.
//!
//! The format: eight bytes that name it, the number of pages, then a word for each run of states,
//! `pages << 2 | state`, all little endian. Data are not in it; they are the user's to save.

use std::io::{Read, Write};
use std::sync::Arc;

use crate::backend::{Backend, RUNS_AT_ONCE};
use crate::error::{Error, Result};
use crate::pages::ranges::FilePages;
use crate::pages::states::{PageState, View};
use crate::vm::Vm;

const MAGIC: u64 = u64::from_le_bytes(*b"gmfdsta1");

impl Vm {
    /// Writes the states of all pages of a backend, in a form that [`Vm::restore_states`] reads. The
    /// guest must not run.
    ///
    /// # Errors
    /// [`Error::InUse`] if a page is being converted, [`Error::BadStates`] with the writer's error,
    /// [`Error::OtherVm`].
    pub fn save_states(&self, backend: &Backend, out: &mut dyn Write) -> Result<()> {
        backend.check_vm(self.id())?;
        let mut put = |word: u64| {
            let written = out.write_all(&word.to_le_bytes());
            written.map_err(|error| bad(backend, format!("cannot write them: {error}")))
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
    /// guest the views that follow from them. What the views hold is left as it is. The guest must
    /// not run.
    ///
    /// # Errors
    /// [`Error::BadStates`] for what [`Vm::save_states`] has not written for such a backend;
    /// [`Error::SetAttributes`] and [`Error::Listener`]. Pages before the bad place have their new
    /// states then.
    pub fn restore_states(&self, backend: &Arc<Backend>, from: &mut dyn Read) -> Result<()> {
        backend.check_vm(self.id())?;
        let mut words = || {
            let mut word = [0; 8];
            let read = from.read_exact(&mut word);
            read.map_err(|error| bad(backend, format!("cannot read them: {error}")))?;
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

    fn restore_run(&self, backend: &Backend, run: FilePages, to: PageState) -> Result<()> {
        let notifier = self.begin()?;
        let _claim = self.claims.claim_for_sure(&[(backend.id(), run)]);
        let mut rest = Some(run);
        while let Some(pages) = rest {
            let (now, was) = backend.first_run(pages);
            match (was.host_may_use(), to.host_may_use()) {
                (true, false) => {
                    notifier.unmap(backend, now);
                    self.set_attributes_of(backend, now, View::Private)?;
                }
                (false, true) => {
                    notifier.map(backend, now)?;
                    self.set_attributes_of(backend, now, View::Shared)?;
                }
                _ => {}
            }
            backend.with_states(|states| states.set_run(now, was, to));
            rest = FilePages::new(now.end(), run.end());
        }
        Ok(())
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

fn bad(backend: &Backend, found: String) -> Error {
    Error::BadStates {
        backend: backend.config().name.clone(),
        found,
    }
}
