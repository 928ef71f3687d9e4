// SPDX-License-Identifier: GPL-2.0-or-later
//! Tells whoever watches the emulated CPU where something begins and ends that no guest can mark. All of
//! it is of one kind. Elsewhere these instructions do nothing.

use guestmemfd_guest::marks::Mark;

macro_rules! mark {
    ($mark:expr) => {
        // SAFETY: the instruction does nothing.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            std::arch::asm!(
                "nop dword ptr [rax + {number}]",
                number = const $mark.number(),
                options(nostack, preserves_flags)
            );
        }
    };
}

/// It begins.
#[inline(never)]
pub(crate) fn begin() {
    mark!(Mark::Begin);
}

/// It ends.
#[inline(never)]
pub(crate) fn end() {
    mark!(Mark::End(0));
    mark!(Mark::Take(0));
}
