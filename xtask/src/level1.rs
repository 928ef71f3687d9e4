// SPDX-License-Identifier: GPL-2.0-or-later
//! Level 1 of the lab: a Linux with KVM inside QEMU/TCG, which runs a job that
//! it finds in a folder shared with the host.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};

use crate::cargo;
use crate::context::Context;
use crate::image::{self, PROGRAM};
use crate::kernel::{self, Kernel};
use crate::process::{Job, command};
use crate::progress::Step;
use crate::qemu::Qemu;
use crate::scratch::Scratch;
use crate::tsc;

/// How many of the last lines of level 1's console an error shows.
const CONSOLE_TAIL: usize = 20;

/// What level 1 needs besides the conformance guest's own size.
const BASE_MEMORY: u64 = 4 << 30;

/// An IOMMU that Linux and VFIO can use, and a device that does nothing but DMA, to any address
/// (QEMU's docs/specs/edu.rst). Virtio devices go around the IOMMU unless told otherwise.
const IOMMU: [&str; 4] = [
    "-device",
    "intel-iommu,intremap=on",
    "-device",
    "edu,dma_mask=0xffffffffffffffff",
];

/// Everything that is built before level 1 can start.
#[derive(Clone, Debug)]
pub(crate) struct Lab {
    pub(crate) qemu: Qemu,
    pub(crate) firmware: PathBuf,
    pub(crate) kernel: Kernel,
    pub(crate) image: PathBuf,
    pub(crate) guest: PathBuf,
    pub(crate) runner: PathBuf,
}

/// Something to run in level 1.
#[derive(Debug, Default)]
pub(crate) struct Task {
    /// Says in errors what it is.
    pub(crate) name: String,
    /// Shell commands; `guestmemfd-lab` and `guest.elf` lie in `/run/lab`.
    pub(crate) script: String,
    /// A folder of the host that is seen as `/host`.
    pub(crate) share: Option<PathBuf>,
    /// Level 1's memory in bytes.
    pub(crate) memory: u64,
    /// How long it may take; nothing: as long as it likes.
    pub(crate) limit: Option<Duration>,
    /// Level 1's clocks count instructions: 1 ns each. It then has one CPU.
    pub(crate) count_instructions: bool,
    /// A plugin for the outer QEMU, with its options.
    pub(crate) plugin: Option<String>,
    /// Images that level 1 has as virtio disks, with their serial numbers. What it writes to one is
    /// gone when it ends.
    pub(crate) disks: Vec<(&'static str, PathBuf)>,
    /// More programs for `/run/lab`.
    pub(crate) programs: Vec<PathBuf>,
    /// The log's name, where several tasks run at once.
    pub(crate) log: Option<String>,
    /// Level 1 has an IOMMU, and behind it a device for its guests.
    pub(crate) iommu: bool,
    /// Whether level 1's kernel converts memory in place; nothing: as the user says.
    pub(crate) in_place: Option<bool>,
}

/// Memory for a level 1 in which guests of `size` bytes run.
pub(crate) fn memory_for(size: u64) -> u64 {
    // Both views of a page can be populated while it is converted.
    BASE_MEMORY.max(size.saturating_mul(2).saturating_add(BASE_MEMORY / 2))
}

/// Where level 1 has the runner.
pub(crate) const RUNNER: &str = "/run/lab/guestmemfd-lab";

/// The arguments of the runner that say where level 1 has everything.
pub(crate) fn runner_paths() -> [String; 6] {
    [
        "--qemu",
        PROGRAM,
        "--firmware",
        image::FIRMWARE_FOLDER,
        "--guest",
        "/run/lab/guest.elf",
    ]
    .map(str::to_owned)
}

/// More of them: where level 1 has the Linux guest.
pub(crate) fn linux_paths() -> [String; 4] {
    [
        "--linux",
        "/run/lab/bzImage",
        "--linux-disk",
        "/dev/disk/guest",
    ]
    .map(str::to_owned)
}

/// Words as a shell reads them back unchanged.
pub(crate) fn quote(words: impl IntoIterator<Item = impl AsRef<str>>) -> String {
    let quoted = words
        .into_iter()
        .map(|word| format!("'{}'", word.as_ref().replace('\'', "'\\''")));
    quoted.collect::<Vec<_>>().join(" ")
}

impl Lab {
    /// Builds what is not built yet of the parts that only level 1 needs.
    pub(crate) fn complete(ctx: &Context, step: &Step, parts: Parts) -> Result<Self> {
        let kernel = parts.kernel;
        Ok(Self {
            firmware: image::firmware(ctx)?,
            image: image::build(ctx, step, &parts.qemu, &parts.runner)?,
            qemu: parts.qemu,
            kernel,
            guest: parts.guest,
            runner: parts.runner,
        })
    }

    /// Runs a task, hands on its lines of output, and returns its exit status.
    pub(crate) fn run(&self, ctx: &Context, task: &Task, line: impl FnMut(&str)) -> Result<i32> {
        let folder = self.job_folder(ctx, &task.programs)?;
        fs::write(folder.path().join("run"), &task.script).context("cannot write the job")?;
        let mut job = Job::new(&task.name, self.command(ctx, folder.path(), task))
            .log(&ctx.log(task.log.as_deref().unwrap_or("lab")))
            .follow(line);
        if let Some(limit) = task.limit {
            job = job.limit(limit);
        }
        let outcome = job.outcome()?;
        let result = match outcome.timed_out() {
            true => Err(anyhow!("{}: {}", task.name, outcome.ending())),
            false => outcome.check().and_then(|()| status(folder.path())),
        };
        result.map_err(|error| {
            anyhow!(
                "{error:#}; level 1's console ends in:{}",
                console_tail(folder.path())
            )
        })
    }

    /// A shell in level 1 on this terminal, in place of the task's script; returns its exit status.
    pub(crate) fn shell(&self, ctx: &Context, task: &Task) -> Result<i32> {
        let folder = self.job_folder(ctx, &[])?;
        let status_of_qemu = self
            .command(ctx, folder.path(), task)
            .status()
            .with_context(|| format!("cannot run {}", self.qemu.program.display()))?;
        if !status_of_qemu.success() {
            bail!("level 1: {status_of_qemu}{}", console_tail(folder.path()));
        }
        status(folder.path())
    }

    /// A folder with what jobs use, removed when it is no longer in use.
    fn job_folder(&self, ctx: &Context, programs: &[PathBuf]) -> Result<Scratch> {
        let folder = Scratch::new("job-", ctx.scratch())?;
        fs::create_dir(folder.path().join("bin"))?;
        let ours = [(&self.runner, "guestmemfd-lab"), (&self.guest, "guest.elf")];
        let ours = ours.map(|(from, name)| (from, OsStr::new(name)));
        let more = programs
            .iter()
            .filter_map(|from| Some((from, from.file_name()?)));
        for (from, name) in ours.into_iter().chain(more) {
            fs::copy(from, folder.path().join("bin").join(name))
                .with_context(|| format!("cannot copy {}", from.display()))?;
        }
        Ok(folder)
    }

    fn command(&self, ctx: &Context, folder: &Path, task: &Task) -> Command {
        let mut qemu = command(
            &self.qemu.program,
            ["-nodefaults", "-no-reboot", "-display", "none"],
        );
        let (accel, cpus) = match task.count_instructions {
            true => ("tcg,thread=single", 1),
            false => ("tcg,thread=multi", ctx.jobs.clamp(2, 4)),
        };
        if let Some(plugin) = &task.plugin {
            qemu.args(["-plugin", plugin]);
        }
        if task.count_instructions {
            qemu.args(["-icount", "shift=0,sleep=off"]);
        } else {
            qemu.args(nodes(task.memory));
        }
        if task.iommu {
            qemu.args(IOMMU);
        }
        qemu.args(["-accel", accel, "-machine", "q35", "-cpu", "max"])
            .args(["-smp", &cpus.to_string()])
            .args(["-m", &format!("{}M", task.memory >> 21 << 1)])
            .args(["-run-with", "exit-with-parent=on"])
            .args(["-L", &self.firmware.to_string_lossy()])
            .args(["-kernel", &self.kernel.image.to_string_lossy()])
            .args(["-initrd", &self.image.to_string_lossy()])
            .args([
                "-append",
                &kernel_command_line(
                    task.count_instructions,
                    task.in_place.unwrap_or(ctx.in_place),
                ),
            ])
            // The kernel speaks on the serial port, the job on the virtio console.
            .args([
                "-serial",
                &format!("file:{}", folder.join("console").display()),
            ])
            .args(["-chardev", "stdio,id=job,signal=off"])
            .args([
                "-device",
                "virtio-serial-pci",
                "-device",
                "virtconsole,chardev=job",
            ]);
        for (serial, image) in &task.disks {
            disk(&mut qemu, serial, image);
        }
        share(&mut qemu, "lab", folder);
        if let Some(folder) = &task.share {
            share(&mut qemu, "host", folder);
        }
        qemu
    }
}

/// On a busy machine a virtual CPU can pause at any time. The kernel then measures the frequency of
/// the time-stamp counter wrongly, by a factor of nine once, or takes the counter for unstable; and
/// while it changes to another clock, it can wait for ever in `stop_machine()` for a CPU that is in
/// the counter's watchdog. So it is told the frequency, and that the counter can be relied upon.
///
/// For the same reason it is not to try whether the timer's interrupt arrives in time: it would give up.
///
/// Huge pages only where they are asked for: otherwise the first touch of a thread's stack shows in
/// a process's memory as 2 MiB, and tests could not see a small leak.
fn kernel_command_line(count_instructions: bool, in_place: bool) -> String {
    let khz = match count_instructions {
        // An instruction takes a nanosecond.
        true => 1_000_000,
        false => tsc::khz(),
    };
    let in_place = u8::from(in_place);
    format!(
        "console=ttyS0 loglevel=5 panic=-1 tsc_early_khz={khz} tsc=reliable no_timer_check \
         transparent_hugepage=madvise kvm.gmem_in_place_conversion={in_place}"
    )
}

/// What level 1 is made of, where steps of their own build it.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    pub(crate) qemu: Qemu,
    pub(crate) kernel: Kernel,
    pub(crate) guest: PathBuf,
    pub(crate) runner: PathBuf,
}

impl Parts {
    /// Builds what is not built yet, as one step.
    pub(crate) fn build(ctx: &Context, step: &Step) -> Result<Self> {
        Ok(Self {
            qemu: crate::qemu::build(ctx, step)?,
            kernel: kernel::build(ctx, step)?,
            guest: cargo::guest(ctx, step)?,
            runner: cargo::runner(ctx, step)?,
        })
    }
}

/// Two NUMA nodes with half of the memory each: where a page lies can be asked for, and seen.
fn nodes(memory: u64) -> Vec<String> {
    let half = memory >> 21;
    (0..2)
        .flat_map(|node| {
            [
                "-object".to_owned(),
                format!("memory-backend-ram,id=node{node},size={half}M"),
                "-numa".to_owned(),
                format!("node,nodeid={node},memdev=node{node}"),
            ]
        })
        .collect()
}

/// A path as QEMU's options take it.
fn option_value(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// A disk that can be written to, without changing the image, which is in the cache.
fn disk(qemu: &mut Command, serial: &str, image: &Path) {
    let file = option_value(image);
    qemu.args(["-drive"])
        .arg(format!(
            "if=none,id={serial},format=raw,snapshot=on,file={file}"
        ))
        .arg("-device")
        .arg(format!("virtio-blk-pci,drive={serial},serial={serial}"));
}

/// A folder of the host that level 1 mounts by its tag.
fn share(qemu: &mut Command, tag: &str, folder: &Path) {
    let path = option_value(folder);
    qemu.args([
        "-fsdev",
        &format!("local,id={tag},path={path},security_model=none,multidevs=remap"),
    ])
    .args([
        "-device",
        &format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"),
    ]);
}

fn status(folder: &Path) -> Result<i32> {
    let text = fs::read_to_string(folder.join("status"))
        .context("level 1 went down without an exit status of the job")?;
    text.trim()
        .parse()
        .with_context(|| format!("the job's exit status is {text:?}"))
}

fn console_tail(folder: &Path) -> String {
    let bytes = fs::read(folder.join("console")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(CONSOLE_TAIL);
    lines[from..]
        .iter()
        .map(|line| format!("\n    {line}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        let words = ["a b", "it's", "$x", ""];
        let script = format!("printf '%s|' {}", quote(words));
        let printed = crate::process::output(command("sh", ["-c", &script])).expect("a shell");
        assert_eq!(printed, "a b|it's|$x||");
    }

    #[test]
    fn the_kernel_is_told_how_to_convert() {
        for (in_place, word) in [
            (true, "kvm.gmem_in_place_conversion=1"),
            (false, "kvm.gmem_in_place_conversion=0"),
        ] {
            let line = kernel_command_line(true, in_place);
            assert!(line.split(' ').any(|w| w == word), "{line}");
        }
    }

    #[test]
    fn level_1_has_room_for_both_views_of_a_large_guest() {
        assert_eq!(memory_for(256 << 20), 4 << 30);
        assert_eq!(memory_for(8 << 30), 18 << 30);
    }

    #[test]
    fn an_error_shows_the_end_of_the_console() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let text: String = (0..50).map(|n| format!("line {n}\r\n")).collect();
        fs::write(dir.path().join("console"), text).expect("write");
        let tail = console_tail(dir.path());
        assert!(
            tail.ends_with("line 49") && !tail.contains("line 29"),
            "{tail}"
        );
    }
}
