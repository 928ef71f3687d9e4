// SPDX-License-Identifier: GPL-2.0-or-later
//! Starting the conformance guest without firmware, for VMMs that have next to nothing.

#[cfg(target_arch = "x86_64")] // as the guest is
pub mod boot;
#[cfg(target_arch = "x86_64")]
pub mod machine;
