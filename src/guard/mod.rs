// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guards: they catch accesses to private pages which go around every check.
//!
//! A private page is a hole of the shared file. When a thread of this program touches the host's
//! mapping there, userfaultfd stops it; it is told of, it goes on with a page of zeros, and that
//! page is given back some time later. What other processes do with the file cannot be stopped, but
//! it leaves data where a hole should be, which the guard looks for.
//!
//! The price: each first touch of a shared page, the guest's too, is a fault that the guard serves.
//! It takes no lock for that but those of lookups, and never waits for a claim: a conversion that
//! holds one may be waiting for the guard, in a listener that touches the memory.
//!
//! A [`StrayGuard`] starts no thread. Its user runs it on one of his own, serves it in an event
//! loop with other things, or asks for a [`GuardThread`].

mod thread;
mod userfault;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::backend::{Backend, Discard};
use crate::error::{Error, Result};
use crate::guard::userfault::{Fault, Userfault};
use crate::listener::{Level, Stray};
use crate::pages::ranges::FilePages;
use crate::pages::states::{PageState, View};
use crate::views::Mode;
use crate::vm::Vm;

pub use thread::GuardThread;

/// How long a thread has to make the access that it was caught in, before the page is given back.
const GIVE_BACK: Duration = Duration::from_millis(100);

/// How often the guard looks for what other processes have left.
const SWEEP: Duration = Duration::from_secs(1);

/// What is done before faults, which threads wait for, have their turn again: runs of states that
/// are looked at, and pages that are given back. And how many faults before the rest has its turn.
const RUNS: usize = 1024;
const GIVEN_BACK: usize = 64;
const FAULTS: usize = 256;

/// How long to wait before a fault that could not be served comes again.
const PAUSE: Duration = Duration::from_millis(1);

/// A guard of a backend. It acts only while its user has it [run](Self::run), [serve](Self::serve),
/// or [on a thread of its own](Self::spawn); until then, whoever touches a hole of the guarded
/// mapping waits. Dropped, it guards no more, and those who wait go on.
pub struct StrayGuard {
    vm: Arc<Vm>,
    backend: Arc<Backend>,
    faults: Userfault,
    /// Pages that were filled although they were not the host's, and when.
    suspects: VecDeque<(Instant, FilePages)>,
    /// What is left of a sweep, and when the last one was over.
    unswept: Option<FilePages>,
    swept: Instant,
    complained: Option<Instant>,
}

impl fmt::Debug for StrayGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StrayGuard")
            .field("backend", &self.backend.config().name)
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// A guard of the private pages of a backend, whose shared file the host maps at `address`. The
    /// listener hears of [`Stray`] accesses from the thread that the guard acts on.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where nothing is private, where memory starts private, where pages
    /// keep their data when they become private ([`Discard::Keep`]), and where userfaultfd is not
    /// to be had. [`Error::OtherVm`].
    ///
    /// # Safety
    /// This process has mapped all of the shared file at `address`, and keeps it mapped as long as
    /// the guard lives.
    #[allow(unsafe_code)] // a contract of the caller's; nothing here is unsafe
    pub unsafe fn guard(
        self: &Arc<Self>,
        backend: &Arc<Backend>,
        address: usize,
    ) -> Result<StrayGuard> {
        backend.check_vm(self.id())?;
        check_guardable(backend)?;
        let faults = Userfault::new(address, backend.config().size).map_err(|error| {
            refused(
                backend,
                format!(
                    "userfaultfd: {error}; it takes a kernel with CONFIG_USERFAULTFD, and \
                     CAP_SYS_PTRACE, access to /dev/userfaultfd or vm.unprivileged_userfaultfd=1"
                ),
            )
        })?;
        Ok(StrayGuard {
            vm: self.clone(),
            backend: backend.clone(),
            faults,
            suspects: VecDeque::new(),
            unswept: None,
            swept: Instant::now(),
            complained: None,
        })
    }
}

fn refused(backend: &Backend, found: String) -> Error {
    Error::Unsupported {
        wanted: format!("a guard for backend '{}'", backend.config().name),
        found,
    }
}

/// Can what a guard finds in private pages only have come there by a stray access?
fn check_guardable(backend: &Backend) -> Result<()> {
    let refused = |found: &str| Err(refused(backend, found.into()));
    if !backend.mode().has_private_pages() {
        return refused("the host maps all memory of this guest, nothing is private");
    }
    if backend.mode() == Mode::InPlace {
        return refused(
            "memory is converted in place, and the kernel itself answers such an access with \
             SIGBUS",
        );
    }
    if backend.config().start == PageState::Private {
        return refused(
            "its memory starts private, and a launch that is measured may write there through the \
             host's mapping, which a guard would undo",
        );
    }
    if backend.config().discard == Discard::Keep {
        return refused("discard=keep leaves data where pages were; use now");
    }
    Ok(())
}

/// For an event loop: readable when a thread waits for the guard.
impl AsFd for StrayGuard {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.faults.as_fd()
    }
}

impl StrayGuard {
    /// Serves the threads that wait, and does what else is due, in portions; waits for nothing.
    /// Call it when the descriptor is readable, and after the time that it returns at the latest.
    ///
    /// # Errors
    /// [`Error::Guard`]: it cannot go on. Drop it, or those who wait for it wait for ever.
    pub fn serve(&mut self) -> Result<Duration> {
        for _ in 0..FAULTS {
            match self.faults.next().map_err(|source| self.failed(source))? {
                Some(fault) => self.serve_fault(fault),
                None => break,
            }
        }
        self.give_back();
        self.sweep();
        Ok(match (&self.unswept, self.suspects.is_empty()) {
            (Some(_), _) => Duration::ZERO,
            (None, true) => SWEEP,
            (None, false) => GIVE_BACK,
        })
    }

    /// Serves until a descriptor becomes readable: an eventfd, for example.
    ///
    /// # Errors
    /// As for [`StrayGuard::serve`].
    pub fn run(&mut self, stop: impl AsFd) -> Result<()> {
        let mut timeout = Duration::ZERO;
        while !self.wait(stop.as_fd(), timeout)? {
            timeout = self.serve()?;
        }
        Ok(())
    }

    /// Waits for something to do; true if that is to end.
    fn wait(&self, stop: BorrowedFd<'_>, timeout: Duration) -> Result<bool> {
        let mut waited = [
            PollFd::new(&self.faults, PollFlags::IN),
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
        ];
        let polled = timeout
            .try_into()
            .map_err(|_| Errno::INVAL)
            .and_then(|timeout| poll(&mut waited, Some(&timeout)));
        match polled {
            Ok(_) | Err(Errno::INTR) => Ok(!waited[1].revents().is_empty()),
            Err(error) => Err(self.failed(error.into())),
        }
    }

    /// Without a guard, nobody is stopped any more: the kernel takes faults back with the
    /// descriptor.
    fn failed(&self, source: io::Error) -> Error {
        Error::Guard {
            backend: self.backend.config().name.clone(),
            source,
        }
    }

    /// A listener that panics does not end a guard that threads wait for.
    fn log(&self, message: &str) {
        let log = || self.vm.log(Level::Error, message);
        let _ = catch_unwind(AssertUnwindSafe(log));
    }

    fn state(&self, page: u64) -> PageState {
        self.backend.state(page)
    }

    fn serve_fault(&mut self, fault: Fault) {
        let Ok(page) = self.backend.pages_covering(fault.offset, 1) else {
            return;
        };
        if self.state(page.start()) == PageState::Private {
            self.tell(page, Some(fault.thread));
        }
        if let Err(error) = self.faults.fill(fault.offset) {
            self.complain(page, &error);
            std::thread::sleep(PAUSE);
        }
        // It may have become private since the look at its state.
        if !self.state(page.start()).host_may_use() {
            self.suspects.push_back((Instant::now(), page));
        }
    }

    /// Once a second: the fault comes again and again.
    fn complain(&mut self, page: FilePages, error: &io::Error) {
        let last = self.complained.map(|last| last.elapsed());
        if last.is_none_or(|last| last >= Duration::from_secs(1)) {
            self.complained = Some(Instant::now());
            let name = &self.backend.config().name;
            let message = format!("cannot fill {page} of backend '{name}': {error}");
            self.log(&message);
        }
    }

    fn tell(&self, pages: FilePages, thread: Option<u32>) {
        let first = FilePages::new(pages.start(), pages.start() + 1).unwrap_or(pages);
        let backend = self.backend.id();
        let places = self
            .vm
            .places
            .read()
            .windows
            .places(backend, first, View::Shared);
        let gpa = places.into_iter().next().map(|guest| guest.start_bytes());
        self.backend
            .counters()
            .strays
            .fetch_add(1, Ordering::Relaxed);
        let stray = Stray { pages, gpa, thread };
        let tell = || {
            self.vm
                .listener
                .call(|user| user.stray(&self.backend, stray))
        };
        // The thread that was caught waits, whatever becomes of this.
        if catch_unwind(AssertUnwindSafe(tell)).is_err() {
            self.log(&format!(
                "the listener panicked at a stray access to {pages}"
            ));
        }
    }

    /// Frees what was filled in private pages, once its thread has had its time.
    fn give_back(&mut self) {
        for _ in 0..self.suspects.len().min(GIVEN_BACK) {
            match self.suspects.pop_front() {
                Some((since, page)) if since.elapsed() < GIVE_BACK => {
                    // Those behind it have come later.
                    self.suspects.push_front((since, page));
                    return;
                }
                Some((_, page)) if !self.punch_if_private(page) => {
                    self.suspects.push_back((Instant::now(), page));
                }
                _ => {}
            }
        }
    }

    /// False if a conversion has claimed the page, or if the kernel refuses.
    fn punch_if_private(&self, page: FilePages) -> bool {
        let wanted = [(self.backend.id(), page)];
        let Some(_claim) = self.vm.claims.try_claim(&wanted) else {
            return false;
        };
        self.state(page.start()) != PageState::Private
            || self.backend.punch(page, View::Shared).is_ok()
    }

    /// Looks for data in private pages, part by part.
    fn sweep(&mut self) {
        if self.unswept.is_none() && self.swept.elapsed() >= SWEEP {
            self.unswept = Some(self.backend.pages());
        }
        let Some(pages) = self.unswept else { return };
        let map = self.backend.state_map(pages, RUNS);
        let private = map.runs.iter().filter(|(_, s)| *s == PageState::Private);
        for (run, _) in private {
            // A file that cannot be asked is asked again the next time.
            let data = self.backend.data_within(*run, View::Shared);
            for pages in data.unwrap_or_default() {
                self.free_if_strange(pages);
            }
        }
        self.unswept = map.rest;
        if self.unswept.is_none() {
            self.swept = Instant::now();
        }
    }

    /// Frees data in private pages that nobody is to free anyway. The next sweep sees what is in
    /// the way of this one.
    fn free_if_strange(&self, pages: FilePages) {
        let wanted = [(self.backend.id(), pages)];
        let Some(claim) = self.vm.claims.try_claim(&wanted) else {
            return;
        };
        let owed = self.backend.first_owed_hole(pages, View::Shared);
        if owed.is_some() || self.backend.first_run(pages) != (pages, PageState::Private) {
            return;
        }
        let mut strange = self
            .backend
            .data_within(pages, View::Shared)
            .unwrap_or_default();
        let is_suspect = |pages: &FilePages| self.suspects.iter().any(|(_, p)| p.overlaps(*pages));
        strange.retain(|pages| !is_suspect(pages));
        strange.retain(|pages| self.backend.punch(*pages, View::Shared).is_ok());
        drop(claim);
        for pages in strange {
            self.tell(pages, None);
        }
    }
}
