// SPDX-License-Identifier: GPL-2.0-or-later
//! Virtio devices on the first PCI bus: one queue of one device at a time, polled.

use crate::pci::{Device, Registers};
use core::cell::UnsafeCell;
use core::sync::atomic::{Ordering, fence};
use spin::{Mutex, MutexGuard};

const CAPABILITIES: u32 = 0x34;
const VENDOR_CAPABILITY: u32 = 9;

// `cfg_type` of struct virtio_pci_cap.
const COMMON: u32 = 1;
const NOTIFY: u32 = 2;

// struct virtio_pci_common_cfg.
const DEVICE_FEATURE_SELECT: u64 = 0;
const DEVICE_FEATURE: u64 = 4;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_NOTIFY_OFF: u64 = 30;
const QUEUE_DESCRIPTORS: u64 = 32;
const QUEUE_AVAILABLE: u64 = 40;
const QUEUE_USED: u64 = 48;

const DRIVER: u8 = 1 | 2;
const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;
const NEEDS_RESET: u8 = 0x40;
/// `VIRTIO_F_VERSION_1`, bit 32, in the second word of features.
const VERSION_1: u32 = 1;
/// `VIRTIO_F_ACCESS_PLATFORM`, bit 33: what QEMU sets for confidential guests.
const ACCESS_PLATFORM: u32 = 2;

const NEXT: u16 = 1;
const WRITABLE: u16 = 2;
const INDIRECT: u16 = 4;

const PAGE: usize = 4096;
/// Room for the rings of a queue of 256.
const RING_BYTES: usize = 3 * PAGE;

/// A device, by its virtio type.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    /// virtio-blk.
    Disk = 2,
    /// virtio-balloon.
    Balloon = 5,
    /// virtio-gpu.
    Gpu = 16,
    /// virtio-sound.
    Sound = 25,
}

impl Kind {
    /// Vendor and device number: of a transitional device, as ordinary guests have by default, or of
    /// one without a legacy interface, as confidential guests have.
    fn matches(self, id: u32) -> bool {
        let transitional = match self {
            Self::Disk => 0x1001,
            Self::Balloon => 0x1002,
            // These have no legacy interface.
            Self::Gpu => 0x1050,
            Self::Sound => 0x1059,
        };
        let modern = 0x1040 + self as u32;
        id & 0xffff == 0x1af4 && (id >> 16 == transitional || id >> 16 == modern)
    }
}

/// Memory that a device uses for a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Buffer {
    /// Where it begins.
    pub(crate) address: u64,
    /// Bytes.
    pub(crate) length: u32,
    /// May the device write to it?
    pub(crate) writable: bool,
}

#[repr(C, align(4096))]
struct Rings(UnsafeCell<[u8; RING_BYTES]>);

// SAFETY: the rings lie in a Mutex, whose holder hands them to one device.
unsafe impl Send for Rings {}

static RINGS: Mutex<Rings> = Mutex::new(Rings(UnsafeCell::new([0; RING_BYTES])));

/// A queue of a device that runs.
pub(crate) struct Queue {
    rings: MutexGuard<'static, Rings>,
    common: Registers,
    notify: Registers,
    number: u16,
    size: usize,
    done: u16,
}

impl Queue {
    /// Resets the device, takes `features`, all of which it must have, and starts this queue.
    pub(crate) fn open(kind: Kind, features: u32, number: u16) -> Result<Self, &'static str> {
        let rings = RINGS.lock();
        let device = find(kind)?;
        let common = negotiate(device, u64::from(features))?;
        let size = select(common, number)?;
        if used_at(size) + 6 + 8 * size > RING_BYTES {
            return Err("the virtio device has queues of more than 256 entries");
        }
        let at = rings.0.get();
        // SAFETY: no device has these rings: the one that had them last has been reset.
        unsafe { at.write_bytes(0, 1) };
        let at = at as u64;
        let parts = [at, at + 16 * size as u64, at + used_at(size) as u64];
        let notify = enable(device, common, parts)?;
        common.put(STATUS, DRIVER | FEATURES_OK | DRIVER_OK);
        Ok(Self {
            rings,
            common,
            notify,
            number,
            size,
            done: 0,
        })
    }

    /// Where the rings begin.
    pub(crate) fn rings(&self) -> u64 {
        self.rings.0.get() as u64
    }

    /// Hands one request to the device and waits until it is done with it, or gives up.
    ///
    /// # Safety
    ///
    /// The device reads the buffers, and writes to the writable ones.
    pub(crate) unsafe fn request(&mut self, buffers: &[Buffer]) -> Result<(), &'static str> {
        // SAFETY: the caller's promise.
        unsafe { self.give(buffers) };
        self.wait()
    }

    fn wait(&self) -> Result<(), &'static str> {
        while self.get16(used_at(self.size) + 2) != self.done {
            if self.common.get::<u8>(STATUS) & NEEDS_RESET != 0 {
                return Err("the virtio device has given up and wants to be reset");
            }
        }
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// The same with descriptors that lie in a page elsewhere.
    ///
    /// # Safety
    ///
    /// As for `request`; nothing lives in the page.
    pub(crate) unsafe fn indirect(
        &mut self,
        table: u64,
        buffers: &[Buffer],
    ) -> Result<(), &'static str> {
        for (index, buffer) in buffers.iter().enumerate() {
            let last = index + 1 == buffers.len();
            for (part, word) in descriptor(buffer, index, last).into_iter().enumerate() {
                // SAFETY: the caller's promise.
                unsafe {
                    (table as *mut u64)
                        .add(2 * index + part)
                        .write_volatile(word)
                };
            }
        }
        // SAFETY: as for `request`.
        unsafe { self.at_table(table, buffers.len()) }
    }

    /// The same with what a table holds already.
    ///
    /// # Safety
    ///
    /// The device uses what the table says.
    pub(crate) unsafe fn at_table(
        &mut self,
        table: u64,
        descriptors: usize,
    ) -> Result<(), &'static str> {
        self.put(0, table);
        self.put(8, (descriptors * 16) as u32);
        self.put(12, INDIRECT);
        self.offer();
        self.wait()
    }

    /// Hands one request to the device.
    ///
    /// # Safety
    ///
    /// The device reads the buffers, and writes to the writable ones, until it is reset.
    pub(crate) unsafe fn give(&mut self, buffers: &[Buffer]) {
        assert!(buffers.len() <= self.size);
        for (index, buffer) in buffers.iter().enumerate() {
            let last = index + 1 == buffers.len();
            let [address, rest] = descriptor(buffer, index, last);
            self.put(16 * index, address);
            self.put(16 * index + 8, rest);
        }
        self.offer();
    }

    /// The caller answers for what the first descriptor says.
    fn offer(&mut self) {
        // Every request begins at descriptor 0.
        let available = 16 * self.size;
        self.put(
            available + 4 + 2 * (usize::from(self.done) % self.size),
            0_u16,
        );
        self.done = self.done.wrapping_add(1);
        fence(Ordering::SeqCst);
        self.put(available + 2, self.done);
        fence(Ordering::SeqCst);
        // The caller answers for the buffers, and the rings are the device's.
        self.notify.put(0, self.number);
    }

    fn put<T>(&self, at: usize, value: T) {
        assert!(at + size_of::<T>() <= RING_BYTES);
        // SAFETY: inside the rings; what is put is aligned to its size by the layout.
        unsafe {
            self.rings
                .0
                .get()
                .byte_add(at)
                .cast::<T>()
                .write_volatile(value)
        }
    }

    fn get16(&self, at: usize) -> u16 {
        assert!(at + 2 <= RING_BYTES);
        // SAFETY: inside the rings, aligned.
        unsafe {
            self.rings
                .0
                .get()
                .byte_add(at)
                .cast::<u16>()
                .read_volatile()
        }
    }
}

/// A device whose queues lie where the caller wants them, and get no requests.
#[derive(Debug)]
pub(crate) struct Running {
    common: Registers,
    notify: [Registers; Running::MOST],
    queues: usize,
}

impl Running {
    /// As many queues as it may have.
    const MOST: usize = 4;

    /// Resets the device, takes `features`, and starts a queue in three pages at each address.
    ///
    /// # Safety
    ///
    /// The pages are the device's as long as this lives.
    pub(crate) unsafe fn start(
        kind: Kind,
        features: u64,
        queues: &[u64],
    ) -> Result<Self, &'static str> {
        assert!((1..=Self::MOST).contains(&queues.len()));
        let device = find(kind)?;
        let common = negotiate(device, features)?;
        let mut notify = [common; Self::MOST];
        for (number, (at, notify)) in queues.iter().zip(&mut notify).enumerate() {
            if 16 * select(common, number as u16)? > PAGE {
                return Err("the virtio device has queues of more than 256 entries");
            }
            let parts = [0, 1, 2].map(|part| at + part * PAGE as u64);
            *notify = enable(device, common, parts)?;
        }
        common.put(STATUS, DRIVER | FEATURES_OK | DRIVER_OK);
        Ok(Self {
            common,
            notify,
            queues: queues.len(),
        })
    }

    /// Has the device look at a queue.
    pub(crate) fn notify(&self, number: usize) {
        assert!(number < self.queues);
        fence(Ordering::SeqCst);
        self.notify[number].put(0, number as u16);
    }

    /// Does it want to be reset?
    pub(crate) fn has_given_up(&self) -> bool {
        self.common.get::<u8>(STATUS) & NEEDS_RESET != 0
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        reset(self.common);
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // A reset device leaves the rings alone.
        reset(self.common);
    }
}

/// Resets a device, and takes features, all of which it must have. Returns its registers.
fn negotiate(device: Device, features: u64) -> Result<Registers, &'static str> {
    let (common, _) = registers(device, COMMON)?;
    reset(common);
    common.put(STATUS, DRIVER);
    let high = VERSION_1 | (features >> 32) as u32;
    for (word, wanted, taken) in [(0_u32, features as u32, 0), (1, high, ACCESS_PLATFORM)] {
        common.put(DEVICE_FEATURE_SELECT, word);
        let offered = common.get::<u32>(DEVICE_FEATURE);
        if offered & wanted != wanted {
            return Err("the virtio device lacks a feature: see guest/README.md");
        }
        common.put(DRIVER_FEATURE_SELECT, word);
        common.put(DRIVER_FEATURE, wanted | offered & taken);
    }
    common.put(STATUS, DRIVER | FEATURES_OK);
    Ok(common)
}

/// Selects a queue. Returns how many entries it has.
fn select(common: Registers, number: u16) -> Result<usize, &'static str> {
    common.put(QUEUE_SELECT, number);
    match common.get::<u16>(QUEUE_SIZE) {
        0 => Err("the virtio device has no such queue"),
        size => Ok(usize::from(size)),
    }
}

/// Gives the queue that is selected its three parts. Returns where it is notified.
fn enable(device: Device, common: Registers, parts: [u64; 3]) -> Result<Registers, &'static str> {
    for (register, at) in [QUEUE_DESCRIPTORS, QUEUE_AVAILABLE, QUEUE_USED]
        .into_iter()
        .zip(parts)
    {
        put_address(common, register, at);
    }
    common.put(QUEUE_ENABLE, 1_u16);
    let (notify, multiplier) = registers(device, NOTIFY)?;
    let offset = u64::from(common.get::<u16>(QUEUE_NOTIFY_OFF)) * u64::from(multiplier);
    Ok(notify.at(offset))
}

fn reset(common: Registers) {
    common.put(STATUS, 0_u8);
    while common.get::<u8>(STATUS) != 0 {
        core::hint::spin_loop();
    }
}

/// `struct virtq_desc`, which goes on with the next one unless it is the last.
fn descriptor(buffer: &Buffer, index: usize, last: bool) -> [u64; 2] {
    let flags = if last { 0 } else { NEXT } | if buffer.writable { WRITABLE } else { 0 };
    let next = index as u64 + 1;
    [
        buffer.address,
        u64::from(buffer.length) | u64::from(flags) << 32 | next << 48,
    ]
}

/// Where the used ring begins: behind descriptors and available ring, in a page of its own.
fn used_at(size: usize) -> usize {
    (16 * size + 6 + 2 * size).next_multiple_of(PAGE)
}

/// The first device of a kind, by number, ready to be used.
fn find(kind: Kind) -> Result<Device, &'static str> {
    Device::find(|id| kind.matches(id))
        .ok_or("no such virtio device on the first PCI bus: add it with -device")
}

/// The registers of a type, and the word behind their capability.
fn registers(device: Device, kind: u32) -> Result<(Registers, u32), &'static str> {
    let mut at = device.config(CAPABILITIES) & 0xfc;
    while at != 0 {
        let head = device.config(at);
        if head & 0xff == VENDOR_CAPABILITY && head >> 24 == kind {
            let bar = device.config(at + 4) & 0xff;
            let registers = device.registers(bar, device.config(at + 8));
            return Ok((registers, device.config(at + 16)));
        }
        at = head >> 8 & 0xfc;
    }
    Err("the virtio device has no modern interface: disable-modern=off")
}

fn put_address(registers: Registers, at: u64, address: u64) {
    registers.put(at, address as u32);
    registers.put(at + 4, (address >> 32) as u32);
}
