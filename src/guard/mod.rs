// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guards: threads that catch accesses to private pages which go around every check.
//!
//! A private page is a hole of the shared file. When a thread of this program touches the host's
//! mapping there, userfaultfd stops it; it is told of, it goes on with a page of zeros, and that page is
//! given back some time later. What other processes do with the file cannot be stopped, but it leaves
//! data where a hole should be, which the guard looks for.
//!
//! The price: each first touch of a shared page, the guest's too, is a fault that the guard serves.
//! It takes no lock for that but those of lookups, and never waits for a claim: a conversion that holds
//! one may be waiting for the guard, in a listener that touches the memory.

mod userfault;

use std::collections::VecDeque;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::backend::{Backend, Discard};
use crate::error::{Error, Result};
use crate::guard::userfault::{Fault, Userfault};
use crate::listener::Level;
use crate::listener::Stray;
use crate::pages::ranges::FilePages;
use crate::pages::states::{PageState, View};
use crate::views::Mode;
use crate::vm::Vm;

/// How long a thread has to make the access that it was caught in, before the page is given back.
const GIVE_BACK: Duration = Duration::from_millis(100);

/// How often the guard looks for what other processes have left.
const SWEEP: Duration = Duration::from_secs(1);

/// What is done before faults, which threads wait for, have their turn again: runs of states that are
/// looked at, and pages that are given back. And how many faults before the rest has its turn.
const RUNS: usize = 1024;
const GIVEN_BACK: usize = 64;
const FAULTS: usize = 256;

/// How long to wait before a fault that could not be served comes again.
const PAUSE: Duration = Duration::from_millis(1);

/// A running guard; it ends when this is dropped.
#[derive(Debug)]
pub struct StrayGuard {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Vm {
    /// Guards the private pages of a backend, whose shared file the host maps at `address`. The
    /// listener hears of [`Stray`] accesses from a thread of the guard's.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where nothing is private, where memory starts private, where pages keep
    /// their data when they become private ([`Discard::Keep`]), and where userfaultfd is not to be had.
    ///
    /// # Safety
    /// This process has mapped all of the shared file at `address`, and keeps it mapped as long as the
    /// guard lives.
    #[allow(unsafe_code)] // a contract of the caller's; nothing here is unsafe
    pub unsafe fn guard(
        self: &Arc<Self>,
        backend: &Arc<Backend>,
        address: usize,
    ) -> Result<StrayGuard> {
        let refused = |found: String| Error::Unsupported {
            wanted: format!("a guard for backend '{}'", backend.config().name),
            found,
        };
        if !backend.mode().has_private_pages() {
            return Err(refused(
                "the host maps all memory of this guest, nothing is private".into(),
            ));
        }
        if backend.mode() == Mode::InPlace {
            return Err(refused(
                "memory is converted in place, and the kernel itself answers such an access with \
                 SIGBUS"
                    .into(),
            ));
        }
        if backend.config().start == PageState::Private {
            return Err(refused(
                "its memory starts private, and a launch that is measured may write there through the \
                 host's mapping, which a guard would undo"
                    .into(),
            ));
        }
        if backend.config().discard == Discard::Keep {
            return Err(refused(
                "discard=keep leaves data where pages were; use now".into(),
            ));
        }
        let faults = Userfault::new(address, backend.config().size).map_err(|error| {
            refused(format!(
                "userfaultfd: {error}; it takes a kernel with CONFIG_USERFAULTFD, and CAP_SYS_PTRACE, access \
                 to /dev/userfaultfd or vm.unprivileged_userfaultfd=1"
            ))
        })?;
        let failed = |source| Error::Thread { source };
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
        let stop = Arc::new(stop);
        let watch = Watch {
            vm: self.clone(),
            backend: backend.clone(),
            faults,
            stop: stop.clone(),
            suspects: VecDeque::new(),
            unswept: None,
            swept: Instant::now(),
            complained: None,
        };
        let thread = spawn("guestmemfd-guard", move || watch.run()).map_err(failed)?;
        Ok(StrayGuard {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for StrayGuard {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            // An eventfd that nobody else writes to has room for this.
            let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
            // It has panicked, or not: there is nothing left to do.
            let _ = thread.join();
        }
    }
}

/// Starts a thread without signals: those are the program's, and its own threads must get them.
#[allow(unsafe_code)] // pthread_sigmask()
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let mut all = MaybeUninit::uninit();
    let mut before = MaybeUninit::uninit();
    // SAFETY: sigfillset() fills what it is given, pthread_sigmask() reads the one and fills the other.
    let blocked = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr())
    };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    let started = std::thread::Builder::new().name(name.into()).spawn(body);
    // SAFETY: the call above has filled it, and has not failed.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut()) };
    started
}

/// What the guard's thread has.
struct Watch {
    vm: Arc<Vm>,
    backend: Arc<Backend>,
    faults: Userfault,
    stop: Arc<OwnedFd>,
    /// Pages that were filled although they were not the host's, and when.
    suspects: VecDeque<(Instant, FilePages)>,
    /// What is left of a sweep, and when the last one was over.
    unswept: Option<FilePages>,
    swept: Instant,
    complained: Option<Instant>,
}

impl Watch {
    fn run(mut self) {
        loop {
            match self.wait() {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => return self.give_up(&error),
            }
            for _ in 0..FAULTS {
                match self.faults.next() {
                    Ok(Some(fault)) => self.serve(fault),
                    Ok(None) => break,
                    Err(error) => return self.give_up(&error),
                }
            }
            self.give_back();
            self.sweep();
        }
    }

    /// Waits for something to do; false if that is to end.
    fn wait(&self) -> io::Result<bool> {
        let timeout = match (&self.unswept, self.suspects.is_empty()) {
            (Some(_), _) => Duration::ZERO,
            (None, true) => SWEEP,
            (None, false) => GIVE_BACK,
        };
        let mut waited = [
            PollFd::new(&self.faults, PollFlags::IN),
            PollFd::new(&*self.stop, PollFlags::IN),
        ];
        let timeout = timeout.try_into().map_err(|_| rustix::io::Errno::INVAL)?;
        match poll(&mut waited, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(waited[1].revents().is_empty()),
            Err(error) => Err(error.into()),
        }
    }

    /// Without a guard, nobody is stopped any more: the kernel takes faults back with the descriptor.
    fn give_up(&self, error: &io::Error) {
        let name = &self.backend.config().name;
        let message = format!("the guard of backend '{name}' has ended: {error}");
        self.vm.log(Level::Error, &message);
    }

    fn state(&self, page: u64) -> PageState {
        self.backend.state(page)
    }

    fn serve(&mut self, fault: Fault) {
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
            self.vm.log(Level::Error, &message);
        }
    }

    fn tell(&self, pages: FilePages, thread: Option<u32>) {
        let first = FilePages::new(pages.start(), pages.start() + 1).unwrap_or(pages);
        let backend = self.backend.id();
        let places = self.vm.windows.read().places(backend, first, View::Shared);
        let gpa = places.into_iter().next().map(|guest| guest.start_bytes());
        self.backend.counters.strays.fetch_add(1, Ordering::Relaxed);
        let stray = Stray { pages, gpa, thread };
        self.vm
            .listener
            .call(|user| user.stray(&self.backend, stray));
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

    /// Frees data in private pages that nobody is to free anyway. The next sweep sees what is in the
    /// way of this one.
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
