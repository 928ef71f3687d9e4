// SPDX-License-Identifier: GPL-2.0-or-later
//! From what the guest prints to rows of the report.

use std::borrow::Cow;
use std::collections::HashMap;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use super::plan::Measurement;

/// A row of `report.json`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(crate) struct Row {
    pub(crate) row: String,
    pub(crate) subject: String,
    pub(crate) variant: String,
    pub(crate) value: f64,
    pub(crate) unit: String,
}

/// The rows of starts, by size.
pub(super) const STARTS: [&str; 4] = ["start-1g", "start-16g", "start-64g", "start-256g"];

/// What the kernel has allocated by then.
pub(super) const START_MEMORY: [&str; 4] = [
    "start-kernel-memory-1g",
    "start-kernel-memory-16g",
    "start-kernel-memory-64g",
    "start-kernel-memory-256g",
];

impl Row {
    /// Is it the same, measured once more?
    pub(super) fn is_of(&self, other: &Self) -> bool {
        self.row == other.row && self.is_by((&other.subject, &other.variant))
    }

    /// Is it this subject's, in this variant?
    pub(super) fn is_by(&self, (subject, variant): (&str, &str)) -> bool {
        self.subject == subject && self.variant == variant
    }
}

/// What a subject has taken.
pub(super) fn value(rows: &[Row], name: &str, subject: (&str, &str)) -> Option<f64> {
    let row = rows
        .iter()
        .find(|row| row.row == name && row.is_by(subject));
    row.map(|row| row.value)
}

/// A line of the guest's, `# measured row=... part=...`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Line {
    pub(super) row: String,
    pub(super) direction: String,
    pub(super) part: String,
    /// Of one sample.
    pub(super) mean: f64,
    median: f64,
    p99: f64,
    /// Pages, or instructions, of one sample.
    pub(super) units: f64,
}

impl Line {
    /// Reads a line; nothing if it is another one.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let words = text.trim().strip_prefix("# measured ")?.split_whitespace();
        let words: HashMap<&str, &str> = words.filter_map(|word| word.split_once('=')).collect();
        let number = |key: &str| words.get(key)?.parse::<f64>().ok();
        Some(Self {
            row: (*words.get("row")?).to_owned(),
            direction: (*words.get("direction")?).to_owned(),
            part: (*words.get("part")?).to_owned(),
            mean: number("total")? / number("samples")?,
            median: number("median")?,
            p99: number("p99")?,
            units: number("units")?,
        })
    }
}

impl Line {
    /// The name of a conversion's row.
    pub(super) fn name(&self) -> String {
        match self.direction.as_str() {
            "none" => self.row.clone(),
            direction => format!("{}-to-{direction}", self.row),
        }
    }

    /// The row that it belongs to, its unit, and what a sample is to be divided by.
    pub(super) fn place(&self, measurement: &Measurement) -> (String, &'static str, f64) {
        let (name, unit, units) = match self.part.as_str() {
            "exit" => (format!("exit-{}", self.direction), PER_EXIT, 1.0),
            "repeat" => (self.name() + "-repeat", PER_REQUEST, 1.0),
            "io" if measurement.ordinary() => (format!("ordinary-{}", self.row), PER_REQUEST, 1.0),
            "io" => (self.row.clone(), PER_REQUEST, 1.0),
            "time" => (self.row.clone(), "instructions", 1.0),
            "whole" => (self.name(), PER_REQUEST, 1.0),
            _ => (self.name(), PER_PAGE, self.units),
        };
        let name = match measurement.suffix() {
            Some(suffix) => format!("{name}-{suffix}"),
            None => name,
        };
        (name, unit, units)
    }
}

/// Rows that the runner has measured, with a clock of the host.
const HOST_ROWS: [&str; 2] = ["ordinary-ready", "ordinary-prealloc"];

/// What the guest's clock counts.
#[derive(Clone, Copy, Debug)]
pub(super) enum Clock {
    /// One an instruction; then nanoseconds are the same.
    Instructions,
    /// Ticks of this machine's time-stamp counter.
    Time { nanoseconds_per_tick: f64 },
}

impl Clock {
    /// What a value of a row is to be multiplied by, and its unit.
    fn convert(self, row: &str, unit: &str) -> (f64, String) {
        match self {
            Self::Instructions => (1.0, unit.to_owned()),
            Self::Time {
                nanoseconds_per_tick,
            } => {
                let of_host = unit == "bytes" || HOST_ROWS.contains(&row);
                let scale = if of_host { 1.0 } else { nanoseconds_per_tick };
                (scale, unit.replace("instructions", "ns"))
            }
        }
    }
}

const PER_PAGE: &str = "instructions/page";
const PER_REQUEST: &str = "instructions/request";
const PER_EXIT: &str = "instructions/exit";

/// The rows of one measurement.
pub(super) fn rows(measurement: &Measurement, lines: &[Line], clock: Clock) -> Result<Vec<Row>> {
    let mut rows = Rows {
        measurement,
        clock,
        rows: Vec::new(),
    };
    // What is compared with a baseline must not depend on where the timer's interrupts fall.
    let typical = |line: &Line| Line {
        mean: line.median,
        ..line.clone()
    };
    let lines = match measurement.is_compared() {
        true => Cow::Owned(lines.iter().map(typical).collect()),
        false => Cow::Borrowed(lines),
    };
    for line in lines.iter() {
        let (name, unit, units) = line.place(measurement);
        let mean = line.mean / units;
        match (line.part.as_str(), clock) {
            ("instruction", Clock::Instructions) => check_unit(line.median / line.units)?,
            // In time, a single exit of another program would be more than what was put off.
            ("instruction" | "later", Clock::Time { .. }) => {}
            // What idling takes is subtracted already.
            ("idle", _) => {}
            ("request" | "touch" | "later", _) => rows.add_conversion(line, &lines),
            ("repeat" | "time" | "page" | "whole", _) => rows.add(name, mean, unit),
            // All are alike, and few; what else level 1 does is in some of them.
            ("exit" | "io", _) => rows.add(name, line.median, unit),
            ("nanoseconds", _) => rows.add(name, line.mean, "ns"),
            ("tries", _) => rows.add(name + "-tries", line.mean, "tries"),
            ("memory", _) => rows.add(name, line.mean, "bytes"),
            (memory, _) => {
                let line = Line {
                    row: format!("{}-{memory}", line.row),
                    ..line.clone()
                };
                rows.add(line.place(measurement).0, line.mean, "bytes");
            }
        }
    }
    ensure!(!rows.rows.is_empty(), "the guest measured nothing");
    Ok(rows.rows)
}

struct Rows<'a> {
    measurement: &'a Measurement,
    clock: Clock,
    rows: Vec<Row>,
}

impl Rows<'_> {
    fn add(&mut self, row: String, value: f64, unit: &str) {
        let (scale, unit) = self.clock.convert(&row, unit);
        self.rows.push(Row {
            row,
            subject: self.measurement.subject.to_owned(),
            variant: self.measurement.variant.to_owned(),
            value: (value * scale * 100.0).round() / 100.0,
            unit,
        });
    }

    /// A part of a conversion. With the request, or with the touch if there was none, comes the sum.
    fn add_conversion(&mut self, line: &Line, lines: &[Line]) {
        let name = line.name();
        let mean = |part| find(lines, line, part).map(|line| line.mean / line.units);
        let request = mean("request");
        let first = if request.is_some() {
            "request"
        } else {
            "touch"
        };
        if line.part == first {
            let all = [request, mean("touch")].into_iter().flatten().sum();
            self.add(name.clone(), all, PER_PAGE);
            let tail = line.p99 / line.units;
            self.add(format!("{name}-tail"), tail, PER_PAGE);
        }
        if request.is_some() || line.part == "later" {
            let per_unit = line.mean / line.units;
            self.add(format!("{name}-{}", line.part), per_unit, PER_PAGE);
        }
    }
}

fn find<'a>(lines: &'a [Line], of: &Line, part: &str) -> Option<&'a Line> {
    lines
        .iter()
        .find(|line| line.part == part && line.row == of.row && line.direction == of.direction)
}

/// A loop of known length must have taken one each; the rest is level 1's timer.
fn check_unit(per_instruction: f64) -> Result<()> {
    let good = (0.99..1.05).contains(&per_instruction);
    good.then_some(()).with_context(|| {
        format!("the guest's clock ticks {per_instruction:.3} times an instruction, not once")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plan;

    fn line(row: &str, direction: &str, part: &str, units: u32, samples: u32, total: u32) -> Line {
        let text = format!(
            "# measured row={row} direction={direction} part={part} units={units} \
             samples={samples} total={total} least=1 median={} p99=3 most=4",
            f64::from(total) / f64::from(samples)
        );
        Line::parse(&text).expect("a line of the guest")
    }

    fn value(rows: &[Row], name: &str) -> Option<f64> {
        rows.iter().find(|row| row.row == name).map(|row| row.value)
    }

    #[test]
    fn a_conversion_counts_with_its_touch() {
        let lines = [
            line("convert-64k", "private", "request", 16, 2, 32_000),
            line("convert-64k", "private", "touch", 16, 2, 64_000),
            line("convert-64k", "private", "repeat", 16, 2, 4_000),
            line("convert-64k", "private", "later", 32, 1, 320),
        ];
        let rows = rows(&plan::check(), &lines, Clock::Instructions).expect("rows");
        assert_eq!(value(&rows, "convert-64k-to-private"), Some(3000.0));
        assert_eq!(value(&rows, "convert-64k-to-private-later"), Some(10.0));
        assert_eq!(value(&rows, "convert-64k-to-private-request"), Some(1000.0));
        assert_eq!(value(&rows, "convert-64k-to-private-touch"), Some(2000.0));
        assert_eq!(value(&rows, "convert-64k-to-private-repeat"), Some(2000.0));
    }

    #[test]
    fn a_fault_is_a_touch_that_converts() {
        let lines = [line("fault-4k", "shared", "touch", 1, 2, 40)];
        let rows = rows(&plan::check(), &lines, Clock::Instructions).expect("rows");
        assert_eq!(value(&rows, "fault-4k-to-shared"), Some(20.0));
    }

    #[test]
    fn what_happens_beside_an_exit_is_not_its_cost() {
        let text = "# measured row=exit direction=port part=exit units=1 samples=64 total=1064000 \
                    least=2000 median=2000 p99=900000 most=900000";
        let lines = [Line::parse(text).expect("a line of the guest")];
        let rows = rows(&plan::check(), &lines, Clock::Instructions).expect("rows");
        assert_eq!(value(&rows, "exit-port"), Some(2000.0));
    }

    #[test]
    fn ticks_of_a_guest_become_time_and_those_of_the_host_are_time() {
        let clock = Clock::Time {
            nanoseconds_per_tick: 0.5,
        };
        let lines = [
            line("convert-4k", "private", "request", 1, 1, 100),
            line("convert-4k", "private", "later", 1, 1, 77),
            line("ordinary-prealloc", "none", "page", 10, 1, 100),
        ];
        let rows = rows(&plan::check(), &lines, clock).expect("rows");
        assert_eq!(value(&rows, "convert-4k-to-private"), Some(50.0));
        assert_eq!(value(&rows, "ordinary-prealloc"), Some(10.0));
        assert_eq!(rows[0].unit, "ns/page");
    }

    #[test]
    fn a_clock_that_does_not_count_instructions_is_noticed() {
        let lines = [line("loop", "none", "instruction", 100, 1, 240)];
        let error = rows(&plan::check(), &lines, Clock::Instructions).expect_err("an error");
        assert!(error.to_string().contains("2.4"), "{error}");
    }

    #[test]
    fn a_burst_beside_a_loop_says_nothing_of_the_clock() {
        let text = "# measured row=loop direction=none part=instruction units=2000000 samples=3 \
                    total=6729176 least=2000007 median=2003321 p99=2725848 most=2725848";
        let lines = [
            Line::parse(text).expect("a line of the guest"),
            line("convert-4k", "private", "request", 1, 1, 100),
        ];
        let rows = rows(&plan::check(), &lines, Clock::Instructions).expect("rows");
        assert_eq!(value(&rows, "convert-4k-to-private"), Some(100.0));
    }

    #[test]
    fn other_lines_are_not_rows() {
        assert_eq!(Line::parse("ok 1 - something row=4"), None);
        assert_eq!(Line::parse("# measured row=x"), None);
    }
}
