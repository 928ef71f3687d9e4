// SPDX-License-Identifier: GPL-2.0-or-later
//! Access to memory under test, through either view.

use crate::fwcfg;
use guestmemfd_guest::PAGE_SIZE;
use guestmemfd_guest::model::Intent;
use guestmemfd_guest::pattern::WORDS;

/// Pages that nothing but the tests uses.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TestMemory {
    start: u64,
    pages: usize,
    /// Set in an address, it selects the shared view. Without it a page is seen through the view
    /// that it is in.
    shared_mask: u64,
}

impl TestMemory {
    /// # Safety
    ///
    /// The range must be RAM in which nothing lives, and mapped, with the shared bit too.
    pub(crate) unsafe fn new(start: u64, pages: usize, shared_bit: Option<u32>) -> Self {
        Self {
            start,
            pages,
            shared_mask: shared_bit.map_or(0, |bit| 1 << bit),
        }
    }

    /// How many pages it has.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// Does an address lie in it?
    pub(crate) fn contains(&self, gpa: u64) -> bool {
        gpa.checked_sub(self.start)
            .is_some_and(|offset| offset / PAGE_SIZE < self.pages as u64)
    }

    /// The guest physical address of a page, without the shared bit.
    pub(crate) fn gpa(&self, page: usize) -> u64 {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.start + page as u64 * PAGE_SIZE
    }

    /// Do accesses say which view they mean?
    pub(crate) fn has_shared_bit(&self) -> bool {
        self.shared_mask != 0
    }

    /// Writes to the first page through the shared view: where nothing is, nothing stays.
    pub(crate) fn shared_view_keeps_data(&self) -> bool {
        [0x5555_5555_5555_5555, !0x5555_5555_5555_5555]
            .into_iter()
            .all(|value| {
                self.write(0, Intent::Shared, 0, value);
                self.read(0, Intent::Shared, 0) == value
            })
    }

    /// Reads a word of a page.
    pub(crate) fn read(&self, page: usize, intent: Intent, index: usize) -> u64 {
        // SAFETY: see `word`.
        unsafe { self.word(page, intent, index).read_volatile() }
    }

    /// Writes a word of a page.
    pub(crate) fn write(&self, page: usize, intent: Intent, index: usize, value: u64) {
        // SAFETY: see `word`.
        unsafe { self.word(page, intent, index).write_volatile(value) }
    }

    /// Writes a word that begins in the last four bytes of a page and ends in the next one.
    pub(crate) fn write_across(&self, page: usize, intent: Intent, value: u64) {
        self.gpa(page + 1);
        // SAFETY: see `word`; the word ends in the next page, which is part of this memory too.
        unsafe {
            let at = self.word(page, intent, WORDS - 1).byte_add(4);
            // One instruction, which a volatile access to an unaligned address would not have to
            // be.
            core::arch::asm!("mov [{}], {}", in(reg) at, in(reg) value, options(nostack, preserves_flags));
        }
    }

    /// Has QEMU write the first `length` bytes of a fw_cfg item to a page, which must be shared.
    pub(crate) fn host_writes(
        &self,
        page: usize,
        item: u16,
        length: usize,
    ) -> Result<(), fwcfg::Error> {
        assert!(length as u64 <= PAGE_SIZE);
        // SAFETY: the page is test memory, and the bytes end in it.
        unsafe { fwcfg::read_to(item, self.gpa(page), length as u32) }
    }

    /// Where a word lies. It may be read and written, by the promise given to `new`.
    fn word(&self, page: usize, intent: Intent, index: usize) -> *mut u64 {
        assert!(index < WORDS);
        let mask = match intent {
            Intent::Private => 0,
            Intent::Shared => self.shared_mask,
        };
        ((self.gpa(page) | mask) + 8 * index as u64) as *mut u64
    }
}
