// SPDX-License-Identifier: GPL-2.0-or-later
//! `boot`: one guest, with its memory shown before and after.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::linux::{self, Job};
use crate::probe::{Machine, Need};
use crate::qemu::{self, Qemu};
use crate::query::{self, Backend};
use crate::strict::Strict;
use crate::tap::Tap;
use crate::vm::{Files, Scenario, Size, Vm};
use crate::{guest, memory, show};

/// Options of `boot`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    files: Files,
    /// What the guest does
    #[arg(long, value_enum, default_value = "all")]
    scenario: Scenario,
    /// Guest memory
    #[arg(long, default_value = "256M")]
    size: Size,
    /// Number of vCPUs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    smp: u32,
    /// Seconds that the guest may run
    #[arg(long, default_value_t = 300)]
    limit: u64,
    /// Folder for QEMU's command line, stderr, the serial port's output and the QMP transcript
    #[arg(long, value_name = "DIR", default_value_os_t = default_log())]
    out: PathBuf,
    /// Further arguments for QEMU
    #[arg(last = true, value_name = "QEMU ARGUMENTS")]
    extra: Vec<String>,
}

fn default_log() -> PathBuf {
    std::env::temp_dir().join("guestmemfd-lab").join("boot")
}

/// Boots and prints; the last line says how it went. True for success.
pub(crate) fn boot(options: &Options) -> bool {
    match try_boot(options) {
        Ok(line) => {
            println!("boot: ok – {line}");
            true
        }
        Err(why) => {
            println!("logs are in {}", options.out.display());
            // One line, whatever QEMU said.
            let why = format!("{why:#}").replace('\n', " / ");
            println!("boot: FAILED – {why}");
            false
        }
    }
}

fn try_boot(options: &Options) -> Result<String> {
    let machine = Machine::probe();
    let needs = options.scenario.needs();
    if let Some(why) = needs.iter().find_map(|need| machine.lacks(*need)) {
        bail!("this machine cannot run the guest: {why}");
    }
    let strict = match machine.lacks(Need::StrictMode) {
        _ if !options.scenario.uses_strict_mode() => None,
        None => Some(Strict::on()?),
        Some(why) => {
            println!("without memory faults: {why}");
            None
        }
    };

    let linux = options.scenario == Scenario::Linux;
    let mut vm = match linux {
        true => options
            .files
            .linux
            .vm(Job::Work, options.size, options.smp)?,
        false => Vm::conformance(
            &options.files,
            options.scenario,
            strict.is_some(),
            options.size,
            options.smp,
        ),
    };
    vm.extra.extend_from_slice(&options.extra);
    let arguments = vm.arguments(&options.files.firmware);
    let mut qemu = qemu::start_running(&options.files.qemu, &arguments, &options.out, true)?;

    println!("before (guest paused):");
    show_memory(&mut qemu)?;
    let limit = Duration::from_secs(options.limit);
    let ran = match linux {
        true => guest::run_through_reboot(&mut qemu, limit),
        false => guest::run(&mut qemu, limit),
    };
    println!("after:");
    let after = show_memory(&mut qemu);
    // Why the guest did not end matters more than that QEMU then did not answer.
    ran?;
    let after = after?;
    if linux {
        let tap = linux::finish(&mut qemu, Tap::default())?;
        return linux_summary(&query::only(after)?, &tap);
    }
    guest::finish(&mut qemu)?;
    summary(&after)
}

fn linux_summary(backend: &Backend, tap: &Tap) -> Result<String> {
    linux::check(backend, tap)?;
    Ok(format!(
        "{} tests of the guest, {} % of its memory private, {} hypercalls",
        tap.verdict()?,
        linux::percent_private(backend),
        backend.hypercalls
    ))
}

fn show_memory(qemu: &mut Qemu) -> Result<Vec<Backend>> {
    qemu.alive()?;
    let backends = query::backends(&mut qemu.qmp)?;
    println!("{}", show::map(&backends, &memory::backings(qemu.pid())?));
    println!("{}", show::counters(&backends));
    Ok(backends)
}

fn summary(backends: &[Backend]) -> Result<String> {
    ensure!(!backends.is_empty(), "query-guestmemfd shows no backend");
    let sum = |value: fn(&Backend) -> u64| backends.iter().map(value).sum::<u64>();
    Ok(format!(
        "{} pages private, {} shared, {} hypercalls, {} memory faults",
        sum(|b| b.private_bytes) / 4096,
        sum(|b| b.shared_bytes) / 4096,
        sum(|b| b.hypercalls),
        sum(|b| b.faults_private + b.faults_shared)
    ))
}
