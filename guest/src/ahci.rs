// SPDX-License-Identifier: GPL-2.0-or-later
//! The first port of an AHCI controller, running, with lists where the caller wants them.

use crate::pci::{Device, Registers};

/// Mass storage, SATA.
const CLASS: u32 = 0x0106;
const ABAR: u32 = 5;

const CONTROL: u64 = 0x04;
const ENABLE: u32 = 1 << 31;

// Registers of port 0.
const LIST: u64 = 0x100;
const RECEIVED: u64 = 0x108;
const STATUS: u64 = 0x110;
const COMMAND: u64 = 0x118;
const ISSUE: u64 = 0x138;

const START: u32 = 1;
const RECEIVE: u32 = 1 << 4;
const RECEIVE_RUNS: u32 = 1 << 14;
const LIST_RUNS: u32 = 1 << 15;
/// The controller could not access memory.
const HOST_BUS_FATAL_ERROR: u32 = 1 << 29;

/// The port.
#[derive(Debug)]
pub(crate) struct Port(Registers);

impl Port {
    /// Stops what the firmware has left, and starts with a command list in one page and received
    /// answers in another.
    ///
    /// # Safety
    ///
    /// The pages are the controller's as long as this lives.
    pub(crate) unsafe fn start(list: u64, received: u64) -> Result<Self, &'static str> {
        let device = Device::of_class(CLASS).ok_or("no AHCI controller on the first PCI bus")?;
        let port = Self(device.registers(ABAR, 0));
        let control: u32 = port.0.get(CONTROL);
        port.0.put(CONTROL, control | ENABLE);
        port.stop();
        for (register, at) in [(LIST, list), (RECEIVED, received)] {
            port.0.put(register, at as u32);
            port.0.put(register + 4, (at >> 32) as u32);
        }
        let status: u32 = port.0.get(STATUS);
        port.0.put(STATUS, status);
        port.0.put(COMMAND, port.0.get::<u32>(COMMAND) | RECEIVE);
        port.0.put(COMMAND, port.0.get::<u32>(COMMAND) | START);
        let runs = LIST_RUNS | RECEIVE_RUNS;
        match port.0.get::<u32>(COMMAND) & runs == runs {
            true => Ok(port),
            false => Err("the AHCI port does not start"),
        }
    }

    /// Issues what the list has in its first place. Could the controller read it?
    pub(crate) fn issue(&self) -> bool {
        self.0.put(ISSUE, 1_u32);
        self.0.get::<u32>(STATUS) & HOST_BUS_FATAL_ERROR == 0
    }

    fn stop(&self) {
        let command = self.0.get::<u32>(COMMAND);
        self.0.put(COMMAND, command & !START);
        self.0.put(COMMAND, command & !(START | RECEIVE));
        while self.0.get::<u32>(COMMAND) & (LIST_RUNS | RECEIVE_RUNS) != 0 {
            core::hint::spin_loop();
        }
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.stop();
    }
}
