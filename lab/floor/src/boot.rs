// SPDX-License-Identifier: GPL-2.0-or-later
//! Loads the guest and makes the vCPU ready to enter it, by the PVH boot protocol.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, bail};
use kvm_bindings::kvm_segment;
use kvm_ioctls::VcpuFd;
use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, load_cmdline};
use vm_memory::{GuestAddress, GuestMemoryBackend};

const START_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x20000;
const MOST_COMMAND_LINE: usize = 1024;

const MAGIC: u32 = 0x336e_c578;
const RAM: u32 = 1;

const CODE: u16 = 0x08;
const DATA: u16 = 0x10;
/// Protection on, paging off; the coprocessor is an x87.
const CR0: u64 = 0x11;

/// Puts the guest into memory, and what it is told: its command line, and where there is RAM (first
/// byte and bytes of each range). Returns where it is entered.
pub fn load(
    memory: &impl GuestMemoryBackend,
    ram: &[(u64, u64)],
    guest: &Path,
    append: &str,
) -> Result<u64> {
    let mut file = File::open(guest).with_context(|| format!("cannot open {}", guest.display()))?;
    let loaded = Elf::load(memory, None, &mut file, None)
        .with_context(|| format!("cannot load {}", guest.display()))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        bail!("{} has no PVH entry note", guest.display());
    };
    let mut line = Cmdline::new(MOST_COMMAND_LINE)?;
    line.insert_str(append)?;
    load_cmdline(memory, GuestAddress(COMMAND_LINE), &line)?;

    let map: Vec<_> = ram
        .iter()
        .map(|&(addr, size)| hvm_memmap_table_entry {
            addr,
            size,
            type_: RAM,
            reserved: 0,
        })
        .collect();
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        cmdline_paddr: COMMAND_LINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len())?,
        ..Default::default()
    };
    let mut parameters = BootParams::new(&info, GuestAddress(START_INFO));
    parameters.set_sections(&map, GuestAddress(MEMORY_MAP));
    PvhBootConfigurator::write_bootparams(&parameters, memory)?;
    Ok(entry.0)
}

/// 32-bit protected mode with flat segments, and %ebx at the start info.
pub fn enter(vcpu: &VcpuFd, entry: u64) -> Result<()> {
    let mut special = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    special.cs = flat(CODE, 0xb);
    for segment in [&mut special.ds, &mut special.es, &mut special.ss] {
        *segment = flat(DATA, 0x3);
    }
    special.cr0 = CR0;
    vcpu.set_sregs(&special).context("KVM_SET_SREGS")?;
    let mut registers = vcpu.get_regs().context("KVM_GET_REGS")?;
    registers.rip = entry;
    registers.rbx = START_INFO;
    registers.rflags = 2;
    vcpu.set_regs(&registers).context("KVM_SET_REGS")
}

fn flat(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}
