// SPDX-License-Identifier: GPL-2.0-or-later
//! Interrupts that come while a request waits in QEMU: all of them arrive.
//!
//! The first CPU takes a buffer from a sound card, which keeps the request waiting; the second one has
//! the legacy interrupt controller interrupt it meanwhile, the second time with a higher priority.
//! QEMU has that controller with `kernel-irqchip=split`, and could inject both without an entry to the
//! guest in between, of which KVM takes one.

use super::kept::per_millisecond;
use super::sweep::rest;
use super::{Run, device};
use crate::failure::Failure;
use crate::interrupts::counted;
use crate::smp::Barrier;
use crate::tester::{Check, Tester};
use crate::{apic, cpu, pic, tap};

/// Between two interrupts, in ticks.
const PAUSE: u64 = apic::TICKS_PER_SECOND / 4;
/// How long the first CPU waits for what must have arrived already, in milliseconds.
const PATIENCE: u64 = 5000;
/// How far its clock has to come in that time.
const TICKS: u64 = 10;

static BARRIER: Barrier = Barrier::new();

pub(super) fn run(run: &mut Run<'_>, cpu: usize) {
    match cpu {
        0 => run.test("interrupts arrive that come while a request waits", waits),
        1 => run.test("interrupts can be sent meanwhile", |_| {
            BARRIER.wait(2);
            rest(PAUSE);
            pic::interrupt_by_serial_port(true);
            rest(PAUSE);
            pic::interrupt_by_timer();
            rest(PAUSE);
            pic::interrupt_by_serial_port(false);
            Ok(())
        }),
        _ => {}
    }
}

fn waits(tester: &mut Tester<'_>) -> Check {
    let millisecond = per_millisecond();
    apic::accept_legacy(true);
    pic::open();
    // What was pending comes now.
    rest(PAUSE);
    let before = counted();
    let queue = device::buffer_in_use(tester)?;
    tap::note(format_args!("waiting: begins"));
    BARRIER.wait(2);
    device::is_refused(tester)?;
    tap::note(format_args!("waiting: answered"));
    drop(queue);
    let arrived = arrives(before, millisecond);
    pic::close();
    apic::accept_legacy(false);
    arrived
}

/// Both interrupts have come, and the clock goes on.
fn arrives(before: [u64; 2], millisecond: u64) -> Check {
    // It is not the clock's ticks that say when to give up: the clock may stand still.
    let (start, ticks) = (cpu::timestamp(), apic::ticks());
    loop {
        let now = counted();
        let all = now.iter().zip(before).all(|(now, before)| *now > before);
        if all && apic::ticks() > ticks + TICKS {
            return Ok(());
        }
        if cpu::timestamp() - start > PATIENCE * millisecond {
            let [serial, timer] = [0, 1].map(|n| now[n] - before[n]);
            tap::note(format_args!("waiting: serial={serial} timer={timer}"));
            return Err(match all {
                true => Failure::Missing("the timer's interrupts are lost"),
                false => Failure::Missing("an interrupt is lost"),
            });
        }
        core::hint::spin_loop();
    }
}
