// SPDX-License-Identifier: MIT OR Apache-2.0

//! QEMU's firmware configuration device (docs/specs/fw_cfg.rst), read by DMA: items with what the
//! guest wants to know, copied to where it wants them.
//!
//! It knows guest memory as any device of rust-vmm does. What it uses is pinned meanwhile, and what is
//! the guest's alone is an error: both are the library's doing.

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryResult};

/// The address of a transfer's description: its high half, and its low half, which starts it.
pub(crate) const DMA_HIGH: u16 = 0x514;
pub(crate) const DMA_LOW: u16 = 0x518;
/// What the register reads as.
pub(crate) const DMA_SIGNATURE: [u8; 4] = *b"QEMU";

const SIGNATURE: u16 = 0x00;
const CPUS: u16 = 0x05;
const DIRECTORY: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;

const ERROR: u32 = 1;
const READ: u32 = 2;
const SKIP: u32 = 4;
const SELECT: u32 = 8;
const WRITE: u32 = 16;

/// The guest's number of bytes is not to be believed: this program allocates them.
const MOST: u32 = 1 << 20;

/// `struct e820_entry`, for a range of RAM.
const E820_RAM: u32 = 1;

/// The device.
#[derive(Debug)]
pub(crate) struct FwCfg {
    items: Vec<(u16, Vec<u8>)>,
    /// Index of the selected item, and how much of it has been read.
    selected: Option<usize>,
    offset: usize,
    high: u32,
}

impl FwCfg {
    /// With the memory map, and a pattern for shared pages.
    pub(crate) fn new(ram: &[(u64, u64)]) -> Self {
        let files = [
            ("etc/e820", e820(ram)),
            ("opt/guestmemfd/pattern", pattern()),
        ];
        let mut directory = (files.len() as u32).to_be_bytes().to_vec();
        let mut items = vec![
            (SIGNATURE, b"QEMU".to_vec()),
            (CPUS, 1_u16.to_le_bytes().to_vec()),
        ];
        for (selector, (name, content)) in (FIRST_FILE..).zip(files) {
            let mut text = [0; 56];
            text[..name.len()].copy_from_slice(name.as_bytes());
            directory.extend((content.len() as u32).to_be_bytes());
            directory.extend(selector.to_be_bytes());
            directory.extend([0; 2]);
            directory.extend(text);
            items.push((selector, content));
        }
        items.push((DIRECTORY, directory));
        Self {
            items,
            selected: None,
            offset: 0,
            high: 0,
        }
    }

    /// The guest has written to the device's registers.
    pub(crate) fn write(&mut self, memory: &impl GuestMemory, port: u16, value: [u8; 4]) {
        let value = u32::from_be_bytes(value);
        if port == DMA_HIGH {
            self.high = value;
            return;
        }
        let at = u64::from(std::mem::take(&mut self.high)) << 32 | u64::from(value);
        let at = GuestAddress(at);
        let result = self.transfer(memory, at);
        let control = match &result {
            Ok(true) => 0,
            Ok(false) | Err(_) => ERROR,
        };
        // Where the description cannot be written, the guest waits in vain, as under QEMU.
        let told = memory.write_slice(&control.to_be_bytes(), at);
        for error in [result.err(), told.err()].into_iter().flatten() {
            eprintln!("fw_cfg: {error}");
        }
    }

    /// Carries out what is described at an address; false if it is not understood.
    fn transfer(&mut self, memory: &impl GuestMemory, at: GuestAddress) -> GuestMemoryResult<bool> {
        let mut description = [0; 16];
        memory.read_slice(&mut description, at)?;
        let [control, length, high, low] = [0, 4, 8, 12].map(|at| {
            let word = &description[at..at + 4];
            u32::from_be_bytes([word[0], word[1], word[2], word[3]])
        });
        if control & SELECT != 0 {
            let selector = (control >> 16) as u16;
            self.selected = self.items.iter().position(|(item, _)| *item == selector);
            self.offset = 0;
        }
        if length > MOST || control & WRITE != 0 {
            return Ok(false);
        }
        let length = length as usize;
        if control & READ != 0 {
            let address = u64::from(high) << 32 | u64::from(low);
            memory.write_slice(&self.next(length), GuestAddress(address))?;
        }
        if control & (READ | SKIP) != 0 {
            self.offset += length;
        }
        Ok(true)
    }

    /// Bytes of the selected item; zeros behind its end.
    fn next(&self, length: usize) -> Vec<u8> {
        let item = self.selected.map_or(&[][..], |at| &self.items[at].1);
        let rest = item.get(self.offset..).unwrap_or_default();
        let mut bytes = rest[..length.min(rest.len())].to_vec();
        bytes.resize(length, 0);
        bytes
    }
}

fn e820(ram: &[(u64, u64)]) -> Vec<u8> {
    let entry = |(gpa, size): &(u64, u64)| {
        let numbers = [gpa.to_le_bytes(), size.to_le_bytes()];
        [numbers.as_flattened(), &E820_RAM.to_le_bytes()].concat()
    };
    ram.iter().flat_map(entry).collect()
}

/// No two neighbours are equal.
fn pattern() -> Vec<u8> {
    (0..=255).map(|n: u8| n.wrapping_mul(7)).collect()
}
