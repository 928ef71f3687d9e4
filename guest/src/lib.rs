// SPDX-License-Identifier: GPL-2.0-or-later
//! The part of the conformance guest that is pure logic, so that it can be tested on the host: what
//! the command line asks for, which memory to use, what to write into a page, and what state every
//! page must be in.

#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod cmdline;
pub mod hostile;
pub mod layout;
pub mod marks;
pub mod measure;
pub mod model;
pub mod pattern;
pub mod samples;
pub mod storm;

/// Bytes in a page.
pub const PAGE_SIZE: u64 = 4096;

/// Bytes that the scenario `disk` reads from the start of a disk, and that it writes behind them.
pub const DISK_PART: u64 = 64 << 10;

/// What the 64-bit word of this number, in little endian, must be on the disk; the guest writes its
/// complement behind.
#[must_use]
pub fn disk_word(word: u64) -> u64 {
    pattern::word(7, word, 0)
}
