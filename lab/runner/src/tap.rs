// SPDX-License-Identifier: GPL-2.0-or-later
//! The guest's report: TAP lines on its serial port, and `# name=value` notes.

use std::collections::BTreeMap;
use std::fmt;

/// What a TAP stream has said so far.
#[derive(Debug, Default, Clone)]
pub(crate) struct Tap {
    planned: Option<u64>,
    passed: u64,
    failed: Vec<String>,
    out_of_order: Option<String>,
    bailed_out: Option<String>,
    notes: BTreeMap<String, u64>,
}

/// Why a report is not a success.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The guest gave up.
    BailOut(String),
    /// Tests that failed, by description.
    Failed(Vec<String>),
    /// No plan line came.
    NoPlan,
    /// Fewer or more tests than planned.
    Count { planned: u64, seen: u64 },
    /// A test number that does not follow the one before.
    OutOfOrder(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BailOut(why) => write!(f, "the guest gave up: {why}"),
            Self::Failed(tests) => write!(f, "the guest says not ok: {}", tests.join("; ")),
            Self::NoPlan => write!(f, "the guest's report has no plan (a line 1..N)"),
            Self::Count { planned, seen } => {
                write!(f, "the guest planned {planned} tests and reported {seen}")
            }
            Self::OutOfOrder(line) => write!(f, "a test out of order: {line}"),
        }
    }
}

impl std::error::Error for Fault {}

impl Tap {
    /// Reads one line; lines that are not TAP are ignored.
    pub(crate) fn line(&mut self, line: &str) {
        let line = line.trim_end();
        if let Some(count) = line.strip_prefix("1..") {
            let count = count.split_whitespace().next().unwrap_or_default();
            self.planned = count.parse().ok();
        } else if let Some(rest) = line.strip_prefix("not ok") {
            self.number(rest, line);
            self.failed.push(rest.trim().to_owned());
        } else if let Some(rest) = line.strip_prefix("ok ") {
            self.number(rest, line);
            self.passed += 1;
        } else if let Some(why) = line.strip_prefix("Bail out!") {
            self.bailed_out = Some(why.trim().to_owned());
        } else if let Some(comment) = line.strip_prefix('#') {
            let words = comment.split_whitespace();
            self.notes.extend(words.filter_map(|word| {
                let (name, value) = word.split_once('=')?;
                Some((name.to_owned(), value.parse().ok()?))
            }));
        }
    }

    fn number(&mut self, rest: &str, line: &str) {
        let expected = self.seen() + 1;
        let number = rest.split_whitespace().next().map(str::parse::<u64>);
        // The number is optional in TAP; one that is there must be right, or lines were lost.
        if matches!(number, Some(Ok(number)) if number != expected) {
            self.out_of_order.get_or_insert_with(|| line.to_owned());
        }
    }

    /// Tests reported so far.
    pub(crate) fn seen(&self) -> u64 {
        self.passed + self.failed.len() as u64
    }

    /// The last `# name=value` of that name.
    pub(crate) fn note(&self, name: &str) -> Option<u64> {
        self.notes.get(name).copied()
    }

    /// Was the report complete, and everything in it ok? Gives the number of tests.
    pub(crate) fn verdict(&self) -> Result<u64, Fault> {
        if let Some(why) = &self.bailed_out {
            return Err(Fault::BailOut(why.clone()));
        }
        if !self.failed.is_empty() {
            return Err(Fault::Failed(self.failed.clone()));
        }
        if let Some(line) = &self.out_of_order {
            return Err(Fault::OutOfOrder(line.clone()));
        }
        let planned = self.planned.ok_or(Fault::NoPlan)?;
        let seen = self.seen();
        if planned == seen && seen > 0 {
            Ok(seen)
        } else {
            Err(Fault::Count { planned, seen })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Tap {
        let mut tap = Tap::default();
        text.lines().for_each(|line| tap.line(line));
        tap
    }

    #[test]
    fn complete_report() {
        let tap =
            parse("TAP version 13\r\n1..2\r\nok 1 - a\r\n# hypercalls=7 faults=0\r\nok 2 - b\r\n");
        assert_eq!(tap.verdict(), Ok(2));
        assert_eq!(tap.note("hypercalls"), Some(7));
        assert_eq!(tap.note("other"), None);
    }

    #[test]
    fn plan_at_the_end() {
        assert_eq!(parse("ok 1\nok 2\n1..2\n").verdict(), Ok(2));
    }

    #[test]
    fn faults() {
        assert_eq!(parse("ok 1\n").verdict(), Err(Fault::NoPlan));
        assert_eq!(
            parse("1..3\nok 1\nok 2\n").verdict(),
            Err(Fault::Count {
                planned: 3,
                seen: 2
            })
        );
        assert_eq!(
            parse("1..0\n").verdict(),
            Err(Fault::Count {
                planned: 0,
                seen: 0
            })
        );
        assert!(matches!(
            parse("1..2\nok 1\nnot ok 2 - b\n").verdict(),
            Err(Fault::Failed(tests)) if tests == ["2 - b"]
        ));
        assert!(matches!(
            parse("1..2\nok 1\nok 3\n").verdict(),
            Err(Fault::OutOfOrder(_))
        ));
        assert!(matches!(
            parse("1..1\nok 1\nBail out! no memory\n").verdict(),
            Err(Fault::BailOut(why)) if why == "no memory"
        ));
    }
}
