// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshots in a file: a line that says what it is, then one snapshot a line, in JSON.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::snapshot::Snapshot;

const HEADER: &str = r#"{"guestmemfd-top":1}"#;
/// The longest line that is read: a snapshot of a hundred backends.
const LINE_LIMIT: u64 = 256 << 20;

/// A record that grows.
#[derive(Debug)]
pub(crate) struct Writer {
    file: File,
}

impl Writer {
    /// Makes the file, which must not be there yet.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = File::create_new(path);
        let mut file =
            file.with_context(|| format!("cannot make the record {}", path.display()))?;
        writeln!(file, "{HEADER}").context("cannot write the record")?;
        Ok(Self { file })
    }

    /// Appends; what has been written stays whole if this program ends.
    pub(crate) fn write(&mut self, snapshot: &Snapshot) -> Result<()> {
        let mut line = serde_json::to_vec(snapshot)?;
        line.push(b'\n');
        let written = self.file.write_all(&line);
        written.context("cannot write the record")
    }
}

/// A record that is read from its start on.
#[derive(Debug)]
pub(crate) struct Reader {
    file: BufReader<File>,
    line: u64,
    elapsed: u64,
    /// Why it ended before the file did.
    pub(crate) cut: Option<String>,
}

impl Reader {
    /// Opens one.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path)
            .with_context(|| format!("cannot open the record {}", path.display()))?;
        let mut file = BufReader::new(file);
        let mut header = Vec::new();
        let length = HEADER.len() as u64 + 1;
        (&mut file).take(length).read_to_end(&mut header)?;
        ensure!(
            header == format!("{HEADER}\n").as_bytes(),
            "{} is no record of guestmemfd-top: its first line is not {HEADER}",
            path.display()
        );
        Ok(Self {
            file,
            line: 1,
            elapsed: 0,
            cut: None,
        })
    }

    fn read(&mut self) -> Result<Option<Snapshot>> {
        let mut line = Vec::new();
        self.line += 1;
        let limited = &mut (&mut self.file).take(LINE_LIMIT);
        if limited.read_until(b'\n', &mut line)? == 0 {
            return Ok(None);
        }
        if !line.ends_with(b"\n") {
            bail!("it ends in the middle");
        }
        let snapshot: Snapshot = serde_json::from_slice(&line)?;
        snapshot.check()?;
        ensure!(snapshot.elapsed >= self.elapsed, "its time goes back");
        self.elapsed = snapshot.elapsed;
        Ok(Some(snapshot))
    }
}

impl Iterator for Reader {
    type Item = Snapshot;

    /// The next whole snapshot.
    fn next(&mut self) -> Option<Snapshot> {
        if self.cut.is_some() {
            return None;
        }
        self.read().unwrap_or_else(|error| {
            let snapshots = self.line - 2;
            self.cut = Some(format!(
                "line {} of the record is not a whole snapshot ({error:#}); the {snapshots} before it are shown",
                self.line
            ));
            None
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::tests::snapshot;

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        let snapshots = [snapshot(0, 1), snapshot(1000, 2), snapshot(1000, 2)];
        let mut writer = Writer::create(&path).unwrap();
        for snapshot in &snapshots {
            writer.write(snapshot).unwrap();
        }
        let mut reader = Reader::open(&path).unwrap();
        let read: Vec<_> = reader.by_ref().collect();
        assert_eq!(read, snapshots);
        assert_eq!(reader.cut, None);
    }

    #[test]
    fn what_follows_a_bad_line_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record");
        let line = |snapshot: &Snapshot| serde_json::to_string(snapshot).unwrap();
        let good = line(&snapshot(2000, 1));
        let mut wrong = snapshot(3000, 1);
        wrong.backends[0].info.size = 4097;
        for (bad, why) in [
            ("garbage".to_owned(), "expected value"),
            (line(&snapshot(1000, 1)), "goes back"),
            (line(&wrong), "add up"),
            ("\u{1b}".repeat(3), "expected value"),
        ] {
            std::fs::write(&path, format!("{HEADER}\n{good}\n{bad}\n{good}\n")).unwrap();
            let mut reader = Reader::open(&path).unwrap();
            assert_eq!(reader.by_ref().count(), 1);
            let cut = reader.cut.unwrap();
            assert!(cut.contains("line 3") && cut.contains(why), "{cut}");
        }
        std::fs::write(&path, "\u{0}".repeat(100)).unwrap();
        assert!(Reader::open(&path).is_err());
    }
}
