// SPDX-License-Identifier: MIT OR Apache-2.0

use std::fmt::Display;
use std::os::raw::c_char;

/// Size of guestmemfd_error.message in bytes, with the terminating NUL.
pub const GUESTMEMFD_ERROR_SIZE: usize = 512;

/// Why a function failed. The caller owns it; written only when a function returns a negative
/// number.
#[repr(C)]
#[derive(Debug)]
pub struct guestmemfd_error {
    /// The errno, positive.
    pub code: i32,
    /// One line in English, without a newline; cut if it is too long.
    pub message: [c_char; GUESTMEMFD_ERROR_SIZE],
}

/// The error as C gets it.
pub(super) fn filled(code: i32, why: &impl Display) -> guestmemfd_error {
    // One line: what a user may have put into a name does not end it, or move the cursor.
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    let message: String = why.to_string().chars().map(plain).collect();
    let mut end = message.len().min(GUESTMEMFD_ERROR_SIZE - 1);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    let mut text = [0; GUESTMEMFD_ERROR_SIZE];
    for (to, from) in text.iter_mut().zip(message[..end].bytes()) {
        *to = from as c_char;
    }
    guestmemfd_error {
        code,
        message: text,
    }
}
