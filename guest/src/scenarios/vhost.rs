// SPDX-License-Identifier: GPL-2.0-or-later
//! A disk in another process, which has the shared view alone and asks nobody whether a page is in it.

use super::sweep::rest;
use super::{Run, disk};
use crate::apic;
use core::ops::Range;
use guestmemfd_guest::cmdline::Contents;
use guestmemfd_guest::model::Intent::{Private, Shared};

/// What private pages are filled with, and what shared ones are.
const SECRET: u64 = 0x5ec7e7;
const OTHER: u64 = 1;
/// How long the host may look for what the disk has left.
const PAUSE: u64 = 3 * apic::TICKS_PER_SECOND;

pub(super) fn run(run: &mut Run<'_>) {
    let pages = disk::FIRST_PAGE..disk::FIRST_PAGE + disk::PAGES;
    disk::run(run);
    if run.tester.plan.options.contents == Contents::Kept {
        in_place(run, pages);
        return;
    }
    run.test("of private pages it writes zeros to the disk", |tester| {
        tester.request(pages.clone(), Private)?;
        tester.fill(pages.clone(), Private, SECRET);
        disk::transfer(tester, disk::WRITE, disk::BEHIND)?;
        tester.holds(pages.clone(), Private, SECRET)?;
        tester.request(pages.clone(), Shared)?;
        tester.fill(pages.clone(), Shared, OTHER);
        disk::transfer(tester, disk::READ, disk::BEHIND)?;
        disk::compare(tester, |_| 0)
    });
    run.test("what it reads into private pages is lost", |tester| {
        tester.request(pages.clone(), Private)?;
        tester.fill(pages.clone(), Private, SECRET);
        disk::transfer(tester, disk::READ, 0)?;
        rest(PAUSE);
        tester.holds(pages.clone(), Private, SECRET)
    });
}

/// The kernel refuses the process what is private.
fn in_place(run: &mut Run<'_>, pages: Range<usize>) {
    run.test("requests with private pages fail", |tester| {
        tester.request(pages.clone(), Private)?;
        tester.fill(pages.clone(), Private, SECRET);
        for kind in [disk::WRITE, disk::READ] {
            disk::answers(tester, kind, 0, disk::IO_ERROR)?;
            tester.holds(pages.clone(), Private, SECRET)?;
        }
        Ok(())
    });
    run.test("shared again they are in its reach", |tester| {
        tester.request(pages.clone(), Shared)?;
        tester.holds(pages.clone(), Shared, SECRET)?;
        disk::reads(tester)
    });
}
