// SPDX-License-Identifier: GPL-2.0-or-later
//! What can be wrong.

use core::fmt;
use guestmemfd_guest::hostile::{Answer, Call};
use guestmemfd_guest::model::Intent;

/// Why a test failed. Prints as TAP diagnostics.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Failure {
    /// A word of memory is not what it should be.
    Memory {
        /// The view through which it was read.
        intent: Intent,
        /// Its address, without the shared bit.
        gpa: u64,
        /// What is there.
        got: u64,
        /// What should be.
        expected: u64,
    },
    /// A request was answered with the wrong number.
    Request {
        /// The first argument.
        gpa: u64,
        /// The second.
        pages: u64,
        /// The third.
        attributes: u64,
        /// The answer.
        got: i64,
        /// What it should have been.
        expected: &'static str,
    },
    /// A hypercall with any numbers was answered with something else than those allow.
    Call {
        /// The numbers.
        call: Call,
        /// The answer.
        got: i64,
        /// What it should have been.
        expected: Answer,
    },
    /// QEMU could not write to shared memory.
    Host {
        /// The page.
        gpa: u64,
    },
    /// The machine lacks something.
    Missing(&'static str),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Memory {
                intent,
                gpa,
                got,
                expected,
            } => {
                let view = match intent {
                    Intent::Private => "private",
                    Intent::Shared => "shared",
                };
                writeln!(f, "# gpa {gpa:#x} through the {view} view")?;
                write!(f, "# got: {got:#018x}\n# expected: {expected:#018x}")
            }
            Self::Request {
                gpa,
                pages,
                attributes,
                got,
                expected,
            } => {
                writeln!(
                    f,
                    "# request gpa {gpa:#x} pages {pages:#x} attributes {attributes:#x}"
                )?;
                write!(f, "# got: {got}\n# expected: {expected}")
            }
            Self::Call {
                call,
                got,
                expected,
            } => {
                let [rbx, rcx, rdx, rsi] = call.arguments;
                writeln!(
                    f,
                    "# rax {:#x} rbx {rbx:#x} rcx {rcx:#x} rdx {rdx:#x} rsi {rsi:#x}",
                    call.number
                )?;
                write!(f, "# got: {got}\n# expected: {expected:?}")
            }
            Self::Host { gpa } => {
                writeln!(f, "# fw_cfg DMA to the shared page at gpa {gpa:#x}")?;
                write!(f, "# got: an error\n# expected: success")
            }
            Self::Missing(what) => write!(f, "# {what}"),
        }
    }
}
