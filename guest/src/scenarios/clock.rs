// SPDX-License-Identifier: GPL-2.0-or-later
//! KVM writes a clock to a page that the guest names. It does so through the host's mapping and asks
//! nobody, so where the page is private the guest sees nothing of it.

use super::Run;
use super::sweep::rest;
use crate::cpu;
use guestmemfd_guest::model::Intent::Private;

/// `MSR_KVM_SYSTEM_TIME_NEW` of `arch/x86/include/uapi/asm/kvm_para.h`; bit 0 of its value switches the
/// clock on.
const SYSTEM_TIME: u32 = 0x4b56_4d01;
const ON: u64 = 1;

const PAGE: usize = 0;
/// What the page is filled with.
const SECRET: u64 = 0xc10c;
/// How long KVM has to write, in ticks.
const PAUSE: u64 = 10;

pub(super) fn run(run: &mut Run<'_>) {
    run.test("KVM's clock does not show in a private page", |tester| {
        tester.request(PAGE..PAGE + 1, Private)?;
        tester.fill(PAGE..PAGE + 1, Private, SECRET);
        // SAFETY: the page is test memory, and the clock is off again before it is anything else.
        unsafe { cpu::write_msr(SYSTEM_TIME, tester.memory.gpa(PAGE) | ON) };
        rest(PAUSE);
        let result = tester.holds(PAGE..PAGE + 1, Private, SECRET);
        // SAFETY: writes to no memory any more.
        unsafe { cpu::write_msr(SYSTEM_TIME, 0) };
        result
    });
}
