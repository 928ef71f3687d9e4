// SPDX-License-Identifier: GPL-2.0-or-later
//! Hypercalls that make no sense: which numbers to use, which of them would harm nobody but the guest
//! itself, and what they may be answered with.

use crate::PAGE_SIZE;
use crate::layout::Range;
use crate::pattern::Random;

/// `KVM_HC_MAP_GPA_RANGE`.
pub const MAP_GPA_RANGE: u64 = 12;

/// `KVM_HC_CLOCK_PAIRING` writes to memory, `KVM_HC_SEND_IPI` can reset CPUs.
const HARMFUL: [u64; 2] = [9, 10];

/// What requests that make no sense are answered with.
pub const EINVAL: i64 = -22;
/// What hypercalls that do not exist are answered with.
pub const ENOSYS: i64 = -1000;

const ENCRYPTED: u64 = 1 << 4;
/// The largest page size that the attributes can name.
const PAGE_SIZES: u64 = 2;

/// What a hypercall takes from registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// rax.
    pub number: u64,
    /// rbx, rcx, rdx, rsi: for a request the address, the pages, the attributes, and nothing.
    pub arguments: [u64; 4],
}

/// What there is in guest physical space.
#[derive(Debug, Clone, Copy)]
pub struct World {
    /// RAM; ends of memory below and above 4 GiB.
    pub ram: [Range; 2],
    /// Memory of which it does not matter in which view it is.
    pub tests: [Range; 2],
    /// The second of these is a DIMM, which may come and go.
    pub dimm: bool,
    /// Set in an address, it selects the shared view.
    pub shared_bit: Option<u32>,
}

/// What a hypercall may be answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// This number.
    Is(i64),
    /// 0 or this number.
    ZeroOr(i64),
}

impl Answer {
    /// Is it this one?
    #[must_use]
    pub fn allows(self, got: i64) -> bool {
        match self {
            Self::Is(number) => got == number,
            Self::ZeroOr(number) => got == 0 || got == number,
        }
    }
}

impl World {
    /// Numbers of which some make sense by themselves, none of which harms the guest.
    pub fn call(&self, random: &mut Random) -> Call {
        loop {
            let call = Call {
                number: match random.below(8) {
                    0 => random.below(32),
                    1 => self.word(random),
                    _ => MAP_GPA_RANGE,
                },
                arguments: [
                    self.word(random),
                    self.count(random),
                    self.attributes(random),
                    self.word(random),
                ],
            };
            if self.is_harmless(&call) {
                return call;
            }
        }
    }

    /// The answers that a call may get.
    #[must_use]
    pub fn answer(&self, call: &Call) -> Answer {
        let [gpa, pages, attributes, _] = call.arguments;
        if call.number != MAP_GPA_RANGE {
            return match call.number {
                // Those that KVM has and that do no harm: polling, and waking a CPU.
                1 | 5 | 11 => Answer::ZeroOr(ENOSYS),
                _ => Answer::Is(ENOSYS),
            };
        }
        let Some(range) = range(gpa, pages) else {
            return Answer::Is(EINVAL);
        };
        if attributes & !ENCRYPTED > PAGE_SIZES {
            return Answer::Is(EINVAL);
        }
        let [low, high] = self.tests.map(|tests| tests.contains(range));
        match attributes & ENCRYPTED != 0 {
            _ if high && self.dimm => Answer::ZeroOr(EINVAL),
            _ if low || high => Answer::Is(0),
            // There is no other memory that can be private, and none where RAM ends.
            true => Answer::Is(EINVAL),
            // What is shared may be over nothing, but not over ROM.
            false => Answer::ZeroOr(EINVAL),
        }
    }

    /// A private request that is granted must not take away what the guest lives in.
    fn is_harmless(&self, call: &Call) -> bool {
        let [gpa, pages, attributes, _] = call.arguments;
        if call.number != MAP_GPA_RANGE {
            return !HARMFUL.contains(&call.number);
        }
        let Some(range) = range(gpa, pages) else {
            return true;
        };
        let is_ram = self.ram.iter().any(|ram| ram.contains(range));
        let for_tests = self.tests.iter().any(|tests| tests.contains(range));
        attributes & ENCRYPTED == 0 || !is_ram || for_tests
    }

    /// Any 64 bits, with a preference for borders and for addresses of test memory.
    fn word(&self, random: &mut Random) -> u64 {
        let near = |base: u64, random: &mut Random| {
            let steps = random.below(5).wrapping_sub(2);
            base.wrapping_add(steps.wrapping_mul(PAGE_SIZE))
        };
        let side = random.below(2) as usize;
        match random.below(16) {
            0..8 => {
                let tests = self.tests[side];
                let pages = tests.size() / PAGE_SIZE;
                tests.start + random.below(pages) * PAGE_SIZE
            }
            8 => near(self.tests[side].end, random),
            9 => near(self.ram[side].end, random),
            10 => near(1 << random.below(64), random),
            11 => near(0, random),
            12 => (1 << random.below(64)) ^ random.below(2).wrapping_neg(),
            13 => {
                let bit = self.shared_bit.map_or(0, |bit| 1 << bit);
                near(self.tests[side].start | bit, random)
            }
            14 => random.any() & PAGE_SIZE.wrapping_neg(),
            _ => random.any(),
        }
    }

    fn count(&self, random: &mut Random) -> u64 {
        match random.below(8) {
            0..4 => 1 + random.below(8),
            // Now and then many; conversions of many pages take most of the time.
            4 if random.below(8) == 0 => random.below(2048),
            4 => random.below(32),
            5 => (1 << random.below(64)) - random.below(2),
            // As many as make the bytes wrap.
            6 => (1 << 52) - random.below(1 << 22),
            _ => self.word(random),
        }
    }

    fn attributes(&self, random: &mut Random) -> u64 {
        match random.below(8) {
            0..3 => ENCRYPTED,
            3..6 => 0,
            6 => random.below(64),
            _ => self.word(random),
        }
    }
}

/// The bytes of a request, if it has any and does not wrap.
fn range(gpa: u64, pages: u64) -> Option<Range> {
    let size = pages.checked_mul(PAGE_SIZE).filter(|&size| size > 0)?;
    let end = gpa.checked_add(size)?;
    gpa.is_multiple_of(PAGE_SIZE)
        .then_some(Range { start: gpa, end })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const FOUR_GIB: u64 = 4 << 30;

    fn world() -> World {
        let range = |start, end| Range { start, end };
        World {
            ram: [range(0, 128 * MIB), range(FOUR_GIB, FOUR_GIB + 128 * MIB)],
            tests: [
                range(32 * MIB, 56 * MIB),
                range(FOUR_GIB, FOUR_GIB + 24 * MIB),
            ],
            dimm: false,
            shared_bit: Some(38),
        }
    }

    fn request(gpa: u64, pages: u64, attributes: u64) -> Call {
        Call {
            number: MAP_GPA_RANGE,
            arguments: [gpa, pages, attributes, 0],
        }
    }

    #[test]
    fn the_guest_survives_every_call() {
        let world = world();
        let mut random = Random::new(7);
        for _ in 0..100_000 {
            let call = world.call(&mut random);
            let [gpa, pages, attributes, _] = call.arguments;
            let image = Range {
                start: 2 * MIB,
                end: 16 * MIB,
            };
            let granted = world.answer(&call).allows(0) && call.number == MAP_GPA_RANGE;
            if let (true, Some(range)) = (granted && attributes & ENCRYPTED != 0, range(gpa, pages))
            {
                assert_eq!(range.overlap(image), None, "{call:?}");
            }
            assert!(!HARMFUL.contains(&call.number));
        }
    }

    #[test]
    fn all_kinds_of_answers_come_up() {
        let world = world();
        let mut random = Random::new(1);
        let mut seen = [0; 4];
        for _ in 0..10_000 {
            seen[match world.answer(&world.call(&mut random)) {
                Answer::Is(0) => 0,
                Answer::Is(EINVAL) => 1,
                Answer::Is(_) => 2,
                Answer::ZeroOr(_) => 3,
            }] += 1;
        }
        assert!(seen.iter().all(|&count| count > 500), "{seen:?}");
    }

    #[test]
    fn answers() {
        let world = world();
        for (call, answer) in [
            (request(32 * MIB, 1, ENCRYPTED), Answer::Is(0)),
            (request(32 * MIB, 1, ENCRYPTED | 2), Answer::Is(0)),
            (request(32 * MIB, 1, 3), Answer::Is(EINVAL)),
            (request(32 * MIB, 0, 0), Answer::Is(EINVAL)),
            (request(32 * MIB + 1, 1, 0), Answer::Is(EINVAL)),
            (request(32 * MIB, 1 << 52, 0), Answer::Is(EINVAL)),
            (request(127 * MIB, 512, ENCRYPTED), Answer::Is(EINVAL)),
            (request(127 * MIB, 512, 0), Answer::ZeroOr(EINVAL)),
            (request(0, 1 << 40, ENCRYPTED), Answer::Is(EINVAL)),
        ] {
            assert_eq!(world.answer(&call), answer, "{call:?}");
        }
        let dimm = World {
            dimm: true,
            ..world
        };
        for (gpa, answer) in [
            (FOUR_GIB, Answer::ZeroOr(EINVAL)),
            (32 * MIB, Answer::Is(0)),
        ] {
            assert_eq!(dimm.answer(&request(gpa, 1, ENCRYPTED)), answer);
        }
        let none = Call {
            number: 77,
            arguments: [0; 4],
        };
        assert_eq!(world.answer(&none), Answer::Is(ENOSYS));
        assert!(Answer::ZeroOr(EINVAL).allows(0) && Answer::ZeroOr(EINVAL).allows(EINVAL));
        assert!(!Answer::Is(0).allows(EINVAL));
    }
}
