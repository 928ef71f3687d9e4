// SPDX-License-Identifier: GPL-2.0-or-later
//! Devices that use a mapped guest_memfd, or give parts of it back.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use guestmemfd_guest::{DISK_PART, disk_word};
use serde_json::json;
use tempfile::TempDir;

use super::{Context, GUEST_LIMIT, Test, mapped};
use crate::guest;
use crate::memory;
use crate::probe::Need;
use crate::qemu::EXIT_LIMIT;
use crate::query;
use crate::vm::{BACKEND, Scenario};

const COUNTED: &[Need] = &[Need::MappedMemory, Need::PageCounts];

pub(super) fn tests() -> Vec<Test> {
    let mut tests = Vec::new();
    for bind in mapped::BINDS {
        for scenario in [Scenario::Balloon, Scenario::Reporting] {
            let name = format!("mapped/{}-bind-{bind}", scenario.name());
            let run = move |context: &Context| given_back(context, scenario, bind);
            tests.push(Test::new(name, COUNTED, run));
        }
        let name = format!("mapped/disk-bind-{bind}");
        let run = move |context: &Context| disk(context, bind, false);
        tests.push(Test::new(name, &[Need::MappedMemory], run));
        let name = format!("mapped/vhost-user-blk-bind-{bind}");
        let run = move |context: &Context| disk(context, bind, true);
        tests.push(Test::new(name, &[Need::MappedMemory], run));
        let name = format!("mapped/hotplug-bind-{bind}");
        let run = move |context: &Context| hotplug(context, bind);
        tests.push(Test::new(name, &[Need::MappedMemory], run));
    }
    tests
}

/// The pages that the guest gives back are holes in the file, and only those.
fn given_back(context: &Context, scenario: Scenario, bind: &str) -> Result<()> {
    let vm = mapped::guest_vm(context, scenario, bind)
        .with_arguments("-device virtio-balloon-pci,free-page-reporting=on");
    let mut qemu = context.start(&vm)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let line = guest::wait_line(&qemu, "# slice-start=", EXIT_LIMIT)?;
    let note = |name| guest::address(&line, name);
    let (slice, gone) = (
        note("slice-start")?..note("slice-end")?,
        note("gone-start")?..note("gone-end")?,
    );
    let left = (slice.start..gone.start, gone.end..slice.end);
    for (part, expected) in [
        (left.0.clone(), left.0.end - left.0.start),
        (gone, 0),
        (left.1.clone(), left.1.end - left.1.start),
    ] {
        // RAM below 4 GiB begins at address 0 and at offset 0.
        let found = memory::guest_memfd_part(qemu.pid(), part.start, part.end - part.start)?;
        ensure!(
            found == expected,
            "{found} bytes of {part:#x?} are allocated, not {expected}"
        );
    }
    guest::finish(&mut qemu)?;
    Ok(())
}

/// A process that is ended with its test.
pub(super) struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        // Fails if it has ended, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A disk as the guest expects it, in a process of its own, and where QEMU finds that: the arguments
/// for a chardev `vub`.
pub(super) fn disk_in_daemon(context: &Context, dir: &TempDir) -> Result<(Daemon, String)> {
    let (image, socket) = (dir.path().join("image"), dir.path().join("socket"));
    fs::write(&image, disk_content())?;
    let daemon = daemon(context, &image, &socket)?;
    let chardev = format!("-chardev socket,id=vub,path={}", socket.display());
    Ok((daemon, chardev))
}

/// qemu-storage-daemon, which exports an image at a socket.
fn daemon(context: &Context, image: &Path, socket: &Path) -> Result<Daemon> {
    let program = storage_daemon(&context.files.qemu)?;
    let (image, path) = (image.display(), socket.display());
    let child = Command::new(&program)
        .arg("--blockdev")
        .arg(format!("driver=file,node-name=disk,filename={image}"))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={path}"
        ))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(context.log.join("daemon"))?)
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let daemon = Daemon(child);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !socket.exists() {
        ensure!(
            Instant::now() < deadline,
            "qemu-storage-daemon makes no socket"
        );
        thread::sleep(Duration::from_millis(20));
    }
    Ok(daemon)
}

/// It lies beside QEMU, or in a folder of its own in a build tree.
fn storage_daemon(qemu: &Path) -> Result<PathBuf> {
    let folder = qemu.parent().context("QEMU lies in no folder")?;
    let places = ["qemu-storage-daemon", "storage-daemon/qemu-storage-daemon"];
    let found = places.map(|place| folder.join(place));
    match found.iter().find(|path| path.is_file()) {
        Some(path) => Ok(path.clone()),
        None => bail!("no qemu-storage-daemon beside {}", qemu.display()),
    }
}

/// A disk as the guest expects it.
pub(super) fn disk_content() -> Vec<u8> {
    let words = (0..DISK_PART / 8).flat_map(|n| disk_word(n).to_le_bytes());
    let mut content: Vec<u8> = words.collect();
    content.resize(1 << 20, 0);
    content
}

/// The arguments for a sound card that plays nothing.
pub(super) const SILENT_SOUND: &str =
    "-audiodev none,id=none -device virtio-sound-pci,audiodev=none,ioeventfd=off";

/// The arguments for a disk in QEMU.
pub(super) fn virtio_blk(image: &Path) -> String {
    let path = image.display();
    format!(
        "-blockdev driver=file,node-name=disk,filename={path} -device virtio-blk-pci,drive=disk"
    )
}

/// A disk in QEMU, or in a process that has the guest's memory by its descriptor.
fn disk(context: &Context, bind: &str, vhost_user: bool) -> Result<()> {
    let dir = TempDir::new()?;
    let image = dir.path().join("image");
    let mut content = disk_content();

    let (arguments, daemon) = if vhost_user {
        let (daemon, chardev) = disk_in_daemon(context, &dir)?;
        let arguments = format!("{chardev} -device vhost-user-blk-pci,chardev=vub");
        (arguments, Some(daemon))
    } else {
        fs::write(&image, &content)?;
        (virtio_blk(&image), None)
    };
    let vm = mapped::guest_vm(context, Scenario::Disk, bind).with_arguments(&arguments);
    let mut qemu = context.start(&vm)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    guest::finish(&mut qemu)?;
    drop(daemon);

    let words = (0..DISK_PART / 8).flat_map(|n| (!disk_word(n)).to_le_bytes());
    let written: Vec<u8> = words.collect();
    let part = usize::try_from(DISK_PART)?;
    content[part..2 * part].copy_from_slice(&written);
    ensure!(
        fs::read(&image)? == content,
        "the image is not what the guest wrote"
    );
    Ok(())
}

/// A DIMM on a backend of its own, added while QEMU runs; the guest uses it.
fn hotplug(context: &Context, bind: &str) -> Result<()> {
    const AT: u64 = 8 << 30;
    const DIMM: u64 = 64 << 20;
    let mut vm = mapped::guest_vm(context, Scenario::Dirty, bind)
        .with_arguments("-m 256M,slots=2,maxmem=16G")
        .with_arguments("-fw_cfg name=opt/guestmemfd/stop,string=1");
    if let Some((_, append)) = &mut vm.kernel {
        append.push_str(&format!(" dimm={AT:#x}+{DIMM}"));
    }
    let mut qemu = context.start(&vm)?;
    let object = json!({"qom-type": BACKEND, "id": "extra", "size": DIMM, "bind": bind == "on"});
    qemu.qmp.run("object-add", object)?;
    let device = json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "extra", "addr": AT});
    qemu.qmp.run("device_add", device)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let backends = query::backends(&mut qemu.qmp)?;
    ensure!(
        backends.len() == 2 && backends.iter().all(|b| b.mode == "mapped"),
        "two mapped backends expected: {backends:?}"
    );
    let tap = guest::finish(&mut qemu)?;
    ensure!(tap.verdict()? == 2, "the guest has not used the DIMM");
    Ok(())
}
