// SPDX-License-Identifier: GPL-2.0-or-later
//! What a dump of the guest's memory says of private pages: where they are, and nothing of what they hold.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use elf::ElfBytes;
use elf::abi::PT_LOAD;
use elf::endian::LittleEndian;
use elf::segment::ProgramHeader;
use serde_json::json;
use tempfile::TempDir;

use super::query::{RUNS, read_map};
use super::{Context, GUEST_LIMIT, SIZE, Test, guests};
use crate::guest;
use crate::probe::Need;
use crate::qemu::Qemu;
use crate::query::State;
use crate::vm::{self, Scenario};

const PAGE: u64 = 4096;

pub(super) fn tests() -> Vec<Test> {
    let private = &[Need::PrivateMemory];
    vec![
        Test::new("dump/elf", private, elf),
        Test::new("dump/paging", private, paging),
        Test::new("dump/private-page-tables", private, private_page_tables),
        Test::new("dump/kdump", private, kdump),
    ]
}

/// A guest that has ended, with private pages below and above 4 GiB.
fn ended_guest(context: &Context) -> Result<Box<Qemu>> {
    let mut qemu = context.start(&guests::guest_vm(context, Scenario::Hypercall, 1))?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    Ok(qemu)
}

/// What the map calls private is what the dump lists, and what it has nothing of.
fn elf(context: &Context) -> Result<()> {
    let dir = TempDir::new()?;
    let mut qemu = ended_guest(context)?;
    let private = pages_in(&mut qemu, State::Private)?;
    let dump = Elf::of(&mut qemu, dir.path())?;
    let listed = dump.listed();
    ensure!(
        private.len() > 1 && listed == private,
        "{} pages are private, the dump lists {}",
        private.len(),
        listed.len()
    );
    let dumped = private.iter().find(|page| dump.from(**page).is_some());
    ensure!(dumped.is_none(), "the dump has {dumped:#x?}");
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

/// The guest maps all of its memory, private and shared, with few large pages.
fn paging(context: &Context) -> Result<()> {
    let dir = TempDir::new()?;
    let mut qemu = ended_guest(context)?;
    let private = pages_in(&mut qemu, State::Private)?;
    let shared = pages_in(&mut qemu, State::Shared)?;
    let dump = Elf::with_paging(&mut qemu, dir.path())?;
    let lost = shared.iter().find(|page| dump.from(**page).is_none());
    ensure!(
        shared.len() > 1 && lost.is_none(),
        "the dump lacks the shared page {lost:#x?}"
    );
    let dumped = private.iter().find(|page| dump.from(**page).is_some());
    ensure!(dumped.is_none(), "the dump has {dumped:#x?}");
    let unlisted = private.iter().find(|page| !dump.lists(**page));
    ensure!(
        private.len() > 1 && unlisted.is_none(),
        "the dump does not list {unlisted:#x?}"
    );
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

/// Where page tables are private, a dump with paging would have no memory at all.
fn private_page_tables(context: &Context) -> Result<()> {
    let dir = TempDir::new()?;
    let mut qemu = context.start(&guests::guest_vm(context, Scenario::Tables, 1))?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let protocol = format!("file:{}", dir.path().join("dump").display());
    let arguments = json!({"paging": true, "protocol": protocol});
    let answer = qemu.qmp.raw("dump-guest-memory", arguments)?;
    let why = answer.err().context("a dump with paging is written")?.desc;
    ensure!(why.contains("page tables"), "no reason in {why:?}");
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

/// In kdump's formats a page that is left out is one that the guest does not have.
fn kdump(context: &Context) -> Result<()> {
    let dir = TempDir::new()?;
    let mut qemu = ended_guest(context)?;
    let private = pages_in(&mut qemu, State::Private)?;
    let shared = pages_in(&mut qemu, State::Shared)?;
    let bytes = dump(&mut qemu, dir.path(), "kdump-raw-zlib", false)?;
    // struct disk_dump_header.
    let number = |at: usize| -> Result<usize> {
        let bytes = bytes.get(at..at + 4).context("the dump has no header")?;
        Ok(usize::try_from(u32::from_le_bytes(bytes.try_into()?))?)
    };
    let (block, sub_header, blocks) = (number(428)?, number(432)?, number(436)?);
    let start = block * (1 + sub_header);
    let bitmaps = bytes.get(start..start + blocks * block);
    let bitmaps = bitmaps.filter(|bitmaps| !bitmaps.is_empty());
    let bitmaps = bitmaps.context("the dump has no bitmaps")?;
    // One of pages that there are, one of pages that are in the file.
    for bitmap in bitmaps.chunks(bitmaps.len() / 2) {
        let has = |page: &&u64| {
            let byte = bitmap.get((*page / PAGE / 8) as usize);
            byte.is_some_and(|byte| byte >> (*page / PAGE % 8) & 1 == 1)
        };
        let (found, all) = (
            private.iter().find(has),
            shared.iter().all(|page| has(&page)),
        );
        ensure!(
            !private.is_empty() && found.is_none(),
            "the dump has the private page {found:#x?}"
        );
        ensure!(!shared.is_empty() && all, "the dump lacks a shared page");
    }
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}

/// The guest addresses of all pages in a state.
fn pages_in(qemu: &mut Qemu, state: State) -> Result<Vec<u64>> {
    let runs = read_map(qemu, RUNS)?;
    let runs = runs.iter().filter(|run| run.state == state);
    let offsets = runs.flat_map(|run| (run.offset..run.offset + run.size).step_by(PAGE as usize));
    Ok(offsets
        .map(|offset| vm::small_guest_address(SIZE, offset))
        .collect())
}

fn dump(qemu: &mut Qemu, dir: &Path, format: &str, paging: bool) -> Result<Vec<u8>> {
    let file = dir.join("dump");
    let protocol = format!("file:{}", file.display());
    let arguments = json!({"paging": paging, "protocol": protocol, "format": format});
    qemu.qmp.run("dump-guest-memory", arguments)?;
    Ok(fs::read(&file)?)
}

/// A dump in ELF format.
pub(super) struct Elf {
    bytes: Vec<u8>,
    segments: Vec<ProgramHeader>,
}

impl Elf {
    pub(super) fn of(qemu: &mut Qemu, dir: &Path) -> Result<Self> {
        Self::parse(dump(qemu, dir, "elf", false)?)
    }

    fn with_paging(qemu: &mut Qemu, dir: &Path) -> Result<Self> {
        Self::parse(dump(qemu, dir, "elf", true)?)
    }

    fn parse(bytes: Vec<u8>) -> Result<Self> {
        let elf = ElfBytes::<LittleEndian>::minimal_parse(&bytes)?;
        let segments = elf.segments().context("the dump has no segments")?;
        let segments = segments.iter().filter(|s| s.p_type == PT_LOAD).collect();
        Ok(Self { bytes, segments })
    }

    /// What it has from a guest address on.
    pub(super) fn from(&self, address: u64) -> Option<&[u8]> {
        let mut segments = self.segments.iter();
        let segment = segments.find(|s| (s.p_paddr..s.p_paddr + s.p_filesz).contains(&address))?;
        let start = segment.p_offset + (address - segment.p_paddr);
        let end = segment.p_offset + segment.p_filesz;
        self.bytes.get(start as usize..end as usize)
    }

    /// Is this address listed without being in it?
    fn lists(&self, address: u64) -> bool {
        let mut absent = self.segments.iter().filter(|s| s.p_filesz == 0);
        absent.any(|s| (s.p_paddr..s.p_paddr + s.p_memsz).contains(&address))
    }

    /// Pages that are listed without being in it.
    pub(super) fn listed(&self) -> Vec<u64> {
        let absent = self.segments.iter().filter(|s| s.p_filesz == 0);
        absent
            .flat_map(|s| (s.p_paddr..s.p_paddr + s.p_memsz).step_by(PAGE as usize))
            .collect()
    }
}
