// SPDX-License-Identifier: MIT OR Apache-2.0

//! The layout: which windows there are, and their attributes as they come and go.

use crate::backend::{Backend, RUNS_AT_ONCE};
use crate::error::{Error, Result};
use crate::exclusion::claims::Claim;
use crate::listener::check_no_callback;
use crate::pages::ranges::{BackendId, FilePages, GuestPages};
use crate::pages::states::{PageState, View};
use crate::views::Mode;
use crate::vm::{STEP_PAGES, Vm};
use crate::windows::{Binding, Window};

impl Vm {
    /// Shows pages of a backend to the guest and brings the attributes there in line with their
    /// states. Returns how the window is bound: as `wanted` unless the backend forbids it or
    /// another window of these pages is bound.
    ///
    /// # Errors
    /// [`Error::OutsideBackend`], [`Error::Overlap`], [`Error::OtherVm`], [`Error::Removed`], and
    /// [`Error::SetAttributes`]; the window is not there then.
    pub fn add_window(
        &self,
        backend: &Backend,
        guest: GuestPages,
        offset: u64,
        wanted: Binding,
    ) -> Result<Binding> {
        backend.check_vm(self.id())?;
        check_no_callback(self.id())?;
        let file = backend.pages_at(offset, guest.bytes())?;
        let _layout = self.layout.lock();
        let stale = self.places.read().windows.stale_in(guest);
        let _claim = self.claim_layout(
            stale.iter().map(|w| (w.backend, w.file)),
            Some((backend.id(), file)),
        );

        let mut places = self.places.write();
        places.check_known(backend)?;
        let windows = &mut places.windows;
        let binding = match wanted {
            Binding::Bound if backend.is_bindable() && !windows.is_bound(backend.id(), file) => {
                Binding::Bound
            }
            Binding::SharedAlias => Binding::SharedAlias,
            _ => Binding::Unbound,
        };
        let window = Window::new(guest, backend.id(), file.start(), binding)
            .ok_or_else(|| backend.outside(offset, guest.bytes()))?;
        windows.add(window)?;
        let (other, fresh) = windows.take_stale_under(&window);
        drop(places);

        let result = self
            .clear_attributes(&other)
            .and_then(|()| self.set_where_private(&fresh));
        if result.is_err() {
            self.places.write().windows.take_back(window, other);
        }
        result.map(|()| binding)
    }

    /// The guest no longer sees this window. Attributes stay until
    /// [`Vm::clear_stale_windows`], so that a window that comes back unchanged costs nothing.
    ///
    /// A conversion under way keeps the attributes of stale windows in line too, so there is
    /// nothing to wait for.
    ///
    /// # Errors
    /// [`Error::NoWindow`].
    pub fn remove_window(&self, guest: GuestPages) -> Result<()> {
        check_no_callback(self.id())?;
        let _layout = self.layout.lock();
        match self.places.write().windows.remove(guest) {
            Some(_) => Ok(()),
            None => Err(Error::NoWindow { guest }),
        }
    }

    /// Clears the attributes where windows have been removed and none has come back.
    ///
    /// # Errors
    /// [`Error::SetAttributes`]; it is tried again the next time.
    pub fn clear_stale_windows(&self) -> Result<()> {
        check_no_callback(self.id())?;
        let _layout = self.layout.lock();
        let stale = self.places.read().windows.stale();
        if stale.is_empty() {
            return Ok(());
        }
        let _claim = self.claim_layout(stale.iter().map(|w| (w.backend, w.file)), None);
        self.clear_attributes(&stale)?;
        self.places.write().windows.forget_stale();
        Ok(())
    }

    /// Clears the attributes of windows wherever they may be set. The caller has claimed them.
    /// Where the file has them, they have nothing to do with windows.
    fn clear_attributes(&self, windows: &[Window]) -> Result<()> {
        for window in windows {
            let Some(backend) = self.backend(window.backend) else {
                // It is gone, and what its pages were is not known any more.
                self.set_attributes_at(window.guest, View::Shared)?;
                continue;
            };
            if backend.mode() == Mode::InPlace {
                continue;
            }
            for step in window.file.pieces(STEP_PAGES) {
                self.clear_step(&backend, window, step)?;
            }
        }
        Ok(())
    }

    fn clear_step(&self, backend: &Backend, window: &Window, step: FilePages) -> Result<()> {
        let clear = |pages| match window.guest_at(pages) {
            Some(guest) => self.set_attributes_at(guest, View::Shared),
            None => Ok(()),
        };
        if backend.first_doubtful(step).is_some() {
            return clear(step);
        }
        let Some(span) = backend.private_span(step) else {
            return Ok(());
        };
        let map = backend.state_map(span, RUNS_AT_ONCE);
        if map.rest.is_some() {
            // What lies between is clear; to clear it again costs less than a call for each run.
            return clear(span);
        }
        let private = map.runs.iter().filter(|(_, s)| *s == PageState::Private);
        private.map(|(run, _)| *run).try_for_each(clear)
    }

    /// Sets the attributes of windows where their pages are private. The caller has claimed them.
    fn set_where_private(&self, windows: &[Window]) -> Result<()> {
        for window in windows {
            let backend = self.backend(window.backend);
            let Some(backend) = backend.filter(|b| b.mode() != Mode::InPlace) else {
                continue;
            };
            let mut rest = backend.private_span(window.file);
            while let Some(pages) = rest {
                let map = backend.state_map(pages, RUNS_AT_ONCE);
                let private = map.runs.iter().filter(|(_, s)| *s == PageState::Private);
                for guest in private.filter_map(|(run, _)| window.guest_at(*run)) {
                    self.set_attributes_at(guest, View::Private)?;
                }
                rest = map.rest;
            }
        }
        Ok(())
    }

    /// Pages whose layout changes must not be converted meanwhile. Not interruptible: the user
    /// cannot take a layout change back.
    pub(super) fn claim_layout(
        &self,
        stale: impl Iterator<Item = (BackendId, FilePages)>,
        new: Option<(BackendId, FilePages)>,
    ) -> Claim<'_> {
        let wanted: Vec<_> = stale.chain(new).collect();
        self.claims.claim_for_sure(&wanted)
    }
}
