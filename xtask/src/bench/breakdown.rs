// SPDX-License-Identifier: GPL-2.0-or-later
//! Who carries out the instructions of a row, as the plugin (`plugin/`) has counted them.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};

use super::plan::Measurement;
use super::report::thousands;
use super::rows::{Line, Row};

/// What the names of such rows end in, what the plugin calls it, and what it is.
pub(super) const PARTIES: [(&str, &str, &str); 3] = [
    ("-in-guest", "guest", "guest"),
    ("-in-vmm", "user", "VMM"),
    ("-in-kernel", "kernel", "kernel"),
];

/// Instructions of one sample, in the order of `PARTIES`.
type Counts = [f64; PARTIES.len()];

/// What the outer QEMU is told.
pub(super) fn option(plugin: &Path, counts: &Path) -> String {
    let escaped = |path: &Path| path.to_string_lossy().replace(',', ",,");
    format!("{},out={}", escaped(plugin), escaped(counts))
}

/// Reads what the plugin has counted, and puts the pages that were touched into a file of their own.
pub(super) fn read(counts: &Path, touched: &Path) -> Result<Vec<Counts>> {
    let text = fs::read_to_string(counts)
        .with_context(|| format!("the plugin has not written {}", counts.display()))?;
    let of = |start: &'static str| text.lines().filter(move |line| line.starts_with(start));
    let touches: Vec<_> = of("touch=").collect();
    if !touches.is_empty() {
        fs::write(touched, touches.join("\n") + "\n")
            .with_context(|| format!("cannot write {}", touched.display()))?;
    }
    of("part=")
        .map(|line| of_line(line).with_context(|| format!("no line of the plugin: {line}")))
        .collect()
}

fn of_line(line: &str) -> Option<Counts> {
    let words: HashMap<&str, &str> = line
        .split_whitespace()
        .filter_map(|word| word.split_once('='))
        .collect();
    let number = |key: &str| words.get(key)?.parse::<f64>().ok();
    let samples = number("samples").filter(|samples| *samples > 0.0)?;
    let mut counts = Counts::default();
    for (count, (_, key, _)) in counts.iter_mut().zip(PARTIES) {
        *count = number(key)? / samples;
    }
    Some(counts)
}

/// Rows beside those of the lines. The plugin has counted a part for each line, in their order, but not
/// for memory.
pub(super) fn rows(
    measurement: &Measurement,
    lines: &[Line],
    parts: &[Counts],
) -> Result<Vec<Row>> {
    if parts.is_empty() {
        return Ok(Vec::new());
    }
    let counted = |line: &&Line| !line.part.ends_with("memory");
    let lines: Vec<&Line> = lines.iter().filter(counted).collect();
    ensure!(
        lines.len() == parts.len(),
        "{} lines were printed, but the plugin has seen {}",
        lines.len(),
        parts.len()
    );
    let of_part = |part: &str| {
        let mut both = lines.iter().zip(parts);
        both.find_map(|(line, counts)| (line.part == part).then_some(*counts))
    };
    // What is in samples of a part that does not belong to it.
    let ready = of_part("time");
    let mut all: Vec<(String, &str, Counts)> = Vec::new();
    for (line, counts) in lines.iter().zip(parts) {
        let beyond = match line.part.as_str() {
            "instruction" | "idle" | "later" => continue,
            "page" => ready,
            _ => None,
        };
        let mut counts = *counts;
        for (count, beyond) in counts.iter_mut().zip(beyond.unwrap_or_default()) {
            *count = (*count - beyond).max(0.0);
        }
        let (name, unit, units) = line.place(measurement);
        let counts = counts.map(|count| count / units);
        match all.iter_mut().find(|(known, ..)| *known == name) {
            Some((.., sum)) => sum.iter_mut().zip(counts).for_each(|(sum, n)| *sum += n),
            None => all.push((name, unit, counts)),
        }
    }
    let rows = all.into_iter().flat_map(|(name, unit, counts)| {
        PARTIES
            .into_iter()
            .zip(counts)
            .map(move |((suffix, ..), value)| Row {
                row: format!("{name}{suffix}"),
                subject: measurement.subject.to_owned(),
                variant: measurement.variant.to_owned(),
                value: (value * 100.0).round() / 100.0,
                unit: unit.to_owned(),
            })
    });
    Ok(rows.collect())
}

/// Is it a row of a breakdown?
pub(super) fn is_part(name: &str) -> bool {
    PARTIES.iter().any(|(suffix, ..)| name.ends_with(suffix))
}

/// Who carries out what, a line for each row and subject; nothing if nobody has asked.
pub(super) fn table(rows: &[Row]) -> Option<Table> {
    let first = PARTIES[0].0;
    let mut table = Table::new();
    table.load_preset(presets::UTF8_FULL_CONDENSED);
    let mut header = vec!["row", "subject"];
    header.extend(PARTIES.map(|(_, _, name)| name));
    header.push("together");
    table.set_header(header);
    for row in rows {
        let Some(name) = row.row.strip_suffix(first) else {
            continue;
        };
        let values = PARTIES.map(|(suffix, ..)| {
            let part = rows.iter().find(|part| {
                part.row.strip_suffix(suffix) == Some(name)
                    && (&part.subject, &part.variant) == (&row.subject, &row.variant)
            });
            part.map_or(0.0, |part| part.value)
        });
        let mut cells = vec![name.to_owned(), format!("{} {}", row.subject, row.variant)];
        cells.extend(values.map(thousands));
        cells.push(thousands(values.iter().sum()));
        table.add_row(cells);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    (table.row_count() > 0).then_some(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::plan;

    fn line(part: &str, units: u32) -> Line {
        let text = format!(
            "# measured row=convert-64k direction=private part={part} units={units} samples=2 \
             total=8 least=1 median=2 p99=3 most=4"
        );
        Line::parse(&text).expect("a line of the guest")
    }

    #[test]
    fn parts_of_a_conversion_add_up() {
        let lines = [line("request", 16), line("touch", 32), line("later", 32)];
        let parts = [[16.0, 160.0, 320.0], [0.0, 32.0, 32.0], [100.0, 32.0, 42.0]];
        let rows = rows(&plan::check(), &lines, &parts).expect("rows");
        let of = |name: &str| rows.iter().find(|row| row.row == name).map(|row| row.value);
        assert_eq!(of("convert-64k-to-private-in-guest"), Some(1.0));
        assert_eq!(of("convert-64k-to-private-in-vmm"), Some(11.0));
        assert_eq!(of("convert-64k-to-private-in-kernel"), Some(21.0));
        let text = table(&rows).expect("a table").to_string();
        assert!(text.contains("33"), "{text}");
    }

    #[test]
    fn what_prealloc_adds() {
        let line = |row: &str, part: &str, units: u32| {
            let text = format!(
                "# measured row={row} direction=none part={part} units={units} samples=1 \
                 total=8 least=8 median=8 p99=8 most=8"
            );
            Line::parse(&text).expect("a line of the runner")
        };
        let lines = [
            line("ordinary-ready", "time", 1),
            line("ordinary-prealloc", "page", 10),
            line("twice", "peak-memory", 1),
        ];
        let parts = [[0.0, 100.0, 1000.0], [0.0, 100.0, 1500.0]];
        let rows = rows(&plan::check(), &lines, &parts).expect("rows");
        let of = |name: &str| rows.iter().find(|row| row.row == name).map(|row| row.value);
        assert_eq!(of("ordinary-ready-in-vmm"), Some(100.0));
        assert_eq!(of("ordinary-prealloc-in-kernel"), Some(50.0));
        assert_eq!(of("ordinary-prealloc-in-vmm"), Some(0.0));
    }

    #[test]
    fn the_plugins_lines() {
        let counts = of_line("part=80 samples=2 guest=2 user=4 kernel=6");
        assert_eq!(counts, Some([1.0, 2.0, 3.0]));
        assert_eq!(of_line("part=80 samples=0 guest=0 user=0 kernel=0"), None);
    }

    #[test]
    fn a_line_that_the_plugin_has_missed_is_an_error() {
        let error = rows(&plan::check(), &[line("request", 1)], &[]);
        assert_eq!(error.expect("no breakdown"), []);
        let lines = [line("request", 1), line("touch", 1)];
        assert!(rows(&plan::check(), &lines, &[[1.0; 3]]).is_err());
    }
}
