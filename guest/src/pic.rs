// SPDX-License-Identifier: GPL-2.0-or-later
//! The legacy interrupt controller, and two devices that it has: interrupts of the first CPU.

use crate::cpu::out8;

const COMMAND: u16 = 0x20;
const DATA: u16 = 0x21;
/// Of the serial port.
const INTERRUPT_ENABLE: u16 = 0x3f9;
const TRANSMITTER_EMPTY: u8 = 2;
/// Of the interval timer.
const COUNTER_0: u16 = 0x40;
const MODE: u16 = 0x43;
/// Counter 0, both bytes, an interrupt when the count is over.
const ONCE: u8 = 0x30;

/// Where its vectors begin.
const BASE: u8 = 0x40;
const TIMER: u8 = 0;
const SERIAL: u8 = 4;

/// The vectors of both, the one with the lower priority first.
pub(crate) const VECTORS: [u8; 2] = [BASE + SERIAL, BASE + TIMER];

/// Lets the two through.
pub(crate) fn open() {
    out8(MODE, ONCE);
    // Edges, a second controller at input 2, ends of interrupts by command.
    for (port, value) in [(COMMAND, 0x11), (DATA, BASE), (DATA, 4), (DATA, 1)] {
        out8(port, value);
    }
    out8(DATA, !(1 << TIMER | 1 << SERIAL));
}

/// Lets nothing through.
pub(crate) fn close() {
    out8(DATA, 0xff);
}

/// The serial port, which nobody uses meanwhile, says that it has nothing to send.
pub(crate) fn interrupt_by_serial_port(on: bool) {
    out8(INTERRUPT_ENABLE, if on { TRANSMITTER_EMPTY } else { 0 });
}

/// The timer interrupts once.
pub(crate) fn interrupt_by_timer() {
    out8(MODE, ONCE);
    out8(COUNTER_0, 0);
    out8(COUNTER_0, 1);
}
