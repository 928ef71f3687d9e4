// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the library asks of, and tells, the program that uses it.

use std::cell::Cell;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
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
/// All but `stray` are called from the thread that entered the library, and `log` from the thread of
/// a stray guard as well. None may ask for a conversion, free pages or change the layout: such a call
/// fails with [`Error::InCallback`]. Pins, reads, writes and questions about states are allowed, but
/// not of pages that another request may be moving, which would wait for it.
///
/// `begin` and `end` bracket every step of a conversion, and of what frees pages. `begin` comes
/// before any claim is taken, so it is the place for locks that `map` and `unmap` need: a thread that
/// holds such a lock may itself wait for a claim. Register those who are told by `map` and `unmap`
/// before `begin` answers: one that comes later is not told of this step.
///
/// A listener may use undecided pages, which nobody tells it of, and a device of its may be doing so.
/// Where `begin` answers yes, a private touch therefore decides its own page alone, whatever lazy
/// attributes say.
///
/// A panic in any of them leaves the library usable: pages go back to the state that they had, and
/// their attributes are set again before they move the next time.
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

    /// A backend has new files, as a new owner needs them. Where the host maps the shared one, it is to
    /// be mapped anew, now: `unmap` has been told before of all pages whose file has gone, and `map`
    /// is told after this of those that may be used.
    fn new_files(&self, backend: &Backend) {
        let _ = backend;
    }

    /// Pages are to become private, and the host has pinned some of them. Whoever can do without
    /// lets go of its pins now, or soon: the request waits for those that stay. Called with no claim
    /// held, and not between `begin` and `end`.
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

    /// A request of the guest's that begins in `backend` could not be served: the kernel, the host's
    /// pins or this listener were in the way. Earlier steps of it have taken effect, this one has
    /// changed nothing. Called after `end`; a guest can have it called as often as it likes.
    fn failed(&self, backend: Option<&Backend>, guest: GuestPages, to: View, error: &Error) {
        let _ = (backend, guest, to, error);
    }

    /// A stray guard has caught somebody. Called from its thread, with no claim held; the thread that
    /// was caught waits meanwhile.
    fn stray(&self, backend: &Backend, stray: Stray) {
        let _ = (backend, stray);
    }

    /// Something that a user should know and that no return value says.
    fn log(&self, level: Level, message: &str) {
        let _ = (level, message);
    }
}

thread_local! {
    /// The VM whose step this thread is in, if any.
    static STEP_OF: Cell<Option<VmId>> = const { Cell::new(None) };
}

/// An error if this thread is in a step of the same VM: a listener calls back.
pub(crate) fn check_no_callback(vm: VmId) -> Result<()> {
    match STEP_OF.get() {
        Some(in_step) if in_step == vm => Err(Error::InCallback),
        _ => Ok(()),
    }
}

/// Brackets a step for the listener.
pub(crate) struct Notifier<'a> {
    listener: &'a dyn Listener,
    listening: bool,
    /// What this thread was in before: a listener may use another VM.
    outer: Option<VmId>,
}

impl<'a> Notifier<'a> {
    pub(crate) fn begin(listener: &'a dyn Listener, vm: VmId) -> Result<Self> {
        check_no_callback(vm)?;
        let outer = STEP_OF.replace(Some(vm));
        let mut notifier = Self {
            listener,
            listening: false,
            outer,
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
        let end = || self.listener.end(self.listening);
        if thread::panicking() {
            // A second panic would abort the program.
            let _ = catch_unwind(AssertUnwindSafe(end));
            STEP_OF.set(self.outer);
            return;
        }
        let _left = Left(self.outer);
        end();
    }
}

/// Dropped when `end` has returned, or panicked.
struct Left(Option<VmId>);

impl Drop for Left {
    fn drop(&mut self) {
        STEP_OF.set(self.0);
    }
}
