// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the library asks of, and tells, the program that uses it.

use std::any::Any;
use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread;

use rustix::io::Errno;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::pages::ranges::{FilePages, GuestPages, VmId};
use crate::pages::states::View;

/// How grave a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Level {
    /// Something was lost or cannot be undone.
    Error,
    /// Something will be tried again.
    Warning,
}

/// An access to private pages that went around every check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stray {
    /// What was accessed. Of another process only the pages are known that it has left data in.
    pub pages: FilePages,
    /// Where the guest sees the first of them, if it does anywhere.
    pub gpa: Option<u64>,
    /// The kernel's id of the thread, which waits until the listener returns; `None` for another
    /// process.
    pub thread: Option<u32>,
}

/// The user of a VM. Every function has a default that does nothing, or refuses.
///
/// All but `stray` are called from the thread that entered the library, and `log` from the thread
/// of a stray guard as well. None may ask for a conversion, free pages or change the layout: such a
/// call fails with [`Error::InCallback`]. Pins, reads, writes and questions about states are
/// allowed, but not of pages that another request may be moving, which would wait for it.
///
/// `begin` and `end` bracket every step of a conversion, and of what frees pages. `begin` comes
/// before any claim is taken, so it is the place for locks that `map` and `unmap` need: a thread
/// that holds such a lock may itself wait for a claim. Register those who are told by `map` and
/// `unmap` before `begin` answers: one that comes later is not told of this step.
///
/// A listener may use undecided pages, which nobody tells it of, and a device of its may be doing
/// so. Where `begin` answers yes, a private touch therefore decides its own page alone, whatever
/// lazy attributes say.
///
/// A panic in any of them leaves the library usable. The step that it comes in changes no page, and
/// takes back what it has told of other pages; a panic in `end` or `log` comes after the step. Of
/// the pages that a function panics at the library has told nothing, as far as it is concerned.
/// `stray` and what a guard logs are the exception: their panics end there, and the guard goes on.
pub trait Listener: Send + Sync {
    /// A step begins. Are `map` and `unmap` to be called in it?
    fn begin(&self) -> bool {
        false
    }

    /// The step is over; `listening` is what `begin` answered.
    fn end(&self, listening: bool) {
        let _ = listening;
    }

    /// The host can use the pages from now on. On an error, they stay private.
    ///
    /// # Errors
    /// Any: it is the listener's to say why it cannot use them.
    fn map(&self, backend: &Backend, pages: FilePages) -> io::Result<()> {
        let _ = (backend, pages);
        Ok(())
    }

    /// The pages are about to become private: let go of them.
    fn unmap(&self, backend: &Backend, pages: FilePages) {
        let _ = (backend, pages);
    }

    /// A backend has new files, as a new owner needs them. Where the host maps the shared one, it
    /// is to be mapped anew, now: `unmap` has been told before of all pages whose file has gone,
    /// and `map` is told after this of those that may be used.
    fn new_files(&self, backend: &Backend) {
        let _ = backend;
    }

    /// Pages are to become private, and the host has pinned some of them. Whoever can do without
    /// lets go of its pins now, or soon: the request waits for those that stay. Called with no
    /// claim held, and not between `begin` and `end`.
    fn revoke(&self, backend: &Backend, pages: FilePages) {
        let _ = (backend, pages);
    }

    /// A hypercall has made pages private, and they are to be allocated now (see
    /// [`Prefault`](crate::backend::Prefault)). The request is over.
    fn prefault(&self, guest: GuestPages) {
        let _ = guest;
    }

    /// May a part of a request that no backend owns take part in it? By default it is refused.
    ///
    /// # Errors
    /// Why not; the guest gets its number.
    fn gap(&self, guest: GuestPages, to: View) -> io::Result<()> {
        let _ = (guest, to);
        Err(Errno::INVAL.into())
    }

    /// Should a thread that waits, or has a part of a request still to do, give up?
    fn interrupted(&self) -> bool {
        false
    }

    /// A request of the guest's that begins in `backend` could not be served: the kernel, the
    /// host's pins or this listener were in the way. Earlier steps of it have taken effect, this
    /// one has changed nothing. Called after `end`; a guest can have it called as often as it
    /// likes.
    fn failed(&self, backend: Option<&Backend>, guest: GuestPages, to: View, error: &Error) {
        let _ = (backend, guest, to, error);
    }

    /// A stray guard has caught somebody. Called from its thread, with no claim held; the thread
    /// that was caught waits meanwhile.
    fn stray(&self, backend: &Backend, stray: Stray) {
        let _ = (backend, stray);
    }

    /// Something that a user should know and that no return value says.
    fn log(&self, level: Level, message: &str) {
        let _ = (level, message);
    }
}

thread_local! {
    /// The VM that this thread is in a step or a callback of, if any.
    static INSIDE: Cell<Option<VmId>> = const { Cell::new(None) };
}

/// This thread is in a step or a callback of a VM as long as this lives.
struct Inside {
    /// What it was in before: a listener may use another VM.
    outer: Option<VmId>,
}

impl Inside {
    fn enter(vm: VmId) -> Self {
        Self {
            outer: INSIDE.replace(Some(vm)),
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(self.outer);
    }
}

/// An error if this thread is in a step or a callback of the same VM: a listener calls back.
pub(crate) fn check_no_callback(vm: VmId) -> Result<()> {
    match INSIDE.get() {
        Some(inside) if inside == vm => Err(Error::InCallback),
        _ => Ok(()),
    }
}

/// The listener of a VM, which may not call back while it is called.
pub(crate) struct Caller {
    listener: Box<dyn Listener>,
    vm: VmId,
}

impl Caller {
    pub(crate) fn new(listener: Box<dyn Listener>, vm: VmId) -> Self {
        Self { listener, vm }
    }

    pub(crate) fn call<T>(&self, function: impl FnOnce(&dyn Listener) -> T) -> T {
        let _inside = Inside::enter(self.vm);
        function(self.listener.as_ref())
    }
}

/// Brackets a step for the listener.
pub(crate) struct Notifier<'a> {
    listener: &'a dyn Listener,
    listening: bool,
    /// Until `end` has returned, or panicked.
    _inside: Inside,
}

impl<'a> Notifier<'a> {
    pub(crate) fn begin(caller: &'a Caller) -> Result<Self> {
        check_no_callback(caller.vm)?;
        let listener = caller.listener.as_ref();
        let mut notifier = Self {
            listener,
            listening: false,
            _inside: Inside::enter(caller.vm),
        };
        // If this panics, the step is over, and `end` is called all the same.
        notifier.listening = listener.begin();
        Ok(notifier)
    }

    /// Is anybody told of what is mapped?
    pub(crate) fn is_listening(&self) -> bool {
        self.listening
    }

    pub(crate) fn map(&self, backend: &Backend, pages: FilePages) -> Result<()> {
        if !self.listening {
            return Ok(());
        }
        self.listener
            .map(backend, pages)
            .map_err(|source| Error::Listener {
                backend: backend.config().name.clone(),
                pages,
                source,
            })
    }

    pub(crate) fn unmap(&self, backend: &Backend, pages: FilePages) {
        if self.listening {
            self.listener.unmap(backend, pages);
        }
    }
}

impl Drop for Notifier<'_> {
    fn drop(&mut self) {
        // A second panic would abort the program.
        let mut panics = Panics::default();
        panics.hold(|| self.listener.end(self.listening));
    }
}

/// Panics of a listener while the library does what has to be done all the same. The first goes on
/// when this is dropped, unless there is one already.
#[derive(Default)]
pub(crate) struct Panics(Option<Box<dyn Any + Send>>);

impl Panics {
    /// Calls a listener. `None` if it panics.
    pub(crate) fn hold<T>(&mut self, call: impl FnOnce() -> T) -> Option<T> {
        match catch_unwind(AssertUnwindSafe(call)) {
            Ok(answer) => Some(answer),
            Err(panic) => {
                self.0.get_or_insert(panic);
                None
            }
        }
    }
}

impl Drop for Panics {
    fn drop(&mut self) {
        match self.0.take() {
            Some(panic) if !thread::panicking() => resume_unwind(panic),
            _ => {}
        }
    }
}
