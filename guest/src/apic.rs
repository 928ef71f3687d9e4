// SPDX-License-Identifier: GPL-2.0-or-later
//! The local APIC: it starts the other CPUs, and its timer is clock and watchdog.

use crate::cpu::{self, MAX_CPUS};
use crate::interrupts::TIMER_VECTOR;
use crate::tap;
use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering};

/// Interrupts of the timer in a second.
pub(crate) const TICKS_PER_SECOND: u64 = 100;
/// Under QEMU and KVM the timer counts nanoseconds.
const TIMER_COUNT: u32 = 1_000_000_000 / TICKS_PER_SECOND as u32;

const BASE_REGISTER: u32 = 0x1b;
const X2APIC_ENABLED: u64 = 1 << 10;
const BASE: u64 = 0xfee0_0000;

const END_OF_INTERRUPT: u64 = 0xb0;
const SPURIOUS: u64 = 0xf0;
const COMMAND: u64 = 0x300;
const TIMER: u64 = 0x320;
const LINT0: u64 = 0x350;
const TIMER_INITIAL: u64 = 0x380;
const TIMER_DIVIDE: u64 = 0x3e0;

/// Whatever the legacy controller has.
const EXTERNAL: u32 = 7 << 8;
const MASKED: u32 = 1 << 16;
const PENDING: u32 = 1 << 12;
const TO_ALL_OTHERS: u32 = 3 << 18 | 1 << 14;
const INIT: u32 = 5 << 8;
const START_UP: u32 = 6 << 8;
const PERIODIC: u32 = 1 << 17;
const DIVIDE_BY_1: u32 = 0xb;
const ENABLED: u32 = 0x100;

static TICKS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
static TIMEOUT: AtomicU64 = AtomicU64::new(u64::MAX);
/// The time-stamp counter when the watchdog started: another clock, for its message.
static STARTED: AtomicU64 = AtomicU64::new(0);

fn read(register: u64) -> u32 {
    // SAFETY: the register page is mapped, and reading it changes no memory.
    unsafe { ((BASE + register) as *const u32).read_volatile() }
}

fn write(register: u64, value: u32) {
    // SAFETY: the register page is mapped; the registers written here make interrupts, for which
    // there are handlers, and start CPUs, for which there is a trampoline.
    unsafe { ((BASE + register) as *mut u32).write_volatile(value) }
}

/// Makes sure that the registers are where we look for them, and silences the legacy interrupt
/// controllers.
pub(crate) fn init() {
    let base = cpu::read_msr(BASE_REGISTER);
    if base & X2APIC_ENABLED != 0 || base & 0xf_ffff_f000 != BASE {
        tap::bail_out(format_args!(
            "the local APIC is not at {BASE:#x} in xAPIC mode (base register {base:#x})"
        ));
    }
    cpu::out8(0x21, 0xff);
    cpu::out8(0xa1, 0xff);
}

/// Starts the watchdog of all CPUs, and this CPU's clock.
pub(crate) fn start_watchdog(seconds: u64) {
    STARTED.store(cpu::timestamp(), Ordering::Relaxed);
    TIMEOUT.store(seconds * TICKS_PER_SECOND, Ordering::Relaxed);
    start_timer();
}

/// Starts this CPU's clock.
pub(crate) fn start_timer() {
    write(SPURIOUS, ENABLED | 0xff);
    write(TIMER_DIVIDE, DIVIDE_BY_1);
    write(TIMER, PERIODIC | u32::from(TIMER_VECTOR));
    write(TIMER_INITIAL, TIMER_COUNT);
    // SAFETY: handlers are in place, on stacks of their own.
    unsafe { asm!("sti", options(nomem, nostack)) }
}

/// Ticks since this CPU's clock was started.
pub(crate) fn ticks() -> u64 {
    TICKS[cpu::index()].load(Ordering::Relaxed)
}

/// The timer's interrupt, at `rip`.
pub(crate) extern "C" fn timer(rip: u64) {
    write(END_OF_INTERRUPT, 0);
    let cpu = cpu::index();
    let ticks = TICKS[cpu].fetch_add(1, Ordering::Relaxed) + 1;
    let timeout = TIMEOUT.load(Ordering::Relaxed);
    if ticks > timeout {
        tap::bail_out(format_args!(
            "not done after timeout={} seconds; cpu{cpu} was at {rip:#x}, {} million cycles since the start",
            timeout / TICKS_PER_SECOND,
            cpu::timestamp().wrapping_sub(STARTED.load(Ordering::Relaxed)) / 1_000_000
        ));
    }
}

/// Lets the legacy interrupt controller interrupt this CPU, or not.
pub(crate) fn accept_legacy(on: bool) {
    write(LINT0, if on { EXTERNAL } else { EXTERNAL | MASKED });
}

/// Resets all other CPUs.
pub(crate) fn send_init() {
    command(TO_ALL_OTHERS | INIT);
}

/// Starts all other CPUs at a page below 1 MiB.
pub(crate) fn send_start_up(address: u64) {
    command(TO_ALL_OTHERS | START_UP | (address >> 12) as u32);
}

fn command(value: u32) {
    write(COMMAND, value);
    while read(COMMAND) & PENDING != 0 {
        core::hint::spin_loop();
    }
}
