// SPDX-License-Identifier: GPL-2.0-or-later
//! Rows that must not grow: `xtask/baseline.json`.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};

use crate::context::Context;

use super::plan::{MAIN, OURS_IN_PLACE};
use super::report::thousands;
use super::rows::{self, Row};

const UPDATE: &str = "cargo xtask bench --update-baseline";

/// What the names of rows begin with, and whose they are.
const SUBJECTS: [(&str, (&str, &str)); 2] = [("", MAIN), ("in-place/", OURS_IN_PLACE)];

/// The rows that are compared.
const ROWS: [&str; 5] = [
    "convert-4k-to-private",
    "convert-4k-to-shared",
    "convert-2m-to-private",
    "convert-2m-to-private-repeat",
    "sequential-4k-to-private",
];

/// By how much a row may grow.
const TOLERANCE: f64 = 0.03;

type Values = BTreeMap<String, f64>;

fn path(ctx: &Context) -> PathBuf {
    ctx.root.join("xtask/baseline.json")
}

fn values(rows: &[Row]) -> Result<Values> {
    let all = SUBJECTS
        .into_iter()
        .flat_map(|(start, subject)| ROWS.map(|row| (start, row, subject)));
    all.map(|(start, row, subject)| {
        let name = format!("{start}{row}");
        let value = rows::value(rows, row, subject);
        let value = value.with_context(|| format!("row {name} was not measured"))?;
        Ok((name, value))
    })
    .collect()
}

/// One line a row: what was measured, and what it was. The flag tells whether it is within bounds.
pub(crate) fn compare(ctx: &Context, rows: &[Row]) -> Result<Vec<(String, bool)>> {
    let path = path(ctx);
    let text = fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}: make it with {UPDATE}", path.display()))?;
    let baseline: Values = serde_json::from_str(&text)
        .with_context(|| format!("{} is not what {UPDATE} writes", path.display()))?;
    judge(&values(rows)?, &baseline)
}

fn judge(now: &Values, baseline: &Values) -> Result<Vec<(String, bool)>> {
    now.iter()
        .map(|(name, value)| {
            let was = baseline.get(name);
            let was = was.with_context(|| format!("the baseline lacks {name}: {UPDATE}"))?;
            ensure!(*was > 0.0, "the baseline of {name} is {was}: {UPDATE}");
            let change = value / was - 1.0;
            let line = format!(
                "{name}: {} instructions, baseline {} ({:+.1} %)",
                thousands(*value),
                thousands(*was),
                100.0 * change
            );
            Ok((line, change <= TOLERANCE))
        })
        .collect()
}

/// For `cargo xtask bench --check` and `--update-baseline`.
pub(super) fn compare_or_update(ctx: &Context, rows: &[Row], update: bool) -> Result<ExitCode> {
    if update {
        let path = path(ctx);
        fs::write(&path, serde_json::to_string_pretty(&values(rows)?)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
        println!("{}", path.display());
        return Ok(ExitCode::SUCCESS);
    }
    let mut good = true;
    for (line, within) in compare(ctx, rows)? {
        println!("{} {line}", if within { "ok" } else { "TOO MUCH" });
        good &= within;
    }
    if !good {
        println!("if that is meant to be: {UPDATE}");
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(value: f64) -> Values {
        BTreeMap::from([("convert-4k-to-private".to_owned(), value)])
    }

    #[test]
    fn three_in_a_hundred_more_is_too_much() {
        let within = |now: f64| judge(&of(now), &of(10_000.0)).expect("a baseline")[0].1;
        assert!(within(5_000.0) && within(10_299.0));
        assert!(!within(10_301.0));
    }

    #[test]
    fn rows_with_two_files_and_in_place_have_names_of_their_own() {
        let row = |row: &str, (subject, variant): (&str, &str), value| Row {
            row: row.to_owned(),
            subject: subject.to_owned(),
            variant: variant.to_owned(),
            value,
            unit: String::new(),
        };
        let of = |subject, value| ROWS.map(|name| row(name, subject, value));
        let mut rows = of(MAIN, 2.0).to_vec();
        assert!(values(&rows).is_err());
        rows.extend(of(OURS_IN_PLACE, 1.0));
        let values = values(&rows).expect("all of them");
        assert_eq!(values.len(), 2 * ROWS.len());
        assert_eq!(values["sequential-4k-to-private"], 2.0);
        assert_eq!(values["in-place/sequential-4k-to-private"], 1.0);
    }

    #[test]
    fn a_row_without_a_baseline_is_an_error() {
        let error = judge(&of(1.0), &Values::new()).expect_err("an error");
        assert!(error.to_string().contains(UPDATE), "{error}");
    }
}
