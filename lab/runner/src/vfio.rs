// SPDX-License-Identifier: GPL-2.0-or-later
//! A PCI device behind an IOMMU that guests can have, and what the kernel has mapped for it.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use vfio_bindings::bindings::vfio as kernel;

use crate::memory;
use crate::setting::{self, Setting};

/// QEMU's edu device, which the conformance guest knows.
const VENDOR: &str = "0x1234";
const DEVICE: &str = "0x11e8";

const DRIVER: &str = "/sys/bus/pci/drivers/vfio-pci";
/// How many mappings a container may have that is opened from now on.
const LIMIT: &str = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";

/// Why there is no such device; nothing if there is one.
pub(crate) fn lacking() -> Option<String> {
    if !Path::new(DRIVER).exists() {
        return Some("the kernel has no vfio-pci (CONFIG_VFIO_PCI)".into());
    }
    find().err().map(|why| format!("{why:#}"))
}

fn find() -> Result<PathBuf> {
    let is = |path: &Path, name: &str, value: &str| {
        fs::read_to_string(path.join(name)).is_ok_and(|found| found.trim() == value)
    };
    for entry in fs::read_dir("/sys/bus/pci/devices").context("no PCI")? {
        let path = entry?.path();
        if is(&path, "vendor", VENDOR) && is(&path, "device", DEVICE) {
            ensure!(
                path.join("iommu_group").exists(),
                "there is no IOMMU for the edu device"
            );
            return Ok(path);
        }
    }
    bail!("there is no edu device (cargo xtask lab --iommu)")
}

/// Gives the device to vfio-pci. Returns its address, as QEMU's `host=` takes it.
pub(crate) fn device() -> Result<String> {
    let path = find()?;
    let address = path.file_name().and_then(|name| name.to_str());
    let address = address.context("a PCI device without an address")?;
    let driver = fs::canonicalize(path.join("driver"));
    if !driver.is_ok_and(|driver| driver == Path::new(DRIVER)) {
        fs::write(path.join("driver_override"), "vfio-pci")?;
        fs::write("/sys/bus/pci/drivers_probe", address)
            .with_context(|| format!("vfio-pci does not take {address}"))?;
        ensure!(
            path.join("driver").exists(),
            "vfio-pci does not take {address}"
        );
    }
    Ok(address.to_owned())
}

/// More mappings than usual while this lives: for a guest whose pages are visible twice, for instance.
pub(crate) fn many_mappings() -> Result<Setting> {
    Setting::set(LIMIT, "1000000")
}

/// What the kernel has mapped for the devices of a QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapped {
    /// Mappings in the VFIO container; nothing if it has none.
    pub(crate) mappings: Option<u32>,
    /// Bytes of the process that are pinned for it.
    pub(crate) bytes: u64,
}

impl Mapped {
    /// Asks the kernel.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        // VFIO's containers count as locked what iommufd counts as pinned.
        let bytes = ["VmLck:", "VmPin:"].map(|name| memory::kilobytes(&status, name).unwrap_or(0));
        let limit = setting::read(LIMIT).unwrap_or_default();
        let mappings = match (container(pid)?, limit.parse::<u32>()) {
            (Some(container), Ok(limit)) => Some(limit.saturating_sub(available(&container)?)),
            _ => None,
        };
        Ok(Self {
            mappings,
            bytes: bytes.iter().sum::<u64>() * 1024,
        })
    }
}

/// The VFIO container of a process.
fn container(pid: u32) -> Result<Option<OwnedFd>> {
    for fd in memory::open_fds(pid)? {
        let target = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap_or_default();
        if target == Path::new("/dev/vfio/vfio") {
            return memory::fetch_fd(pid, fd).map(Some);
        }
    }
    Ok(None)
}

/// How many more mappings a container may have: `VFIO_IOMMU_GET_INFO` with its capability
/// `VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL`.
fn available(container: &OwnedFd) -> Result<u32> {
    const WORDS: usize = 128;
    let mut answer = [0_u32; WORDS];
    answer[0] = size_of_val(&answer) as u32;
    let request = u64::from(kernel::VFIO_TYPE) << 8 | u64::from(kernel::VFIO_BASE + 12);
    // SAFETY: the answer is as long as it says, and the kernel writes no more than that.
    let result = unsafe { libc::ioctl(container.as_raw_fd(), request, answer.as_mut_ptr()) };
    ensure!(
        result == 0,
        "VFIO_IOMMU_GET_INFO: {}",
        std::io::Error::last_os_error()
    );
    dma_available(&answer).context("the kernel does not say how many mappings are left")
}

/// Reads the answer, `struct vfio_iommu_type1_info` with its chain of capabilities, in words.
fn dma_available(answer: &[u32]) -> Option<u32> {
    const FLAGS: usize = 1;
    const FIRST: usize = std::mem::offset_of!(kernel::vfio_iommu_type1_info, cap_offset) / 4;
    if answer[FLAGS] & kernel::VFIO_IOMMU_INFO_CAPS == 0 {
        return None;
    }
    let mut at = answer[FIRST] as usize / 4;
    while at != 0 {
        // Two 16-bit numbers, the first of which says what it is, then where the next one lies.
        let head = answer.get(at..at + 3)?;
        if head[0] & 0xffff == kernel::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL {
            return Some(head[2]);
        }
        at = head[1] as usize / 4;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_is_found_in_the_chain() {
        let mut answer = [0_u32; 16];
        answer[1] = kernel::VFIO_IOMMU_INFO_CAPS;
        answer[4] = 24;
        answer[6..9].copy_from_slice(&[1 << 16 | 1, 40, 7]);
        answer[10..13].copy_from_slice(&[1 << 16 | 3, 0, 65_000]);
        assert_eq!(dma_available(&answer), Some(65_000));
        answer[7] = 0;
        assert_eq!(dma_available(&answer), None);
        answer[7] = 4 * 16;
        assert_eq!(dma_available(&answer), None, "beyond the end");
    }
}
