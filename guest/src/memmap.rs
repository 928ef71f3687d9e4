// SPDX-License-Identifier: GPL-2.0-or-later
//! What the loader says: the command line and the memory that the firmware leaves to us.

use crate::{fwcfg, tap};
use guestmemfd_guest::layout::Range;

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;
const MAX_RANGES: usize = 32;
const MAX_COMMAND_LINE: usize = 1024;

/// `struct hvm_start_info` of the PVH boot protocol, version 1.
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// `struct hvm_memmap_table_entry`.
#[repr(C)]
struct MemoryMapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// A list of ranges.
#[derive(Debug, Clone, Copy)]
struct Ranges {
    ranges: [Range; MAX_RANGES],
    count: usize,
}

impl Ranges {
    const EMPTY: Self = Self {
        ranges: [Range { start: 0, end: 0 }; MAX_RANGES],
        count: 0,
    };

    fn add(&mut self, start: u64, size: u64) {
        if let Some(slot) = self.ranges.get_mut(self.count) {
            *slot = Range {
                start,
                end: start.saturating_add(size),
            };
            self.count += 1;
        }
    }

    fn iter(&self) -> impl Iterator<Item = Range> + '_ {
        self.ranges[..self.count].iter().copied()
    }
}

/// What the loader says.
#[derive(Debug)]
pub(crate) struct Map {
    usable: Ranges,
    command_line: [u8; MAX_COMMAND_LINE],
    command_line_size: usize,
}

impl Map {
    /// Copies what the loader left.
    ///
    /// # Safety
    ///
    /// `address` is what the loader passed in %ebx.
    pub(crate) unsafe fn from_start_info(address: u32) -> Self {
        let mut map = Self {
            usable: Ranges::EMPTY,
            command_line: [0; MAX_COMMAND_LINE],
            command_line_size: 0,
        };
        // SAFETY: the structure and what it points to lie in the first GiB, which is mapped, and
        // nobody changes them.
        unsafe {
            let info = &*(address as *const StartInfo);
            if info.magic != MAGIC || info.version < 1 {
                tap::bail_out(format_args!(
                    "no PVH start info with a memory map: magic {:#x} version {}",
                    info.magic, info.version
                ));
            }
            let entries = info.memory_map as *const MemoryMapEntry;
            for index in 0..info.memory_map_entries as usize {
                let entry = &*entries.add(index);
                if entry.kind == RAM {
                    map.usable.add(entry.address, entry.size);
                }
            }
            map.copy_command_line(info.command_line as *const u8);
        }
        map
    }

    unsafe fn copy_command_line(&mut self, text: *const u8) {
        if text.is_null() {
            return;
        }
        for (index, slot) in self.command_line.iter_mut().enumerate() {
            // SAFETY: the text ends with a zero byte, at which this stops.
            let byte = unsafe { text.add(index).read() };
            if byte == 0 {
                return;
            }
            *slot = byte;
            self.command_line_size = index + 1;
        }
        tap::bail_out(format_args!(
            "the command line is longer than {} bytes",
            MAX_COMMAND_LINE - 1
        ));
    }

    /// The command line; empty if it is not text.
    pub(crate) fn command_line(&self) -> &str {
        core::str::from_utf8(&self.command_line[..self.command_line_size]).unwrap_or_default()
    }

    /// RAM that the firmware leaves to us.
    pub(crate) fn usable(&self) -> impl Iterator<Item = Range> + '_ {
        self.usable.iter()
    }
}

/// All RAM of the machine, the firmware's part included.
pub(crate) fn ram() -> Result<impl Iterator<Item = Range>, fwcfg::Error> {
    const ENTRY_SIZE: usize = 20;
    let mut table = [0; ENTRY_SIZE * MAX_RANGES];
    let mut ranges = Ranges::EMPTY;
    if let Some((selector, size)) = fwcfg::find("etc/e820")? {
        let size = table.len().min(size as usize);
        fwcfg::read(selector, &mut table[..size])?;
        for entry in table[..size].chunks_exact(ENTRY_SIZE) {
            // A 64-bit address, a 64-bit size, a 32-bit type; little endian.
            let half = |at: usize| {
                entry[at..at + 8]
                    .iter()
                    .rev()
                    .fold(0, |value, &byte| value << 8 | u64::from(byte))
            };
            if u32::from_le_bytes([entry[16], entry[17], entry[18], entry[19]]) == RAM {
                ranges.add(half(0), half(8));
            }
        }
    }
    Ok((0..ranges.count).map(move |index| ranges.ranges[index]))
}
