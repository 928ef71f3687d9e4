// SPDX-License-Identifier: GPL-2.0-or-later
//! Page tables in private memory: the CPU finds them there, and the host does not.

use super::Run;
use crate::cpu;
use guestmemfd_guest::model::Intent::{Private, Shared};

/// Where the copy lies.
const PAGE: usize = 0;
const ENTRIES: usize = 512;
/// Another page, and what is written there by the copy.
const NEXT: usize = 1;
const VALUE: u64 = 0x7ab1e;

pub(super) fn run(run: &mut Run<'_>) {
    run.test("the CPU uses page tables in private memory", |tester| {
        tester.request(PAGE..PAGE + 1, Private)?;
        let copy = tester.memory.gpa(PAGE);
        let (from, to) = (cpu::page_tables() as *const u64, copy as *mut u64);
        for entry in 0..ENTRIES {
            // SAFETY: all memory is mapped where it is. One page holds the highest level of the CPU's tables, the
            // other is test memory.
            unsafe {
                to.add(entry)
                    .write_volatile(from.add(entry).read_volatile())
            };
        }
        // SAFETY: the copy maps what the tables did, and this is the last test that could change it.
        unsafe { cpu::set_page_tables(copy) };
        tester.fill(NEXT..NEXT + 1, Shared, VALUE);
        tester.holds(NEXT..NEXT + 1, Shared, VALUE)
    });
}
