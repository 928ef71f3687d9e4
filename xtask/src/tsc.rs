// SPDX-License-Identifier: GPL-2.0-or-later
//! The frequency of this machine's time-stamp counter, which is also that of a guest under TCG.

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

/// Long beside the time that reading both clocks takes.
const INTERVAL: Duration = Duration::from_millis(50);

/// As often as that is measured; the middle value counts, as others may be disturbed.
const ROUNDS: usize = 3;

/// In kHz, right to some thousandths.
pub(crate) fn khz() -> u64 {
    let mut measured: [u64; ROUNDS] = std::array::from_fn(|_| measure());
    measured.sort_unstable();
    measured[ROUNDS / 2]
}

fn measure() -> u64 {
    let (ticks, start) = (ticks(), Instant::now());
    thread::sleep(INTERVAL);
    let (ticks, nanoseconds) = (
        self::ticks().wrapping_sub(ticks),
        start.elapsed().as_nanos(),
    );
    u64::try_from(u128::from(ticks) * 1_000_000 / nanoseconds.max(1)).unwrap_or(u64::MAX)
}

fn ticks() -> u64 {
    // SAFETY: every x86-64 CPU has the instruction. (It is an unsafe function in older toolchains
    // only.)
    #[allow(unsafe_code, unused_unsafe)]
    unsafe {
        _rdtsc()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_measurements_agree() {
        let (a, b) = (khz(), khz());
        assert!(a > 100_000, "{a} kHz");
        assert!(a.abs_diff(b) * 50 < a, "{a} and {b} kHz");
    }
}
