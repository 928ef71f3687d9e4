// SPDX-License-Identifier: MIT OR Apache-2.0

//! Waiting for those who use pages that are to become private. It is done with no claim and none of
//! the listener's locks held: whoever lets go may need them.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::exclusion::pins::Waited;
use crate::exclusion::sync::ASK_INTERVAL;
use crate::pages::ranges::{FilePages, GuestPages};
use crate::vm::Vm;

/// How long pages are given back, at most, between two tries.
const BETWEEN_TRIES: Duration = Duration::from_millis(50);

/// The first pause for a holder that the library does not know; each is twice as long as the last.
const FIRST_PAUSE: Duration = Duration::from_millis(1);

/// How a step of a request has waited so far.
#[derive(Debug, Default)]
pub(super) struct Wait {
    since: Option<Instant>,
    pauses: u32,
}

impl Wait {
    /// How much longer it may wait; `None` if it has waited long enough. One that has not waited
    /// yet always may: what is free at the deadline has been waited for.
    fn left(&self, timeout: Duration) -> Option<Duration> {
        match self.since {
            None => Some(timeout),
            Some(start) => match timeout.saturating_sub(start.elapsed()) {
                Duration::ZERO => None,
                left => Some(left),
            },
        }
    }
}

impl Vm {
    /// Waits for the host to unpin pages. Not until all are unpinned: then the step is tried again,
    /// which keeps new pins away.
    pub(super) fn wait_for_pins(
        &self,
        guest: GuestPages,
        backend: &Backend,
        pages: FilePages,
        wait: &mut Wait,
    ) -> Result<()> {
        let timeout = backend.config().convert_timeout;
        let Some(left) = wait.left(timeout) else {
            return Err(pinned(backend, pages, timeout));
        };
        if wait.since.is_none() {
            self.first_wait(backend, wait);
            self.listener.call(|user| user.revoke(backend, pages));
        }
        let deadline = Instant::now() + left.min(BETWEEN_TRIES);
        match backend
            .pins()
            .wait(pages, deadline, || self.is_interrupted())
        {
            Waited::Unpinned | Waited::TimedOut => Ok(()),
            Waited::Interrupted => Err(Error::Interrupted { guest }),
        }
    }

    /// Waits for somebody whom only the kernel knows, in pauses that grow: each try costs it a look
    /// at the pages. `held` is what to return when that has been long enough.
    pub(super) fn wait_for_holder(
        &self,
        guest: GuestPages,
        backend: &Backend,
        held: Error,
        wait: &mut Wait,
    ) -> Result<()> {
        let Some(left) = wait.left(backend.config().convert_timeout) else {
            return Err(held);
        };
        if wait.since.is_none() {
            self.first_wait(backend, wait);
        }
        let pause = FIRST_PAUSE * 2_u32.pow(wait.pauses.min(10));
        wait.pauses += 1;
        let end = Instant::now() + pause.min(BETWEEN_TRIES).min(left);
        loop {
            if self.is_interrupted() {
                return Err(Error::Interrupted { guest });
            }
            match end.saturating_duration_since(Instant::now()) {
                Duration::ZERO => return Ok(()),
                rest => std::thread::sleep(rest.min(ASK_INTERVAL)),
            }
        }
    }

    fn first_wait(&self, backend: &Backend, wait: &mut Wait) {
        wait.since = Some(Instant::now());
        backend.counters().waits.fetch_add(1, Ordering::Relaxed);
    }
}

/// The host has used pages for so long.
pub(super) fn pinned(backend: &Backend, pages: FilePages, timeout: Duration) -> Error {
    Error::Pinned {
        backend: backend.config().name.clone(),
        pages,
        timeout,
    }
}
