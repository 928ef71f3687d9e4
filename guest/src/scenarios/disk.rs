// SPDX-License-Identifier: GPL-2.0-or-later
//! Reads a virtio-blk disk and writes to it: a device, perhaps in another process, that uses guest
//! memory in both directions.

use super::Run;
use crate::failure::Failure;
use crate::tester::{Check, Tester};
use crate::virtio::{Buffer, Kind, Queue};
use guestmemfd_guest::model::Intent::Shared;
use guestmemfd_guest::{DISK_PART, PAGE_SIZE, disk_word};

pub(super) const READ: u32 = 0;
pub(super) const WRITE: u32 = 1;
/// `VIRTIO_BLK_S_OK` and `VIRTIO_BLK_S_IOERR`.
pub(super) const GOOD: u8 = 0;
pub(super) const IO_ERROR: u8 = 1;
/// Where the second part of the disk begins, in sectors.
pub(super) const BEHIND: u64 = DISK_PART / 512;
/// Where the test memory that the disk uses begins, and how much it is.
pub(super) const FIRST_PAGE: usize = 32;
pub(super) const PAGES: usize = (DISK_PART / PAGE_SIZE) as usize;

/// `struct virtio_blk_outhdr`.
#[repr(C)]
pub(super) struct Header {
    kind: u32,
    priority: u32,
    sector: u64,
}

impl Header {
    /// Of a request that begins at a sector.
    pub(super) fn new(kind: u32, sector: u64) -> Self {
        Self {
            kind,
            priority: 0,
            sector,
        }
    }
}

pub(super) fn run(run: &mut Run<'_>) {
    run.test("what the disk holds arrives in memory", reads);
    run.test("what memory holds arrives on the disk", |tester| {
        each_word(|page, index, word| {
            tester.memory.write(page, Shared, index, !disk_word(word));
            Ok(())
        })?;
        transfer(tester, WRITE, BEHIND)?;
        tester.fill(FIRST_PAGE..FIRST_PAGE + PAGES, Shared, 1);
        transfer(tester, READ, BEHIND)?;
        compare(tester, |word| !disk_word(word))
    });
}

/// What the disk holds must arrive in memory.
pub(super) fn reads(tester: &mut Tester<'_>) -> Check {
    transfer(tester, READ, 0)?;
    compare(tester, disk_word)
}

/// Carries out one request of `DISK_PART` bytes.
pub(super) fn transfer(tester: &mut Tester<'_>, kind: u32, sector: u64) -> Check {
    answers(tester, kind, sector, GOOD)
}

/// The same with this answer of the disk.
pub(super) fn answers(tester: &mut Tester<'_>, kind: u32, sector: u64, expected: u8) -> Check {
    let mut queue = Queue::open(Kind::Disk, 0, 0).map_err(Failure::Missing)?;
    let address = tester.memory.gpa(FIRST_PAGE);
    // SAFETY: the pages are test memory.
    let status = unsafe { request(&mut queue, &Header::new(kind, sector), address, DISK_PART) };
    match status.map_err(Failure::Missing)? {
        status if status == expected => Ok(()),
        _ => Err(Failure::Missing("the disk gives another answer")),
    }
}

/// Reads the first bytes of the disk to an address.
///
/// # Safety
///
/// The device writes there.
pub(super) unsafe fn read(queue: &mut Queue, address: u64, bytes: u64) -> Result<(), &'static str> {
    // SAFETY: the caller's promise.
    unsafe { good_request(queue, &Header::new(READ, 0), address, bytes) }
}

/// # Safety
///
/// The device reads or writes the bytes, as the header says.
unsafe fn good_request(
    queue: &mut Queue,
    header: &Header,
    address: u64,
    bytes: u64,
) -> Result<(), &'static str> {
    // SAFETY: the caller's promise.
    match unsafe { request(queue, header, address, bytes) }? {
        GOOD => Ok(()),
        _ => Err("the disk answered with an error"),
    }
}

/// Carries out a request, and returns its status.
///
/// # Safety
///
/// The device reads or writes the bytes, as the header says.
pub(super) unsafe fn request(
    queue: &mut Queue,
    header: &Header,
    address: u64,
    bytes: u64,
) -> Result<u8, &'static str> {
    let mut status = 0xff_u8;
    let at = &raw mut status;
    // SAFETY: the caller answers for the bytes; header and status live until the device is done.
    unsafe {
        queue.request(&buffers(header, address, bytes, at as u64))?;
        Ok(at.read_volatile())
    }
}

/// What a request consists of.
pub(super) fn buffers(header: &Header, address: u64, bytes: u64, status: u64) -> [Buffer; 3] {
    let buffer = |address, length, writable| Buffer {
        address,
        length,
        writable,
    };
    [
        buffer(&raw const *header as u64, size_of::<Header>() as u32, false),
        buffer(address, bytes as u32, header.kind == READ),
        buffer(status, 1, true),
    ]
}

pub(super) fn compare(tester: &mut Tester<'_>, expected: impl Fn(u64) -> u64) -> Check {
    each_word(|page, index, word| {
        let got = tester.memory.read(page, Shared, index);
        tester.word_is(page, Shared, index, got, expected(word))
    })
}

/// Calls `action` with page, index in the page, and number of every word.
fn each_word(mut action: impl FnMut(usize, usize, u64) -> Check) -> Check {
    const WORDS: u64 = PAGE_SIZE / 8;
    (0..DISK_PART / 8).try_for_each(|word| {
        let page = FIRST_PAGE + (word / WORDS) as usize;
        action(page, (word % WORDS) as usize, word)
    })
}
