// SPDX-License-Identifier: GPL-2.0-or-later
//! The table for people.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use super::breakdown;
use super::plan::{IN_PLACE, SUBJECTS, is_in_place};
use super::rows::Row;

/// The unit of rows that say how many times as much is done.
pub(super) const RATIO: &str = "x one vCPU";

/// Rows that the table leaves to `report.json`: their sum is a row.
const PARTS: [&str; 3] = ["-request", "-touch", "-later"];

/// Rows with all subjects, and what ours is relative to upstream and to the better of the floors.
pub(super) fn table(rows: &[Row]) -> Table {
    let subjects: Vec<(&str, &str)> = SUBJECTS
        .into_iter()
        .filter(|subject| rows.iter().any(|row| row.is_by(*subject)))
        .collect();
    let mut table = Table::new();
    table
        .load_preset(presets::UTF8_FULL_CONDENSED)
        .set_content_arrangement(ContentArrangement::Disabled);
    let mut header = vec!["row".to_owned(), "unit".to_owned()];
    header.extend(subjects.iter().map(|(subject, variant)| {
        let name = format!("{subject}\n{variant}");
        match *subject {
            "ours" => format!("{name}\n(x upstream, x floor)"),
            _ => name,
        }
    }));
    table.set_header(header);
    let whole =
        |name: &&str| !PARTS.iter().any(|part| name.ends_with(part)) && !breakdown::is_part(name);
    for name in names(rows).into_iter().filter(whole) {
        let of_row: Vec<&Row> = rows.iter().filter(|row| row.row == name).collect();
        let unit = of_row.first().map_or("", |row| row.unit.as_str());
        let mut cells = vec![name.to_owned(), unit.to_owned()];
        cells.extend(subjects.iter().map(|subject| cell(&of_row, *subject)));
        table.add_row(cells);
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

fn cell(of_row: &[&Row], subject: (&str, &str)) -> String {
    let Some(row) = of_row.iter().find(|row| row.is_by(subject)) else {
        return String::new();
    };
    let value = number(row);
    if subject.0 != "ours" {
        return value;
    }
    let floor = match is_in_place(subject) {
        true => IN_PLACE,
        false => "floor",
    };
    let ratio = |to: &str| match least(of_row, to) {
        Some(other) if other > 0.0 => format!("{:.2}", row.value / other),
        _ => "–".to_owned(),
    };
    format!("{value} ({}, {})", ratio("upstream"), ratio(floor))
}

fn number(row: &Row) -> String {
    match row.unit.as_str() {
        RATIO => format!("{:.2}", row.value),
        _ => thousands(row.value),
    }
}

/// The best variant of a subject.
fn least(of_row: &[&Row], subject: &str) -> Option<f64> {
    let values = of_row.iter().filter(|row| row.subject == subject);
    values.map(|row| row.value).reduce(f64::min)
}

/// Each name once, in the order of its first row.
fn names(rows: &[Row]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for row in rows {
        if !names.contains(&row.row.as_str()) {
            names.push(&row.row);
        }
    }
    names
}

/// Digits in groups of three.
pub(super) fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(subject: &str, variant: &str, value: f64) -> Row {
        Row {
            row: "convert-4k-to-private".to_owned(),
            subject: subject.to_owned(),
            variant: variant.to_owned(),
            value,
            unit: "instructions/page".to_owned(),
        }
    }

    #[test]
    fn ours_stands_beside_upstream_and_the_better_floor() {
        let rows = [
            row("floor", "", 1000.0),
            row("floor", "prefault", 800.0),
            row("upstream", "", 2000.0),
            row("ours", "discard=now", 1200.0),
        ];
        let text = table(&rows).to_string();
        assert!(text.contains("1,200 (0.60, 1.50)"), "{text}");
        assert!(!text.contains("discard=keep"), "{text}");
    }

    #[test]
    fn what_converts_in_place_stands_beside_the_floor_that_does() {
        let rows = [
            row("floor", "", 1000.0),
            row("floor-in-place", "", 500.0),
            row("ours", "mode=in-place", 600.0),
        ];
        let text = table(&rows).to_string();
        assert!(text.contains("600 (–, 1.20)"), "{text}");
    }

    #[test]
    fn ratios_keep_their_fractions() {
        let mut ratio = row("floor", "", 1.256);
        ratio.unit = RATIO.to_owned();
        let text = table(&[ratio]).to_string();
        assert!(text.contains("1.26"), "{text}");
    }

    #[test]
    fn numbers_for_people() {
        let all = [(7.4, "7"), (999.6, "1,000"), (1_234_567.0, "1,234,567")];
        for (value, text) in all {
            assert_eq!(thousands(value), text);
        }
    }
}
