// SPDX-License-Identifier: MIT OR Apache-2.0

//! Another owner: the guest starts over in another VM of the hypervisor, as after a confidential
//! reset.

use std::sync::Arc;

use crate::backend::{Backend, Discard, RUNS_AT_ONCE, create};
use crate::error::{Error, Result};
use crate::listener::{Notifier, Panics};
use crate::owner::Owner;
use crate::pages::ranges::FilePages;
use crate::pages::states::{PageState, View};
use crate::views::{Mode, Views};
use crate::vm::Vm;

impl Vm {
    /// The guest runs under a new owner now. All windows have been removed. Every backend gets a
    /// new guest_memfd, and its pages start over. What was private is gone. What was shared
    /// survives, as RAM does in any reset, unless pages start private; in place it is copied, from
    /// the only file that there was, and the host has to map the new one. Mapped backends keep
    /// their file, which slots of another VM cannot carry: bound ones are refused.
    ///
    /// Takes no longer if states are scattered, unless somebody listens, data are copied, or pages
    /// keep them when they become private ([`Discard::Keep`]).
    ///
    /// # Errors
    /// [`Error::InUse`], [`Error::CreateFile`], [`Error::Punch`] if a shared file cannot be
    /// emptied, or [`Error::FindData`] and [`Error::Transfer`] if it cannot be copied: no backend
    /// has started over then, and no listener has been told of anything.
    /// [`Error::Listener`] is the first refusal to map pages; all have started over.
    pub fn rebind(&self, owner: Arc<dyn Owner>) -> Result<()> {
        let backends = self.all_backends();
        let notifier = self.begin()?;
        let _layout = self.layout.lock();
        if !self.places.read().windows.is_empty() {
            return Err(Error::InUse {
                what: "a VM cannot get a new owner",
                user: "the guest has windows",
            });
        }
        let views = backends
            .iter()
            .map(|backend| create::for_new_owner(owner.as_ref(), backend))
            .collect::<Result<Vec<_>>>()?;
        let all = backends.iter().map(|b| (b.id(), b.pages()));
        let _claim = self.claim_layout(all, None);
        let start_over: Vec<_> = backends
            .iter()
            .zip(views)
            .filter_map(|(backend, views)| Some((backend, views?)))
            .collect();
        for (backend, views) in &start_over {
            match backend.mode() {
                Mode::InPlace => copy_shared_view(backend, views)?,
                _ => empty_shared_view(backend)?,
            }
        }
        // Their attributes went with the old owner.
        self.places.write().windows.forget_stale();
        *self.owner.write() = owner;
        let mut result = Ok(());
        // All of them start over, though the listener panics.
        let mut panics = Panics::default();
        for (backend, views) in start_over {
            let lost = lost_pages(backend);
            if notifier.is_listening() {
                unmap(backend, lost, &notifier, &mut panics);
            }
            backend.replace_views(views);
            backend.forget_debts();
            panics.hold(|| self.listener.call(|user| user.new_files(backend)));
            if notifier.is_listening() {
                result = result.and(map(backend, lost, &notifier, &mut panics));
            }
            backend.with_states(|states| states.reset(backend.config().start));
        }
        result
    }
}

/// Which of the pages that the host may use now are somewhere else afterwards.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lost {
    /// None: they start over as they are.
    Nothing,
    /// All of them.
    Everything,
}

fn lost_pages(backend: &Backend) -> Lost {
    let stay = backend.mode() == Mode::Private && backend.config().start.host_may_use();
    if stay {
        Lost::Nothing
    } else {
        Lost::Everything
    }
}

/// Copies what is shared to the new file. The caller has claimed all pages.
fn copy_shared_view(backend: &Backend, to: &Views) -> Result<()> {
    if !backend.config().start.host_may_use() {
        return Ok(());
    }
    for_each_run(backend, |pages, state| match state.host_may_use() {
        true => backend.copy_shared(pages, to),
        false => Ok(()),
    })
}

/// Frees what the shared view holds of pages that start over. The caller has claimed them.
fn empty_shared_view(backend: &Backend) -> Result<()> {
    if !backend.config().start.host_may_use() {
        return backend.punch(backend.pages(), View::Shared);
    }
    backend.punch_owed(backend.pages(), View::Shared)?;
    if backend.config().discard == Discard::Keep {
        for_each_run(backend, |pages, state| match state.host_may_use() {
            true => Ok(()),
            false => backend.punch(pages, View::Shared),
        })?;
    }
    Ok(())
}

/// Tells the listener to let go of pages that start over with another file, or private.
fn unmap(backend: &Backend, lost: Lost, notifier: &Notifier<'_>, panics: &mut Panics) {
    if lost == Lost::Nothing {
        return;
    }
    // Nothing in it fails.
    let _ = for_each_run(backend, |pages, state| {
        if state.host_may_use() {
            panics.hold(|| notifier.unmap(backend, pages));
        }
        Ok(())
    });
}

/// Tells the listener of pages that start over and are the host's. They are still in their old
/// states. Goes on after an error, and returns the first.
fn map(backend: &Backend, lost: Lost, notifier: &Notifier<'_>, panics: &mut Panics) -> Result<()> {
    if !backend.config().start.host_may_use() {
        return Ok(());
    }
    let mut map = |pages| {
        let mapped = panics.hold(|| notifier.map(backend, pages));
        mapped.unwrap_or(Ok(()))
    };
    if lost == Lost::Everything {
        return map(backend.pages());
    }
    let mut result = Ok(());
    for_each_run(backend, |pages, state| {
        if !state.host_may_use() {
            let mapped = map(pages);
            result = std::mem::replace(&mut result, Ok(())).and(mapped);
        }
        Ok(())
    })?;
    result
}

/// Walks the runs of all states, a bounded number at a time.
fn for_each_run(
    backend: &Backend,
    mut act: impl FnMut(FilePages, PageState) -> Result<()>,
) -> Result<()> {
    let mut rest = Some(backend.pages());
    while let Some(pages) = rest {
        let map = backend.state_map(pages, RUNS_AT_ONCE);
        map.runs
            .into_iter()
            .try_for_each(|(run, state)| act(run, state))?;
        rest = map.rest;
    }
    Ok(())
}
