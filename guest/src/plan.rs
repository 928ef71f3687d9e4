// SPDX-License-Identifier: GPL-2.0-or-later
//! What all CPUs need to know, fixed before the first scenario runs.

use crate::memory::TestMemory;
use crate::{cpu, fwcfg, hypercall, memmap, paging, smp, tap};
use core::fmt;
use guestmemfd_guest::PAGE_SIZE;
use guestmemfd_guest::cmdline::Options;
use guestmemfd_guest::hostile::World;
use guestmemfd_guest::layout::{Area, EDGE_PAGES, Range, SLICE_PAGES, SLICE_SIZE};
use spin::Once;

/// The fw_cfg item whose contents QEMU writes to shared pages.
const HOST_ITEM: &str = "opt/guestmemfd/pattern";

static PLAN: Once<Plan> = Once::new();

/// A fw_cfg item, and what it holds.
#[derive(Debug)]
pub(crate) struct HostItem {
    /// Its number.
    pub(crate) selector: u16,
    /// The words that it fills from the start of a page.
    pub(crate) words: usize,
    /// Its first bytes.
    pub(crate) bytes: [u8; PAGE_SIZE as usize],
}

/// What all CPUs need to know.
#[derive(Debug)]
pub(crate) struct Plan {
    /// The command line.
    pub(crate) options: Options,
    /// CPUs that take part.
    pub(crate) cpus: usize,
    /// Memory below 4 GiB, and above it if there is enough for all CPUs.
    pub(crate) areas: [Option<Area>; 2],
    /// What QEMU writes to shared pages.
    pub(crate) host: HostItem,
    /// Does KVM run the guest?
    pub(crate) kvm: bool,
    /// Is there memory where the shared bit is set? True without such a bit.
    pub(crate) shared_bit_works: bool,
}

/// Why the guest cannot do what it was asked for.
#[derive(Debug)]
pub(crate) enum Error {
    /// fw_cfg does not work.
    FwCfg(fwcfg::Error),
    /// `smp=` is higher than the number of CPUs.
    TooFewCpus {
        /// What was asked for.
        wanted: usize,
        /// What is there.
        found: usize,
    },
    /// No room for the slices below 4 GiB.
    TooLittleRam {
        /// CPUs, each of which needs a slice.
        cpus: usize,
    },
    /// No room for the slices on the DIMM.
    SmallDimm {
        /// CPUs, each of which needs a slice.
        cpus: usize,
    },
    /// The CPU has no such address bit.
    SharedBit {
        /// What was asked for.
        bit: u32,
        /// Physical address bits that the CPU has.
        width: u32,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FwCfg(error) => error.fmt(f),
            Self::TooFewCpus { wanted, found } => {
                write!(
                    f,
                    "smp={wanted}, but the machine has {found} CPUs: use -smp {wanted}"
                )
            }
            Self::TooLittleRam { cpus } => write!(
                f,
                "no room for {cpus} times {} MiB of test memory between 32 MiB and 4 GiB: use -m {}M",
                SLICE_SIZE >> 20,
                // What precedes the slices, and what the firmware and the edge take.
                34 + *cpus as u64 * (SLICE_SIZE >> 20)
            ),
            Self::SmallDimm { cpus } => {
                write!(f, "no room for {cpus} times 6 MiB of test memory in dimm=")
            }
            Self::SharedBit { bit, width } => write!(
                f,
                "shared-bit={bit}, but the CPU has {width} physical address bits: use -cpu host or -cpu max"
            ),
        }
    }
}

impl From<fwcfg::Error> for Error {
    fn from(error: fwcfg::Error) -> Self {
        Self::FwCfg(error)
    }
}

/// Memory that only the command line tells of.
fn dimm(start: u64, size: u64, cpus: usize) -> Option<Area> {
    let end = start.checked_add(size)?;
    let all = Range { start, end };
    Area::find("dimm", all, [all].into_iter(), [all].into_iter(), cpus)
}

impl Plan {
    /// Looks at the machine.
    pub(crate) fn new(options: Options, map: &memmap::Map) -> Result<Self, Error> {
        let found = smp::online();
        let cpus = options.smp.unwrap_or(found);
        if cpus > found {
            return Err(Error::TooFewCpus {
                wanted: cpus,
                found,
            });
        }
        let width = cpu::cpuid(0x8000_0008).eax & 0xff;
        if let Some(bit) = options.shared_bit
            && bit >= width
        {
            return Err(Error::SharedBit { bit, width });
        }
        let below_shared_bit = Range {
            start: 0,
            end: 1 << options.shared_bit.unwrap_or(38),
        };
        let high = Range::HIGH.overlap(below_shared_bit);
        let find = |name, within| -> Result<_, Error> {
            Ok(Area::find(name, within, map.usable(), memmap::ram()?, cpus))
        };
        let low = find("low", Range::LOW)?.ok_or(Error::TooLittleRam { cpus })?;
        let high = match options.dimm {
            None => high.map(|high| find("high", high)).transpose()?.flatten(),
            Some((start, size)) => Some(dimm(start, size, cpus).ok_or(Error::SmallDimm { cpus })?),
        };
        let mut plan = Self {
            options,
            cpus,
            areas: [Some(low), high],
            host: HostItem::read()?,
            kvm: hypercall::present(),
            shared_bit_works: true,
        };
        plan.map_areas();
        plan.shared_bit_works = plan.edge(&low).shared_view_keeps_data();
        Ok(plan)
    }

    /// Says what was found.
    pub(crate) fn announce(&self) {
        for area in self.areas.iter().flatten() {
            tap::note(format_args!(
                "{} memory: slices from {:#x}, edge at {:#x}, end of RAM at {:#x}",
                area.name, area.slices, area.edge, area.ram_end
            ));
        }
        if self.areas[1].is_none() {
            tap::note(format_args!(
                "high memory: none, or not enough for all CPUs"
            ));
        }
        tap::note(format_args!(
            "cpus={} kvm={} host-item-bytes={} seed={}",
            self.cpus,
            u8::from(self.kvm),
            8 * self.host.words,
            self.options.seed
        ));
    }

    /// The memory of a CPU in an area.
    pub(crate) fn slice(&self, area: &Area, cpu: usize) -> TestMemory {
        // SAFETY: the firmware leaves the memory to us, it is mapped, and no two CPUs have the same
        // number.
        unsafe { TestMemory::new(area.slice(cpu), SLICE_PAGES, self.options.shared_bit) }
    }

    /// The slices of all CPUs. What is in them changes under the hands of a CPU that has not agreed
    /// with the others on who uses what.
    pub(crate) fn all_slices(&self, area: &Area) -> TestMemory {
        let pages = self.cpus * SLICE_PAGES;
        // SAFETY: as for `slice`, but that the CPUs share it: it is accessed with volatile
        // instructions only.
        unsafe { TestMemory::new(area.slices, pages, self.options.shared_bit) }
    }

    /// What lies behind the slices, for all CPUs.
    pub(crate) fn rest(&self, area: &Area) -> TestMemory {
        let rest = area.rest(self.cpus);
        let pages = (rest.size() / PAGE_SIZE) as usize;
        for gib in 0..=rest.size() >> 30 {
            self.map_both_views((rest.start + (gib << 30)).min(rest.end));
        }
        // SAFETY: as for `all_slices`; it ends before the edge begins, and has just been mapped.
        unsafe { TestMemory::new(rest.start, pages, self.options.shared_bit) }
    }

    /// A page behind the end of RAM: reads find nothing there, and writes are lost.
    pub(crate) fn nothing(&self, area: &Area) -> TestMemory {
        let start = area
            .ram_end
            .max(Range::HIGH.start)
            .next_multiple_of(1 << 30);
        self.map_both_views(start);
        // SAFETY: nothing lives where nothing is, and it has just been mapped.
        unsafe { TestMemory::new(start, 1, self.options.shared_bit) }
    }

    /// Guest physical space, as far as a request by one of the CPUs can do harm.
    pub(crate) fn world(&self) -> World {
        let low = self.areas[0].as_ref();
        let high = self.areas[1].as_ref().or(low);
        let pair = |range: &dyn Fn(&Area) -> Range| {
            let of = |area: Option<&Area>| area.map_or(Range { start: 0, end: 0 }, range);
            [of(low), of(high)]
        };
        World {
            // All that lies below the end: better too much than too little.
            ram: pair(&|area| Range {
                start: if area.slices < Range::HIGH.start {
                    0
                } else {
                    Range::HIGH.start
                },
                end: area.ram_end,
            }),
            tests: pair(&|area| area.all_slices(self.cpus)),
            dimm: self.options.dimm.is_some(),
            shared_bit: self.options.shared_bit,
        }
    }

    /// The last pages of an area, for the boot CPU.
    pub(crate) fn edge(&self, area: &Area) -> TestMemory {
        // SAFETY: as for `slice`; the edge lies behind all slices.
        unsafe { TestMemory::new(area.edge, EDGE_PAGES, self.options.shared_bit) }
    }

    /// Does touching memory in an area convert it?
    pub(crate) fn is_strict(&self, area: &Area) -> bool {
        self.options.shared_bit.is_some() && area.slices >= self.options.strict_from
    }

    fn map_areas(&self) {
        for area in self.areas.iter().flatten() {
            for cpu in 0..self.cpus {
                self.map_both_views(area.slice(cpu));
                self.map_both_views(area.slice(cpu) + SLICE_SIZE - 1);
            }
            self.map_both_views(area.edge);
        }
    }

    fn map_both_views(&self, gpa: u64) {
        paging::map(gpa);
        if let Some(bit) = self.options.shared_bit {
            paging::map(gpa | 1 << bit);
        }
    }
}

impl HostItem {
    /// The runner's item, or the one that every machine has.
    fn read() -> Result<Self, fwcfg::Error> {
        let (selector, size) = fwcfg::find(HOST_ITEM)?.unwrap_or((fwcfg::SIGNATURE, 4));
        let mut bytes = [0; PAGE_SIZE as usize];
        let length = bytes.len().min(size as usize);
        fwcfg::read(selector, &mut bytes[..length])?;
        Ok(Self {
            selector,
            // Beyond the end of an item fw_cfg gives zeros.
            words: length.div_ceil(8),
            bytes,
        })
    }

    /// What word `index` of a page is after QEMU has written the item there.
    pub(crate) fn word(&self, index: usize) -> u64 {
        let bytes = self.bytes[8 * index..].iter().take(8).rev();
        bytes.fold(0, |word, &byte| word << 8 | u64::from(byte))
    }
}

/// Lets the other CPUs see the plan.
pub(crate) fn publish(plan: Plan) -> &'static Plan {
    PLAN.call_once(|| plan)
}

/// The plan, once it is there.
pub(crate) fn published() -> Option<&'static Plan> {
    PLAN.get()
}
