// SPDX-License-Identifier: GPL-2.0-or-later
//! Instructions that Rust has no name for.

use core::arch::asm;
use core::arch::x86_64::{__cpuid, CpuidResult};
use guestmemfd_guest::marks::Mark;

/// How many CPUs the guest has room for.
pub(crate) const MAX_CPUS: usize = 16;

/// The selector of the first CPU's task state segment; each takes 16 bytes of the descriptor table.
pub(crate) const FIRST_TSS: u16 = 0x20;

const EXIT_PORT: u16 = 0x501;
const EXIT_SUCCESS: u16 = 0x10;
const EXIT_FAILURE: u16 = 0x11;

/// Writes a byte to an I/O port.
pub(crate) fn out8(port: u16, value: u8) {
    // SAFETY: no device that the guest talks to by ports writes to memory on a byte.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    }
}

/// Writes 16 bits to an I/O port.
pub(crate) fn out16(port: u16, value: u16) {
    // SAFETY: as for out8.
    unsafe {
        asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags))
    }
}

/// Writes 32 bits to an I/O port.
///
/// # Safety
///
/// The device may be told to write to memory: that memory must be its to write.
pub(crate) unsafe fn out32(port: u16, value: u32) {
    // SAFETY: the caller answers for what the device does.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags))
    }
}

/// Reads a byte from an I/O port.
pub(crate) fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: reading a port changes no memory.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
    }
    value
}

/// Reads 32 bits from an I/O port.
pub(crate) fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: reading a port changes no memory.
    unsafe {
        asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags))
    }
    value
}

/// Where this CPU's page tables begin.
pub(crate) fn page_tables() -> u64 {
    let tables: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr3", out(reg) tables, options(nomem, nostack, preserves_flags)) }
    tables & !0xfff
}

/// Gives this CPU other page tables.
///
/// # Safety
///
/// They must map what is in use as it is mapped now, for as long as the CPU has them.
pub(crate) unsafe fn set_page_tables(tables: u64) {
    // SAFETY: the caller answers for what they map.
    unsafe { asm!("mov cr3, {}", in(reg) tables, options(nostack, preserves_flags)) }
}

/// Asks the CPU about itself.
pub(crate) fn cpuid(leaf: u32) -> CpuidResult {
    // SAFETY: every 64-bit CPU has the instruction. (It is an unsafe function in older toolchains
    // only.)
    #[allow(unused_unsafe)]
    unsafe {
        __cpuid(leaf)
    }
}

/// The time-stamp counter, once all instructions before have been carried out.
pub(crate) fn timestamp() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a register. What was written to memory before stays before, hence no `nomem`.
    unsafe {
        asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Goes round `rounds` times, two instructions each time.
pub(crate) fn go_round(rounds: u64) {
    // SAFETY: changes a register of its own.
    unsafe {
        asm!("2:", "dec {0}", "jnz 2b", inout(reg) rounds.max(1) => _, options(nomem, nostack));
    }
}

/// Comes to a mark, which does nothing.
#[inline(never)]
pub(crate) fn mark(mark: Mark) {
    macro_rules! one_of {
        ($number:expr, $($each:literal)*) => {
            match $number {
                // SAFETY: the instruction does nothing.
                $($each => unsafe {
                    asm!(concat!("nop dword ptr [rax + ", $each, "]"), options(nostack, preserves_flags));
                })*
                _ => {}
            }
        };
    }
    one_of!(mark.number(), 0x40 0x41 0x48 0x49 0x4a 0x4b 0x4c 0x4d 0x4e 0x4f
        0x50 0x51 0x52 0x53 0x54 0x55 0x56 0x57);
}

/// Reads a model-specific register.
pub(crate) fn read_msr(register: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading changes no memory; a register that does not exist ends in the handler of #GP.
    unsafe {
        asm!("rdmsr", in("ecx") register, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a model-specific register.
///
/// # Safety
/// The register must not take away or change memory that Rust code relies upon.
pub(crate) unsafe fn write_msr(register: u32, value: u64) {
    let (low, high) = (value as u32, (value >> 32) as u32);
    // SAFETY: the caller's promise; a register that does not exist ends in the handler of #GP.
    unsafe {
        asm!("wrmsr", in("ecx") register, in("eax") low, in("edx") high, options(nostack, preserves_flags));
    }
}

/// The number of the CPU that runs this, from its task register. Valid once `interrupts::init` has
/// run.
pub(crate) fn index() -> usize {
    let selector: u16;
    // SAFETY: reads a register.
    unsafe { asm!("str {0:x}", out(reg) selector, options(nomem, nostack, preserves_flags)) }
    usize::from(selector.saturating_sub(FIRST_TSS) / 16)
}

/// The address that the last page fault was about.
pub(crate) fn fault_address() -> u64 {
    let address;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack, preserves_flags)) }
    address
}

/// Sleeps until the next interrupt, which the watchdog's timer brings at the latest.
pub(crate) fn wait() {
    // SAFETY: the handlers keep all registers. Memory may have changed meanwhile, hence no `nomem`.
    unsafe { asm!("sti", "hlt", options(nostack)) }
}

/// Ends QEMU with an exit status that says how it went.
pub(crate) fn finish(success: bool) -> ! {
    out16(EXIT_PORT, if success { EXIT_SUCCESS } else { EXIT_FAILURE });
    halt()
}

/// Stops this CPU for good.
pub(crate) fn halt() -> ! {
    loop {
        // SAFETY: nothing happens from here on.
        unsafe { asm!("cli", "hlt", options(nostack)) }
    }
}
