// SPDX-License-Identifier: GPL-2.0-or-later
//! The tables of docs/performance.md, from a report.

use super::breakdown::PARTIES;
use super::plan::{IN_PLACE, OURS_IN_PLACE, is_in_place};
use super::record::Report;
use super::report::thousands;
use super::rows::{Row, START_MEMORY, STARTS, value};

type Subject = (&'static str, &'static str);

const FLOOR: Subject = ("floor", "");
const PREFAULT: Subject = ("floor", "prefault");
const UPSTREAM: Subject = ("upstream", "");
const NOW: Subject = ("ours", "discard=now");
const PREFAULTING: Subject = ("ours", "prefault=on");
const FLOOR_IN_PLACE: Subject = (IN_PLACE, "");
const PREFAULTING_IN_PLACE: Subject = ("ours", "mode=in-place,prefault=on");
const NOT_LAZY: Subject = ("ours", "lazy-attributes=off");
const MAPPED: Subject = ("ours", "mode=mapped");
const BOUND: Subject = ("ours", "mode=mapped,bind=on");

/// What a column shows of a row.
#[derive(Clone, Copy)]
enum Column {
    Value(Subject),
    /// How many times as much as upstream.
    OverUpstream(Subject),
    /// How many times as much as the better of the floors that convert as the subject does.
    OverFloor(Subject),
    /// How many times as much as with two files.
    OverTwoFiles(Subject),
    /// What one party carries out.
    Part(Subject, usize),
}
use Column::{OverFloor, OverTwoFiles, OverUpstream, Part, Value};

/// A table: lists of names of rows, and what is shown of them.
struct Form {
    rows: &'static [&'static [&'static str]],
    columns: &'static [Column],
    /// What the values are divided by, and how many decimals are left.
    unit: (f64, usize),
}

/// Requests, and the first touch of what they are for.
const CONVERSIONS: [&str; 18] = [
    "convert-4k-to-private",
    "convert-4k-to-shared",
    "convert-64k-to-private",
    "convert-64k-to-shared",
    "convert-2m-to-private",
    "convert-2m-to-shared",
    "convert-64m-to-private",
    "convert-64m-to-shared",
    "sequential-4k-to-private",
    "sequential-4k-to-shared",
    "sequential-4k-1g-to-private",
    "sequential-4k-1g-to-shared",
    "flip-2m-to-private",
    "flip-2m-to-shared",
    "untouched-4k-to-private",
    "untouched-4k-to-shared",
    "untouched-2m-to-private",
    "untouched-2m-to-shared",
];

/// Touches that convert.
const FAULTS: [&str; 5] = [
    "fault-first-4k-to-private",
    "fault-4k-to-private",
    "fault-4k-to-shared",
    "fault-sequential-4k-to-private",
    "fault-sequential-4k-to-shared",
];

/// Requests for what is so already, and exits.
const NOTHING_TO_DO: [&str; 6] = [
    "convert-4k-to-private-repeat",
    "convert-2m-to-private-repeat",
    "convert-64m-to-private-repeat",
    "exit-kernel",
    "exit-port",
    "exit-refused",
];

const FORMS: [Form; 12] = [
    Form {
        rows: &[&CONVERSIONS, &NOTHING_TO_DO],
        columns: &[
            Value(FLOOR),
            Value(PREFAULT),
            Value(UPSTREAM),
            Value(NOW),
            OverUpstream(NOW),
            OverFloor(NOW),
            Value(PREFAULTING),
            OverFloor(PREFAULTING),
        ],
        unit: (1.0, 0),
    },
    Form {
        rows: &[&[
            "convert-4k-to-private",
            "convert-4k-to-shared",
            "convert-64k-to-private",
            "convert-64k-to-shared",
            "convert-2m-to-private",
            "convert-2m-to-shared",
            "sequential-4k-to-private",
            "sequential-4k-to-shared",
            "untouched-4k-to-private",
            "untouched-4k-to-shared",
            "convert-4k-to-private-repeat",
            "convert-2m-to-private-repeat",
            "fault-4k-to-private",
            "fault-4k-to-shared",
        ]],
        columns: &[
            Part(NOW, 0),
            Part(FLOOR, 1),
            Part(FLOOR, 2),
            Part(UPSTREAM, 1),
            Part(UPSTREAM, 2),
            Part(NOW, 1),
            Part(NOW, 2),
        ],
        unit: (1.0, 0),
    },
    Form {
        rows: &[&FAULTS],
        columns: &[
            Value(FLOOR),
            Value(NOW),
            OverFloor(NOW),
            Value(NOT_LAZY),
            OverFloor(NOT_LAZY),
        ],
        unit: (1.0, 0),
    },
    Form {
        rows: &[&STARTS],
        columns: &[
            Value(FLOOR),
            Value(UPSTREAM),
            Value(NOW),
            OverUpstream(NOW),
            Part(FLOOR, 1),
            Part(FLOOR, 2),
            Part(UPSTREAM, 1),
            Part(UPSTREAM, 2),
            Part(NOW, 1),
            Part(NOW, 2),
        ],
        unit: (1e6, 1),
    },
    Form {
        rows: &[&START_MEMORY],
        columns: &[Value(FLOOR), Value(UPSTREAM), Value(NOW)],
        unit: (1024.0, 0),
    },
    Form {
        rows: &[&CONVERSIONS, &FAULTS, &NOTHING_TO_DO],
        columns: &[
            Value(FLOOR_IN_PLACE),
            Value(OURS_IN_PLACE),
            OverFloor(OURS_IN_PLACE),
            OverTwoFiles(OURS_IN_PLACE),
            OverUpstream(OURS_IN_PLACE),
            Value(PREFAULTING_IN_PLACE),
        ],
        unit: (1.0, 0),
    },
    Form {
        rows: &[&[
            "convert-4k-to-private",
            "convert-4k-to-shared",
            "convert-64k-to-private",
            "convert-64k-to-shared",
            "convert-2m-to-private",
            "convert-2m-to-shared",
            "sequential-4k-to-private",
            "sequential-4k-to-shared",
            "convert-4k-to-private-repeat",
            "fault-4k-to-private",
            "fault-4k-to-shared",
            "exit-kernel",
        ]],
        columns: &[
            Part(OURS_IN_PLACE, 0),
            Part(FLOOR_IN_PLACE, 1),
            Part(FLOOR_IN_PLACE, 2),
            Part(OURS_IN_PLACE, 1),
            Part(OURS_IN_PLACE, 2),
        ],
        unit: (1.0, 0),
    },
    Form {
        rows: &[&STARTS],
        columns: &[Value(FLOOR_IN_PLACE), Value(OURS_IN_PLACE)],
        unit: (1e6, 1),
    },
    Form {
        rows: &[&START_MEMORY],
        columns: &[Value(FLOOR_IN_PLACE), Value(OURS_IN_PLACE)],
        unit: (1024.0, 0),
    },
    // What does not depend on how much memory it is about, or on who holds some of it.
    Form {
        rows: &[&[
            "untouched-64g-to-private",
            "untouched-64g-to-shared",
            "untouched-64g-kernel-memory",
            "start-private-64g",
            "start-private-64g-kernel-memory",
            "twice-peak-memory",
            "held-4k",
            "held-4k-tries",
            "held-2m",
            "held-2m-tries",
        ]],
        columns: &[
            Value(FLOOR),
            Value(NOW),
            Value(FLOOR_IN_PLACE),
            Value(OURS_IN_PLACE),
        ],
        unit: (1.0, 0),
    },
    Form {
        rows: &[&["disk-read-4k", "disk-read-64k"]],
        columns: &[Value(UPSTREAM), Value(NOW), OverUpstream(NOW)],
        unit: (1.0, 0),
    },
    Form {
        rows: &[&[
            "ordinary-ready",
            "ordinary-prealloc",
            "ordinary-touch-4k",
            "ordinary-disk-read-4k",
            "ordinary-disk-read-64k",
        ]],
        columns: &[
            Value(UPSTREAM),
            Value(MAPPED),
            OverUpstream(MAPPED),
            Value(BOUND),
            OverUpstream(BOUND),
        ],
        unit: (1.0, 0),
    },
];

/// All tables of which something was measured, and what was measured.
pub(super) fn tables(report: &Report) -> String {
    let versions = report.versions.iter();
    let versions: Vec<String> = versions.map(|(name, of)| format!("{name} {of}")).collect();
    let mut text = format!("{}, {}\n", report.date, versions.join(", "));
    for form in FORMS {
        text += &form.table(&report.rows).unwrap_or_default();
    }
    text
}

impl Form {
    fn table(&self, rows: &[Row]) -> Option<String> {
        let lines = self.rows.iter().copied().flatten().filter_map(|name| {
            let cells = self
                .columns
                .iter()
                .map(|column| self.cell(rows, name, *column));
            let cells: Vec<Option<String>> = cells.collect();
            let known = cells.iter().any(Option::is_some);
            let cells = cells.into_iter().map(|cell| cell.unwrap_or("–".to_owned()));
            known.then(|| format!("| `{name}` | {} |\n", cells.collect::<Vec<_>>().join(" | ")))
        });
        let lines: String = lines.collect();
        let headers: Vec<String> = self.columns.iter().map(|column| header(*column)).collect();
        (!lines.is_empty()).then(|| {
            format!(
                "\n| row | {} |\n|{}\n{lines}",
                headers.join(" | "),
                "---|".repeat(headers.len() + 1)
            )
        })
    }

    fn cell(&self, rows: &[Row], name: &str, column: Column) -> Option<String> {
        let (unit, decimals) = self.unit;
        let number = |value: f64| match decimals {
            0 => thousands(value / unit),
            _ => format!("{:.decimals$}", value / unit),
        };
        let ratio = |of: Subject, to: &[Subject]| {
            let to = to.iter().filter_map(|to| value(rows, name, *to));
            Some(format!(
                "{:.2}",
                value(rows, name, of)? / to.reduce(f64::min)?
            ))
        };
        match column {
            Value(subject) => value(rows, name, subject).map(number),
            OverUpstream(subject) => ratio(subject, &[UPSTREAM]),
            OverFloor(subject) if is_in_place(subject) => ratio(subject, &[FLOOR_IN_PLACE]),
            OverFloor(subject) => ratio(subject, &[FLOOR, PREFAULT]),
            OverTwoFiles(subject) => ratio(subject, &[NOW]),
            Part(subject, party) => {
                let name = format!("{name}{}", PARTIES[party].0);
                value(rows, &name, subject).map(number)
            }
        }
    }
}

fn header(column: Column) -> String {
    match column {
        Value(subject) => subject_name(subject),
        OverUpstream(_) => "/upstream".to_owned(),
        OverFloor(_) => "/floor".to_owned(),
        OverTwoFiles(_) => "/two files".to_owned(),
        Part(subject, party) => format!("{}: {}", subject_name(subject), PARTIES[party].2),
    }
}

fn subject_name((subject, variant): Subject) -> String {
    match variant {
        "" => subject.to_owned(),
        _ => format!("{subject}, `{variant}`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, (subject, variant): Subject, value: f64) -> Row {
        Row {
            row: name.to_owned(),
            subject: subject.to_owned(),
            variant: variant.to_owned(),
            value,
            unit: String::new(),
        }
    }

    fn report(rows: Vec<Row>) -> Report {
        Report {
            date: "today".to_owned(),
            versions: [("qemu".to_owned(), "11".to_owned())].into(),
            rows,
        }
    }

    #[test]
    fn a_line_for_what_was_measured() {
        let report = report(vec![
            row("start-1g", FLOOR, 11.5e6),
            row("start-1g", UPSTREAM, 200e6),
            row("start-1g", NOW, 150e6),
            row("start-1g-in-vmm", NOW, 50e6),
        ]);
        let text = tables(&report);
        assert!(text.starts_with("today, qemu 11\n"), "{text}");
        let line = "| `start-1g` | 11.5 | 200.0 | 150.0 | 0.75 | – | – | – | – | 50.0 | – |";
        assert!(text.contains(line), "{text}");
        assert!(
            !text.contains("start-16g") && !text.contains("disk"),
            "{text}"
        );
    }

    #[test]
    fn what_converts_in_place_is_compared_with_its_own_floor_and_with_two_files() {
        let name = "convert-64k-to-shared";
        let report = report(vec![
            row(name, FLOOR, 14_000.0),
            row(name, UPSTREAM, 16_000.0),
            row(name, NOW, 14_400.0),
            row(name, FLOOR_IN_PLACE, 3_000.0),
            row(name, OURS_IN_PLACE, 3_600.0),
            row("held-4k-tries", OURS_IN_PLACE, 104.0),
        ]);
        let text = tables(&report);
        let line = "| `convert-64k-to-shared` | 3,000 | 3,600 | 1.20 | 0.25 | 0.23 | – |";
        assert!(text.contains(line), "{text}");
        assert!(
            text.contains("| `held-4k-tries` | – | – | – | 104 |"),
            "{text}"
        );
    }
}
