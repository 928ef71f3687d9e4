// SPDX-License-Identifier: GPL-2.0-or-later
//! The guest's memory: a memfd for shared pages, a guest_memfd for private ones, and conversions
//! between them; or one guest_memfd for both, in which they are converted in place.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

use anyhow::{Context, Result, ensure};
use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd,
    kvm_memory_attributes, kvm_userspace_memory_region2,
};
use kvm_ioctls::VmFd;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress, MmapRegion,
};

use crate::Options;

pub(crate) const PAGE: u64 = 4096;
const ONE_MIB: u64 = 1 << 20;
const FOUR_GIB: u64 = 4 << 30;

/// RAM at one place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Window {
    pub(crate) gpa: u64,
    pub(crate) size: u64,
    /// Where it begins in each file.
    offset: u64,
}

/// GUEST_MEMFD_FLAG_MMAP and GUEST_MEMFD_FLAG_INIT_SHARED.
const MAPPED_AND_SHARED: u64 = 3;

/// `struct kvm_memory_attributes2` of Linux 7.4.
#[repr(C)]
#[derive(Default)]
struct Attributes2 {
    offset: u64,
    size: u64,
    attributes: u64,
    flags: u64,
    error_offset: u64,
    reserved: [u64; 11],
}

/// What memory is made of.
#[derive(Debug)]
enum Files {
    Two { shared: OwnedFd, private: OwnedFd },
    InPlace(OwnedFd),
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) shared_view: GuestMemoryMmap,
    pub(crate) windows: Vec<Window>,
    files: Files,
    shared_bit: Option<u32>,
}

impl Memory {
    /// Makes the files and tells KVM where they are.
    pub(crate) fn new(vm: &VmFd, options: &Options) -> Result<Self> {
        let (low, high) = (u64::from(options.low) << 20, u64::from(options.high) << 20);
        // As on a PC, where other things than RAM can be below 1 MiB. It makes a difference: with each change
        // of a page KVM looks at all the aligned GiB around it, if that lies in one slot.
        let ends = [
            (0, ONE_MIB.min(low)),
            (ONE_MIB, low),
            (FOUR_GIB, FOUR_GIB + high),
        ];
        let mut offset = 0;
        let windows = ends.into_iter().filter(|(gpa, end)| gpa < end);
        let windows: Vec<_> = windows
            .map(|(gpa, end)| {
                let size = end - gpa;
                offset += size;
                Window {
                    gpa,
                    size,
                    offset: offset - size,
                }
            })
            .collect();
        let (files, shared_view) = match options.in_place {
            true => in_place(vm, low + high, &windows)?,
            false => two_files(vm, low + high, &windows)?,
        };
        let memory = Self {
            shared_view,
            windows,
            files,
            shared_bit: options.shared_bit,
        };
        memory.add_slots(vm)?;
        Ok(memory)
    }

    fn add_slots(&self, vm: &VmFd) -> Result<()> {
        let mut slot = 0;
        for (window, region) in self.windows.iter().zip(self.shared_view.iter()) {
            let host = region.get_host_address(MemoryRegionAddress(0))?;
            let bound = kvm_userspace_memory_region2 {
                slot,
                flags: KVM_MEM_GUEST_MEMFD,
                guest_phys_addr: window.gpa,
                memory_size: window.size,
                userspace_addr: host as u64,
                guest_memfd_offset: window.offset,
                guest_memfd: u32::try_from(self.guest_memfd().as_raw_fd())?,
                ..Default::default()
            };
            let unbound = self.shared_bit.map(|bit| kvm_userspace_memory_region2 {
                slot: slot + 1,
                flags: 0,
                guest_phys_addr: window.gpa | 1 << bit,
                guest_memfd: 0,
                guest_memfd_offset: 0,
                ..bound
            });
            for region in [Some(bound), unbound].into_iter().flatten() {
                // SAFETY: the mapping lives as long as `self`, which outlives the vCPU.
                unsafe { vm.set_user_memory_region2(region) }
                    .context("KVM_SET_USER_MEMORY_REGION2")?;
            }
            slot += 2;
        }
        Ok(())
    }

    fn guest_memfd(&self) -> &OwnedFd {
        match &self.files {
            Files::Two { private, .. } | Files::InPlace(private) => private,
        }
    }

    /// Takes the shared bit away.
    pub(crate) fn without_shared_bit(&self, gpa: u64) -> u64 {
        gpa & !self.shared_bit.map_or(0, |bit| 1 << bit)
    }

    /// Moves pages to one view. With two files, first nobody may reach the old view any more, then it
    /// is freed.
    pub(crate) fn convert(&self, vm: &VmFd, gpa: u64, pages: u64, private: bool) -> Result<()> {
        let size = pages.checked_mul(PAGE).context("too many pages")?;
        let end = gpa.checked_add(size).context("a range that wraps")?;
        let window = self
            .windows
            .iter()
            .find(|window| window.gpa <= gpa && end <= window.gpa + window.size);
        let window = window.with_context(|| format!("{gpa:#x} to {end:#x} is no RAM"))?;
        ensure!(gpa.is_multiple_of(PAGE) && pages > 0, "no whole pages");
        let attributes = if private {
            u64::from(KVM_MEMORY_ATTRIBUTE_PRIVATE)
        } else {
            0
        };
        let offset = gpa - window.gpa + window.offset;
        let (shared, private_file) = match &self.files {
            Files::Two { shared, private } => (shared, private),
            Files::InPlace(file) => return convert_in_place(file, offset, size, attributes),
        };
        let alias = self.shared_bit.map(|bit| gpa | 1 << bit);
        for address in [Some(gpa), alias].into_iter().flatten() {
            vm.set_memory_attributes(kvm_memory_attributes {
                address,
                size,
                attributes,
                flags: 0,
            })
            .context("KVM_SET_MEMORY_ATTRIBUTES")?;
        }
        let left = if private { shared } else { private_file };
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(left, hole, offset, size).context("fallocate")
    }
}

fn guest_memfd(vm: &VmFd, size: u64, flags: u64) -> Result<OwnedFd> {
    let raw = vm
        .create_guest_memfd(kvm_create_guest_memfd {
            size,
            flags,
            ..Default::default()
        })
        .context("KVM_CREATE_GUEST_MEMFD")?;
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

fn two_files(vm: &VmFd, size: u64, windows: &[Window]) -> Result<(Files, GuestMemoryMmap)> {
    let shared = memfd_create("floor", MemfdFlags::CLOEXEC).context("memfd_create")?;
    ftruncate(&shared, size)?;
    let private = guest_memfd(vm, size, 0)?;
    let ranges = windows
        .iter()
        .map(|window| -> Result<_> {
            let file = FileOffset::new(File::from(shared.try_clone()?), window.offset);
            Ok((
                GuestAddress(window.gpa),
                usize::try_from(window.size)?,
                Some(file),
            ))
        })
        .collect::<Result<Vec<_>>>()?;
    let view = GuestMemoryMmap::from_ranges_with_files(ranges)?;
    Ok((Files::Two { shared, private }, view))
}

/// vm-memory would look for the end of the file, which a guest_memfd does not tell.
fn in_place(vm: &VmFd, size: u64, windows: &[Window]) -> Result<(Files, GuestMemoryMmap)> {
    let file = guest_memfd(vm, size, MAPPED_AND_SHARED)?;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let regions = windows
        .iter()
        .map(|window| -> Result<_> {
            let size = usize::try_from(window.size)?;
            let (none, flags) = (ptr::null_mut(), MapFlags::SHARED);
            // SAFETY: a new mapping at an address of the kernel's choice.
            let start = unsafe { mmap(none, size, access, flags, &file, window.offset) }?;
            let (access, flags) = (access.bits().cast_signed(), flags.bits().cast_signed());
            // SAFETY: it is mapped like that, as long as this process lives.
            let region = unsafe { MmapRegion::build_raw(start.cast(), size, access, flags) }?;
            GuestRegionMmap::new(region, GuestAddress(window.gpa)).context("a region that wraps")
        })
        .collect::<Result<Vec<_>>>()?;
    let view = GuestMemoryMmap::from_regions(regions)?;
    Ok((Files::InPlace(file), view))
}

fn convert_in_place(file: &OwnedFd, offset: u64, size: u64, attributes: u64) -> Result<()> {
    const OPCODE: Opcode = opcode::read_write::<Attributes2>(0xae, 0xd2);
    let mut attributes = Attributes2 {
        offset,
        size,
        attributes,
        ..Default::default()
    };
    // SAFETY: the request reads and writes one such structure and keeps nothing of it.
    let answer = unsafe { ioctl(file, Updater::<OPCODE, _>::new(&mut attributes)) };
    answer.with_context(|| {
        let at = attributes.error_offset;
        format!("KVM_SET_MEMORY_ATTRIBUTES2, at {at:#x}")
    })
}
