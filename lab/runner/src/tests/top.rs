// SPDX-License-Identifier: GPL-2.0-or-later
//! `guestmemfd-top` beside a real guest.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::{Context, GUEST_LIMIT, SIZE, Test};
use crate::guest;
use crate::probe::Need;
use crate::qemu::EXIT_LIMIT;
use crate::query;
use crate::vm::{Scenario, Vm};

const POLL: Duration = Duration::from_millis(50);

/// The line that begins a record.
const HEADER_LINES: usize = 1;

pub(super) fn tests(program: Option<&Path>) -> Vec<Test> {
    let Some(program) = program.map(Path::to_owned) else {
        return Vec::new();
    };
    let run = move |context: &Context| record(context, &program);
    vec![Test::new("top/record", &[Need::PrivateMemory], run)]
}

/// A record from before the guest's start to QEMU's end agrees with what QEMU says.
fn record(context: &Context, program: &Path) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let (socket, file) = (dir.path().join("qmp"), dir.path().join("record"));
    let vm = Vm::conformance(&context.files, Scenario::Hypercall, false, SIZE, 2).with_arguments(
        &format!("-qmp unix:{},server=on,wait=off", socket.display()),
    );
    let mut qemu = context.start(&vm)?;
    let mut top = Recorder(
        Command::new(program)
            .arg(&socket)
            .args(["--interval", "0.2", "--record"])
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(File::create(context.log.join("top"))?)
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?,
    );
    top.wait_for(&file, 1)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backend = query::backend(&mut qemu.qmp)?;
    // One may have begun before the guest's end, the one after it has not.
    let so_far = snapshots(&file);
    top.wait_for(&file, so_far + 2)?;
    guest::finish(&mut qemu)?;
    top.ends_well(context)?;

    let report = Command::new(program)
        .args(["--json", "--replay"])
        .arg(&file)
        .output()?;
    let report: Value = serde_json::from_slice(&report.stdout).context("the report is no JSON")?;
    let shown = &report["backends"][0];
    ensure!(
        shown["info"]["private-bytes"] == backend.private_bytes
            && shown["rates"]["hypercalls"].as_f64() > Some(0.0),
        "it shows {shown}, QEMU says {backend:?}"
    );
    let runs = shown["map"]["runs"].as_array().context("no map")?;
    for (state, bytes) in [
        ("undecided", backend.undecided_bytes),
        ("shared", backend.shared_bytes),
        ("private", backend.private_bytes),
        ("transition", backend.transition_bytes),
    ] {
        let runs = runs.iter().filter(|run| run[0] == state);
        let sum: u64 = runs.filter_map(|run| run[1].as_u64()).sum();
        ensure!(sum == bytes, "{sum} bytes {state} in the map, not {bytes}");
    }
    Ok(())
}

/// Snapshots in a record.
fn snapshots(file: &Path) -> usize {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines().count().saturating_sub(HEADER_LINES)
}

/// The program while it records.
#[derive(Debug)]
struct Recorder(Child);

impl Recorder {
    /// Waits until the record has so many snapshots.
    fn wait_for(&mut self, file: &Path, count: usize) -> Result<()> {
        let deadline = Instant::now() + EXIT_LIMIT;
        while snapshots(file) < count {
            if let Some(status) = self.0.try_wait()? {
                bail!("it ended while it should record: {status}");
            }
            ensure!(Instant::now() < deadline, "it does not record");
            thread::sleep(POLL);
        }
        Ok(())
    }

    /// Waits for its end, which is that of QEMU.
    fn ends_well(&mut self, context: &Context) -> Result<()> {
        let deadline = Instant::now() + EXIT_LIMIT;
        let status = loop {
            if let Some(status) = self.0.try_wait()? {
                break status;
            }
            ensure!(Instant::now() < deadline, "it does not end when QEMU does");
            thread::sleep(POLL);
        };
        let said = fs::read_to_string(context.log.join("top"))?;
        ensure!(
            status.success() && said.contains("QEMU has ended"),
            "{status}: {said}"
        );
        Ok(())
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        // It is gone already if all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
