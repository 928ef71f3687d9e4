// SPDX-License-Identifier: MIT OR Apache-2.0

//! What benchmarks print for `cargo xtask bench`.

/// One value, which is named like the rows of guests.
pub(crate) fn row(row: &str, direction: &str, part: &str, value: u64) {
    println!(
        "# measured row={row} direction={direction} part={part} units=1 samples=1 total={value} \
         least={value} median={value} p99={value} most={value}"
    );
}
