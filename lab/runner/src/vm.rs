// SPDX-License-Identifier: GPL-2.0-or-later
//! The command lines of the guests under test.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Result, bail};

use crate::linux;
use crate::probe::{self, Need};

/// Where the second, unbound window of a strict-mode guest lies: `1 << SHARED_BIT`.
pub(crate) const SHARED_BIT: u32 = 38;

/// q35 puts no more than this below 4 GiB, and all of it unless told otherwise.
const BELOW_4G: u64 = 0xb000_0000;

/// Enough for firmware, the guest's image, and test memory of 16 CPUs.
const BELOW_4G_SMALL: u64 = 128 << 20;

/// How much of a small guest's memory lies below 4 GiB.
fn below_4g(size: Size) -> u64 {
    BELOW_4G_SMALL.min((size.0 / 2) >> 20 << 20)
}

/// Where a small guest of [`Vm::conformance`] has an offset of its memory.
pub(crate) fn small_guest_address(size: Size, offset: u64) -> u64 {
    let below = below_4g(size);
    match offset < below {
        true => offset,
        false => (4 << 30) + (offset - below),
    }
}

/// Seconds after which the guest gives up, and says where it was; sooner than those who wait for it.
const TIMEOUT: u32 = 240;

/// The backend's QEMU type.
pub(crate) const BACKEND: &str = "memory-backend-guestmemfd";

/// The files that every guest needs.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Files {
    /// The patched qemu-system-x86_64
    #[arg(long, value_name = "PATH", value_parser = existing)]
    pub(crate) qemu: PathBuf,
    /// Folder with SeaBIOS and QEMU's option ROMs
    #[arg(long, value_name = "DIR", value_parser = existing)]
    pub(crate) firmware: PathBuf,
    /// The conformance guest
    #[arg(long, value_name = "PATH", value_parser = existing)]
    pub(crate) guest: PathBuf,
    #[command(flatten)]
    pub(crate) linux: linux::Files,
}

/// A path that exists, made absolute: a program's bare name would be looked for elsewhere.
fn existing(text: &str) -> Result<PathBuf, String> {
    match std::path::absolute(text) {
        Ok(path) if path.exists() => Ok(path),
        Ok(path) => Err(format!("{} does not exist", path.display())),
        Err(why) => Err(why.to_string()),
    }
}

/// What the conformance guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Scenario {
    /// Everything that this machine can run
    All,
    /// Starts its CPUs and ends
    Idle,
    /// Converts by hypercall
    Hypercall,
    /// Converts by touching memory; needs the lab kernel's strict mode
    Fault,
    /// Hypercalls that must be refused
    Bad,
    /// All CPUs convert random ranges
    Storm,
    /// Random numbers in every register of the hypercall, and random touches
    Hostile,
    /// The same pages back and forth
    Flip,
    /// Looks for what an earlier guest has left
    Reset,
    /// Few touches of much memory
    Large,
    /// Shared and private touches of undecided pages side by side; needs strict mode
    Race,
    /// Much memory converted and never touched
    Sweep,
    /// Writes to memory until a fw_cfg item says stop
    Dirty,
    /// Gives pages back by virtio-balloon
    Balloon,
    /// Reports free pages by virtio-balloon
    Reporting,
    /// Uses a virtio-blk disk
    Disk,
    /// Gives devices private memory; needs a virtio-blk disk
    Device,
    /// Has KVM write its clock to private memory
    Clock,
    /// Gives a disk in another process private memory; needs a vhost-user-blk disk
    Vhost,
    /// Uses an edu device, which VFIO has handed to it
    Dma,
    /// Has its page tables in private memory
    Tables,
    /// Takes away what devices keep mapped as long as they run
    Kept,
    /// Interrupts a CPU while its request waits; needs two CPUs and a sound card
    Waiting,
    /// Not the conformance guest but Linux
    Linux,
}

impl Scenario {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Idle => "idle",
            Self::Hypercall => "hypercall",
            Self::Fault => "fault",
            Self::Bad => "bad",
            Self::Storm => "storm",
            Self::Hostile => "hostile",
            Self::Flip => "flip",
            Self::Reset => "reset",
            Self::Large => "large",
            Self::Race => "race",
            Self::Sweep => "sweep",
            Self::Dirty => "dirty",
            Self::Balloon => "balloon",
            Self::Reporting => "reporting",
            Self::Disk => "disk",
            Self::Device => "device",
            Self::Clock => "clock",
            Self::Vhost => "vhost",
            Self::Dma => "dma",
            Self::Tables => "tables",
            Self::Kept => "kept",
            Self::Waiting => "waiting",
            Self::Linux => "linux",
        }
    }

    /// What it needs of the machine.
    pub(crate) fn needs(self) -> &'static [Need] {
        match self {
            Self::Fault | Self::Race => &[Need::PrivateMemory, Need::StrictMode],
            _ => &[Need::PrivateMemory],
        }
    }

    /// Does more in strict mode than without?
    pub(crate) fn uses_strict_mode(self) -> bool {
        !matches!(
            self,
            Self::Idle
                | Self::Hypercall
                | Self::Bad
                | Self::Reset
                | Self::Sweep
                | Self::Device
                | Self::Clock
                | Self::Vhost
                | Self::Tables
                | Self::Kept
                | Self::Waiting
                | Self::Linux
        )
    }
}

/// A guest to start. The default is an ordinary VM of 256 MiB on KVM whose memory is our backend,
/// paused and without a kernel.
#[derive(Debug, Clone)]
pub(crate) struct Vm {
    /// `kvm` or `tcg`.
    pub(crate) accel: &'static str,
    /// The object whose id must be `ram0`; without it the machine has memory of its own.
    pub(crate) backend: Option<String>,
    /// The object whose id must be `cgs0`.
    pub(crate) confidential: Option<String>,
    /// More properties of the machine.
    pub(crate) machine: String,
    pub(crate) size: Size,
    pub(crate) smp: u32,
    /// Kernel and command line.
    pub(crate) kernel: Option<(PathBuf, String)>,
    pub(crate) extra: Vec<String>,
}

impl Vm {
    /// The backend in an ordinary VM.
    pub(crate) fn ordinary(size: Size) -> Self {
        Self {
            accel: "kvm",
            backend: Some(format!("{BACKEND},id=ram0,size={}", size.0)),
            confidential: None,
            machine: String::new(),
            size,
            smp: 1,
            kernel: None,
            extra: Vec::new(),
        }
    }

    /// The backend in a software-protected VM.
    pub(crate) fn protected(size: Size) -> Self {
        Self {
            confidential: Some("sw-protected-guest,id=cgs0".into()),
            ..Self::ordinary(size)
        }
    }

    /// The conformance guest in a software-protected VM; `strict` if it is to use the second
    /// window, without which it leaves out what needs memory faults.
    pub(crate) fn conformance(
        files: &Files,
        scenario: Scenario,
        strict: bool,
        size: Size,
        smp: u32,
    ) -> Self {
        let mut vm = Self::protected(size);
        let mut append = format!("scenario={} timeout={TIMEOUT}", scenario.name());
        if strict {
            vm.confidential = Some(format!(
                "sw-protected-guest,id=cgs0,shared-bit={SHARED_BIT}"
            ));
            append += &format!(" shared-bit={SHARED_BIT}");
        }
        if probe::in_place() {
            append += " contents=kept";
        }
        vm.smp = smp;
        let pattern = format!("name=opt/guestmemfd/pattern,string={}", host_pattern());
        vm.extra = vec!["-fw_cfg".to_owned(), pattern];
        if size.0 <= BELOW_4G {
            // So that a small guest, too, has memory above 4 GiB.
            vm.machine = format!(",max-ram-below-4g={}B", below_4g(size));
        }
        vm.kernel = Some((files.guest.clone(), append));
        vm
    }

    /// The conformance guest in an ordinary VM.
    pub(crate) fn ordinary_guest(files: &Files, scenario: Scenario, size: Size) -> Self {
        Self {
            confidential: None,
            ..Self::conformance(files, scenario, false, size, 1)
        }
    }

    /// Adds properties to the backend.
    pub(crate) fn with_backend_properties(mut self, properties: &str) -> Self {
        if let Some(object) = &mut self.backend {
            object.push(',');
            object.push_str(properties);
        }
        self
    }

    /// Replaces the backend.
    pub(crate) fn with_backend(mut self, object: &str) -> Self {
        self.backend = Some(object.to_owned());
        self
    }

    /// Adds words to the guest's command line.
    pub(crate) fn with_words(mut self, words: &str) -> Self {
        if let Some((_, append)) = &mut self.kernel {
            append.push(' ');
            append.push_str(words);
        }
        self
    }

    /// Adds arguments, separated by white space.
    pub(crate) fn with_arguments(mut self, arguments: &str) -> Self {
        self.extra
            .extend(arguments.split_whitespace().map(str::to_owned));
        self
    }

    /// QEMU's arguments.
    pub(crate) fn arguments(&self, firmware: &Path) -> Vec<String> {
        let mut machine = format!("q35{}", self.machine);
        let mut arguments: Vec<String> =
            ["-nodefaults", "-no-user-config", "-display", "none", "-S"]
                .map(str::to_owned)
                .into();
        let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
        add("-L", firmware.display().to_string());
        add("-accel", self.accel.to_owned());
        add(
            "-cpu",
            if self.accel == "kvm" { "host" } else { "max" }.to_owned(),
        );
        add("-m", format!("{}B", self.size.0));
        add("-smp", self.smp.to_string());
        // The guest's end must leave a QEMU that can still be asked.
        add("-action", "shutdown=pause".to_owned());
        add("-serial", "chardev:serial0".to_owned());
        add("-device", "isa-debug-exit,iobase=0x501,iosize=2".to_owned());
        if let Some(object) = &self.backend {
            add("-object", object.clone());
            machine += ",memory-backend=ram0";
        }
        if let Some(object) = &self.confidential {
            add("-object", object.clone());
            machine += ",confidential-guest-support=cgs0";
        }
        if let Some((kernel, append)) = &self.kernel {
            add("-kernel", kernel.display().to_string());
            add("-append", append.clone());
        }
        add("-machine", machine);
        arguments.extend_from_slice(&self.extra);
        arguments
    }
}

/// What the guest has QEMU write to shared pages: the host's side of a page. No two neighbours are
/// equal, and no comma is among them, which would end the option.
pub(crate) fn host_pattern() -> String {
    (0..=255)
        .map(|n: u8| char::from(b'A' + n.wrapping_mul(7) % 26))
        .collect()
}

/// A number of bytes, written like QEMU's sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match &text[digits.len()..] {
            "B" => 0,
            "k" | "K" => 10,
            // QEMU's -m counts in MiB.
            "" | "M" => 20,
            "G" => 30,
            "T" => 40,
            other => bail!("size {text}: unknown unit {other}; use K, M, G or T"),
        };
        let bytes = digits
            .parse()
            .ok()
            .and_then(|number: u64| number.checked_mul(1 << shift));
        match bytes {
            Some(bytes) if bytes > 0 && bytes % 4096 == 0 => Ok(Self(bytes)),
            Some(bytes) => bail!("size {text}: {bytes} bytes are not a positive multiple of 4 KiB"),
            None => bail!("size {text} is not a number of bytes; use for example 256M"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!("256M".parse::<Size>().unwrap().0, 256 << 20);
        assert_eq!("256".parse::<Size>().unwrap().0, 256 << 20);
        assert_eq!("2G".parse::<Size>().unwrap().0, 2 << 30);
        for bad in ["", "M", "0", "1B", "3X", "-1M", "18446744073709551615G"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
    }

    #[test]
    fn command_line() {
        let vm = Vm::protected(Size(256 << 20)).with_arguments("-device x -name y");
        let arguments = vm.arguments(Path::new("/firmware")).join(" ");
        assert!(arguments.contains("-object memory-backend-guestmemfd,id=ram0,size=268435456"));
        assert!(arguments.contains("-m 268435456B"));
        assert!(
            arguments.contains("-machine q35,memory-backend=ram0,confidential-guest-support=cgs0")
        );
        assert!(arguments.ends_with("-device x -name y"));
    }
}
