// SPDX-License-Identifier: GPL-2.0-or-later
//! Instructions that do nothing, by which the guest, or who starts it, tells whoever watches the emulated CPU where
//! something that it measures begins and ends. Each is `nopl N(%rax)`; the number says which mark.

/// The bytes before the number.
pub const PREFIX: [u8; 3] = [0x0f, 0x1f, 0x40];

/// How many kinds of samples there are: in each direction `request`, `touch`, `repeat` and `later`.
pub const KINDS: u8 = 8;

const BEGIN: u8 = 0x40;
const FORGET: u8 = 0x41;
const END: u8 = 0x48;
const TAKE: u8 = 0x50;

/// What a mark says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// A sample begins.
    Begin,
    /// It ends, and is of this kind.
    End(u8),
    /// All samples so far do not count.
    Forget,
    /// All samples of this kind are summed up and printed.
    Take(u8),
}

impl Mark {
    /// The instruction's number.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Begin => BEGIN,
            Self::Forget => FORGET,
            Self::End(kind) => END + kind % KINDS,
            Self::Take(kind) => TAKE + kind % KINDS,
        }
    }

    /// Reads an instruction; nothing if it is another one.
    #[must_use]
    pub fn decode(instruction: &[u8]) -> Option<Self> {
        let [number] = *instruction.strip_prefix(&PREFIX)? else {
            return None;
        };
        match number {
            BEGIN => Some(Self::Begin),
            FORGET => Some(Self::Forget),
            END.. if number < END + KINDS => Some(Self::End(number - END)),
            TAKE.. if number < TAKE + KINDS => Some(Self::Take(number - TAKE)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_read_as_it_was_written() {
        for mark in [Mark::Begin, Mark::Forget, Mark::End(7), Mark::Take(0)] {
            let [a, b, c] = PREFIX;
            assert_eq!(Mark::decode(&[a, b, c, mark.number()]), Some(mark));
        }
        assert_eq!(Mark::decode(&[0x0f, 0x1f, 0x40, 0]), None);
        assert_eq!(Mark::decode(&[0x90]), None);
    }
}
