// SPDX-License-Identifier: GPL-2.0-or-later
//! Counts what test programs report, and shows it all as a table.

use std::time::Duration;

use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table, TableComponent};

use crate::progress::seconds;

/// Tests counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
    /// What failed, or another word for the table.
    pub(crate) detail: String,
}

impl Tally {
    /// One test that passed.
    pub(crate) fn pass(detail: impl Into<String>) -> Self {
        Self {
            passed: 1,
            detail: detail.into(),
            ..Self::default()
        }
    }

    /// One test that failed.
    pub(crate) fn fail(detail: impl Into<String>) -> Self {
        Self {
            failed: 1,
            detail: detail.into(),
            ..Self::default()
        }
    }

    /// One test that cannot run here, by name, and why.
    pub(crate) fn skip(detail: impl Into<String>) -> Self {
        Self {
            skipped: 1,
            detail: detail.into(),
            ..Self::default()
        }
    }

    /// This and another one.
    pub(crate) fn and(mut self, other: Self) -> Self {
        self.add(other);
        self
    }

    /// Adds another tally; details of both stay.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        if !self.detail.is_empty() && !other.detail.is_empty() {
            self.detail.push('\n');
        }
        self.detail.push_str(&other.detail);
    }
}

/// A TAP stream, read line by line.
#[derive(Debug, Default)]
pub(crate) struct Tap {
    planned: Option<u64>,
    tally: Tally,
    bad: Vec<String>,
    last_failed: bool,
}

impl Tap {
    /// Reads one line; those that are not TAP are passed over.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("1..") {
            self.planned = rest.split(' ').next().and_then(|count| count.parse().ok());
        } else if let Some(rest) = line.strip_prefix("not ok") {
            self.tally.failed += 1;
            self.last_failed = true;
            self.bad.push(name(rest).to_owned());
        } else if line == "ok" || line.starts_with("ok ") {
            self.last_failed = false;
            let (_, comment) = line.split_once('#').unwrap_or_default();
            let skip = comment
                .trim_start()
                .get(..4)
                .is_some_and(|c| c.eq_ignore_ascii_case("skip"));
            if skip {
                self.tally.skipped += 1;
            } else {
                self.tally.passed += 1;
            }
        } else if let Some(why) = line.strip_prefix("Bail out!") {
            self.tally.failed += 1;
            self.bad.push(format!("bailed out: {}", why.trim()));
        }
    }

    /// Was the last result that has come a failure?
    pub(crate) fn last_failed(&self) -> bool {
        self.last_failed
    }

    /// How many results have come, and how many are to come in all.
    pub(crate) fn progress(&self) -> (u64, u64) {
        (self.seen(), self.planned.unwrap_or_default())
    }

    fn seen(&self) -> u64 {
        self.tally.passed + self.tally.failed + self.tally.skipped
    }

    /// The count. Tests that were planned and did not report have failed.
    pub(crate) fn finish(mut self) -> Tally {
        let seen = self.seen();
        match self.planned {
            None => {
                self.tally.failed += 1;
                self.bad.push("no plan was reported".to_owned());
            }
            Some(planned) if seen < planned => {
                self.tally.failed += planned - seen;
                self.bad.push(format!(
                    "{} of {planned} tests did not report",
                    planned - seen
                ));
            }
            Some(_) => {}
        }
        self.tally.detail = self.bad.join("\n");
        self.tally
    }
}

/// `12 - name # comment`
fn name(rest: &str) -> &str {
    let rest = rest.split('#').next().unwrap_or_default().trim();
    let rest = rest.trim_start_matches(|c: char| c.is_ascii_digit());
    rest.trim_start_matches([' ', '-'])
}

/// Counts what `cargo test` prints.
#[derive(Debug, Default)]
pub(crate) struct CargoTest {
    tally: Tally,
    bad: Vec<String>,
}

impl CargoTest {
    /// Reads one line.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("test result: ") {
            let counts = result.split_once(". ").map_or(result, |(_, counts)| counts);
            self.tally.passed += number_before(counts, "passed");
            self.tally.failed += number_before(counts, "failed");
            self.tally.skipped += number_before(counts, "ignored");
        } else if let Some(name) = line
            .strip_prefix("test ")
            .and_then(|line| line.strip_suffix(" ... FAILED"))
        {
            self.bad.push(name.to_owned());
        }
    }

    /// The count, given whether cargo succeeded.
    pub(crate) fn finish(mut self, success: bool) -> Tally {
        if !success && self.tally.failed == 0 {
            self.tally.failed = 1;
            self.bad.push("cargo test failed".to_owned());
        }
        self.tally.detail = self.bad.join("\n");
        self.tally
    }
}

fn number_before(text: &str, word: &str) -> u64 {
    text.split(';')
        .find_map(|part| part.trim().strip_suffix(word)?.trim().parse().ok())
        .unwrap_or_default()
}

/// Counts what `meson test` prints at its end.
#[derive(Clone, Debug, Default)]
pub(crate) struct MesonTest {
    tally: Tally,
    bad: Vec<String>,
}

impl MesonTest {
    /// Reads one line: of the summary (`Ok:   3`), or of one program
    /// (` 2/9 suite / name   FAIL   0.1s   2 subtests passed`).
    pub(crate) fn line(&mut self, line: &str) {
        if let Some((label, count)) = line.split_once(':') {
            let count: u64 = count.trim().parse().unwrap_or_default();
            match label.trim() {
                "Ok" | "Expected Fail" => self.tally.passed += count,
                "Fail" | "Unexpected Pass" | "Timeout" => self.tally.failed += count,
                "Skipped" => self.tally.skipped += count,
                _ => {}
            }
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [.., "OK", _, count, "subtests", "passed"] = words.as_slice() {
            // The summary counts the program as one.
            let count: u64 = count.parse().unwrap_or_default();
            self.tally.passed += count.saturating_sub(1);
        }
        let failed = words
            .iter()
            .position(|word| ["FAIL", "TIMEOUT", "ERROR"].contains(word));
        if let (Some(end), Some(first)) = (failed, words.first()) {
            let numbered = first
                .split_once('/')
                .is_some_and(|(n, _)| n.parse::<u32>().is_ok());
            // The summary lists each failure once more.
            let name = words.get(1..end).unwrap_or_default().join(" ");
            if numbered && !self.bad.contains(&name) {
                self.bad.push(name);
            }
        }
    }

    /// The count, given whether meson succeeded, and which programs are expected to fail. One that
    /// does counts as skipped; one that does not is a failure.
    pub(crate) fn finish(mut self, success: bool, expected: &[&str]) -> Tally {
        let is = |bad: &str, name: &str| bad.ends_with(&format!("/{name}"));
        let (known, bad): (Vec<_>, Vec<_>) = std::mem::take(&mut self.bad)
            .into_iter()
            .partition(|bad| expected.iter().any(|name| is(bad, name)));
        let count = known.len() as u64;
        self.tally.failed = self.tally.failed.saturating_sub(count);
        self.tally.skipped += count;
        self.bad = bad;
        for name in expected {
            if !known.iter().any(|bad| is(bad, name)) {
                self.bad.push(format!("{name} was expected to fail"));
                self.tally.failed += 1;
            }
        }
        if self.tally.failed == 0 && count > 0 {
            let names = expected.join(", ");
            self.tally.detail = format!("as without the patches: {names}");
            return self.tally;
        }
        if !success && self.tally.failed == 0 {
            self.tally.failed = 1;
            self.bad.push("meson test failed".to_owned());
        }
        self.tally.detail = self.bad.join("\n");
        self.tally
    }
}

/// A step that has run.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) name: &'static str,
    pub(crate) tally: Tally,
    pub(crate) time: Duration,
}

/// All steps as a table.
pub(crate) fn table(lines: &[Line]) -> String {
    let mut table = Table::new();
    table.load_preset(UTF8_HORIZONTAL_ONLY);
    // A line under the header, none between rows.
    table.remove_style(TableComponent::HorizontalLines);
    table.remove_style(TableComponent::MiddleIntersections);
    table.set_header(["step", "passed", "failed", "skipped", "time", "detail"]);
    for line in lines {
        let tally = &line.tally;
        table.add_row([
            line.name.to_owned(),
            tally.passed.to_string(),
            tally.failed.to_string(),
            tally.skipped.to_string(),
            seconds(line.time),
            tally.detail.clone(),
        ]);
    }
    for column in table.column_iter_mut().skip(1).take(4) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

/// The last line.
pub(crate) fn total(lines: &[Line]) -> String {
    let sum = |count: fn(&Tally) -> u64| lines.iter().map(|line| count(&line.tally)).sum::<u64>();
    let skipped = sum(|tally| tally.skipped);
    let mut text = format!("{} passed, {} failed", sum(|t| t.passed), sum(|t| t.failed));
    if skipped > 0 {
        text.push_str(&format!(", {skipped} skipped"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tap(text: &str) -> Tally {
        let mut tap = Tap::default();
        text.lines().for_each(|line| tap.line(line));
        tap.finish()
    }

    fn counts(tally: &Tally) -> (u64, u64, u64) {
        (tally.passed, tally.failed, tally.skipped)
    }

    #[test]
    fn tap_is_counted() {
        let tally = tap("TAP version 13\n1..4\nok 1 - a\nnot ok 2 - b c # why\n\
                         ok 3 - d # SKIP no KVM\n# note\nok 4 - e\n");
        assert_eq!(counts(&tally), (2, 1, 1));
        assert_eq!(tally.detail, "b c");
    }

    #[test]
    fn tests_that_do_not_report_have_failed() {
        assert_eq!(counts(&tap("1..3\nok 1\n")), (1, 2, 0));
        assert_eq!(counts(&tap("")), (0, 1, 0));
        assert_eq!(counts(&tap("1..1\nBail out! no QEMU\n")), (0, 1, 0));
    }

    #[test]
    fn cargo_test_is_counted() {
        let mut cargo = CargoTest::default();
        for line in [
            "test a::b ... ok",
            "test a::c ... FAILED",
            "test result: FAILED. 1 passed; 1 failed; 2 ignored; 0 measured; 3 filtered out; finished in 0.1s",
            "test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.1s",
        ] {
            cargo.line(line);
        }
        let tally = cargo.finish(false);
        assert_eq!(counts(&tally), (6, 1, 2));
        assert_eq!(tally.detail, "a::c");
        assert_eq!(counts(&CargoTest::default().finish(false)), (0, 1, 0));
    }

    #[test]
    fn meson_test_is_counted() {
        let mut meson = MesonTest::default();
        for line in [
            "1/2 qemu:qtest+qtest-x86_64 / qtest-x86_64/boot  OK   1.2s   3 subtests passed",
            "2/2 qemu:qtest+qtest-x86_64 / qtest-x86_64/qmp   FAIL 0.2s   exit status 1",
            "Summary of Failures:",
            "2/2 qemu:qtest+qtest-x86_64 / qtest-x86_64/qmp   FAIL 0.2s   exit status 1",
            "Ok:                 1   ",
            "Fail:               1   ",
            "Skipped:            4   ",
        ] {
            meson.line(line);
        }
        let tally = meson.clone().finish(false, &[]);
        assert_eq!(counts(&tally), (3, 1, 4));
        assert_eq!(tally.detail, "qemu:qtest+qtest-x86_64 / qtest-x86_64/qmp");
        // Expected to fail, it counts as skipped; what is expected has to come.
        let tally = meson.clone().finish(false, &["qmp"]);
        assert_eq!(counts(&tally), (3, 0, 5));
        assert_eq!(tally.detail, "as without the patches: qmp");
        let tally = meson.finish(false, &["qmp", "boot"]);
        assert_eq!(counts(&tally), (3, 1, 5));
        assert_eq!(tally.detail, "boot was expected to fail");
    }

    #[test]
    fn the_last_line_counts_all_steps() {
        let line = |name, tally| Line {
            name,
            tally,
            time: Duration::from_secs(1),
        };
        let skipping = Tally {
            passed: 3,
            failed: 0,
            skipped: 2,
            detail: String::new(),
        };
        let lines = [
            line("a", Tally::pass("")),
            line("b", Tally::fail("why")),
            line("c", skipping),
        ];
        assert_eq!(total(&lines), "4 passed, 1 failed, 2 skipped");
        assert_eq!(total(&lines[..2]), "1 passed, 1 failed");
        let table = table(&lines);
        assert!(table.contains("why") && !table.contains("total"));
    }
}
