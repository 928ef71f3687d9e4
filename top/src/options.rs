// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ArgGroup, CommandFactory, Parser};

/// Show what the memory of a guest on memory-backend-guestmemfd is doing
///
/// Asks QEMU over QMP, with query-guestmemfd and x-query-guestmemfd-map, and shows for every backend
/// a map of its memory by state, the bytes in each state, and conversions, memory faults, hypercalls
/// and refusals in all and per second. Without --once, --json and --svg it is a live view.
#[derive(Debug, Parser)]
#[command(version, after_long_help = MORE)]
#[command(group = ArgGroup::new("from").required(true).args(["socket", "replay"]))]
pub(crate) struct Options {
    /// QEMU's QMP socket
    ///
    /// The PATH of QEMU's -qmp unix:PATH,server=on,wait=off. QEMU talks to one client at a time on
    /// it; give QEMU a second -qmp if something else uses the first.
    socket: Option<PathBuf>,

    /// Show this backend; the live view starts with it
    #[arg(long, value_name = "ID")]
    pub(crate) backend: Option<String>,

    /// Print a report and end
    #[arg(long, conflicts_with = "json")]
    pub(crate) once: bool,

    /// Print one snapshot in JSON and end
    #[arg(long)]
    pub(crate) json: bool,

    /// Draw a report into FILE and end
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,

    /// Write every snapshot to FILE, which must not exist
    ///
    /// With the live view, or without it where stdout is not a terminal: then until QEMU ends or a
    /// signal (INT, TERM, HUP) ends this program.
    #[arg(long, value_name = "FILE", conflicts_with = "replay")]
    pub(crate) record: Option<PathBuf>,

    /// Show what --record has written to FILE
    ///
    /// Reports show the last snapshot, with rates over the whole record.
    #[arg(long, value_name = "FILE")]
    pub(crate) replay: Option<PathBuf>,

    /// Time between snapshots [default: 1; when replaying, as recorded]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) interval: Option<Duration>,

    /// How long QEMU may take for each answer
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "5")]
    pub(crate) timeout: Duration,
}

const MORE: &str = "\
Keys of the live view:
  q, Esc, Ctrl-C  quit
  p               pause, and go on; a record goes on
  arrows          choose a backend
  ?               help

The map:
  Cells go from left to right and down; the number before a row is the offset in the backend where
  it begins, not a guest physical address. A capital or a point stands for a cell that is all in one
  state, a small letter for a mixed one that is mostly in this state:
    .  u  undecided: nobody has chosen yet
    S  s  shared with the host
    P  p  private to the guest
    T  t  in transition: claimed by a conversion that is under way
    ?     not read: the map has more than 65536 runs of states, of which the first are read

Environment:
  NO_COLOR   no colours in the live view
  COLORTERM  truecolor or 24bit: mixed cells have mixed colours

Exit status:
  0  in order, also when QEMU ended by itself while recording
  1  a failure, which stderr tells
  2  wrong options

Examples:
  guestmemfd-top /run/qmp.sock
  guestmemfd-top /run/qmp.sock --once --backend ram0
  guestmemfd-top /run/qmp.sock --record boot.jsonl --interval 0.2
  guestmemfd-top --replay boot.jsonl --svg boot.svg";

fn seconds(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is no number from 0.01 to 3600");
    let seconds: f64 = text.parse().map_err(|_| wrong())?;
    match (0.01..=3600.0).contains(&seconds) {
        true => Ok(Duration::from_secs_f64(seconds)),
        false => Err(wrong()),
    }
}

impl Options {
    /// Ends this program if the options make no sense with this stdout.
    pub(crate) fn check(&self, terminal: bool) {
        if !terminal && !self.reports() && self.record.is_none() {
            let message = "stdout is not a terminal: use --once, --json, --svg or --record";
            Self::command()
                .error(ErrorKind::MissingRequiredArgument, message)
                .exit();
        }
    }

    /// Is there something to report, in place of a live view?
    pub(crate) fn reports(&self) -> bool {
        self.once || self.json || self.svg.is_some()
    }

    /// QEMU's, where a record is not replayed.
    pub(crate) fn socket(&self) -> &Path {
        self.socket.as_deref().unwrap_or(Path::new(""))
    }

    /// Between two questions to QEMU.
    pub(crate) fn interval(&self) -> Duration {
        self.interval.unwrap_or(Duration::from_secs(1))
    }
}
