// SPDX-License-Identifier: GPL-2.0-or-later
//! The measuring itself: both ways of counting a guest_memfd's pages, on one whose contents are
//! known.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use anyhow::{Context as _, Result, bail, ensure};
use kvm_bindings::kvm_create_guest_memfd;
use kvm_ioctls::Kvm;
use rustix::fs::{FallocateFlags, fallocate};

use super::{Context, Test};
use crate::memory::{Kind, System, backings, cached_bytes};
use crate::probe::Need;

const FILE: u64 = 32 << 20;
const PART: u64 = 16 << 20;

/// Page cache that other programs may fill or lose meanwhile.
const NOISE: u64 = 2 << 20;

/// On a machine that is busy otherwise one try may see more than noise.
const TRIES: usize = 10;

pub(super) fn tests() -> Vec<Test> {
    vec![
        Test::new("measure/file", &[Need::GuestMemfd, Need::PageCounts], file),
        Test::new("measure/system", &[Need::GuestMemfd, Need::Root], system),
    ]
}

fn guest_memfd() -> Result<OwnedFd> {
    let vm = Kvm::new()?.create_vm()?;
    let fd = vm
        .create_guest_memfd(kvm_create_guest_memfd {
            size: FILE,
            ..Default::default()
        })
        .context("KVM_CREATE_GUEST_MEMFD")?;
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn punch(file: &OwnedFd, offset: u64, size: u64) -> Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(file, flags, offset, size).context("cannot punch a hole")
}

fn file(_: &Context) -> Result<()> {
    let file = guest_memfd()?;
    let expect = |bytes: u64, when: &str| -> Result<()> {
        let counted = cached_bytes(file.as_fd())?;
        ensure!(
            counted == bytes,
            "{when} {counted} bytes are counted, not {bytes}"
        );
        // The way that is used for QEMU's files: by process and descriptor.
        let found = backings(std::process::id())?;
        let ours = found
            .iter()
            .find(|b| b.kind == Kind::GuestMemfd && b.size == FILE);
        let ours = ours.context("our guest_memfd is not among our files")?;
        ensure!(
            ours.allocated == Some(bytes),
            "{when} backings() says {:?}",
            ours.allocated
        );
        Ok(())
    };
    expect(0, "fresh")?;
    fallocate(&file, FallocateFlags::KEEP_SIZE, 0, PART).context("cannot allocate")?;
    expect(PART, "allocated")?;
    punch(&file, 4096, 4096)?;
    expect(PART - 4096, "with one page punched")?;
    punch(&file, 0, PART)?;
    expect(0, "punched")
}

fn system(_: &Context) -> Result<()> {
    let file = guest_memfd()?;
    let mut seen = Vec::new();
    for _ in 0..TRIES {
        let before = System::read()?;
        fallocate(&file, FallocateFlags::KEEP_SIZE, 0, PART).context("cannot allocate")?;
        let full = System::read()?;
        punch(&file, 0, PART)?;
        let empty = System::read()?;
        let grown = full.files.saturating_sub(before.files);
        let freed = full.files.saturating_sub(empty.files);
        if grown.abs_diff(PART) <= NOISE && freed.abs_diff(PART) <= NOISE {
            return Ok(());
        }
        seen.push((grown, freed));
    }
    bail!("{PART} bytes allocated, then freed; counted: {seen:?}")
}
