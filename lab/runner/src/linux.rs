// SPDX-License-Identifier: GPL-2.0-or-later
//! The Linux guest: the lab's kernel, which makes its free memory private, with a root file system
//! on a disk.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};

use crate::guest;
use crate::qemu::Qemu;
use crate::query::{Backend, human};
use crate::tap::Tap;
use crate::vm::{Size, Vm};

/// Of the guest's memory, what is to be private at least, in percent. The rest is the kernel's image,
/// its map of all pages, bounce buffers, and what was in use when free memory was converted.
pub(crate) const PRIVATE_PERCENT: u64 = 85;

/// Slots of 2 KiB for bounce buffers: 16 MiB, where the kernel would take 64.
const BOUNCE_SLOTS: u32 = 8192;

/// QEMU's exit status after a guest that has switched itself off.
const OFF: i32 = 0;

/// What the guest consists of.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Files {
    /// The Linux guest's kernel
    #[arg(long = "linux", value_name = "PATH", requires = "disk")]
    kernel: Option<PathBuf>,
    /// The Linux guest's root file system: an image or a block device, which stays as it is
    #[arg(long = "linux-disk", value_name = "PATH", id = "disk")]
    disk: Option<PathBuf>,
}

/// What it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Job {
    /// Files, memory, load, and a reboot.
    Work,
    /// Fills its memory before, in and after an inflation of the balloon.
    Balloon,
    /// Fills its memory, and again when what was free then has been reported.
    Report,
    /// Fills its memory when it has got more, and again when it has lost that.
    Grow,
}

impl Job {
    fn name(self) -> &'static str {
        match self {
            Self::Work => "work",
            Self::Balloon => "balloon",
            Self::Report => "report",
            Self::Grow => "grow",
        }
    }
}

impl Files {
    /// Is there such a guest?
    pub(crate) fn are_named(&self) -> bool {
        self.kernel.is_some()
    }

    /// The guest with all its memory private that can be.
    pub(crate) fn vm(&self, job: Job, size: Size, smp: u32) -> Result<Vm> {
        let missing = "name the Linux guest's kernel and disk: --linux PATH --linux-disk PATH";
        let kernel = self.kernel.clone().context(missing)?;
        let disk = self.disk.as_ref().context(missing)?;
        let append = format!(
            "console=ttyS0 loglevel=4 panic=-1 root=/dev/vda rw init=/usr/sbin/lab-init \
             kvm_sw_protected=on swiotlb={BOUNCE_SLOTS} memhp_default_state=online_movable \
             lab_do={}",
            job.name()
        );
        let mut vm = Vm::protected(size);
        vm.smp = smp;
        vm.kernel = Some((kernel, append));
        let file = disk.display().to_string().replace(',', ",,");
        vm.extra = vec![
            "-drive".to_owned(),
            format!("if=none,id=root,format=raw,snapshot=on,file={file}"),
        ];
        Ok(vm.with_arguments(&format!("-device virtio-blk-pci,drive=root,{VIRTIO}")))
    }

    /// The same guest without private memory.
    pub(crate) fn ordinary_vm(&self, job: Job, size: Size, smp: u32) -> Result<Vm> {
        Ok(Vm {
            confidential: None,
            ..self.vm(job, size, smp)?
        })
    }
}

/// A device that reaches no memory but what the guest has shared.
pub(crate) const VIRTIO: &str = "iommu_platform=on,disable-legacy=on";

/// Ends QEMU; the guest must have reported success, in what comes after `tap` as well.
pub(crate) fn finish(qemu: &mut Qemu, mut tap: Tap) -> Result<Tap> {
    let ended = qemu.quit()?;
    guest::report_into(qemu, &mut tap);
    tap.verdict()?;
    ensure!(
        ended.status.code() == Some(OFF),
        "all tests of the guest are ok but QEMU ended with {}",
        ended.status
    );
    Ok(tap)
}

/// Is most of its memory private, and do guest and QEMU agree about which?
pub(crate) fn check(backend: &Backend, tap: &Tap) -> Result<()> {
    let said = tap
        .note("private-bytes")
        .context("the guest does not say its private-bytes")?;
    ensure!(
        said == backend.private_bytes,
        "the guest has made {} private, QEMU has {}",
        human(said),
        human(backend.private_bytes)
    );
    let percent = percent_private(backend);
    ensure!(
        percent >= PRIVATE_PERCENT,
        "{percent} % of the guest's memory are private, not {PRIVATE_PERCENT} %: {backend:?}"
    );
    ensure!(
        backend.refused == 0,
        "{} conversions were refused",
        backend.refused
    );
    Ok(())
}

/// How much of the memory is private.
pub(crate) fn percent_private(backend: &Backend) -> u64 {
    backend.private_bytes * 100 / backend.size
}
