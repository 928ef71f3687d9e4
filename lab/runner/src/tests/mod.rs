// SPDX-License-Identifier: GPL-2.0-or-later
//! `test`: every test that needs a QEMU, reported as TAP.

mod dump;
mod freed;
mod guard;
mod guests;
mod host;
mod hostile;
mod hotplug;
mod in_place;
mod kept;
mod large;
mod library;
mod linux;
mod mapped;
mod mapped_devices;
mod mapped_migration;
mod measure;
mod no_memory;
mod object;
mod object_qmp;
mod query;
mod reset;
mod robust;
mod several;
mod storm;
mod top;
mod vfio;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::probe::{Machine, Need};
use crate::qemu::{self, Ended, Qemu, Started};
use crate::vm::{Files, Size, Vm};

/// Guest memory of a test that has no reason for another size.
const SIZE: Size = Size(256 << 20);

/// How long a guest may run: only a hang takes this long, even with four vCPUs on two emulated
/// CPUs.
const GUEST_LIMIT: Duration = Duration::from_secs(300);

/// Options of `test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    programs: library::Programs,
    /// Only tests whose name contains this, or one of several
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// Also the tests that take long or are not reliable yet
    #[arg(long)]
    full: bool,
    /// Print the tests' names and what each needs, and stop
    #[arg(long)]
    list: bool,
    /// Folder for the logs, one folder a test
    #[arg(long, value_name = "DIR", default_value_os_t = default_out())]
    out: PathBuf,
}

fn default_out() -> PathBuf {
    std::env::temp_dir().join("guestmemfd-lab").join("test")
}

type Run = dyn Fn(&Context) -> Result<()>;

/// One test.
struct Test {
    name: String,
    needs: Vec<Need>,
    /// Runs only with `--full`, or when asked for by name.
    full: bool,
    full_in_lab: bool,
    run: Box<Run>,
}

impl Test {
    fn new(
        name: impl Into<String>,
        needs: &[Need],
        run: impl Fn(&Context) -> Result<()> + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            needs: needs.to_vec(),
            full: false,
            full_in_lab: false,
            run: Box::new(run),
        }
    }

    fn only_in_full(self) -> Self {
        Self { full: true, ..self }
    }

    /// Runs on a machine's own KVM, and in the lab, which is slow, with `--full`.
    fn in_the_lab_only_in_full(self) -> Self {
        Self {
            full_in_lab: true,
            ..self
        }
    }
}

/// What a test works with.
#[derive(Debug)]
struct Context {
    files: Files,
    /// This test's folder.
    log: PathBuf,
}

impl Context {
    /// Starts a QEMU that is to run, paused.
    fn start(&self, vm: &Vm) -> Result<Box<Qemu>> {
        self.start_as("qemu", vm)
    }

    /// The same where a test has several.
    fn start_as(&self, name: &str, vm: &Vm) -> Result<Box<Qemu>> {
        let arguments = vm.arguments(&self.files.firmware);
        qemu::start_running(&self.files.qemu, &arguments, &self.log.join(name), false)
    }

    /// How many lines QEMU has said: not as many as a guest likes.
    fn said(&self) -> Result<usize> {
        let path = self.log.join("qemu").join("stderr");
        let said = fs::read_to_string(&path).context("no log of QEMU's")?;
        Ok(said.lines().count())
    }

    /// Starts a QEMU that is to refuse its command line.
    fn start_refused(&self, vm: &Vm) -> Result<Ended> {
        let arguments = vm.arguments(&self.files.firmware);
        match qemu::start(&self.files.qemu, &arguments, &self.log.join("qemu"), false)? {
            Started::Ended(ended) => Ok(ended),
            Started::Running(_) => anyhow::bail!("QEMU accepted what it should refuse"),
        }
    }
}

fn all(options: &Options) -> Vec<Test> {
    [
        query::tests(),
        object::tests(),
        object_qmp::tests(),
        measure::tests(),
        guests::tests(),
        freed::tests(),
        robust::tests(),
        reset::tests(),
        several::tests(),
        storm::tests(),
        top::tests(options.programs.top()),
        hostile::tests(),
        host::tests(),
        kept::tests(),
        hotplug::tests(),
        dump::tests(),
        guard::tests(),
        in_place::tests(),
        vfio::tests(),
        large::tests(),
        no_memory::tests(),
        library::tests(&options.programs),
        linux::tests(&options.files.linux),
        ordinary_vms(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn ordinary_vms() -> Vec<Test> {
    let tests = [
        mapped::tests(),
        mapped_devices::tests(),
        mapped_migration::tests(),
    ];
    let tests = tests.into_iter().flatten();
    tests.map(Test::in_the_lab_only_in_full).collect()
}

/// Runs them; true if none failed.
pub(crate) fn run(options: &Options) -> bool {
    let wanted = |test: &Test| {
        let mut filters = options.filter.iter();
        options.filter.is_empty() || filters.any(|text| test.name.contains(text.as_str()))
    };
    let tests: Vec<Test> = all(options).into_iter().filter(wanted).collect();
    if options.list {
        for test in &tests {
            println!("{} {:?}", test.name, test.needs);
        }
        return true;
    }
    if tests.is_empty() {
        println!("Bail out! no test's name contains the filter");
        return false;
    }
    let machine = Machine::probe();
    println!("TAP version 13\n1..{}", tests.len());
    let mut good = true;
    for (index, test) in tests.iter().enumerate() {
        good &= report(index + 1, test, &machine, options);
    }
    good
}

/// Tests of what does not depend on how memory is converted, or takes long: where it is converted in
/// two files they run with `--full`, and otherwise in place alone.
const IN_PLACE_IS_ENOUGH: [&str; 9] = [
    "object/", "query/", "measure/", "large/", "top/", "hostile/", "linux/", "several/", "robust/",
];

/// Is it one of those, in the lab, which runs both ways?
fn in_place_is_enough(test: &Test, machine: &Machine) -> bool {
    let mut names = IN_PLACE_IS_ENOUGH.iter();
    is_lab(machine)
        && machine.lacks(Need::TwoFiles).is_none()
        && !test.needs.contains(&Need::TwoFiles)
        && names.any(|name| test.name.starts_with(name))
}

/// Only the lab's kernel has strict mode.
fn is_lab(machine: &Machine) -> bool {
    machine.lacks(Need::StrictMode).is_none()
}

fn report(number: usize, test: &Test, machine: &Machine, options: &Options) -> bool {
    let name = &test.name;
    if let Some(why) = test.needs.iter().find_map(|need| machine.lacks(*need)) {
        println!("ok {number} - {name} # SKIP {why}");
        return true;
    }
    let full =
        test.full || test.full_in_lab && is_lab(machine) || in_place_is_enough(test, machine);
    if full && !options.full && options.filter.is_empty() {
        println!("ok {number} - {name} # SKIP only with --full");
        return true;
    }
    let context = Context {
        files: options.files.clone(),
        log: options.out.join(name.replace('/', "-")),
    };
    let start = Instant::now();
    let result = empty_folder(&context.log).and_then(|()| (test.run)(&context));
    let seconds = start.elapsed().as_secs_f32();
    match &result {
        Ok(()) => println!("ok {number} - {name}"),
        Err(why) => {
            println!("not ok {number} - {name}");
            for line in format!("{why:#}").lines() {
                println!("# {line}");
            }
            println!("# logs: {}", context.log.display());
        }
    }
    println!("# {seconds:.1} s");
    result.is_ok()
}

/// Logs of an earlier run must not pass for this one's.
fn empty_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display())),
    }
}
