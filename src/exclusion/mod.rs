// SPDX-License-Identifier: MIT OR Apache-2.0

//! Who may touch a page: claims for those who convert it, pins for the host that uses it.

pub mod claims;
#[cfg(all(test, feature = "loom"))]
mod orders;
pub(crate) mod pins;
pub(crate) mod sync;
