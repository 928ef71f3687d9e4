// SPDX-License-Identifier: GPL-2.0-or-later
//! A bare-metal program for QEMU's `-kernel` that converts guest memory between its private and its
//! shared view and checks what it then finds there. `README.md` describes the command line and the
//! scenarios.
//!
//! Only the profile `guest` makes it: that one aborts on panic, which is what a program without a
//! runtime needs.

#![cfg_attr(panic = "abort", no_std, no_main)]
#![cfg_attr(not(panic = "abort"), allow(dead_code))]

mod ahci;
mod apic;
mod boot;
mod cpu;
mod edu;
mod failure;
mod fwcfg;
mod hypercall;
mod interrupts;
mod memmap;
mod memory;
mod paging;
mod pci;
mod pic;
mod plan;
mod scenarios;
mod serial;
mod smp;
mod tap;
mod tester;
mod vapic;
mod virtio;

/// Without panic=abort there is no bare-metal program; this one says how to get it.
#[cfg(not(panic = "abort"))]
fn main() -> std::process::ExitCode {
    eprintln!("not the guest: build that with 'cargo build -p guestmemfd-guest --profile guest'");
    std::process::ExitCode::FAILURE
}

#[cfg(panic = "abort")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    match info.location() {
        Some(place) => tap::bail_out(format_args!(
            "panic at {}:{}: {}",
            place.file(),
            place.line(),
            info.message()
        )),
        None => tap::bail_out(format_args!("panic: {}", info.message())),
    }
}
