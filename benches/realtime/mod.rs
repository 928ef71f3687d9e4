// SPDX-License-Identifier: MIT OR Apache-2.0

//! Threads that get a processor whenever they can run, so that other programs on the machine do not
//! count in what is measured.

use std::io;

/// This thread goes before all ordinary ones as long as this lives.
pub(crate) struct RealTime(());

impl RealTime {
    /// Takes privileges. Whoever never sleeps is stopped by the kernel once a second.
    pub(crate) fn begin() -> io::Result<Self> {
        set(libc::SCHED_FIFO, 1)?;
        Ok(Self(()))
    }
}

impl Drop for RealTime {
    fn drop(&mut self) {
        set(libc::SCHED_OTHER, 0).expect("everybody may be an ordinary thread");
    }
}

fn set(policy: libc::c_int, priority: libc::c_int) -> io::Result<()> {
    let priority = libc::sched_param {
        sched_priority: priority,
    };
    // SAFETY: the structure lives until the function returns; 0 is this thread.
    match unsafe { libc::sched_setscheduler(0, policy, &priority) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
