// SPDX-License-Identifier: GPL-2.0-or-later
//! QEMU's vAPIC: an option ROM, and a port by which it announces itself (hw/i386/vapic.c).

use crate::cpu;

/// Where firmware puts option ROMs, and how they are aligned.
const ROMS: core::ops::Range<u64> = 0xc_0000..0xf_0000;
const ALIGNMENT: usize = 512;
const SIGNATURE: [u8; 2] = [0x55, 0xaa];
/// What this one begins its state with, somewhere in its first bytes.
const STATE: &[u8] = b"kvm aPiC";
const SEARCHED: u64 = 64;

const PORT: u16 = 0x7e;

/// The address of the ROM, if the firmware has one.
pub(crate) fn rom() -> Option<u64> {
    let mut places = ROMS.step_by(ALIGNMENT);
    places.find(|rom| {
        has(*rom, &SIGNATURE) && (*rom..rom + SEARCHED).any(|address| has(address, STATE))
    })
}

fn has(address: u64, bytes: &[u8]) -> bool {
    (address..).zip(bytes).all(|(address, byte)| {
        // SAFETY: the first MiB is mapped, what is there can be read, and nothing of Rust's lives there.
        unsafe { (address as *const u8).read_volatile() == *byte }
    })
}

/// Has QEMU look for the ROM. Whatever it finds, it changes nothing that this guest uses.
pub(crate) fn announce() {
    cpu::out16(PORT, 0);
}
