// SPDX-License-Identifier: GPL-2.0-or-later
//! Makes a thread of another process do what its program never would.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr;

use anyhow::{Context, Result, ensure};

/// `mov (%rdi),%al`, and again and again.
const READ: [u8; 4] = [0x8a, 0x07, 0xeb, 0xfc];

/// The first thread of a process reads a byte at an address.
pub(crate) fn make_thread_read(pid: u32, address: u64) -> Result<()> {
    let pid = libc::pid_t::try_from(pid)?;
    request(libc::PTRACE_ATTACH, pid, ptr::null_mut()).context("cannot attach to the process")?;
    let mut status = 0;
    // SAFETY: the status is ours and outlives the call.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) };
    ensure!(
        waited == pid && libc::WIFSTOPPED(status),
        "the process does not stop"
    );
    // SAFETY: plain numbers, for which all bytes are valid.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETREGS, pid, &raw mut registers).context("cannot read registers")?;
    let memory = OpenOptions::new()
        .write(true)
        .open(format!("/proc/{pid}/mem"))?;
    memory
        .write_all_at(&READ, registers.rip)
        .context("cannot change the program")?;
    registers.rdi = address;
    // The system call that it was in does not begin again.
    registers.orig_rax = u64::MAX;
    request(libc::PTRACE_SETREGS, pid, &raw mut registers).context("cannot set registers")?;
    request(libc::PTRACE_DETACH, pid, ptr::null_mut()).context("cannot let it go")
}

fn request(
    what: libc::c_uint,
    pid: libc::pid_t,
    registers: *mut libc::user_regs_struct,
) -> io::Result<()> {
    // SAFETY: `registers` is null or a structure of the caller's that the call fills or reads.
    let done = unsafe { libc::ptrace(what, pid, ptr::null_mut::<libc::c_void>(), registers) };
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
