// SPDX-License-Identifier: GPL-2.0-or-later
//! The way in, and the order of events.

use crate::plan::{self, Plan};
use crate::{apic, cpu, fwcfg, interrupts, memmap, paging, scenarios, serial, smp, tap};
use guestmemfd_guest::cmdline::{Bench, Options};

/// Bytes of stack of a CPU.
pub(crate) const STACK_SIZE: usize = 32 << 10;

/// The stacks of all CPUs.
#[repr(C, align(4096))]
pub(crate) struct Stacks(core::cell::UnsafeCell<[[u8; STACK_SIZE]; cpu::MAX_CPUS]>);

// SAFETY: every CPU uses its own stack only, and Rust code never names the contents.
unsafe impl Sync for Stacks {}

pub(crate) static STACKS: Stacks = Stacks(core::cell::UnsafeCell::new(
    [[0; STACK_SIZE]; cpu::MAX_CPUS],
));

#[cfg(panic = "abort")]
core::arch::global_asm!(
    include_str!("boot.s"),
    max_cpus = const cpu::MAX_CPUS,
    stack_size = const STACK_SIZE,
    stacks = sym STACKS,
    boot_cpu = sym boot_cpu,
    other_cpu = sym smp::other_cpu,
    options(att_syntax)
);

#[cfg(panic = "abort")]
core::arch::global_asm!(include_str!("mem.s"), options(att_syntax));

/// Where the boot CPU arrives from `boot.s`.
pub(crate) extern "C" fn boot_cpu(_cpu: u32, start_info: u32) -> ! {
    serial::init();
    tap::start();
    interrupts::init(0);
    // SAFETY: the loader put this address into %ebx.
    let map = unsafe { memmap::Map::from_start_info(start_info) };
    let options = match Options::parse(map.command_line()) {
        Ok(options) => options,
        Err(error) => tap::bail_out(format_args!("{error}")),
    };
    paging::init();
    if let Some(bench) = options.bench {
        // Measured without interrupts and without a device but the serial port, so that the same
        // program runs on a hypervisor that has little else; several CPUs need an APIC.
        if bench == Bench::Scale {
            apic::init();
            apic::start_watchdog(options.timeout);
            smp::start_others(options.smp.unwrap_or(1));
        }
        let success = scenarios::bench::run(bench, &options, &map);
        tap::end();
        cpu::finish(success);
    }
    apic::init();
    apic::start_watchdog(options.timeout);

    if let Err(error) = fwcfg::probe() {
        tap::bail_out(format_args!("{error}"));
    }
    match fwcfg::cpus() {
        Ok(cpus @ 1..=cpu::MAX_CPUS) => smp::start_others(cpus),
        Ok(cpus) => tap::bail_out(format_args!(
            "{cpus} CPUs: use -smp with 1 to {}",
            cpu::MAX_CPUS
        )),
        Err(error) => tap::bail_out(format_args!("{error}")),
    }
    let plan = match Plan::new(options, &map) {
        Ok(plan) => plan,
        Err(error) => tap::bail_out(format_args!("{error}")),
    };
    plan.announce();
    let success = scenarios::run_all(plan::publish(plan));
    tap::end();
    cpu::finish(success)
}
