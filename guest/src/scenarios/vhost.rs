// SPDX-License-Identifier: GPL-2.0-or-later
//! A disk in another process, which has the shared view alone and asks nobody whether a page is in it.

use super::sweep::rest;
use super::{Run, disk};
use crate::apic;
use guestmemfd_guest::model::Intent::{Private, Shared};

/// What private pages are filled with, and what shared ones are.
const SECRET: u64 = 0x5ec7e7;
const OTHER: u64 = 1;
/// How long the host may look for what the disk has left.
const PAUSE: u64 = 3 * apic::TICKS_PER_SECOND;

pub(super) fn run(run: &mut Run<'_>) {
    let pages = disk::FIRST_PAGE..disk::FIRST_PAGE + disk::PAGES;
    disk::run(run);
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
