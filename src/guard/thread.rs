// SPDX-License-Identifier: MIT OR Apache-2.0

//! A thread for guards of those who have none for it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::ptr;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, eventfd};

use crate::error::{Error, Result};
use crate::guard::StrayGuard;

/// A thread that runs a guard; both end when this is dropped.
#[derive(Debug)]
pub struct GuardThread {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl StrayGuard {
    /// Runs the guard on a thread of its own, which takes no signals. Where it cannot go on, it
    /// ends, and the listener's log says so.
    ///
    /// # Errors
    /// [`Error::Thread`].
    pub fn spawn(mut self) -> Result<GuardThread> {
        let failed = |source| Error::Thread { source };
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
        let stop = Arc::new(stop);
        let until = stop.clone();
        let body = move || {
            if let Err(error) = self.run(&*until) {
                self.log(&error.to_string());
            }
        };
        let thread = spawn("guestmemfd-guard", body).map_err(failed)?;
        Ok(GuardThread {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for GuardThread {
    fn drop(&mut self) {
        // An eventfd that nobody else writes to has room for this.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        match self.thread.take() {
            // A listener may drop it when it has been told of a stray.
            Some(thread) if thread.thread().id() != thread::current().id() => {
                // It has panicked, or not: there is nothing left to do.
                let _ = thread.join();
            }
            _ => {}
        }
    }
}

/// Starts a thread without signals: those are the program's, and its own threads must get them.
#[allow(unsafe_code)] // pthread_sigmask()
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let mut all = MaybeUninit::uninit();
    let mut before = MaybeUninit::uninit();
    // SAFETY: sigfillset() fills what it is given, pthread_sigmask() reads the one and fills the
    // other.
    let blocked = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr())
    };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    let started = thread::Builder::new().name(name.into()).spawn(body);
    // SAFETY: the call above has filled it, and has not failed.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut()) };
    started
}
