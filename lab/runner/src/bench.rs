// SPDX-License-Identifier: GPL-2.0-or-later
//! `bench`: one guest that measures, on one subject. Its lines go to stdout as they are, with some of
//! ours in the same form; `cargo xtask bench` reads them.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::cgroup::Group;
use crate::strict::Strict;
use crate::vm::{BACKEND, Files, SHARED_BIT, Size};

/// Memory below 4 GiB of a guest that measures above it.
const BELOW_4G: u64 = 128 << 20;
/// The exit status of a guest that is content.
const CONTENT: i32 = 33;

/// Options of `bench`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    files: Files,
    /// The cheapest possible VMM
    #[arg(long, value_name = "PATH")]
    floor: PathBuf,
    /// What runs the guest
    #[arg(long, value_enum)]
    subject: Subject,
    /// Properties of the backend, or `prefault` for the floor, separated by commas
    #[arg(long, value_delimiter = ',')]
    with: Vec<String>,
    /// What the guest measures
    #[arg(long, value_enum)]
    bench: Bench,
    /// Guest memory
    #[arg(long, default_value = "256M")]
    size: Size,
}

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Subject {
    /// memory-backend-guestmemfd
    Ours,
    /// QEMU's own path, with memory-backend-memfd
    Upstream,
    /// The attribute and the hole, and nothing else
    Floor,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Bench {
    /// How long a guest takes to start, and what the kernel holds for it then
    Start,
    /// Conversions by hypercall
    Request,
    /// Those of them that are compared with a baseline
    Check,
    /// Conversions by touching memory
    Fault,
    /// The memory used while the guest converts 96 MiB twice
    Twice,
}

impl Bench {
    fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Request => "request",
            Self::Check => "check",
            Self::Fault => "fault",
            Self::Twice => "twice",
        }
    }

    /// The guest's command line.
    fn append(self) -> String {
        match self {
            Self::Fault => format!("bench=fault shared-bit={SHARED_BIT}"),
            _ => format!("bench={}", self.name()),
        }
    }
}

/// Runs it. True for success.
pub(crate) fn bench(options: &Options) -> bool {
    let result = match options.bench {
        // While it lives.
        Bench::Fault => Strict::on().and_then(|_strict| run(options)),
        _ => run(options),
    };
    if let Err(why) = &result {
        println!("bench: FAILED – {why:#}");
    }
    result.is_ok()
}

fn run(options: &Options) -> Result<()> {
    let group = matches!(options.bench, Bench::Start | Bench::Twice);
    let group = group.then(|| Group::new("bench")).transpose()?;
    let _inside = group.as_ref().map(Group::enter).transpose()?;
    let mut command = command(options)?;
    let before = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let output = child.stdout.take().context("no stdout")?;
    let mut at_start = None;
    for line in BufReader::new(output).lines() {
        let line = line?;
        if line.trim_end().ends_with(" started") && at_start.is_none() {
            let took = before.elapsed();
            at_start = Some(group.as_ref().map(Group::current).transpose()?.unwrap_or(0));
            if let (Bench::Start, Some(group)) = (options.bench, &group) {
                measured("start", "time", took.as_nanos().try_into()?);
                measured(
                    "start",
                    "kernel-memory",
                    group.value("memory.stat", "kernel")?,
                );
            }
        }
        println!("{}", line.trim_end());
    }
    let status = child.wait()?;
    ensure!(
        status.code() == Some(CONTENT),
        "the guest did not end as it should: {status}"
    );
    let at_start = at_start.context("the guest did not start")?;
    if let (Bench::Twice, Some(group)) = (options.bench, &group) {
        measured(
            "twice",
            "peak-memory",
            group.peak()?.saturating_sub(at_start),
        );
    }
    Ok(())
}

fn command(options: &Options) -> Result<Command> {
    match options.subject {
        Subject::Floor => floor(options),
        Subject::Ours => {
            let mut backend = format!("{BACKEND},id=ram0,size={}", options.size.0);
            for property in &options.with {
                backend += &format!(",{property}");
            }
            Ok(qemu(options, backend))
        }
        Subject::Upstream => {
            let size = options.size.0;
            let backend = format!("memory-backend-memfd,id=ram0,size={size},share=on");
            Ok(qemu(options, backend))
        }
    }
}

fn floor(options: &Options) -> Result<Command> {
    let mut command = Command::new(&options.floor);
    let mib = options.size.0 >> 20;
    command.arg("--guest").arg(&options.files.guest);
    command.args(["--append", &options.bench.append()]);
    let (low, high) = match options.bench {
        Bench::Fault => {
            command.args(["--shared-bit", &SHARED_BIT.to_string()]);
            let low = BELOW_4G >> 20;
            (low, mib.checked_sub(low).context("--size is too small")?)
        }
        _ => (mib.min(2048), mib.saturating_sub(2048)),
    };
    command.args(["--low", &low.to_string(), "--high", &high.to_string()]);
    command.args(options.with.iter().map(|word| format!("--{word}")));
    Ok(command)
}

fn qemu(options: &Options, backend: String) -> Command {
    let mut command = Command::new(&options.files.qemu);
    let mut guest = "sw-protected-guest,id=cgs0".to_owned();
    let mut machine = "q35,memory-backend=ram0,confidential-guest-support=cgs0".to_owned();
    if options.bench == Bench::Fault {
        guest += &format!(",shared-bit={SHARED_BIT}");
        machine += &format!(",max-ram-below-4g={BELOW_4G}B");
    }
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .arg("-L")
        .arg(&options.files.firmware)
        .args(["-accel", "kvm", "-cpu", "host", "-smp", "1"])
        .args(["-m", &format!("{}B", options.size.0)])
        .args(["-object", &backend, "-object", &guest])
        .args(["-machine", &machine])
        .args(["-chardev", "file,id=serial0,path=/proc/self/fd/1"])
        .args(["-serial", "chardev:serial0"])
        .args(["-device", "isa-debug-exit,iobase=0x501,iosize=2"])
        .arg("-kernel")
        .arg(&options.files.guest)
        .args(["-append", &options.bench.append()]);
    command
}

/// A line like those of the guest.
fn measured(row: &str, part: &str, value: u64) {
    println!(
        "# measured row={row} direction=none part={part} units=1 samples=1 total={value} \
         least={value} median={value} p99={value} most={value}"
    );
}
