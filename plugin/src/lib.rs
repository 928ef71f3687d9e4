// SPDX-License-Identifier: GPL-2.0-or-later
//! A plugin of QEMU's TCG for level 1 of the lab. It counts instructions by who carries them out – the
//! guest in level 2, level 1's programs, level 1's kernel – for each thing that the conformance
//! guest measures, and notes the first touch of each page by the guest.
//!
//!     qemu-system-x86_64 -plugin libguestmemfd_plugin.so,out=FILE ...
//!
//! The file gets a line `part=... samples=... guest=... user=... kernel=...` for each line that the
//! guest prints, in the same order, or the runner where it measures; at the end a line `all guest=...` with everything since level 1
//! was switched on, and a line `touch=ADDRESS access=read|write` for each page.
//!
//! Level 2 begins with the instruction VMRUN and ends where the kernel goes on behind it. This needs
//! AMD's nested virtualisation, which is what TCG has, and one virtual CPU.

#[cfg(not(test))]
mod api;
#[cfg(not(test))]
mod glue;
#[cfg_attr(test, allow(dead_code))]
mod meter;
