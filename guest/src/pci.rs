// SPDX-License-Identifier: GPL-2.0-or-later
//! PCI devices on the first bus, and their registers. One CPU at a time looks for devices.

use crate::cpu::{in32, out32};
use crate::paging;

const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
const ID: u32 = 0x00;
const COMMAND: u32 = 0x04;
/// Revision, interface, and the class in 16 bits.
const CLASS: u32 = 0x08;
const MEMORY_AND_BUS_MASTER: u32 = 2 | 4;
const BAR0: u32 = 0x10;
const BAR_64_BIT: u32 = 4;

/// A device's function, by its number on the bus: eight times that of the device, and which one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Device(u32);

impl Device {
    /// The first whose device and vendor number are accepted, ready to be used.
    pub(crate) fn find(accepted: impl Fn(u32) -> bool) -> Option<Self> {
        let device = (0..32)
            .map(|number| Self(8 * number))
            .find(|device| accepted(device.config(ID)))?;
        device.enable();
        Some(device)
    }

    /// The first function of a class, ready to be used.
    pub(crate) fn of_class(class: u32) -> Option<Self> {
        let function = (0..256)
            .map(Self)
            .find(|function| function.config(CLASS) >> 16 == class)?;
        function.enable();
        Some(function)
    }

    fn enable(self) {
        let command = self.config(COMMAND);
        // SAFETY: the device may use memory from here on; it does once it is told to.
        unsafe { out32(CONFIG_DATA, command | MEMORY_AND_BUS_MASTER) };
    }

    /// A word of its configuration space.
    pub(crate) fn config(self, register: u32) -> u32 {
        // SAFETY: this only selects what CONFIG_DATA is about.
        unsafe { out32(CONFIG_ADDRESS, 1 << 31 | self.0 << 8 | register) };
        in32(CONFIG_DATA)
    }

    /// The registers that begin at an offset of a memory BAR.
    pub(crate) fn registers(self, bar: u32, offset: u32) -> Registers {
        let at = BAR0 + 4 * bar;
        let low = self.config(at);
        let high = match low & BAR_64_BIT {
            0 => 0,
            _ => self.config(at + 4),
        };
        let base = u64::from(high) << 32 | u64::from(low & !0xf);
        let address = base + u64::from(offset);
        paging::map(address);
        Registers(address)
    }
}

/// Registers of a device, by the address of the first.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Registers(u64);

impl Registers {
    /// Those that begin further behind.
    pub(crate) fn at(self, offset: u64) -> Self {
        Self(self.0 + offset)
    }

    /// The address of the first.
    pub(crate) fn address(self) -> u64 {
        self.0
    }

    /// Reads one, which is aligned to its size.
    pub(crate) fn get<T: Copy>(self, at: u64) -> T {
        // SAFETY: `Device::registers` has found and mapped them.
        unsafe { ((self.0 + at) as *const T).read_volatile() }
    }

    /// Writes one. Who makes a device use memory that way answers for the memory.
    pub(crate) fn put<T>(self, at: u64, value: T) {
        // SAFETY: as for `get`.
        unsafe { ((self.0 + at) as *mut T).write_volatile(value) }
    }
}
