// SPDX-License-Identifier: GPL-2.0-or-later
//! `report.json`: what has been measured of the same versions, in one run or in several.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use super::rows::Row;

pub(super) type Versions = BTreeMap<String, String>;

/// What the file holds.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub(super) struct Report {
    /// When something was last added.
    pub(super) date: String,
    pub(super) versions: Versions,
    pub(super) rows: Vec<Row>,
}

impl Report {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} is no report of this command", path.display()))
    }
}

/// A report that grows, and its file.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) path: PathBuf,
    pub(super) report: Report,
}

impl Record {
    /// Goes on with a report of the same versions, or begins one. Another one that is there stays beside it;
    /// then the second value says so.
    pub(super) fn open(path: PathBuf, versions: Versions) -> Result<(Self, Option<String>)> {
        let why = match Report::read(&path) {
            Ok(report) if report.versions == versions => return Ok((Self { path, report }, None)),
            Ok(_) => Some(format!("{} is of other versions", path.display())),
            Err(error) => match error.downcast_ref::<std::io::Error>() {
                Some(error) if error.kind() == ErrorKind::NotFound => None,
                _ => Some(format!("{error:#}")),
            },
        };
        let note = why.map(|why| {
            let old = path.with_extension("json.old");
            fs::rename(&path, &old).with_context(|| format!("cannot make {}", old.display()))?;
            Ok::<_, anyhow::Error>(format!("{why}; it is now {}", old.display()))
        });
        let report = Report {
            date: String::new(),
            versions,
            rows: Vec::new(),
        };
        let note = note.transpose()?;
        Ok((Self { path, report }, note))
    }

    /// Puts newer rows in the place of older ones, and writes all to the file.
    pub(super) fn add(&mut self, rows: &[Row]) -> Result<()> {
        for row in rows {
            let known = self.report.rows.iter_mut().find(|known| known.is_of(row));
            match known {
                Some(known) => known.clone_from(row),
                None => self.report.rows.push(row.clone()),
            }
        }
        let date = crate::process::output(crate::process::command("date", ["-u", "+%FT%TZ"]))?;
        date.trim().clone_into(&mut self.report.date);
        self.write()
            .with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// All of it or nothing.
    fn write(&self) -> Result<()> {
        let folder = self.path.parent().context("no folder")?;
        let mut file = tempfile::Builder::new()
            .permissions(Permissions::from_mode(0o666))
            .tempfile_in(folder)?;
        let text = serde_json::to_string_pretty(&self.report)? + "\n";
        file.write_all(text.as_bytes())?;
        file.persist(&self.path)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &str, variant: &str, value: f64) -> Row {
        Row {
            row: name.to_owned(),
            subject: "ours".to_owned(),
            variant: variant.to_owned(),
            value,
            unit: "instructions/page".to_owned(),
        }
    }

    /// A run that measures rows of a version.
    fn run(folder: &Path, version: &str, rows: &[Row]) -> (Report, Option<String>) {
        let versions = Versions::from([("guestmemfd".to_owned(), version.to_owned())]);
        let path = folder.join("report.json");
        let (mut record, note) = Record::open(path, versions).expect("a report");
        record.add(rows).expect("a report");
        (Report::read(&record.path).expect("a report"), note)
    }

    #[test]
    fn a_partial_run_replaces_its_own_rows_only() {
        let folder = tempfile::tempdir().expect("a folder");
        let first = [row("a", "x", 1.0), row("a", "y", 2.0), row("b", "x", 3.0)];
        run(folder.path(), "1", &first);
        let second = [row("a", "y", 20.0), row("c", "x", 4.0)];
        let (report, note) = run(folder.path(), "1", &second);
        assert_eq!(note, None);
        let values: Vec<f64> = report.rows.iter().map(|row| row.value).collect();
        assert_eq!(values, [1.0, 20.0, 3.0, 4.0]);
    }

    #[test]
    fn other_versions_begin_a_report_and_keep_the_old_one() {
        let folder = tempfile::tempdir().expect("a folder");
        let (first, _) = run(folder.path(), "1", &[row("a", "x", 1.0)]);
        let (second, note) = run(folder.path(), "2", &[row("b", "x", 2.0)]);
        assert_eq!(second.rows, [row("b", "x", 2.0)]);
        let old = folder.path().join("report.json.old");
        assert!(note.expect("a note").contains("report.json.old"));
        assert_eq!(Report::read(&old).expect("a report"), first);
    }

    #[test]
    fn what_is_no_report_is_kept_beside_the_new_one() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("report.json"), "{\"date\": 1").expect("a file");
        let (report, note) = run(folder.path(), "1", &[row("a", "x", 1.0)]);
        assert_eq!(report.rows.len(), 1);
        assert!(note.expect("a note").contains("no report"));
        let old = fs::read_to_string(folder.path().join("report.json.old")).expect("a file");
        assert_eq!(old, "{\"date\": 1");
    }

    #[test]
    fn the_report_names_rows_as_others_expect_them() {
        let folder = tempfile::tempdir().expect("a folder");
        run(folder.path(), "1", &[row("a", "x", 1.5)]);
        let text = fs::read_to_string(folder.path().join("report.json")).expect("a file");
        let value: serde_json::Value = serde_json::from_str(&text).expect("json");
        assert_eq!(value["rows"][0]["row"], "a");
        assert_eq!(value["rows"][0]["value"], 1.5);
        assert!(value["date"].is_string() && value["versions"].is_object());
    }
}
