// SPDX-License-Identifier: GPL-2.0-or-later
//! QEMU's own tests, and those that the patches add to them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::process::{command, output};
use crate::progress::Step;
use crate::{image, library, qemu as qemu_build};

use super::patches;
use super::report::Tally;
use super::steps::{Bench, meson_test};

/// Where Debian has the ROMs of network cards.
const IPXE: &str = "/usr/lib/ipxe/qemu";

/// Tests that the patches add, or change.
const OURS: [&str; 12] = [
    "test-ram-discard-manager",
    "test-ram-block-attributes",
    "qtest-x86_64/dump-paging-test",
    "qtest-x86_64/vapic-test",
    "qtest-x86_64/virtio-balloon-test",
    "qtest-x86_64/guestmemfd-test",
    "qtest-x86_64/guestmemfd-disk-test",
    "qtest-x86_64/guestmemfd-device-test",
    "qtest-x86_64/guestmemfd-ring-test",
    "qtest-x86_64/ide-test",
    "qtest-x86_64/virtio-snd-test",
    "qtest-x86_64/numa-test",
];

/// Those of them that are part of qos-test, which fails as a whole.
const OURS_OF_QOS: [&str; 2] = ["megasas/megasas-tests", "nvme/nvme-tests"];

/// Where qos-test has the tests of PCI devices.
const QOS: &str = "/x86_64/pc/i440FX-pcihost/pci-bus-pc/pci-bus";

/// Programs of QEMU's that fail with the patches and without. bios-tables-test compares tables with
/// those of a build with all features, qos-test asks for a network backend that is not configured,
/// and migration-test takes longer than meson lets it.
const EXPECTED: [&str; 3] = ["bios-tables-test", "qos-test", "migration-test"];

/// Those of the patches.
pub(super) fn ours(bench: &Bench, step: &Step) -> Result<Tally> {
    let build = build(bench, step, true)?;
    let mut tally = run(bench, step, &build, "qemu-tests", &OURS, &[])?;
    // Of several paths qos-test makes several streams of TAP, which meson does not read.
    for part in OURS_OF_QOS {
        let path = format!("--test-args=-p {QOS}/{part}");
        let which = ["qtest-x86_64/qos-test", &*path];
        let name = format!("qemu-tests-{}", part.replace('/', "-"));
        let mut one = run(bench, step, &build, &name, &which, &[])?;
        if one.passed == 0 && one.failed == 0 {
            one.add(Tally::fail(format!("qos-test has no {part}")));
        }
        tally.add(one);
    }
    Ok(tally)
}

/// All, with the library.
pub(super) fn with(bench: &Bench, step: &Step) -> Result<Tally> {
    let build = build(bench, step, true)?;
    all(bench, step, &build, "qtest")
}

/// All, in a build without the library.
pub(super) fn without(bench: &Bench, step: &Step) -> Result<Tally> {
    let build = build(bench, step, false)?;
    all(bench, step, &build, "without")
}

/// All, with the first folder of patches alone.
pub(super) fn fixes(bench: &Bench, step: &Step) -> Result<Tally> {
    let (build, _lock) = patches::build_first_topic(bench.ctx, step)?;
    all(bench, step, &build, "fixes")
}

fn all(bench: &Bench, step: &Step, build: &Path, name: &str) -> Result<Tally> {
    let suite = ["--suite", "qtest-x86_64"];
    run(bench, step, build, name, &suite, &EXPECTED)
}

fn run(
    bench: &Bench,
    step: &Step,
    build: &Path,
    name: &str,
    which: &[&str],
    expected: &[&str],
) -> Result<Tally> {
    add_roms(build)?;
    step.say("running");
    let tools = build.join("pyvenv/bin");
    let jobs = bench.ctx.jobs.to_string();
    let args = [&["--num-processes", &*jobs], which].concat();
    meson_test(bench.ctx, step, &tools, build, name, &args, expected)
}

/// The folder of a build of all patches.
fn build(bench: &Bench, step: &Step, with: bool) -> Result<PathBuf> {
    let ctx = bench.ctx;
    let library = library::install(ctx, step)?;
    let _lock = qemu_build::lock(ctx, step)?;
    let tree = qemu_build::prepare(ctx, step)?;
    qemu_build::install_library(&tree, &library)?;
    let name = if with { "build" } else { "build-without" };
    let build = tree.folder.join(name);
    qemu_build::compile(ctx, step, &tree, &build, with, &[])?;
    let objects = output(command(
        build.join("qemu-system-x86_64"),
        ["-object", "help"],
    ))?;
    ensure!(
        objects.contains("memory-backend-guestmemfd") == with,
        "the list of objects (-object help) is not what this build should have"
    );
    Ok(build)
}

/// Brings ROMs to where a QEMU that has not been installed looks for them.
fn add_roms(build: &Path) -> Result<()> {
    let bundle = build.join("qemu-bundle/usr/local/share/qemu");
    fs::create_dir_all(&bundle)?;
    for folder in image::FIRMWARE_FOLDERS.iter().chain(&[IPXE]) {
        // Distributions have some of these folders.
        let Ok(files) = fs::read_dir(folder) else {
            continue;
        };
        for file in files {
            let file = file?;
            if file.path().is_file() {
                fs::copy(file.path(), bundle.join(file.file_name()))?;
            }
        }
    }
    Ok(())
}
