// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pages: ranges of them, sets of them, and the state of each. Pure: no lock, no system call but
//! the mapping that a bitmap lives in.

pub(crate) mod atomic;
pub(crate) mod bitmap;
pub(crate) mod closed;
pub mod ranges;
pub(crate) mod set;
pub mod states;
pub(crate) mod zeroed;
