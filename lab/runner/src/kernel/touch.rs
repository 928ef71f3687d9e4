// SPDX-License-Identifier: GPL-2.0-or-later
//! Touches of memory that may end in a signal, by a process of their own.

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{mem, ptr};

use anyhow::{Context, Result, bail};

use super::memory::Map;

/// `si_code` of an access to an address that is mapped to nothing.
const BUS_ADRERR: c_int = 2;

/// The status of a child that got a signal: this and the signal's code.
const CODES: c_int = 64;
/// The status of a child whose signal was about another address.
const ELSEWHERE: c_int = 63;

/// How a touch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touched {
    Done,
    /// SIGBUS with this `si_code`, about the address that was touched.
    Bus(c_int),
    /// SIGBUS about another address.
    Elsewhere,
}

impl Touched {
    /// As for private pages.
    pub(super) const BUS: Self = Self::Bus(BUS_ADRERR);
}

/// What the process at hand touches. Each is a fork, and has one.
static ADDRESS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_signal(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel hands over a valid structure, and _exit() may be called in a handler.
    unsafe {
        let right = (*info).si_addr() as usize == ADDRESS.load(Ordering::Relaxed);
        libc::_exit(if right {
            CODES + (*info).si_code
        } else {
            ELSEWHERE
        });
    }
}

/// A forked process that is about to touch a page.
#[derive(Debug)]
pub(super) struct Toucher {
    child: libc::pid_t,
    go: File,
    ready: File,
}

impl Toucher {
    /// It has touched the page once already, and so has it in its page tables.
    pub(super) fn start(map: &Map, page: u64, before: bool, write: bool) -> Result<Self> {
        let (mut told, go) = pipe()?;
        let (ready, mut say) = pipe()?;
        let address = map.page(page).cast::<u32>();
        // SAFETY: the child does nothing but system calls and memory accesses, and ends by _exit().
        let child = unsafe { libc::fork() };
        if child < 0 {
            return Err(io::Error::last_os_error()).context("fork");
        }
        if child == 0 {
            // SAFETY: see above; the page is mapped, and a signal ends this process only.
            unsafe {
                if before {
                    address.read_volatile();
                }
                let good = say.write_all(b"x").is_ok() && told.read_exact(&mut [0]).is_ok();
                libc::_exit(if good { touch_here(address, write) } else { 1 });
            }
        }
        let mut toucher = Self { child, go, ready };
        let begun = toucher.ready.read_exact(&mut [0]);
        begun.context("the child has not begun")?;
        Ok(toucher)
    }

    /// Lets it touch the page.
    pub(super) fn touch(mut self) -> Result<Touched> {
        self.go.write_all(b"x").context("the child is gone")?;
        let mut status = 0;
        // SAFETY: the status outlives the call.
        if unsafe { libc::waitpid(self.child, &raw mut status, 0) } != self.child {
            return Err(io::Error::last_os_error()).context("waitpid");
        }
        if !libc::WIFEXITED(status) {
            bail!("a touch ended with signal {}", libc::WTERMSIG(status));
        }
        match libc::WEXITSTATUS(status) {
            0 => Ok(Touched::Done),
            ELSEWHERE => Ok(Touched::Elsewhere),
            code if code >= CODES => Ok(Touched::Bus(code - CODES)),
            other => bail!("the child ended with status {other}"),
        }
    }
}

fn pipe() -> Result<(File, File)> {
    let (from, to) = rustix::pipe::pipe().context("a pipe")?;
    Ok((from.into(), to.into()))
}

/// Touches a page in the forked process.
///
/// # Safety
/// `address` must be mapped. A signal ends the process.
unsafe fn touch_here(address: *mut u32, write: bool) -> c_int {
    ADDRESS.store(address as usize, Ordering::Relaxed);
    // SAFETY: a zeroed structure is a valid one, and the handler has the right type.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_signal;
        action.sa_sigaction = handler as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO;
        if libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) != 0 {
            return 1;
        }
        let value = address.read_volatile();
        if write {
            address.write_volatile(value);
        }
    }
    0
}

/// Has a page touched by a new process, which has it not in its page tables.
pub(super) fn touch(map: &Map, page: u64, write: bool) -> Result<Touched> {
    Toucher::start(map, page, false, write)?.touch()
}
