// SPDX-License-Identifier: GPL-2.0-or-later
//! Who sees a page, and what is in it, across conversions.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use kvm_ioctls::VmFd;
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::{Advice, madvise, mlock, munlock};

use super::Test;
use super::memory::File;
use super::slots::{GPA, bind};
use super::touch::{Touched, Toucher};
use super::uapi::{self, PAGE, SW_PROTECTED};
use super::vcpu::{Seen, Vcpu};

const PAGES: u64 = 64;

pub(super) fn tests() -> Vec<Test> {
    vec![
        Test::new("kernel/contents-stay", contents),
        Test::new("kernel/host-sees-shared-pages-only", host),
        Test::new("kernel/system-calls-fail-on-private-pages", system_calls),
        Test::new("kernel/other-processes-lose-pages", other_process),
        Test::new("kernel/holes-keep-their-view", holes),
        Test::new("kernel/race", race),
    ]
}

/// A VM with a file in a slot, and a vCPU.
fn guest() -> Result<(VmFd, File, Vcpu)> {
    let vm = uapi::vm(SW_PROTECTED)?;
    let file = File::new(&vm, PAGES)?;
    let vcpu = Vcpu::new(&vm)?;
    bind(&vm, 1, GPA, &file)?;
    Ok((vm, file, vcpu))
}

/// Guest and host find what the other has written before.
fn contents() -> Result<()> {
    let (_vm, file, mut vcpu) = guest()?;
    let at = |page: u64| GPA + page * PAGE;
    file.map.write(7, 0x1111);
    file.map.write(8, 0x2222);
    file.convert(4..12, true)?;
    ensure!(vcpu.read(at(7))? == Seen::Value(0x1111), "page 7, private");
    vcpu.write(at(7), 0x3333)?;
    vcpu.write(at(3), 0x4444)?;
    file.convert(4..12, false)?;
    let host = [7, 8, 3, 9].map(|page| file.map.read(page));
    ensure!(host == [0x3333, 0x2222, 0x4444, 0], "the host: {host:x?}");
    file.map.write(7, 0x5555);
    file.convert(7..8, true)?;
    ensure!(vcpu.read(at(7))? == Seen::Value(0x5555), "page 7, again");
    Ok(())
}

/// Edges of what is private, pages that are there and pages that are not.
fn host() -> Result<()> {
    let (_vm, file, _vcpu) = guest()?;
    for page in 0..8 {
        file.map.write(page, 1);
    }
    file.convert(4..12, true)?;
    for page in [3, 4, 7, 8, 11, 12] {
        file.expect(page, (4..12).contains(&page))?;
    }
    // The middle comes back, and what is so already is no error.
    file.convert(6..10, false)?;
    file.convert(6..10, false)?;
    file.convert(4..6, true)?;
    for page in [5, 6, 9, 10] {
        file.expect(page, !(6..10).contains(&page))?;
    }
    file.convert(0..PAGES, true)?;
    file.expect(0, true)?;
    file.convert(0..PAGES, false)?;
    file.expect(PAGES - 1, false)
}

/// They return an error, or less than what was asked for.
fn system_calls() -> Result<()> {
    let (_vm, file, _vcpu) = guest()?;
    file.map.write(6, 6);
    file.convert(7..8, true)?;
    let other = rustix::fs::memfd_create("other", MemfdFlags::CLOEXEC)?;
    rustix::io::write(&other, &[1; 16])?;
    // The last 8 bytes of the page before.
    let edge = file.map.page(7).wrapping_byte_sub(8);
    let fd = other.as_raw_fd();
    let answer = |done| {
        let error = || io::Error::last_os_error().raw_os_error().unwrap_or(0);
        usize::try_from(done).map_err(|_| Errno::from_raw_os_error(error()))
    };
    // SAFETY: the kernel checks the memory, which is nobody else's.
    let read = |to| answer(unsafe { libc::pread(fd, to, 16, 0) });
    // SAFETY: as above.
    let write = |from| answer(unsafe { libc::pwrite(fd, from, 16, 4096) });
    let page = file.map.page(7);
    let refused = [read(page), write(page)];
    ensure!(
        refused == [Err(Errno::FAULT); 2],
        "reading into a private page, and writing from it: {refused:?}"
    );
    let short = read(edge);
    ensure!(short == Ok(8), "reading over the edge: {short:?}");
    let size = usize::try_from(PAGE)?;
    // SAFETY: it concerns our mapping alone.
    let populated = unsafe { madvise(file.map.page(7), size, Advice::LinuxPopulateWrite) };
    ensure!(populated == Err(Errno::FAULT), "populate: {populated:?}");
    // SAFETY: as above.
    let locked = unsafe { mlock(file.map.page(7), size) };
    ensure!(locked == Err(Errno::NOMEM), "mlock: {locked:?}");
    // SAFETY: as above.
    unsafe { munlock(file.map.page(7), size) }.context("munlock")?;
    Ok(())
}

/// A process that has the page in its page tables.
fn other_process() -> Result<()> {
    let (_vm, file, _vcpu) = guest()?;
    file.map.write(30, 1);
    for private in [true, false] {
        let other = Toucher::start(&file.map, 30, true, true)?;
        file.convert(30..31, private)?;
        let touched = other.touch()?;
        let wanted = if private { Touched::BUS } else { Touched::Done };
        ensure!(touched == wanted, "private: {private}: {touched:?}");
        file.convert(30..31, false)?;
    }
    Ok(())
}

/// Freeing a page leaves its view and takes its content.
fn holes() -> Result<()> {
    let (_vm, file, mut vcpu) = guest()?;
    file.map.write(0, 5);
    file.map.write(1, 5);
    file.convert(0..1, true)?;
    ensure!(vcpu.read(GPA)? == Seen::Value(5), "before");
    file.punch(0..2)?;
    file.expect(0, true)?;
    ensure!(vcpu.read(GPA)? == Seen::Value(0), "a private hole");
    file.expect(1, false)?;
    ensure!(file.map.read(1) == 0, "a shared hole");
    file.convert(0..1, false)?;
    ensure!(file.map.read(0) == 0, "a private hole that became shared");
    Ok(())
}

/// While a vCPU counts up in all pages and the host reads them, no count goes back.
fn race() -> Result<()> {
    const ROUNDS: u32 = 100;
    let (_vm, file, mut vcpu) = guest()?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let sweep = scope.spawn(|| -> Result<u32> {
            let mut rounds = 0;
            vcpu.prepare_sweep(GPA, u32::try_from(PAGES)?)?;
            while !stop.load(Ordering::Relaxed) {
                match vcpu.enter()? {
                    Seen::Value(_) => rounds += 1,
                    // The view has changed between the look at it and the fault.
                    Seen::Fault { .. } | Seen::Refused(Errno::INTR | Errno::AGAIN) => {}
                    Seen::Refused(errno) => anyhow::bail!("KVM_RUN: {errno}"),
                }
            }
            Ok(rounds)
        });
        let converted = convert_and_look(&file, ROUNDS);
        stop.store(true, Ordering::Relaxed);
        let swept = sweep.join().unwrap_or_else(|_| anyhow::bail!("panicked"))?;
        let again = converted?;
        println!("# {swept} sweeps, {again} of {ROUNDS} conversions asked for again");
        ensure!(swept > 0, "the vCPU has not run");
        Ok(())
    })
}

fn convert_and_look(file: &File, rounds: u32) -> Result<u32> {
    let mut counts = vec![0; usize::try_from(PAGES)?];
    let mut again = 0;
    for round in 0..rounds {
        let first = u64::from(round) % PAGES;
        let pages = first..(first + 1 + u64::from(round) % 16).min(PAGES);
        // The vCPU's own accesses are no reason for EAGAIN, but a fault of the host in another
        // thread would be; here is none.
        while let Err(refused) = file.set(pages.clone(), true) {
            ensure!(refused.errno == Errno::AGAIN, "{refused:?}");
            again += 1;
            ensure!(again < 100 * rounds, "never converted: {refused:?}");
        }
        thread::yield_now();
        file.convert(pages, false)?;
        for (page, count) in (0..).zip(&mut counts) {
            let now = file.map.read(page);
            ensure!(now >= *count, "page {page} went from {count} to {now}");
            *count = now;
        }
    }
    Ok(again)
}
