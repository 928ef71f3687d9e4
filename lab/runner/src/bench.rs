// SPDX-License-Identifier: GPL-2.0-or-later
//! `bench`: one guest that measures, on one subject. Its lines go to stdout as they are, with some of
//! ours in the same form; `cargo xtask bench` reads them.

mod alone;
mod held;
mod private;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::cgroup::Group;
use crate::marks;
use crate::memory;
use crate::strict::Strict;
use crate::vm::{BACKEND, Files, SHARED_BIT, Size};

/// Memory below 4 GiB of a guest that measures above it.
const BELOW_4G: u64 = 128 << 20;
const PAGE: u64 = 4096;
/// The exit status of a guest that is content.
const CONTENT: i32 = 33;

/// Options of `bench`.
#[derive(Clone, Debug, clap::Args)]
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
    /// How many vCPUs
    #[arg(long, default_value_t = 1)]
    cpus: u8,
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
    /// The attribute of the file, and nothing else
    FloorInPlace,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Bench {
    /// How long a guest takes to start, and what the kernel holds for it then
    Start,
    /// Conversions by hypercall
    Request,
    /// Those for single pages in order, over 1 GiB
    Sequential,
    /// Those of them that are compared with a baseline
    Check,
    /// Conversions by touching memory
    Fault,
    /// The memory used while the guest converts 96 MiB twice
    Twice,
    /// The first touch of pages of an ordinary VM
    Touch,
    /// Conversions by several vCPUs at once
    Scale,
    /// How much longer QEMU takes to be ready with an ordinary VM that has all its memory at once
    Prealloc,
    /// Reads from a virtio-blk disk
    Disk,
    /// The same in an ordinary VM
    OrdinaryDisk,
    /// One request for 64 GiB that nobody has touched, and what the kernel holds for it then
    Vast,
    /// A page that somebody holds for longer than a request waits, without a guest
    Held,
    /// Memory that starts private, without a guest
    Private,
}

impl Bench {
    fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Request => "request",
            Self::Sequential => "sequential",
            Self::Check => "check",
            Self::Fault => "fault",
            Self::Twice => "twice",
            Self::Touch => "touch",
            Self::Scale => "scale",
            Self::Prealloc => "prealloc",
            Self::Disk | Self::OrdinaryDisk => "disk",
            Self::Vast => "vast",
            Self::Held => "held",
            Self::Private => "private",
        }
    }

    /// Is it an ordinary VM, without private memory?
    fn ordinary(self) -> bool {
        matches!(self, Self::Prealloc | Self::Touch | Self::OrdinaryDisk)
    }

    /// The guest's command line.
    fn append(self, cpus: u8) -> String {
        match self {
            Self::Scale => format!("bench=scale smp={cpus} timeout=900"),
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
        Bench::Prealloc => prealloc(options),
        Bench::Held => held::measure(options.subject),
        Bench::Private => private::measure(),
        _ => run(options),
    };
    if let Err(why) = &result {
        println!("bench: FAILED – {why:#}");
    }
    result.is_ok()
}

/// What a guest that runs to its end has taken.
struct Taken {
    /// From the start of the VMM to the guest's first line.
    start: Duration,
    /// Bytes in use by then, if that is counted.
    at_start: u64,
    /// Those of them that the kernel uses for itself.
    kernel: u64,
    /// What it then uses more for the first request, in the whole system, if that is looked at.
    for_request: Option<u64>,
}

fn run(options: &Options) -> Result<()> {
    let group = matches!(options.bench, Bench::Start | Bench::Twice);
    let group = group.then(|| Group::new("bench")).transpose()?;
    let _inside = group.as_ref().map(Group::enter).transpose()?;
    let taken = guest(options, group.as_ref())?;
    match (options.bench, &group) {
        (Bench::Start, Some(_)) => {
            measured("start", "time", 1, nanoseconds(taken.start)?);
            measured("start", "kernel-memory", 1, taken.kernel);
        }
        (Bench::Twice, Some(group)) => {
            let beyond = group.peak()?.saturating_sub(taken.at_start);
            measured("twice", "peak-memory", 1, beyond);
        }
        _ => {}
    }
    if let Some(bytes) = taken.for_request {
        measured("untouched-64g", "kernel-memory", 1, bytes);
    }
    Ok(())
}

fn prealloc(options: &Options) -> Result<()> {
    let time = |property: Option<&str>| -> Result<u64> {
        let mut options = options.clone();
        options.with.extend(property.map(str::to_owned));
        nanoseconds(until_ready(command(&options)?)?)
    };
    let without = time(None)?;
    let more = time(Some("prealloc=on"))?.saturating_sub(without);
    measured("ordinary-ready", "time", 1, without);
    measured("ordinary-prealloc", "page", options.size.0 / PAGE, more);
    Ok(())
}

/// From the start of QEMU to its monitor's first word, which comes when everything is set up. The guest
/// does not run.
fn until_ready(mut command: Command) -> Result<Duration> {
    command.args(["-S", "-monitor", "stdio"]);
    marks::begin();
    let before = Instant::now();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let mut output = child.stdout.take().context("no stdout")?;
    let read = output.read(&mut [0])?;
    let took = before.elapsed();
    marks::end();
    ensure!(read == 1, "QEMU ended before it was ready");
    writeln!(child.stdin.take().context("no stdin")?, "quit")?;
    std::io::copy(&mut output, &mut std::io::sink())?;
    let status = child.wait()?;
    ensure!(status.success(), "QEMU did not end as it should: {status}");
    Ok(took)
}

/// Runs a guest to its end, and hands on what it says.
fn guest(options: &Options, group: Option<&Group>) -> Result<Taken> {
    let mut command = command(options)?;
    // In all other cases the guest has marks of its own.
    let mark = |mark: fn()| (options.bench == Bench::Start).then(mark);
    mark(marks::begin);
    let before = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let output = child.stdout.take().context("no stdout")?;
    let mut taken: Option<Taken> = None;
    let mut before_request = 0;
    for line in BufReader::new(output).lines() {
        let line = line?;
        if line.trim_end().ends_with(" started") && taken.is_none() {
            let start = before.elapsed();
            mark(marks::end);
            let current = group.map(Group::current).transpose()?;
            let kernel = group.map(|group| group.value("memory.stat", "kernel"));
            taken = Some(Taken {
                start,
                at_start: current.unwrap_or(0),
                kernel: kernel.transpose()?.unwrap_or(0),
                for_request: None,
            });
            // Work beside what others measure.
            if options.bench == Bench::Vast {
                before_request = memory::kernel_bytes()?;
            }
        }
        // Attributes are in no cgroup on some kernels.
        if let (Bench::Vast, Some(taken)) = (options.bench, &mut taken)
            && line.contains("part=whole")
            && taken.for_request.is_none()
        {
            let now = memory::kernel_bytes()?;
            taken.for_request = Some(now.saturating_sub(before_request));
        }
        println!("{}", line.trim_end());
    }
    let status = child.wait()?;
    ensure!(
        status.code() == Some(CONTENT),
        "the guest did not end as it should: {status}"
    );
    taken.context("the guest did not start")
}

fn command(options: &Options) -> Result<Command> {
    match options.subject {
        Subject::Floor | Subject::FloorInPlace => floor(options),
        Subject::Ours => {
            let mut backend = format!("{BACKEND},id=ram0,size={}", options.size.0);
            for property in &options.with {
                backend += &format!(",{property}");
            }
            Ok(qemu(options, backend))
        }
        Subject::Upstream => {
            let size = options.size.0;
            let mut backend = format!("memory-backend-memfd,id=ram0,size={size},share=on");
            for property in &options.with {
                backend += &format!(",{property}");
            }
            Ok(qemu(options, backend))
        }
    }
}

fn floor(options: &Options) -> Result<Command> {
    let mut command = Command::new(&options.floor);
    let mib = options.size.0 >> 20;
    command.arg("--guest").arg(&options.files.guest);
    command.args(["--append", &options.bench.append(options.cpus)]);
    let (low, high) = match options.bench {
        Bench::Fault => {
            command.args(["--shared-bit", &SHARED_BIT.to_string()]);
            let low = BELOW_4G >> 20;
            (low, mib.checked_sub(low).context("--size is too small")?)
        }
        _ => (mib.min(2048), mib.saturating_sub(2048)),
    };
    command.args(["--cpus", &options.cpus.to_string()]);
    command.args(["--low", &low.to_string(), "--high", &high.to_string()]);
    command.args(options.with.iter().map(|word| format!("--{word}")));
    if options.subject == Subject::FloorInPlace {
        command.arg("--in-place");
    }
    Ok(command)
}

fn qemu(options: &Options, backend: String) -> Command {
    let mut command = Command::new(&options.files.qemu);
    let mut guest = "sw-protected-guest,id=cgs0".to_owned();
    let mut machine = "q35,memory-backend=ram0".to_owned();
    if !options.bench.ordinary() {
        machine += ",confidential-guest-support=cgs0";
    }
    if options.bench == Bench::Fault {
        guest += &format!(",shared-bit={SHARED_BIT}");
        machine += &format!(",max-ram-below-4g={BELOW_4G}B");
    }
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .arg("-L")
        .arg(&options.files.firmware)
        .args(["-accel", "kvm", "-cpu", "host"])
        .args(["-smp", &options.cpus.to_string()])
        .args(["-m", &format!("{}B", options.size.0)])
        .args(["-object", &backend])
        .args(["-machine", &machine])
        .args(["-chardev", "file,id=serial0,path=/proc/self/fd/1"])
        .args(["-serial", "chardev:serial0"])
        .args(["-device", "isa-debug-exit,iobase=0x501,iosize=2"])
        .arg("-kernel")
        .arg(&options.files.guest)
        .args(["-append", &options.bench.append(options.cpus)]);
    if !options.bench.ordinary() {
        command.args(["-object", &guest]);
    }
    if options.bench.name() == "disk" {
        // The vCPU carries out the request itself, and no file is read: what is left is QEMU's own
        // part, and the same each time.
        command
            .args(["-blockdev", "driver=null-co,node-name=disk,read-zeroes=on"])
            .args(["-device", "virtio-blk-pci,drive=disk,ioeventfd=off"]);
    }
    command
}

fn nanoseconds(time: Duration) -> Result<u64> {
    u64::try_from(time.as_nanos()).context("too long")
}

/// A line like those of the guest.
fn measured(row: &str, part: &str, units: u64, value: u64) {
    println!(
        "# measured row={row} direction=none part={part} units={units} samples=1 total={value} \
         least={value} median={value} p99={value} most={value}"
    );
}
