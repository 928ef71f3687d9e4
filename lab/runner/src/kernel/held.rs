// SPDX-License-Identifier: GPL-2.0-or-later
//! Pages that somebody keeps do not become private, and nothing changes then.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{mem, thread};

use anyhow::{Context as _, Result, ensure};
use rustix::io::Errno;
use rustix::io_uring::{IoringRegisterOp, io_uring_params, io_uring_register, io_uring_setup};
use rustix::mm::{mlock, munlock};
use rustix::pipe::{IoSliceRaw, SpliceFlags, vmsplice};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::Test;
use super::memory::{File, Map, Refused};
use super::uapi::{self, PAGE, SW_PROTECTED};
use crate::failslab::Failures;

const PAGES: u64 = 64;

pub(super) fn tests() -> Vec<Test> {
    vec![
        Test::new("kernel/held-by-a-pipe", pipe),
        Test::new("kernel/held-by-io-uring", io_uring),
        Test::new("kernel/locked-is-not-held", locked),
        Test::new("kernel/new-on-another-cpu-is-not-held", other_cpu),
        Test::new("kernel/no-memory-changes-nothing", no_memory),
    ]
}

fn new_file() -> Result<(kvm_ioctls::VmFd, File)> {
    let vm = uapi::vm(SW_PROTECTED)?;
    let file = File::new(&vm, PAGES)?;
    for page in 0..PAGES {
        file.map.write(page, 1);
    }
    Ok((vm, file))
}

/// As for a page that is held.
fn held(page: u64) -> Result<(), Refused> {
    let errno = Errno::AGAIN;
    Err(Refused { errno, page })
}

/// The whole range stays as it was, whatever came before the page.
fn refused_at(file: &File, page: u64) -> Result<()> {
    let answer = file.set(0..16, true);
    ensure!(answer == held(page), "{answer:?}, where {page} is held");
    for page in [0, page, 15] {
        file.expect(page, false)?;
    }
    // What is shared already is not looked at.
    file.convert(0..16, false)
}

/// A reference.
fn pipe() -> Result<()> {
    let (_vm, file) = new_file()?;
    let (from, _to) = hold(&file.map, 5)?;
    refused_at(&file, 5)?;
    // Its neighbours do not care.
    file.convert(6..16, true)?;
    file.convert(6..16, false)?;
    // Punched, it is another page, and the pipe has the old one.
    let mut buffer = vec![0; 4096];
    rustix::io::read(&from, &mut buffer[..])?;
    ensure!(buffer[0] == 1, "what came out of the pipe");
    file.convert(0..16, true)?;
    file.expect(5, true)
}

/// Holds a page that is mapped until what it holds is read from the pipe, or the pipe is gone. The
/// ends to read from and to write to.
pub(crate) fn hold(map: &Map, page: u64) -> Result<(OwnedFd, OwnedFd)> {
    let (from, to) = rustix::pipe::pipe()?;
    // SAFETY: a page of a mapping that is still there when the call is over.
    let bytes = unsafe { std::slice::from_raw_parts(map.page(page).cast::<u8>(), 4096) };
    let page = IoSliceRaw::from_slice(bytes);
    // SAFETY: whoever writes to the page changes what is read from the pipe, which harms nobody.
    let sent = unsafe { vmsplice(&to, &[page], SpliceFlags::empty()) };
    ensure!(sent == Ok(4096), "vmsplice: {sent:?}");
    Ok((from, to))
}

/// A pin.
fn io_uring() -> Result<()> {
    let (_vm, file) = new_file()?;
    let mut parameters: io_uring_params = unsafe_zeroed();
    // SAFETY: nothing is submitted to the ring.
    let ring = unsafe { io_uring_setup(4, &mut parameters) }.context("io_uring_setup")?;
    let buffers = libc::iovec {
        iov_base: file.map.page(10),
        iov_len: 2 * usize::try_from(PAGE)?,
    };
    let register = |operation, argument: *const libc::iovec, count| {
        // SAFETY: the buffers outlive the ring, which does nothing with them.
        unsafe { io_uring_register(&ring, operation, argument.cast(), count) }
    };
    register(IoringRegisterOp::RegisterBuffers, &raw const buffers, 1).context("buffers")?;
    refused_at(&file, 10)?;
    let off = IoringRegisterOp::UnregisterBuffers;
    register(off, std::ptr::null(), 0).context("no buffers")?;
    // The kernel lets go of them when it gets round to it.
    let mut answer = file.set(0..16, true);
    for _ in 0..100 {
        if answer.is_ok() {
            break;
        }
        thread::sleep(std::time::Duration::from_millis(10));
        answer = file.set(0..16, true);
    }
    ensure!(answer.is_ok(), "after the buffers are gone: {answer:?}");
    file.expect(10, true)
}

fn unsafe_zeroed() -> io_uring_params {
    // SAFETY: plain numbers.
    unsafe { mem::zeroed() }
}

/// A page that is to stay in memory may be private.
fn locked() -> Result<()> {
    let (_vm, file) = new_file()?;
    let size = usize::try_from(PAGE)?;
    // SAFETY: it concerns our mapping alone.
    unsafe { mlock(file.map.page(20), size) }.context("mlock")?;
    file.convert(20..21, true)?;
    file.expect(20, true)?;
    file.convert(20..21, false)?;
    // SAFETY: as above.
    unsafe { munlock(file.map.page(20), size) }.context("munlock")
}

/// A page waits for the LRU in a list of the CPU that allocated it.
fn other_cpu() -> Result<()> {
    let vm = uapi::vm(SW_PROTECTED)?;
    let file = File::new(&vm, PAGES)?;
    let all = sched_getaffinity(None)?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|&cpu| all.is_set(cpu));
    let (Some(here), Some(there)) = (cpus.next(), cpus.next()) else {
        anyhow::bail!("there is one CPU only");
    };
    let on = |cpu| {
        let mut set = CpuSet::new();
        set.set(cpu);
        sched_setaffinity(None, &set).context("sched_setaffinity")
    };
    // How many pages there are.
    let touched = AtomicU64::new(0);
    let wanted = AtomicU64::new(0);
    let result = thread::scope(|scope| {
        let toucher = scope.spawn(|| -> Result<()> {
            on(there)?;
            for page in 0..PAGES {
                while wanted.load(Ordering::Acquire) <= page {
                    thread::yield_now();
                }
                file.map.write(page, 1);
                touched.store(page + 1, Ordering::Release);
            }
            Ok(())
        });
        on(here)?;
        let mut result = Ok(());
        for page in 0..PAGES {
            wanted.store(page + 1, Ordering::Release);
            while touched.load(Ordering::Acquire) <= page && !toucher.is_finished() {
                thread::yield_now();
            }
            // The other thread goes on to its end in any case.
            result = result.and_then(|()| file.convert(page..page + 1, true));
        }
        toucher
            .join()
            .unwrap_or_else(|_| anyhow::bail!("panicked"))?;
        result
    });
    sched_setaffinity(None, &all)?;
    result
}

/// There is none for the tree of attributes.
fn no_memory() -> Result<()> {
    let (_vm, file) = new_file()?;
    file.convert(40..41, true)?;
    let failures = Failures::on(100)?;
    let answers = [file.set(3..5, true), file.set(40..41, false)];
    drop(failures);
    let none = |page| {
        let errno = Errno::NOMEM;
        Err(Refused { errno, page })
    };
    ensure!(answers == [none(3), none(40)], "{answers:?}");
    for page in [3, 4] {
        file.expect(page, false)?;
    }
    file.expect(40, true)?;
    file.convert(3..5, true)?;
    file.expect(4, true)
}
