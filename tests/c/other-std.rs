// SPDX-License-Identifier: MIT OR Apache-2.0
//! A library that brings Rust's standard library along, as guestmemfd does.

use std::panic::catch_unwind;

/// Does a panic end where it is caught?
#[no_mangle]
pub extern "C" fn other_std_catches() -> bool {
    catch_unwind(|| Vec::<u32>::new()[std::env::args().count()]).is_err()
}
