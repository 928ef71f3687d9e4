// SPDX-License-Identifier: GPL-2.0-or-later
//! QEMU's firmware configuration device, by DMA: it tells about the machine, and it makes QEMU
//! write to guest memory.

use crate::cpu::{in32, out32};
use core::cell::UnsafeCell;
use core::fmt;
use core::ptr::addr_of;
use core::sync::atomic::{Ordering, fence};
use spin::Mutex;

const DMA_HIGH: u16 = 0x514;
const DMA_LOW: u16 = 0x518;
/// What the DMA register reads as, `QEMU` in big endian.
const DMA_SIGNATURE: u32 = u32::from_le_bytes(*b"QEMU");

const ERROR: u32 = 1;
const READ: u32 = 2;
const SELECT: u32 = 8;
const WRITE: u32 = 16;

const CPUS: u16 = 0x05;
const DIRECTORY: u16 = 0x19;
/// The item that every machine has: the text `QEMU`.
pub(crate) const SIGNATURE: u16 = 0x00;

/// Why an item cannot be read.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Error {
    /// No device, or one without DMA.
    NoDma,
    /// QEMU could not carry out a transfer.
    Transfer,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoDma => write!(
                f,
                "there is no fw_cfg device with DMA: use a pc or q35 machine"
            ),
            Self::Transfer => write!(f, "QEMU answered a fw_cfg DMA transfer with an error"),
        }
    }
}

/// The transfer's description, in big endian. QEMU writes the result to `control`.
#[repr(C, align(16))]
struct Descriptor {
    control: u32,
    length: u32,
    address: u64,
}

struct Device(UnsafeCell<Descriptor>);

// SAFETY: the device lies in a Mutex, which hands it to one CPU at a time.
unsafe impl Send for Device {}

static DEVICE: Mutex<Device> = Mutex::new(Device(UnsafeCell::new(Descriptor {
    control: 0,
    length: 0,
    address: 0,
})));

impl Device {
    /// # Safety
    ///
    /// QEMU may write to the `length` bytes from `address`.
    unsafe fn transfer(&self, control: u32, address: u64, length: u32) -> Result<(), Error> {
        let descriptor = self.0.get();
        let at = descriptor as u64;
        // SAFETY: the descriptor is ours; QEMU reads it when the low half of its address arrives,
        // and carries out the transfer, for which the caller answers.
        unsafe {
            descriptor.write_volatile(Descriptor {
                control: control.to_be(),
                length: length.to_be(),
                address: address.to_be(),
            });
            fence(Ordering::SeqCst);
            out32(DMA_HIGH, ((at >> 32) as u32).to_be());
            out32(DMA_LOW, (at as u32).to_be());
            loop {
                let control = u32::from_be(addr_of!((*descriptor).control).read_volatile());
                if control & ERROR != 0 {
                    return Err(Error::Transfer);
                }
                if control == 0 {
                    fence(Ordering::SeqCst);
                    return Ok(());
                }
                core::hint::spin_loop();
            }
        }
    }

    fn read(&self, control: u32, buffer: &mut [u8]) -> Result<(), Error> {
        // SAFETY: the buffer is borrowed for writing, and identity-mapped as all of the image.
        unsafe {
            self.transfer(
                control | READ,
                buffer.as_mut_ptr() as u64,
                buffer.len() as u32,
            )
        }
    }
}

/// Is the device there?
pub(crate) fn probe() -> Result<(), Error> {
    if in32(DMA_HIGH) == DMA_SIGNATURE {
        Ok(())
    } else {
        Err(Error::NoDma)
    }
}

/// Reads the first bytes of an item.
pub(crate) fn read(selector: u16, buffer: &mut [u8]) -> Result<(), Error> {
    DEVICE.lock().read(select(selector), buffer)
}

/// Has QEMU write the first `length` bytes of an item to an address.
///
/// # Safety
///
/// Nothing may live there.
pub(crate) unsafe fn read_to(selector: u16, address: u64, length: u32) -> Result<(), Error> {
    // SAFETY: the caller answers for it.
    unsafe {
        DEVICE
            .lock()
            .transfer(select(selector) | READ, address, length)
    }
}

/// Writes an item. What a device does that is told something by it, the caller answers for.
pub(crate) fn write(selector: u16, item: &[u8]) -> Result<(), Error> {
    // SAFETY: QEMU only reads what is there.
    unsafe {
        DEVICE.lock().transfer(
            select(selector) | WRITE,
            item.as_ptr() as u64,
            item.len() as u32,
        )
    }
}

/// Tells QEMU that a transfer's description lies at an address, and does not wait for an answer.
///
/// # Safety
///
/// If a description lies there, its transfer is carried out.
pub(crate) unsafe fn order_at(address: u64) {
    let _device = DEVICE.lock();
    // SAFETY: the caller answers for it.
    unsafe {
        out32(DMA_HIGH, ((address >> 32) as u32).to_be());
        out32(DMA_LOW, (address as u32).to_be());
    }
}

/// Looks for a named item: its selector, and its size in bytes.
pub(crate) fn find(name: &str) -> Result<Option<(u16, u32)>, Error> {
    let device = DEVICE.lock();
    let mut count = [0; 4];
    device.read(select(DIRECTORY), &mut count)?;
    for _ in 0..u32::from_be_bytes(count) {
        // A 32-bit size, a 16-bit selector, 16 bits reserved, 56 bytes of name; big endian.
        let mut entry = [0; 64];
        device.read(0, &mut entry)?;
        let found = entry[8..].split(|&byte| byte == 0).next();
        if found == Some(name.as_bytes()) {
            let size = u32::from_be_bytes([entry[0], entry[1], entry[2], entry[3]]);
            return Ok(Some((u16::from_be_bytes([entry[4], entry[5]]), size)));
        }
    }
    Ok(None)
}

/// How many CPUs the machine has.
pub(crate) fn cpus() -> Result<usize, Error> {
    let mut count = [0; 2];
    read(CPUS, &mut count)?;
    Ok(usize::from(u16::from_le_bytes(count)))
}

fn select(selector: u16) -> u32 {
    u32::from(selector) << 16 | SELECT
}
