// SPDX-License-Identifier: GPL-2.0-or-later
//! What was counted, and what was touched.

use std::collections::HashSet;
use std::fmt;

use guestmemfd_guest::marks::{self, Mark};

/// Instructions, by who carries them out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) guest: u64,
    pub(crate) user: u64,
    pub(crate) kernel: u64,
}

impl Counts {
    fn since(self, before: Self) -> Self {
        Self {
            guest: self.guest.saturating_sub(before.guest),
            user: self.user.saturating_sub(before.user),
            kernel: self.kernel.saturating_sub(before.kernel),
        }
    }

    fn add(&mut self, other: Self) {
        self.guest += other.guest;
        self.user += other.user;
        self.kernel += other.kernel;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            guest,
            user,
            kernel,
        } = self;
        write!(f, "guest={guest} user={user} kernel={kernel}")
    }
}

/// All samples of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sum {
    samples: u64,
    counts: Counts,
}

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "samples={} {}", self.samples, self.counts)
    }
}

/// Follows the marks of the guest.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    begun: Counts,
    sums: [Sum; marks::KINDS as usize],
}

impl Meter {
    /// The guest came to a mark when so much had been counted. Returns what it has asked for.
    pub(crate) fn mark(&mut self, mark: Mark, now: Counts) -> Option<Sum> {
        match mark {
            Mark::Begin => self.begun = now,
            Mark::Forget => self.sums = Default::default(),
            Mark::End(kind) => {
                let sum = self.sums.get_mut(usize::from(kind))?;
                sum.samples += 1;
                sum.counts.add(now.since(self.begun));
            }
            Mark::Take(kind) => return self.sums.get_mut(usize::from(kind)).map(std::mem::take),
        }
        None
    }
}

/// A page's first touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Touch {
    page: u64,
    write: bool,
}

impl fmt::Display for Touch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = if self.write { "write" } else { "read" };
        write!(f, "touch={:#x} access={access}", self.page << 12)
    }
}

/// Pages in the order of their first touch.
#[derive(Debug, Default)]
pub(crate) struct Touches {
    known: HashSet<u64>,
    order: Vec<Touch>,
}

impl Touches {
    pub(crate) fn add(&mut self, address: u64, write: bool) {
        let page = address >> 12;
        if self.known.insert(page) {
            self.order.push(Touch { page, write });
        }
    }

    pub(crate) fn order(&self) -> &[Touch] {
        &self.order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(guest: u64, user: u64, kernel: u64) -> Counts {
        Counts {
            guest,
            user,
            kernel,
        }
    }

    #[test]
    fn samples_add_up_until_they_are_taken() {
        let mut meter = Meter::default();
        for (before, after) in [(0, 10), (100, 120)] {
            meter.mark(Mark::Begin, counts(before, 1, 2));
            meter.mark(Mark::End(3), counts(after, 6, 4));
        }
        let sum = meter.mark(Mark::Take(3), Counts::default()).expect("a sum");
        assert_eq!(sum.to_string(), "samples=2 guest=30 user=10 kernel=4");
        let again = meter.mark(Mark::Take(3), Counts::default());
        assert_eq!(again, Some(Sum::default()));
    }

    #[test]
    fn what_is_forgotten_does_not_count() {
        let mut meter = Meter::default();
        meter.mark(Mark::Begin, Counts::default());
        meter.mark(Mark::End(0), counts(1, 1, 1));
        meter.mark(Mark::Forget, Counts::default());
        assert_eq!(
            meter.mark(Mark::Take(0), Counts::default()),
            Some(Sum::default())
        );
    }

    #[test]
    fn a_page_is_touched_first_once() {
        let mut touches = Touches::default();
        for (address, write) in [(0x5008, true), (0x1000, false), (0x5ff8, false)] {
            touches.add(address, write);
        }
        let lines: Vec<_> = touches.order().iter().map(Touch::to_string).collect();
        assert_eq!(
            lines,
            ["touch=0x5000 access=write", "touch=0x1000 access=read"]
        );
    }
}
