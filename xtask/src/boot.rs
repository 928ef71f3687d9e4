// SPDX-License-Identifier: GPL-2.0-or-later
//! `cargo xtask boot`: from nothing to a guest that has converted its memory.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::context::Context;
use crate::level1::{Lab, Parts, RUNNER, Task, linux_paths, memory_for, quote, runner_paths};
use crate::packages::{self, Purpose};
use crate::process::{command, output};
use crate::progress::{Step, Steps};
use crate::qemu::Qemu;
use crate::{cargo, debian, image, kernel, qemu};

/// What the Linux guest needs at least: the kernel's own part, which stays shared, must be a small one.
const LINUX_LEAST: u64 = 384 << 20;

/// What the lab may take beyond the guest's limit, to start and to show its memory.
const LAB_EXTRA: Duration = Duration::from_secs(300);

/// Options of `boot`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// What the guest does: hypercall, fault, bad, or all of it; or linux, for a Linux that works in
    /// private memory [default: all]
    #[arg(long = "guest", alias = "scenario", value_name = "SCENARIO")]
    scenario: Option<String>,

    /// Guest memory [default: 256M, for linux 512M]
    #[arg(long, value_parser = parse_size)]
    size: Option<(String, u64)>,

    /// Number of vCPUs
    #[arg(long, default_value_t = 1)]
    smp: u32,

    /// Boot in the lab even where this machine's own KVM would do
    #[arg(long)]
    lab: bool,

    /// Seconds that the guest may run
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    limit: u64,

    /// More arguments for QEMU
    #[arg(last = true, value_name = "QEMU ARGUMENTS")]
    extra: Vec<String>,
}

impl Options {
    fn linux(&self) -> bool {
        self.scenario.as_deref() == Some("linux")
    }

    /// The guest's memory as QEMU writes it, and in bytes.
    fn size(&self) -> (String, u64) {
        let default = if self.linux() { 512 } else { 256 };
        let size = self.size.clone();
        size.unwrap_or_else(|| (format!("{default}M"), default << 20))
    }

    fn check(&self) -> Result<()> {
        let (size, bytes) = self.size();
        if self.linux() && bytes < LINUX_LEAST {
            bail!(
                "--size {size} is too little for --guest linux, whose work needs {}M or more",
                LINUX_LEAST >> 20
            );
        }
        Ok(())
    }
}

/// A size as QEMU writes it, and in bytes.
fn parse_size(text: &str) -> Result<(String, u64), String> {
    let (number, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, "M"),
    };
    let shift = match unit.to_ascii_uppercase().as_str() {
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("{unit:?} is no unit: write 256M, or 4G")),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "write a number, like 256M".to_owned())?;
    let bytes = number
        .checked_mul(1 << shift)
        .ok_or("more than any machine has")?;
    Ok((format!("{number}{unit}"), bytes))
}

/// Runs the command. Its last line says how it went.
pub(crate) fn boot(ctx: &Context, options: &Options) -> ExitCode {
    match try_boot(ctx, options) {
        Ok(0) => ExitCode::SUCCESS,
        // The runner has said why.
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error:#}");
            let why = format!("{error:#}");
            println!("boot: FAILED – {}", why.lines().next().unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}

fn try_boot(ctx: &Context, options: &Options) -> Result<i32> {
    options.check()?;
    let steps = Steps::new(7);
    let ready = |step: Step| step.finish("ready");

    let step = steps.begin("system packages");
    packages::ensure(ctx, &step, &[Purpose::Qemu])?;
    ready(step);

    let step = steps.begin("guest and runner");
    let guest = cargo::guest(ctx, &step)?;
    let runner = cargo::runner(ctx, &step)?;
    ready(step);

    let step = steps.begin("QEMU with the library");
    let qemu = qemu::build(ctx, &step)?;
    step.finish(format_args!("{} ready", qemu.version));

    let native = !options.lab && own_kvm_serves(&runner);
    let step = steps.begin("kernel for the lab");
    if native && !options.linux() {
        step.finish("not needed: this machine's own KVM serves");
        steps.begin("image for the lab").finish("not needed");
        let step = steps.begin("firmware");
        packages::ensure(ctx, &step, &[Purpose::Image])?;
        let firmware = image::firmware(ctx)?;
        ready(step);
        steps
            .begin("booting the guest on this machine's KVM")
            .yield_terminal();
        return boot_native(options, &qemu, &firmware, &guest, &runner, None);
    }
    packages::ensure(ctx, &step, &[Purpose::Kernel])?;
    let kernel = kernel::build(ctx, &step)?;
    step.finish(format_args!("Linux {} ready", kernel.version));

    let step = steps.begin("firmware and tools for the image");
    packages::ensure(ctx, &step, &[Purpose::Image])?;
    let disk = match options.linux() {
        true => {
            packages::ensure(ctx, &step, &[Purpose::Debian])?;
            Some(debian::GUEST.disk(ctx, &step)?)
        }
        false => None,
    };
    ready(step);
    if let (true, Some((_, disk))) = (native, &disk) {
        let firmware = image::firmware(ctx)?;
        let linux = Some((kernel.image.as_path(), disk.as_path()));
        return boot_native(options, &qemu, &firmware, &guest, &runner, linux);
    }

    let step = steps.begin("image for the lab");
    let lab = Lab::complete(
        ctx,
        &step,
        Parts {
            qemu,
            kernel,
            guest,
            runner,
        },
    )?;
    ready(step);

    steps.begin("booting the guest in the lab").yield_terminal();
    let mut paths: Vec<String> = runner_paths().into();
    let mut programs = Vec::new();
    if disk.is_some() {
        paths.extend(linux_paths());
        programs.push(lab.kernel.image.clone());
    }
    let task = Task {
        name: "booting the guest in the lab".to_owned(),
        script: quote(runner_command(RUNNER.to_owned(), paths, options)),
        share: None,
        memory: memory_for(options.size().1),
        limit: Some(Duration::from_secs(options.limit).saturating_add(LAB_EXTRA)),
        disks: disk.into_iter().collect(),
        programs,
        ..Task::default()
    };
    lab.run(ctx, &task, |line| println!("{line}"))
}

/// Whether confidential guests can run on this machine's own KVM.
pub(crate) fn own_kvm_serves(runner: &Path) -> bool {
    output(command(runner, ["probe"])).is_ok()
}

fn runner_command(runner: String, paths: Vec<String>, options: &Options) -> Vec<String> {
    let mut words = vec![runner, "boot".to_owned()];
    words.extend(paths);
    if let Some(scenario) = &options.scenario {
        words.extend(["--scenario".to_owned(), scenario.clone()]);
    }
    words.extend(["--size".to_owned(), options.size().0]);
    words.extend(["--smp".to_owned(), options.smp.to_string()]);
    words.extend(["--limit".to_owned(), options.limit.to_string()]);
    words.push("--".to_owned());
    words.extend(options.extra.iter().cloned());
    words
}

fn boot_native(
    options: &Options,
    qemu: &Qemu,
    firmware: &Path,
    guest: &Path,
    runner: &Path,
    linux: Option<(&Path, &Path)>,
) -> Result<i32> {
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let (program, firmware, guest) = (text(&qemu.program), text(firmware), text(guest));
    let paths = [
        "--qemu",
        &program,
        "--firmware",
        &firmware,
        "--guest",
        &guest,
    ];
    let mut paths = paths.map(str::to_owned).to_vec();
    if let Some((kernel, disk)) = linux {
        let more = ["--linux", &text(kernel), "--linux-disk", &text(disk)];
        paths.extend(more.map(str::to_owned));
    }
    let words = runner_command(text(runner), paths, options);
    let status = command(&words[0], &words[1..])
        .status()
        .with_context(|| format!("cannot run {}", runner.display()))?;
    match status.code() {
        Some(code) => Ok(code),
        None => bail!("the runner was ended: {status}"),
    }
}

/// `cargo xtask lab`: a command or a shell in level 1.
#[derive(Debug, clap::Args)]
pub(crate) struct LabOptions {
    /// The folder that level 1 sees as /host, where the command starts [default: this one]
    #[arg(long, value_name = "DIR")]
    share: Option<PathBuf>,

    /// Seconds that the command may take
    #[arg(long, value_name = "SECONDS")]
    limit: Option<u64>,

    /// Level 1's memory
    #[arg(long, default_value = "4G", value_parser = parse_size)]
    memory: (String, u64),

    /// Run the command in a Debian userland; in a shell, in-debian COMMAND does
    #[arg(long)]
    debian: bool,

    /// Level 1 has an IOMMU, and behind it an edu device, which vfio-pci can hand to guests
    #[arg(long)]
    iommu: bool,

    /// A command with its arguments; without one, a shell
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<String>,
}

/// Runs the command; its exit status is the one in level 1.
pub(crate) fn lab(ctx: &Context, options: LabOptions) -> Result<ExitCode> {
    let steps = Steps::new(1);
    let step = steps.begin("lab");
    packages::ensure(
        ctx,
        &step,
        &[Purpose::Qemu, Purpose::Kernel, Purpose::Image],
    )?;
    let parts = Parts::build(ctx, &step)?;
    let lab = Lab::complete(ctx, &step, parts)?;
    let mut words = options.command.clone();
    let mut disks = Vec::new();
    if options.debian {
        packages::ensure(ctx, &step, &[Purpose::Debian])?;
        disks.push(debian::DEBIAN.disk(ctx, &step)?);
        words.insert(0, debian::ENTER.to_owned());
    }
    let share = match options.share {
        Some(folder) => folder,
        None => std::env::current_dir().context("cannot tell the current folder")?,
    };
    step.yield_terminal();
    let task = Task {
        name: words.join(" "),
        script: quote(&words),
        share: Some(share),
        memory: options.memory.1,
        limit: options.limit.map(Duration::from_secs),
        disks,
        iommu: options.iommu,
        ..Task::default()
    };
    let status = match options.command.is_empty() {
        true => lab.shell(ctx, &task)?,
        false => lab.run(ctx, &task, |line| println!("{line}"))?,
    };
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(u8::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(words: &[&str]) -> Options {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            options: Options,
        }
        <Line as clap::Parser>::try_parse_from([&["boot"], words].concat())
            .expect("options")
            .options
    }

    #[test]
    fn a_linux_with_too_little_memory_is_refused() {
        let check = |words: &[&str]| options(words).check().map_err(|error| error.to_string());
        assert_eq!(check(&["--size", "64M"]), Ok(()));
        assert_eq!(check(&["--guest", "linux"]), Ok(()));
        let error = check(&["--guest", "linux", "--size", "256M"]).expect_err("too little");
        assert!(error.contains("256M") && error.contains("384M"), "{error}");
    }

    #[test]
    fn the_limit_reaches_the_runner() {
        let options = options(&["--limit", "77", "--", "-x"]);
        let words = runner_command("runner".to_owned(), Vec::new(), &options).join(" ");
        assert!(words.ends_with("--limit 77 -- -x"), "{words}");
    }

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("256M"), Ok(("256M".to_owned(), 256 << 20)));
        assert_eq!(parse_size("4g").map(|size| size.1), Ok(4 << 30));
        assert_eq!(parse_size("64"), Ok(("64M".to_owned(), 64 << 20)));
        for bad in ["", "M", "4X", "99999999999999T"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }
}
