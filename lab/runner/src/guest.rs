// SPDX-License-Identifier: GPL-2.0-or-later
//! Running the conformance guest to its end.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use crate::qemu::{EXIT_LIMIT, Qemu};
use crate::tap::Tap;

/// QEMU's exit status after a guest that is content wrote 0x10 to isa-debug-exit.
pub(crate) const CONTENT: i32 = 33;

/// Lets the paused guest run until it ends; QEMU stays, paused, and answers QMP.
pub(crate) fn run(qemu: &mut Qemu, limit: Duration) -> Result<()> {
    run_with_resets(qemu, limit, 0)
}

/// The same after a reset: SeaBIOS finds that it has run before and resets the machine itself, once.
pub(crate) fn run_again(qemu: &mut Qemu, limit: Duration) -> Result<()> {
    run_with_resets(qemu, limit, 1)
}

/// The same for a guest that reboots once.
pub(crate) fn run_through_reboot(qemu: &mut Qemu, limit: Duration) -> Result<()> {
    run_with_resets(qemu, limit, 2)
}

/// Resets the machine, and waits until that is done.
pub(crate) fn reset(qemu: &mut Qemu) -> Result<()> {
    qemu.qmp.run("system_reset", json!({}))?;
    qemu.qmp.wait_event(&["RESET"], EXIT_LIMIT)?;
    Ok(())
}

fn run_with_resets(qemu: &mut Qemu, limit: Duration, resets: usize) -> Result<()> {
    let deadline = Instant::now() + limit;
    qemu.qmp.run("cont", json!({}))?;
    let mut seen = 0;
    let event = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let event = qemu.qmp.wait_event(&["SHUTDOWN", "STOP", "RESET"], left);
        let event = event.with_context(|| did_not_end(qemu, limit))?;
        if event.name != "RESET" || seen == resets {
            break event;
        }
        seen += 1;
    };
    match (event.name.as_str(), event.data["reason"].as_str()) {
        ("SHUTDOWN", Some("guest-shutdown")) => {}
        ("STOP", _) => bail!("the guest was stopped: status {}", status(qemu)?),
        ("RESET", _) => bail!("the guest was reset, by itself or by a triple fault"),
        (name, reason) => bail!(
            "the guest did not end itself: {name}, {}",
            reason.unwrap_or("")
        ),
    }
    // The event is sent before the vCPUs have stopped.
    qemu.qmp.wait_event(&["STOP"], EXIT_LIMIT)?;
    let status = status(qemu)?;
    ensure!(
        status == "shutdown",
        "after the guest's end QEMU's status is {status}"
    );
    Ok(())
}

fn did_not_end(qemu: &mut Qemu, limit: Duration) -> String {
    let mut last = None;
    while let Some(line) = qemu.serial_line(Duration::ZERO) {
        last = Some(line);
    }
    format!(
        "the guest did not end within {} s; the last it said: {}\nits CPUs:\n{}",
        limit.as_secs(),
        last.as_deref().unwrap_or("nothing"),
        registers(qemu).unwrap_or_else(|why| format!("{why:#}"))
    )
}

fn registers(qemu: &mut Qemu) -> Result<String> {
    monitor(qemu, "info registers -a")
}

/// What the human monitor says to a line.
pub(crate) fn monitor(qemu: &mut Qemu, line: &str) -> Result<String> {
    let command = json!({"command-line": line});
    let answer = qemu.qmp.run("human-monitor-command", command)?;
    Ok(answer.as_str().unwrap_or_default().trim().to_owned())
}

/// Ends QEMU; everything that the guest has said must be a complete report of success, and its exit
/// status must agree.
pub(crate) fn finish(qemu: &mut Qemu) -> Result<Tap> {
    let ended = qemu.quit()?;
    let tap = report(qemu);
    tap.verdict()?;
    ensure!(
        ended.status.code() == Some(CONTENT),
        "all tests of the guest are ok but QEMU ended with {}, not with status {CONTENT}",
        ended.status
    );
    Ok(tap)
}

/// All lines up to the end of a QEMU that has ended.
pub(crate) fn report(qemu: &Qemu) -> Tap {
    let mut tap = Tap::default();
    report_into(qemu, &mut tap);
    tap
}

/// The same where some lines have been read.
pub(crate) fn report_into(qemu: &Qemu, tap: &mut Tap) {
    // The port's end has closed, so nothing waits this long unless a line is still on its way.
    while let Some(line) = qemu.serial_line(Duration::from_secs(10)) {
        tap.line(&line);
    }
}

/// Waits until the guest has said a line that begins like this.
pub(crate) fn wait_line(qemu: &Qemu, begin: &str, limit: Duration) -> Result<String> {
    wait_line_into(qemu, &mut Tap::default(), begin, limit)
}

/// The same where all lines up to it count.
pub(crate) fn wait_line_into(
    qemu: &Qemu,
    tap: &mut Tap,
    begin: &str,
    limit: Duration,
) -> Result<String> {
    let deadline = Instant::now() + limit;
    while let Some(line) = qemu.serial_line(deadline.saturating_duration_since(Instant::now())) {
        tap.line(&line);
        if line.starts_with(begin) {
            return Ok(line);
        }
    }
    match qemu.last_words() {
        Some(words) => bail!("QEMU ended before the guest said {begin:?}: {words}"),
        None => bail!(
            "the guest did not say {begin:?} within {} s",
            limit.as_secs()
        ),
    }
}

/// What a line of the guest's says as `name=0x...`.
pub(crate) fn address(line: &str, name: &str) -> Result<u64> {
    let mut words = line.split_whitespace();
    let value = words.find_map(|word| word.strip_prefix(name)?.strip_prefix("=0x"));
    let value = value.with_context(|| format!("the guest does not say {name}: {line}"))?;
    Ok(u64::from_str_radix(value, 16)?)
}

/// QEMU's run state.
pub(crate) fn status(qemu: &mut Qemu) -> Result<String> {
    let answer = qemu.qmp.run("query-status", json!({}))?;
    let status = answer["status"]
        .as_str()
        .context("query-status without a status")?;
    Ok(status.to_owned())
}
