// SPDX-License-Identifier: GPL-2.0-or-later
//! What this machine's KVM offers.

use std::fmt;
use std::path::Path;
use std::sync::LazyLock;

use anyhow::{Context, Result, bail};
use kvm_ioctls::{Kvm, VmFd};

use crate::{failslab, memory, strict, vfio};

const KVM_CAP_EXIT_HYPERCALL: u64 = 201;
const KVM_CAP_MEMORY_ATTRIBUTES: u64 = 233;
const KVM_CAP_GUEST_MEMFD: u64 = 234;
const KVM_CAP_VM_TYPES: u64 = 235;
const KVM_CAP_GUEST_MEMFD_FLAGS: u64 = 244;
const KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES: u64 = 252;

/// GUEST_MEMFD_FLAG_MMAP and GUEST_MEMFD_FLAG_INIT_SHARED.
const GUEST_MEMFD_MAPPED: u32 = 3;

const KVM_X86_DEFAULT_VM: u64 = 0;
const KVM_X86_SW_PROTECTED_VM: u64 = 1;
const KVM_MEMORY_ATTRIBUTE_PRIVATE: u32 = 1 << 3;
const KVM_HC_MAP_GPA_RANGE: u32 = 12;

/// What a test or a guest can need of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// A KVM that creates VMs.
    Kvm,
    /// `KVM_CREATE_GUEST_MEMFD` on an ordinary VM.
    GuestMemfd,
    /// The same with a file that the host can map.
    MappedMemory,
    /// A kernel whose guest_memfd follows NUMA policies, and a second node.
    NumaPolicy,
    /// A kernel whose guest_memfd ignores them.
    NoNumaPolicy,
    /// A software-protected VM that converts: attributes and the hypercall.
    PrivateMemory,
    /// One whose private memory is in a file of its own.
    TwoFiles,
    /// One that converts memory in place.
    InPlace,
    /// The lab kernel's `sw_protected_strict_from`, and the right to set it.
    StrictMode,
    /// A KVM without software-protected VMs: what is said there is a test as well.
    NoPrivateMemory,
    /// The kernel counts the pages of a guest_memfd.
    PageCounts,
    /// A device that VFIO can hand to a guest.
    Vfio,
    /// The newer way to it, `/dev/iommu`.
    Iommufd,
    /// A kernel whose allocations fail on demand.
    Failslab,
    /// Root: system-wide page counts and other processes' files.
    Root,
}

/// The answers of `/dev/kvm` and of VMs made for the purpose.
#[derive(Debug, Default)]
pub(crate) struct Machine {
    /// Why KVM cannot be used at all.
    no_kvm: Option<String>,
    api_version: i32,
    vm_types: u32,
    ordinary: Option<Vm>,
    sw_protected: Option<Vm>,
    no_sw_protected: Option<String>,
    strict_from: Option<String>,
    strict_writable: bool,
    root: bool,
    page_counts: bool,
    numa_policy: bool,
}

/// What one VM says of itself: some capabilities depend on its type.
#[derive(Debug, Clone, Copy, Default)]
struct Vm {
    guest_memfd: bool,
    guest_memfd_flags: u32,
    /// Of the VM.
    attributes: u32,
    /// Of its guest_memfd, where memory is converted in place.
    file_attributes: u32,
    exit_hypercall: u32,
}

impl Machine {
    /// Asks.
    pub(crate) fn probe() -> Self {
        let mut machine = Self {
            strict_from: strict::read().ok(),
            strict_writable: strict::writable(),
            root: rustix::process::geteuid().is_root(),
            page_counts: memory::can_count(),
            numa_policy: kernel_version() >= (7, 1),
            ..Self::default()
        };
        if let Err(why) = machine.ask_kvm() {
            machine.no_kvm = Some(format!("{why:#}"));
        }
        machine
    }

    fn ask_kvm(&mut self) -> Result<()> {
        if !Path::new("/dev/kvm").exists() {
            bail!("/dev/kvm does not exist: the kernel has no KVM, or the CPU neither svm nor vmx");
        }
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        self.api_version = kvm.get_api_version();
        // On a kernel that does not know the capability the answer is 0: only the default type.
        let types = kvm.check_extension_raw(KVM_CAP_VM_TYPES);
        self.vm_types = u32::try_from(types).unwrap_or(0).max(1);
        let vm = kvm
            .create_vm_with_type(KVM_X86_DEFAULT_VM)
            .context("KVM does not create an ordinary VM")?;
        self.ordinary = Some(Vm::ask(&vm));
        match kvm.create_vm_with_type(KVM_X86_SW_PROTECTED_VM) {
            Ok(vm) => self.sw_protected = Some(Vm::ask(&vm)),
            Err(e) => self.no_sw_protected = Some(e.to_string()),
        }
        Ok(())
    }

    /// Why `need` is not met; nothing if it is.
    pub(crate) fn lacks(&self, need: Need) -> Option<String> {
        if self.no_kvm.is_some() && !matches!(need, Need::Root | Need::PageCounts) {
            return self.no_kvm.clone();
        }
        match need {
            Need::Kvm => None,
            Need::GuestMemfd => match self.ordinary {
                Some(vm) if vm.guest_memfd => None,
                _ => Some(
                    "KVM has no guest_memfd (Linux 6.8 or newer, CONFIG_KVM_GUEST_MEMFD)".into(),
                ),
            },
            Need::MappedMemory => match self.ordinary {
                Some(vm) if vm.guest_memfd_flags & GUEST_MEMFD_MAPPED == GUEST_MEMFD_MAPPED => None,
                _ => Some("KVM has no guest_memfd that can be mapped (Linux 6.18 or newer)".into()),
            },
            Need::NumaPolicy if !self.numa_policy => {
                Some("guest_memfd ignores NUMA policies (Linux 7.1 or newer)".into())
            }
            Need::NumaPolicy => (!Path::new("/sys/devices/system/node/node1").exists())
                .then(|| "there is one NUMA node".into()),
            Need::NoNumaPolicy => self
                .numa_policy
                .then(|| "guest_memfd follows NUMA policies".into()),
            Need::PrivateMemory => self.lacks_private_memory(),
            Need::TwoFiles => self.lacks_private_memory().or_else(|| {
                self.in_place()
                    .then(|| "memory is converted in place (--in-place off)".into())
            }),
            Need::InPlace => self.lacks_private_memory().or_else(|| {
                (!self.in_place())
                    .then(|| "memory is not converted in place (--in-place on)".into())
            }),
            Need::StrictMode => match (&self.strict_from, self.strict_writable) {
                (None, _) => Some(format!("KVM has no {} (lab kernel)", strict::PATH)),
                (_, false) => Some(format!("{} is not writable: run as root", strict::PATH)),
                (Some(_), true) => None,
            },
            Need::NoPrivateMemory => match self.lacks_private_memory() {
                Some(_) => None,
                None => Some("KVM has private memory".into()),
            },
            Need::PageCounts => (!self.page_counts)
                .then(|| "no cachestat (Linux 6.5 or newer, CONFIG_CACHESTAT_SYSCALL)".into()),
            Need::Vfio => vfio::lacking(),
            Need::Iommufd => (!Path::new("/dev/iommu").exists())
                .then(|| "the kernel has no iommufd (CONFIG_IOMMUFD)".into()),
            Need::Failslab => failslab::lacking(),
            Need::Root => (!self.root).then(|| "needs root".into()),
        }
    }

    /// Does KVM convert memory in place?
    fn in_place(&self) -> bool {
        let vm = self.sw_protected.unwrap_or_default();
        vm.file_attributes & KVM_MEMORY_ATTRIBUTE_PRIVATE != 0
    }

    fn lacks_private_memory(&self) -> Option<String> {
        let Some(vm) = self.sw_protected else {
            let why = self.no_sw_protected.as_deref().unwrap_or_default();
            return Some(format!(
                "KVM does not create software-protected VMs (CONFIG_KVM_SW_PROTECTED_VM): {why}"
            ));
        };
        if !vm.guest_memfd {
            Some("software-protected VMs have no guest_memfd".into())
        } else if vm.all_attributes() & KVM_MEMORY_ATTRIBUTE_PRIVATE == 0 {
            Some("software-protected VMs have no PRIVATE memory attribute".into())
        } else if vm.exit_hypercall & (1 << KVM_HC_MAP_GPA_RANGE) == 0 {
            Some("KVM does not hand KVM_HC_MAP_GPA_RANGE to user space".into())
        } else {
            None
        }
    }
}

/// Does this machine's KVM convert memory in place?
pub(crate) fn in_place() -> bool {
    static IN_PLACE: LazyLock<bool> = LazyLock::new(|| Machine::probe().in_place());
    *IN_PLACE
}

impl Vm {
    /// Those of the VM, or of its guest_memfd.
    fn all_attributes(&self) -> u32 {
        self.attributes | self.file_attributes
    }

    fn ask(vm: &VmFd) -> Self {
        // A negative answer (an old kernel's EINVAL) means the same as 0.
        let ask = |capability| u32::try_from(vm.check_extension_raw(capability)).unwrap_or(0);
        Self {
            guest_memfd: ask(KVM_CAP_GUEST_MEMFD) > 0,
            guest_memfd_flags: ask(KVM_CAP_GUEST_MEMFD_FLAGS),
            attributes: ask(KVM_CAP_MEMORY_ATTRIBUTES),
            file_attributes: ask(KVM_CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES),
            exit_hypercall: ask(KVM_CAP_EXIT_HYPERCALL),
        }
    }
}

impl fmt::Display for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "guest_memfd {}, its flags {}, memory attributes {}, hypercalls to user space {}",
            if self.guest_memfd { "yes" } else { "no" },
            names(self.guest_memfd_flags, &[(0, "MMAP"), (1, "INIT_SHARED")]),
            names(self.all_attributes(), &[(3, "PRIVATE")]),
            names(
                self.exit_hypercall,
                &[(KVM_HC_MAP_GPA_RANGE, "MAP_GPA_RANGE")]
            ),
        )
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(why) = &self.no_kvm {
            writeln!(f, "KVM: no: {why}")?;
        } else {
            writeln!(f, "KVM: API version {}", self.api_version)?;
            let types = [
                (0, "default"),
                (1, "software-protected"),
                (2, "SEV"),
                (3, "SEV-ES"),
                (4, "SEV-SNP"),
                (5, "TDX"),
            ];
            writeln!(f, "VM types: {}", names(self.vm_types, &types))?;
        }
        if let Some(vm) = self.ordinary {
            writeln!(f, "ordinary VM: {vm}")?;
        }
        match (self.sw_protected, &self.no_sw_protected) {
            (Some(vm), _) => writeln!(f, "software-protected VM: {vm}")?,
            (None, Some(why)) => writeln!(f, "software-protected VM: no: {why}")?,
            (None, None) => {}
        }
        let counts = if self.page_counts {
            "yes"
        } else {
            "no (cachestat)"
        };
        writeln!(f, "pages of a guest_memfd can be counted: {counts}")?;
        match &self.strict_from {
            Some(value) => writeln!(f, "strict mode: {} = {value}", strict::PATH),
            None => writeln!(f, "strict mode: no ({} does not exist)", strict::PATH),
        }
    }
}

/// Of `uname`: 7.2.8 is (7, 2).
fn kernel_version() -> (u32, u32) {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release.split('.').map_while(|number| number.parse().ok());
    (
        numbers.next().unwrap_or_default(),
        numbers.next().unwrap_or_default(),
    )
}

/// The names of the bits in `mask`, numbers for unnamed ones.
fn names(mask: u32, known: &[(u32, &str)]) -> String {
    let name = |bit: u32| match known.iter().find(|(b, _)| *b == bit) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("bit {bit}"),
    };
    let set: Vec<String> = (0..32)
        .filter(|bit| mask & (1 << bit) != 0)
        .map(name)
        .collect();
    if set.is_empty() {
        "none".into()
    } else {
        set.join("|")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bit_names() {
        let known = [(3, "PRIVATE")];
        assert_eq!(names(0, &known), "none");
        assert_eq!(names(8, &known), "PRIVATE");
        assert_eq!(names(0x8000_000a, &known), "bit 1|PRIVATE|bit 31");
    }

    #[test]
    fn private_memory_needs_all_parts() {
        let whole = Vm {
            guest_memfd: true,
            guest_memfd_flags: 0,
            attributes: 8,
            file_attributes: 0,
            exit_hypercall: 1 << 12,
        };
        let with = |vm| Machine {
            sw_protected: Some(vm),
            ..Machine::default()
        };
        assert_eq!(with(whole).lacks(Need::PrivateMemory), None);
        assert_eq!(with(whole).lacks(Need::TwoFiles), None);
        assert!(with(whole).lacks(Need::InPlace).is_some());
        let in_place = Vm {
            attributes: 0,
            file_attributes: 8,
            ..whole
        };
        assert_eq!(with(in_place).lacks(Need::PrivateMemory), None);
        assert_eq!(with(in_place).lacks(Need::InPlace), None);
        assert!(with(in_place).lacks(Need::TwoFiles).is_some());
        let part = Vm {
            attributes: 0,
            ..whole
        };
        assert!(with(part).lacks(Need::PrivateMemory).is_some());
        assert!(Machine::default().lacks(Need::PrivateMemory).is_some());
    }
}
