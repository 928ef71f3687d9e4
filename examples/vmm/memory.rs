// SPDX-License-Identifier: MIT OR Apache-2.0

//! The guest's memory: a backend of the library, and the KVM slots that show it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use anyhow::{Context, Result};
use guestmemfd::BackendStats;
use guestmemfd::listener::Level;
use guestmemfd::owner::KvmOwner;
use guestmemfd::{
    Backend, BackendConfig, Binding, GuestPages, Lazy, Listener, PAGE_SIZE, PageState, View, Vm,
};
use kvm_bindings::{KVM_MEM_GUEST_MEMFD, kvm_userspace_memory_region2};
use kvm_ioctls::{Kvm, VmFd};
use rustix::io::Errno;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    MemoryRegionAddress,
};

use crate::Options;

const FOUR_GIB: u64 = 4 << 30;

/// What the library asks of this program.
struct User;

impl Listener for User {
    /// As QEMU has it: there is nothing to share, and nothing that could be private.
    fn gap(&self, _: GuestPages, to: View) -> io::Result<()> {
        match to {
            View::Shared => Ok(()),
            View::Private => Err(Errno::INVAL.into()),
        }
    }

    fn log(&self, level: Level, message: &str) {
        eprintln!("{level:?}: {message}");
    }
}

/// RAM at one place.
#[derive(Debug, Clone, Copy)]
struct Ram {
    gpa: u64,
    size: u64,
    /// Where it begins in the backend.
    offset: u64,
}

/// See the module.
pub(crate) struct Memory {
    /// Converts pages, and reads and writes those that the host may use.
    pub(crate) vm: Vm,
    backend: Arc<Backend>,
    /// What the host maps, which KVM needs at an address of this process.
    mapping: GuestMemoryMmap,
    ram: Vec<Ram>,
}

impl Memory {
    /// Makes a backend and tells KVM where its pages are.
    pub(crate) fn new(kvm: &Kvm, kvm_vm: &VmFd, options: &Options) -> Result<Self> {
        let ram = layout(options);
        // SAFETY: both are open as long as the references live.
        let [kvm_fd, vm_fd] =
            [kvm.as_raw_fd(), kvm_vm.as_raw_fd()].map(|fd| unsafe { BorrowedFd::borrow_raw(fd) });
        let vm = Vm::new(Arc::new(KvmOwner::new(kvm_fd, vm_fd)?), Box::new(User));
        let mut config = BackendConfig::new("ram", ram.iter().map(|ram| ram.size).sum());
        config.confidential = true;
        // The guest counts what it causes, page by page.
        config.lazy = Lazy::Off;
        let backend = vm.create_backend(config)?;
        let memory = Self {
            mapping: map(&backend, &ram)?,
            vm,
            backend,
            ram,
        };
        memory.add_slots(kvm_vm, options.shared_bit)?;
        Ok(memory)
    }

    fn add_slots(&self, kvm_vm: &VmFd, shared_bit: Option<u32>) -> Result<()> {
        let mut slot = 0;
        for (ram, region) in self.ram.iter().zip(self.mapping.iter()) {
            let host = region.get_host_address(MemoryRegionAddress(0))? as u64;
            let alias = shared_bit.map(|bit| ram.gpa | 1 << bit);
            for gpa in [Some(ram.gpa), alias].into_iter().flatten() {
                let guest = GuestPages::from_bytes(gpa, ram.size)?;
                // The library says whether the slot is to carry the guest_memfd: the first does.
                let wanted = match Some(gpa) == alias {
                    true => Binding::SharedAlias,
                    false => Binding::Bound,
                };
                let binding = self
                    .vm
                    .add_window(&self.backend, guest, ram.offset, wanted)?;
                let bound = binding == Binding::Bound;
                let views = self.backend.views();
                let private = views.file(View::Private).fd().as_raw_fd();
                let region = kvm_userspace_memory_region2 {
                    slot,
                    flags: if bound { KVM_MEM_GUEST_MEMFD } else { 0 },
                    guest_phys_addr: gpa,
                    memory_size: ram.size,
                    userspace_addr: host,
                    guest_memfd_offset: if bound { ram.offset } else { 0 },
                    guest_memfd: if bound { u32::try_from(private)? } else { 0 },
                    ..Default::default()
                };
                // SAFETY: the mapping lives as long as `self`, which outlives the vCPU.
                unsafe { kvm_vm.set_user_memory_region2(region) }
                    .context("KVM_SET_USER_MEMORY_REGION2")?;
                slot += 1;
            }
        }
        Ok(())
    }

    /// For what is there before the guest runs.
    pub(crate) fn mapping(&self) -> &GuestMemoryMmap {
        &self.mapping
    }

    /// First byte and bytes of each range.
    pub(crate) fn ranges(&self) -> Vec<(u64, u64)> {
        self.ram.iter().map(|ram| (ram.gpa, ram.size)).collect()
    }

    /// What the library has counted, in the words of the conformance guest.
    pub(crate) fn summary(&self) -> String {
        let BackendStats {
            hypercalls,
            refused,
            faults_private,
            faults_shared,
            conversions_to_private,
            conversions_to_shared,
            converted_to_private,
            converted_to_shared,
            state_bytes,
            ..
        } = self.backend.stats();
        format!(
            "hypercalls={hypercalls} refused={refused} faults-private={faults_private} \
             faults-shared={faults_shared} to-private={conversions_to_private} \
             to-shared={conversions_to_shared} to-private-pages={} to-shared-pages={} \
             private-pages={}",
            converted_to_private / PAGE_SIZE,
            converted_to_shared / PAGE_SIZE,
            state_bytes[PageState::Private as usize] / PAGE_SIZE,
        )
    }
}

fn layout(options: &Options) -> Vec<Ram> {
    let [low, high] = [options.low, options.high].map(|mib| u64::from(mib) << 20);
    let places = [(0, low, 0), (FOUR_GIB, high, low)];
    places
        .into_iter()
        .filter(|(_, size, _)| *size > 0)
        .map(|(gpa, size, offset)| Ram { gpa, size, offset })
        .collect()
}

fn map(backend: &Backend, ram: &[Ram]) -> Result<GuestMemoryMmap> {
    let views = backend.views();
    let shared = views.file(View::Shared).fd();
    let ranges = ram.iter().map(|ram| -> Result<_> {
        let file = File::from(shared.as_fd().try_clone_to_owned()?);
        let file = FileOffset::new(file, ram.offset);
        Ok((
            GuestAddress(ram.gpa),
            usize::try_from(ram.size)?,
            Some(file),
        ))
    });
    let ranges = ranges.collect::<Result<Vec<_>>>()?;
    Ok(GuestMemoryMmap::from_ranges_with_files(ranges)?)
}
