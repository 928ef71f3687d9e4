// SPDX-License-Identifier: MIT OR Apache-2.0

//! Attributes: which view of its pages a guest sees. The VM has them by place, wherever the pages
//! appear; in place the file has them.

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::pages::ranges::{FilePages, GuestPages, PAGE_SIZE};
use crate::pages::states::{PageState, View};
use crate::views::in_place::Refusal;
use crate::views::{Mode, Views};
use crate::vm::Vm;
use crate::vm::moves::Run;
use crate::vm::told::Later;

impl Vm {
    /// Sets the attributes of runs at every place they appear at, or of none.
    pub(super) fn set_attributes(
        &self,
        runs: &[Run<'_>],
        view: View,
        later: &mut Later<'_>,
    ) -> Result<()> {
        for (index, run) in runs.iter().enumerate() {
            if let Err(error) = self.set_attributes_of(run.backend, run.pages, view) {
                self.set_attributes_back(&runs[..=index], view.other(), later);
                return Err(error);
            }
        }
        Ok(())
    }

    /// After a failure. Where this fails too, it is made up for before the pages are converted
    /// again.
    pub(super) fn set_attributes_back(&self, runs: &[Run<'_>], view: View, later: &mut Later<'_>) {
        for run in runs {
            if let Err(error) = self.set_attributes_of(run.backend, run.pages, view) {
                run.backend.doubt_attributes(run.pages);
                later.error(error);
            }
        }
    }

    /// Sets the attributes of pages: in their file, or at every place they appear at.
    pub(super) fn set_attributes_of(
        &self,
        backend: &Backend,
        pages: FilePages,
        view: View,
    ) -> Result<()> {
        if let Views::InPlace(in_place) = &*backend.views() {
            let set = in_place.set_attributes(pages, view);
            return set.map_err(|refusal| refused(backend, pages, view, refusal));
        }
        let places = self.places.read().windows.places(backend.id(), pages, view);
        places
            .into_iter()
            .try_for_each(|guest| self.set_attributes_at(guest, view))
    }

    pub(super) fn set_attributes_at(&self, guest: GuestPages, view: View) -> Result<()> {
        let set = self.owner().set_attributes(guest, view);
        set.map_err(|source| Error::SetAttributes {
            guest,
            view,
            source,
        })
    }

    /// Brings attributes in line with states where that has failed before. The caller has claimed
    /// the pages.
    pub(super) fn repair_attributes(&self, backend: &Backend, pages: FilePages) -> Result<()> {
        while let Some(doubtful) = backend.first_doubtful(pages) {
            let (run, state) = backend.first_run(doubtful);
            let view = match state {
                PageState::Private => View::Private,
                _ => View::Shared,
            };
            self.set_attributes_of(backend, run, view)?;
            if backend.mode() != Mode::InPlace {
                // The guest may have used the other view meanwhile.
                backend.punch(run, view.other())?;
            }
            backend.attributes_are_right(run);
        }
        Ok(())
    }
}

fn refused(backend: &Backend, pages: FilePages, view: View, refusal: Refusal) -> Error {
    let name = backend.config().name.clone();
    match refusal {
        Refusal::InUse { page } => Error::Held {
            backend: name,
            pages,
            offset: page.saturating_mul(PAGE_SIZE),
            timeout: backend.config().convert_timeout,
        },
        Refusal::Other(source) => Error::SetFileAttributes {
            backend: name,
            pages,
            view,
            source,
        },
    }
}
