// SPDX-License-Identifier: GPL-2.0-or-later
//! The library without QEMU: its example, and its own tests of owners.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Context, GUEST_LIMIT, Test, guests};
use crate::guest::CONTENT;
use crate::probe::{self, Need};
use crate::tap::Tap;
use crate::vm::{SHARED_BIT, Scenario};

const POLL: Duration = Duration::from_millis(50);

/// Programs to test, where there are any.
#[derive(Debug, clap::Args)]
pub(crate) struct Programs {
    /// The library's example `vmm`; without it no test of it
    #[arg(long, value_name = "PATH")]
    vmm: Option<PathBuf>,
    /// The library's tests of owners; without them no test of KVM as an owner
    #[arg(long, value_name = "PATH")]
    owner_tests: Option<PathBuf>,
    /// guestmemfd-top; without it no test of it
    #[arg(long, value_name = "PATH")]
    top: Option<PathBuf>,
}

impl Programs {
    /// guestmemfd-top.
    pub(super) fn top(&self) -> Option<&Path> {
        self.top.as_deref()
    }
}

pub(super) fn tests(programs: &Programs) -> Vec<Test> {
    let mut tests = Vec::new();
    if let Some(vmm) = &programs.vmm {
        for scenario in [Scenario::Hypercall, Scenario::Fault, Scenario::Bad] {
            let name = format!("library/example-vmm-{}", scenario.name());
            let vmm = vmm.clone();
            let run = move |context: &Context| example(context, &vmm, scenario);
            tests.push(Test::new(name, scenario.needs(), run));
        }
    }
    if let Some(program) = programs.owner_tests.clone() {
        let needs = &[Need::PrivateMemory, Need::MappedMemory];
        let run = move |context: &Context| owner(context, &program);
        tests.push(Test::new("library/owner-kvm", needs, run));
    }
    tests
}

/// What every owner must do, of KVM as one.
fn owner(context: &Context, program: &Path) -> Result<()> {
    let mut command = Command::new(program);
    command.arg("kvm_").env("GUESTMEMFD_NEED_KVM", "1");
    let ended = run(command, &context.log)?;
    ensure!(
        ended.status.success() && !ended.stdout.contains(" 0 passed"),
        "{}{}",
        ended.stdout,
        ended.stderr
    );
    Ok(())
}

/// The conformance guest in the example, which must have counted what the guest did.
fn example(context: &Context, vmm: &Path, scenario: Scenario) -> Result<()> {
    let _strict = guests::strict(scenario)?;
    let mut command = Command::new(vmm);
    command.arg("--guest").arg(&context.files.guest);
    let mut append = format!("scenario={} timeout=240", scenario.name());
    if scenario.needs().contains(&Need::StrictMode) {
        command.args(["--shared-bit", &SHARED_BIT.to_string()]);
        append += &format!(" shared-bit={SHARED_BIT}");
    }
    if probe::in_place() {
        append += " contents=kept";
    }
    command.args(["--append", &append]);
    let ended = run(command, &context.log)?;
    let mut said = Tap::default();
    ended.stdout.lines().for_each(|line| said.line(line));
    said.verdict().with_context(|| ended.stderr.clone())?;
    ensure!(
        ended.status.code() == Some(CONTENT),
        "the guest is content, but the example ended with {}: {}",
        ended.status,
        ended.stderr
    );
    let mut counted = Tap::default();
    for line in ended.stderr.lines() {
        counted.line(&format!("# {line}"));
    }
    guests::same_counts(scenario, &said, |name| counted.note(name))
}

struct Ended {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

/// Runs a program to its end, with its output in a folder.
fn run(mut command: Command, log: &Path) -> Result<Ended> {
    let [stdout, stderr] = ["stdout", "stderr"].map(|name| log.join(name));
    command
        .stdin(Stdio::null())
        .stdout(File::create(&stdout)?)
        .stderr(File::create(&stderr)?);
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let deadline = Instant::now() + GUEST_LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            bail!("{command:?} did not end within {} s", GUEST_LIMIT.as_secs());
        }
        std::thread::sleep(POLL);
    };
    Ok(Ended {
        status,
        stdout: fs::read_to_string(stdout)?,
        stderr: fs::read_to_string(stderr)?,
    })
}
