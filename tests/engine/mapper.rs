// SPDX-License-Identifier: MIT OR Apache-2.0

//! A listener, and what it does besides in its functions.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use guestmemfd::listener::Level;
use guestmemfd::*;
use rustix::io::Errno;

use crate::fault::Fault;

/// The functions of a listener that are called in this program's threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Callback {
    Begin,
    End,
    Map,
    Unmap,
    /// Not in [`CALLBACKS`]: only under a new owner.
    NewFiles,
    Revoke,
    Prefault,
    Gap,
    Interrupted,
    Failed,
    Log,
}

pub(crate) const CALLBACKS: [Callback; 10] = [
    Callback::Begin,
    Callback::End,
    Callback::Map,
    Callback::Unmap,
    Callback::Revoke,
    Callback::Prefault,
    Callback::Gap,
    Callback::Interrupted,
    Callback::Failed,
    Callback::Log,
];

type Act = Arc<dyn Fn(Callback) + Send + Sync>;

/// What the listener does first in each of its functions.
#[derive(Default)]
pub(crate) struct Hook(parking_lot::Mutex<Option<Act>>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hook").finish_non_exhaustive()
    }
}

impl Hook {
    pub(crate) fn set(&self, act: impl Fn(Callback) + Send + Sync + 'static) {
        *self.0.lock() = Some(Arc::new(act));
    }

    pub(crate) fn clear(&self) {
        *self.0.lock() = None;
    }

    /// Panics, without a word, at the n-th call from now that `is_it` accepts.
    pub(crate) fn panic_at(
        &self,
        nth: u64,
        is_it: impl Fn(Callback) -> bool + Send + Sync + 'static,
    ) {
        let calls = AtomicU64::new(0);
        self.set(move |callback| {
            if is_it(callback) && calls.fetch_add(1, Ordering::SeqCst) + 1 == nth {
                std::panic::resume_unwind(Box::new("a bug of the user's"));
            }
        });
    }

    fn called(&self, callback: Callback) {
        // The lock is not held while it acts.
        let act = self.0.lock().clone();
        if let Some(act) = act {
            act(callback);
        }
    }
}

/// Maps what is shared, as VFIO would, and sees that it is told the truth.
#[derive(Debug, Default)]
pub(crate) struct Mapper {
    pub(crate) mapped: parking_lot::Mutex<Vec<bool>>,
    /// Is told nothing, and maps nothing.
    pub(crate) absent: AtomicBool,
    pub(crate) fault: Arc<Fault>,
    /// Its device writes to what it has just mapped.
    pub(crate) writes: AtomicBool,
    /// Threads that wait are wanted elsewhere.
    pub(crate) interrupts: AtomicBool,
    /// What was to be allocated.
    pub(crate) prefaulted: parking_lot::Mutex<Vec<GuestPages>>,
    /// Requests that it has been told of as failed.
    pub(crate) failed: parking_lot::Mutex<Vec<(GuestPages, View)>>,
    /// What it does besides.
    pub(crate) hook: Hook,
}

pub(crate) struct MapperHandle(pub(crate) Arc<Mapper>);

impl Listener for MapperHandle {
    fn begin(&self) -> bool {
        self.0.hook.called(Callback::Begin);
        !self.0.absent.load(Ordering::SeqCst)
    }

    fn end(&self, _: bool) {
        self.0.hook.called(Callback::End);
    }

    fn map(&self, backend: &Backend, pages: FilePages) -> io::Result<()> {
        self.0.hook.called(Callback::Map);
        self.0.fault.call()?;
        let mut mapped = self.0.mapped.lock();
        for page in pages.start()..pages.end() {
            assert!(!std::mem::replace(&mut mapped[page as usize], true));
        }
        if self.0.writes.load(Ordering::SeqCst) {
            let views = backend.views();
            rustix::io::pwrite(views.file(View::Shared).fd(), &[1], pages.start_bytes())?;
        }
        Ok(())
    }

    fn unmap(&self, _: &Backend, pages: FilePages) {
        self.0.hook.called(Callback::Unmap);
        let mut mapped = self.0.mapped.lock();
        for page in pages.start()..pages.end() {
            assert!(std::mem::replace(&mut mapped[page as usize], false));
        }
    }

    fn new_files(&self, _: &Backend) {
        self.0.hook.called(Callback::NewFiles);
    }

    fn revoke(&self, _: &Backend, _: FilePages) {
        self.0.hook.called(Callback::Revoke);
    }

    fn prefault(&self, guest: GuestPages) {
        self.0.hook.called(Callback::Prefault);
        self.0.prefaulted.lock().push(guest);
    }

    fn interrupted(&self) -> bool {
        self.0.hook.called(Callback::Interrupted);
        self.0.interrupts.load(Ordering::SeqCst)
    }

    fn gap(&self, _: GuestPages, to: View) -> io::Result<()> {
        self.0.hook.called(Callback::Gap);
        match to {
            View::Shared => Ok(()),
            View::Private => Err(Errno::INVAL.into()),
        }
    }

    fn failed(&self, backend: Option<&Backend>, guest: GuestPages, to: View, _: &Error) {
        assert!(backend.is_some());
        self.0.failed.lock().push((guest, to));
        self.0.hook.called(Callback::Failed);
    }

    fn log(&self, _: Level, _: &str) {
        self.0.hook.called(Callback::Log);
    }
}
