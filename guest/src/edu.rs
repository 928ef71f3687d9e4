// SPDX-License-Identifier: GPL-2.0-or-later
//! QEMU's edu device (its docs/specs/edu.rst): a buffer of one page, and DMA to it and from it. A
//! transfer takes place as a whole, 100 ms after it was asked for.

use crate::pci::{Device, Registers};
use core::sync::atomic::{Ordering, fence};
use guestmemfd_guest::PAGE_SIZE;

/// Device and vendor number.
const ID: u32 = 0x11e8_1234;

const IDENTIFICATION: u64 = 0x00;
const EDU: u32 = 0x0100_00ed;
const SOURCE: u64 = 0x80;
const DESTINATION: u64 = 0x88;
const LENGTH: u64 = 0x90;
const COMMAND: u64 = 0x98;
const RUN: u64 = 1;
const TO_MEMORY: u64 = 2;

/// Where the buffer lies, for the device.
const BUFFER: u64 = 0x40000;

/// The device.
#[derive(Debug)]
pub(crate) struct Edu(Registers);

impl Edu {
    /// Looks for it. What a guest before this one has begun is over then.
    pub(crate) fn open() -> Result<Self, &'static str> {
        let device = Device::find(|id| id == ID);
        let device = device.ok_or("no edu device on the first PCI bus: add it with -device")?;
        let edu = Self(device.registers(0, 0));
        if edu.0.get::<u32>(IDENTIFICATION) != EDU {
            return Err("the edu device does not answer at its BAR");
        }
        edu.wait();
        Ok(edu)
    }

    /// Begins to read a page into the buffer.
    ///
    /// # Safety
    ///
    /// Nothing may live in the page.
    pub(crate) unsafe fn read(&self, gpa: u64) {
        self.start(gpa, BUFFER, RUN);
    }

    /// Begins to write the buffer to a page.
    ///
    /// # Safety
    ///
    /// Nothing may live in the page.
    pub(crate) unsafe fn write(&self, gpa: u64) {
        self.start(BUFFER, gpa, RUN | TO_MEMORY);
    }

    /// Is a transfer under way?
    pub(crate) fn is_busy(&self) -> bool {
        self.0.get::<u64>(COMMAND) & RUN != 0
    }

    /// Waits until none is.
    pub(crate) fn wait(&self) {
        while self.is_busy() {
            core::hint::spin_loop();
        }
        fence(Ordering::SeqCst);
    }

    fn start(&self, source: u64, destination: u64, command: u64) {
        self.wait();
        self.0.put(SOURCE, source);
        self.0.put(DESTINATION, destination);
        self.0.put(LENGTH, PAGE_SIZE);
        self.0.put(COMMAND, command);
    }
}
