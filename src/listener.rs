// SPDX-License-Identifier: GPL-2.0-or-later

//! What the library asks of, and tells, the program that uses it.

use std::io;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::pages::ranges::{FilePages, GuestPages};
use crate::pages::states::View;

/// How grave a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Something was lost or cannot be undone.
    Error,
    /// Something will be tried again.
    Warning,
}

/// An access to private pages that went around every check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stray {
    /// What was accessed. Of another process only the pages are known that it has left data in.
    pub pages: FilePages,
    /// Where the guest sees the first of them, if it does anywhere.
    pub gpa: Option<u64>,
    /// The kernel's id of the thread, which waits until the listener returns; `None` for another
    /// process.
    pub thread: Option<u32>,
}

/// The user of a VM. All but `stray` are called from the thread that entered the library, and `log` from a guard's
/// too; none may ask for a
/// conversion, a discard, an access to guest memory or a change of the layout.
///
/// `begin` and `end` bracket every conversion and discard. `begin` comes before any claim is taken,
/// so it is the place for locks that `populate` and `discard` need: a thread that holds such a lock
/// may itself wait for a claim. Between the two, nobody may start to depend on being told who did
/// not when `begin` answered.
///
/// A listener may use undecided pages, which nobody tells it of, and a device of its may be doing so. Where
/// `begin` answers yes, a private touch therefore decides its own page alone, whatever lazy attributes say.
pub trait Listener: Send + Sync {
    /// A request begins. Are `populate` and `discard` to be called in it?
    fn begin(&self) -> bool {
        false
    }

    /// The request is over; `told` is what `begin` answered.
    fn end(&self, told: bool) {
        let _ = told;
    }

    /// The host can use the pages from now on. On an error, they stay private.
    fn populate(&self, backend: &Backend, pages: FilePages) -> io::Result<()> {
        let _ = (backend, pages);
        Ok(())
    }

    /// The pages are about to become private: let go of them.
    fn discard(&self, backend: &Backend, pages: FilePages) {
        let _ = (backend, pages);
    }

    /// A hypercall has made pages private, and they are to be allocated now (see
    /// [`Prefault`](crate::backend::Prefault)). The request is over.
    fn prefault(&self, guest: GuestPages) {
        let _ = guest;
    }

    /// May a part of a request that no backend owns take part in it?
    fn gap(&self, guest: GuestPages, to: View) -> io::Result<()>;

    /// Should a thread that waits for a claim give up?
    fn interrupted(&self) -> bool {
        false
    }

    /// A request of the guest's that begins in `backend` could not be served: the kernel, the host's
    /// pins or this listener were in the way. Nothing has changed. Called after `end`; a guest can have it
    /// called as often as it likes.
    fn failed(&self, backend: Option<&Backend>, guest: GuestPages, to: View, error: &Error) {
        let _ = (backend, guest, to, error);
    }

    /// A [guard](crate::guard) has caught somebody. Called from its thread, with no claim held; the
    /// thread that was caught waits meanwhile.
    fn stray(&self, backend: &Backend, stray: Stray) {
        let _ = (backend, stray);
    }

    /// Something that a user should know and that no return value says.
    fn log(&self, level: Level, message: &str);
}

/// Brackets a request for the listener.
pub(crate) struct Told<'a> {
    listener: &'a dyn Listener,
    told: bool,
}

impl<'a> Told<'a> {
    pub(crate) fn begin(listener: &'a dyn Listener) -> Self {
        let told = listener.begin();
        Self { listener, told }
    }

    /// Does anybody listen?
    pub(crate) fn is_heard(&self) -> bool {
        self.told
    }

    pub(crate) fn populate(&self, backend: &Backend, pages: FilePages) -> Result<()> {
        if !self.told {
            return Ok(());
        }
        self.listener
            .populate(backend, pages)
            .map_err(|source| Error::Listener {
                backend: backend.config().name.clone(),
                pages,
                source,
            })
    }

    pub(crate) fn discard(&self, backend: &Backend, pages: FilePages) {
        if self.told {
            self.listener.discard(backend, pages);
        }
    }
}

impl Drop for Told<'_> {
    fn drop(&mut self) {
        self.listener.end(self.told);
    }
}
