// SPDX-License-Identifier: GPL-2.0-or-later

//! The worker of `discard=coalesced`: a thread that punches the holes which conversions have left
//! to it.
//!
//! It sleeps while nothing is owed. The first hole wakes it, then it gives neighbours some time to
//! come, unless there is much to do already. It claims what it punches, so a page is never exposed
//! meanwhile; who wants a page whose hole is still owed punches it himself.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{SigSet, SigmaskHow};
use parking_lot::{Condvar, Mutex, RwLock};

use crate::backend::{Backend, BackendId, Queued};
use crate::error::Result;
use crate::exclusion::claims::Claims;
use crate::pages::ranges::{FilePages, PAGE_SIZE};
use crate::pages::states::View;

/// How long a hole waits for neighbours.
const COLLECT: Duration = Duration::from_millis(20);

/// How long to wait with holes that could not be punched.
const RETRY: Duration = Duration::from_millis(200);

/// Pages that are punched under one claim: a conversion waits for no more.
const STEP: u64 = (2 << 20) / PAGE_SIZE;

pub(crate) type Backends = RwLock<BTreeMap<BackendId, Arc<Backend>>>;

/// The thread, from the first time that it is needed.
#[derive(Debug, Default)]
pub(crate) struct Worker {
    signal: Arc<Signal>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Signal {
    wish: Mutex<Wish>,
    changed: Condvar,
}

/// What the worker is to do next, by rising urgency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Wish {
    #[default]
    Sleep,
    Soon,
    Now,
    End,
}

/// Starts a thread without signals: those are the program's, and its own threads must get them.
pub(crate) fn spawn(
    name: &str,
    body: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    let started = std::thread::Builder::new().name(name.into()).spawn(body);
    mask.thread_set_mask()?;
    started
}

impl Worker {
    /// Starts the thread if it does not run yet.
    pub(crate) fn start(&self, claims: Arc<Claims>, backends: Arc<Backends>) -> io::Result<()> {
        let mut thread = self.thread.lock();
        if thread.is_some() {
            return Ok(());
        }
        let signal = self.signal.clone();
        let started = spawn("guestmemfd", move || work(&signal, &claims, &backends));
        *thread = Some(started?);
        Ok(())
    }

    /// After a hole was queued.
    pub(crate) fn wake(&self, queued: Queued) {
        match queued {
            Queued::First => self.signal.wish(Wish::Soon),
            Queued::Much => self.signal.wish(Wish::Now),
            Queued::More | Queued::Full => {}
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.lock().take() {
            self.signal.wish(Wish::End);
            // It has panicked, or not: there is nothing left to do.
            let _ = thread.join();
        }
    }
}

impl Signal {
    fn wish(&self, wish: Wish) {
        let mut wished = self.wish.lock();
        if *wished < wish {
            *wished = wish;
            self.changed.notify_one();
        }
    }

    /// Waits until there is something to do; false if that is to end.
    fn wait(&self) -> bool {
        let mut wish = self.wish.lock();
        while *wish == Wish::Sleep {
            self.changed.wait(&mut wish);
        }
        if *wish == Wish::Soon {
            self.changed.wait_for(&mut wish, COLLECT);
        }
        if *wish == Wish::End {
            return false;
        }
        *wish = Wish::Sleep;
        true
    }
}

fn work(signal: &Signal, claims: &Claims, backends: &Backends) {
    while signal.wait() {
        let snapshot: Vec<_> = backends.read().values().cloned().collect();
        for backend in snapshot {
            if drain(claims, &backend).is_err() {
                // It stays on record, where statistics show it, and is tried again.
                std::thread::sleep(RETRY);
            }
            if backend.unpunched_bytes() > 0 {
                signal.wish(Wish::Soon);
            }
        }
    }
}

/// Punches what a backend owes. Goes on after an error, and returns the first.
pub(crate) fn drain(claims: &Claims, backend: &Backend) -> Result<()> {
    let mut result = Ok(());
    for view in [View::Shared, View::Private] {
        let mut rest = Some(backend.pages());
        while let Some(hole) = rest.and_then(|rest| backend.first_unpunched(rest, view)) {
            let end = hole.end().min(hole.start() + STEP);
            let step = FilePages::new(hole.start(), end).unwrap_or(hole);
            rest = FilePages::new(end, backend.pages().end());
            if let Err(error) = punch(claims, backend, step, view) {
                result = result.and(Err(error));
            }
        }
    }
    result
}

fn punch(claims: &Claims, backend: &Backend, pages: FilePages, view: View) -> Result<()> {
    let _claim = claims.claim_for_sure(&[(backend.id(), pages)]);
    // What has been punched before it was claimed is no longer owed.
    backend.prepare(pages, view)
}
