// SPDX-License-Identifier: GPL-2.0-or-later
//! From what the guest prints to rows of the report.

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

/// A line of the guest's, `# measured row=... part=...`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Line {
    row: String,
    direction: String,
    part: String,
    /// Of one sample.
    mean: f64,
    p99: f64,
    /// Pages, or instructions, of one sample.
    units: f64,
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
            p99: number("p99")?,
            units: number("units")?,
        })
    }
}

/// The rows of one measurement.
pub(super) fn rows(measurement: &Measurement, lines: &[Line]) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    let mut add = |row: String, value: f64, unit: &str| {
        let row = match measurement.suffix() {
            Some(suffix) => format!("{row}-{suffix}"),
            None => row,
        };
        rows.push(Row {
            row,
            subject: measurement.subject.to_owned(),
            variant: measurement.variant.to_owned(),
            value: (value * 100.0).round() / 100.0,
            unit: unit.to_owned(),
        });
    };
    for line in lines {
        let name = format!("{}-to-{}", line.row, line.direction);
        let per_unit = line.mean / line.units;
        match line.part.as_str() {
            "instruction" => check_unit(per_unit)?,
            "exit" => add(
                format!("exit-{}", line.direction),
                line.mean,
                "instructions/exit",
            ),
            "request" => {
                let touch =
                    find(lines, line, "touch").map_or(0.0, |touch| touch.mean / touch.units);
                add(name.clone(), per_unit + touch, "instructions/page");
                add(format!("{name}-request"), per_unit, "instructions/page");
                add(
                    format!("{name}-tail"),
                    line.p99 / line.units,
                    "instructions/page",
                );
            }
            // Without a request, the touch is what converts.
            "touch" if find(lines, line, "request").is_none() => {
                add(name.clone(), per_unit, "instructions/page");
                add(
                    format!("{name}-tail"),
                    line.p99 / line.units,
                    "instructions/page",
                );
            }
            "touch" => add(format!("{name}-touch"), per_unit, "instructions/page"),
            "repeat" => add(format!("{name}-repeat"), line.mean, "instructions/request"),
            "time" => add(line.row.clone(), line.mean, "instructions"),
            memory => add(format!("{}-{memory}", line.row), line.mean, "bytes"),
        }
    }
    ensure!(!rows.is_empty(), "the guest measured nothing");
    Ok(rows)
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

    fn line(row: &str, direction: &str, part: &str, units: u32, samples: u32, total: u32) -> Line {
        let text = format!(
            "# measured row={row} direction={direction} part={part} units={units} \
             samples={samples} total={total} least=1 median=2 p99=3 most=4"
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
        ];
        let rows = rows(&super::super::plan::check(), &lines).expect("rows");
        assert_eq!(value(&rows, "convert-64k-to-private"), Some(3000.0));
        assert_eq!(value(&rows, "convert-64k-to-private-request"), Some(1000.0));
        assert_eq!(value(&rows, "convert-64k-to-private-touch"), Some(2000.0));
        assert_eq!(value(&rows, "convert-64k-to-private-repeat"), Some(2000.0));
    }

    #[test]
    fn a_fault_is_a_touch_that_converts() {
        let lines = [line("fault-4k", "shared", "touch", 1, 2, 40)];
        let rows = rows(&super::super::plan::check(), &lines).expect("rows");
        assert_eq!(value(&rows, "fault-4k-to-shared"), Some(20.0));
    }

    #[test]
    fn a_clock_that_does_not_count_instructions_is_noticed() {
        let lines = [line("loop", "none", "instruction", 100, 1, 240)];
        let error = rows(&super::super::plan::check(), &lines).expect_err("an error");
        assert!(error.to_string().contains("2.4"), "{error}");
    }

    #[test]
    fn other_lines_are_not_rows() {
        assert_eq!(Line::parse("ok 1 - something row=4"), None);
        assert_eq!(Line::parse("# measured row=x"), None);
    }
}
