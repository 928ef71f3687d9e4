// SPDX-License-Identifier: GPL-2.0-or-later
//! The identity map. `boot.s` maps the first GiB; the rest comes in pages of 1 GiB where the CPU
//! has them, else of 2 MiB as it is needed.

use crate::{cpu, tap};
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};
use spin::Mutex;

const ENTRIES: usize = 512;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 0x80;
const TWO_MIB: u64 = 2 << 20;

/// Page directories for CPUs without 1 GiB pages.
const POOL: usize = 16;

unsafe extern "C" {
    static mut boot_pdpt: [u64; ENTRIES];
}

static GIB_PAGES: AtomicBool = AtomicBool::new(false);

#[repr(C, align(4096))]
struct Directories(UnsafeCell<[[u64; ENTRIES]; POOL]>);

// SAFETY: only `map` touches it, under the lock of USED.
unsafe impl Sync for Directories {}

static DIRECTORIES: Directories = Directories(UnsafeCell::new([[0; ENTRIES]; POOL]));
static USED: Mutex<usize> = Mutex::new(0);

/// Maps all there is room for, or the first 4 GiB.
pub(crate) fn init() {
    let gib_pages = cpu::cpuid(0x8000_0001).edx & 1 << 26 != 0;
    GIB_PAGES.store(gib_pages, Ordering::Relaxed);
    let gib = if gib_pages { ENTRIES } else { 4 };
    for index in 1..gib {
        map((index as u64) << 30);
    }
}

/// Makes the GiB around an address below 512 GiB accessible.
pub(crate) fn map(address: u64) {
    let mut used = USED.lock();
    let index = (address >> 30) as usize;
    assert!(index < ENTRIES, "{address:#x} is beyond the page tables");
    let start = (index as u64) << 30;
    // SAFETY: the lock is held, so nobody else changes the tables; an entry that was not present
    // needs no invalidation.
    unsafe {
        let entry = (&raw mut boot_pdpt).cast::<u64>().add(index);
        if entry.read_volatile() != 0 {
            return;
        }
        if GIB_PAGES.load(Ordering::Relaxed) {
            entry.write_volatile(start | LARGE | PRESENT_WRITABLE);
            return;
        }
        if *used == POOL {
            tap::bail_out(format_args!(
                "no page table left for {address:#x}: use a CPU with pdpe1gb"
            ));
        }
        let directory = (*DIRECTORIES.0.get()).as_mut_ptr().add(*used);
        *used += 1;
        for (page, slot) in (*directory).iter_mut().enumerate() {
            *slot = (start + page as u64 * TWO_MIB) | LARGE | PRESENT_WRITABLE;
        }
        entry.write_volatile(directory as u64 | PRESENT_WRITABLE);
    }
}
