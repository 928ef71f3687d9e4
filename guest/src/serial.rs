// SPDX-License-Identifier: GPL-2.0-or-later
//! The first serial port.

use crate::cpu::{in8, out8};
use core::fmt::{self, Write};
use spin::Mutex;

const PORT: u16 = 0x3f8;
const LINE_STATUS: u16 = PORT + 5;
const TRANSMITTER_EMPTY: u8 = 0x20;
const FIFO: usize = 16;

static SERIAL: Mutex<Serial> = Mutex::new(Serial { room: 0 });

/// How long an urgent message waits for another CPU to finish its line.
const PATIENCE: u32 = 10_000_000;

/// The port, and how many bytes its FIFO is known to take. Asking it once per 16 bytes halves the
/// exits.
struct Serial {
    room: usize,
}

impl Serial {
    fn byte(&mut self, byte: u8) {
        while self.room == 0 {
            if in8(LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
                self.room = FIFO;
            }
        }
        out8(PORT, byte);
        self.room -= 1;
    }
}

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.byte(b'\r');
            }
            self.byte(byte);
        }
        Ok(())
    }
}

/// 115200 baud, 8 bits, no interrupts, FIFO on.
pub(crate) fn init() {
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 7), (4, 3)] {
        out8(PORT + register, value);
    }
}

/// Prints one line.
pub(crate) fn line(text: fmt::Arguments<'_>) {
    // Writing to the port cannot fail.
    let _ = writeln!(SERIAL.lock(), "{text}");
}

/// Prints one line even if the CPU that holds the port never lets go of it.
pub(crate) fn urgent_line(text: fmt::Arguments<'_>) {
    let serial = (0..PATIENCE).find_map(|_| SERIAL.try_lock());
    let _ = match serial {
        Some(mut serial) => writeln!(serial, "{text}"),
        None => writeln!(Serial { room: 0 }, "\n{text}"),
    };
}
