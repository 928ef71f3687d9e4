// SPDX-License-Identifier: GPL-2.0-or-later
//! KVM's hypercall for conversions.

use crate::cpu;
use core::arch::asm;
use guestmemfd_guest::model::Intent;
use spin::Once;

/// The attribute that asks for the private view.
pub(crate) const ENCRYPTED: u64 = 1 << 4;

use guestmemfd_guest::hostile::MAP_GPA_RANGE;
const ENOSYS: i64 = -1000;
const KVM_LEAF: u32 = 0x4000_0000;

/// The attributes of a request for 4 KiB pages.
pub(crate) fn attributes(intent: Intent) -> u64 {
    match intent {
        Intent::Private => ENCRYPTED,
        Intent::Shared => 0,
    }
}

/// Does KVM run this guest?
pub(crate) fn present() -> bool {
    let leaf = cpu::cpuid(KVM_LEAF);
    text([leaf.ebx, leaf.ecx, leaf.edx]) == *b"KVMKVMKVM\0\0\0"
}

/// Does a request reach user space? Asks with a range of no pages, which is refused in any case.
pub(crate) fn enabled() -> bool {
    map_gpa_range(0, 0, 0) != ENOSYS
}

/// `KVM_HC_MAP_GPA_RANGE`: 0, or an error number below 0.
pub(crate) fn map_gpa_range(gpa: u64, pages: u64, attributes: u64) -> i64 {
    call(MAP_GPA_RANGE, [gpa, pages, attributes, 0])
}

/// Any hypercall: its number and its arguments. Gives what KVM leaves in rax.
///
/// A hypercall may have KVM write to memory, or interrupt CPUs: the caller answers for the numbers.
pub(crate) fn call(number: u64, arguments: [u64; 4]) -> i64 {
    let [gpa, pages, attributes, fourth] = arguments;
    let intel = intel();
    let result: i64;
    // SAFETY: the hypercall changes what test memory holds, which is accessed with volatile
    // instructions only. rbx is the compiler's own, so it is put in place and given back by hand.
    unsafe {
        if intel {
            asm!("xchg rbx, {gpa}", "vmcall", "xchg rbx, {gpa}", gpa = inout(reg) gpa => _,
                inlateout("rax") number => result, in("rcx") pages, in("rdx") attributes,
                in("rsi") fourth, options(nostack));
        } else {
            asm!("xchg rbx, {gpa}", "vmmcall", "xchg rbx, {gpa}", gpa = inout(reg) gpa => _,
                inlateout("rax") number => result, in("rcx") pages, in("rdx") attributes,
                in("rsi") fourth, options(nostack));
        }
    }
    result
}

/// Whether the hypercall's instruction is Intel's. Asked once: asking is an exit of its own.
fn intel() -> bool {
    static INTEL: Once<bool> = Once::new();
    *INTEL.call_once(|| {
        let vendor = cpu::cpuid(0);
        text([vendor.ebx, vendor.edx, vendor.ecx]) == *b"GenuineIntel"
    })
}

/// Twelve characters in three registers.
fn text(registers: [u32; 3]) -> [u8; 12] {
    let mut text = [0; 12];
    for (place, register) in text.chunks_exact_mut(4).zip(registers) {
        place.copy_from_slice(&register.to_le_bytes());
    }
    text
}
