// SPDX-License-Identifier: GPL-2.0-or-later
//! Slots with a guest_memfd, and slots beside them.

use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context as _, Result, ensure};
use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_memory_attributes,
    kvm_userspace_memory_region2,
};
use kvm_ioctls::VmFd;

use super::Test;
use super::memory::{File, Map};
use super::uapi::{self, PAGE, PRIVATE, SW_PROTECTED};
use super::vcpu::{Seen, Vcpu};
use crate::setting::Setting;
use crate::strict;

/// Where memory begins.
pub(super) const GPA: u64 = 1 << 30;
/// Where it is seen a second time.
const ALIAS: u64 = 2 << 30;

const PAGES: u64 = 16;

pub(super) fn tests(in_place: bool) -> Vec<Test> {
    let mut tests = vec![Test::new("kernel/strict-mode", move || strict(in_place))];
    if in_place {
        tests.push(Test::new("kernel/slots", slots));
        tests.push(Test::new("kernel/unbound-slots", unbound));
        tests.push(Test::new("kernel/closed-file", closed));
    }
    tests
}

fn slot(number: u32, flags: u32, gpa: u64, pages: u64, host: u64) -> kvm_userspace_memory_region2 {
    kvm_userspace_memory_region2 {
        slot: number,
        flags,
        guest_phys_addr: gpa,
        memory_size: pages * PAGE,
        userspace_addr: host,
        ..Default::default()
    }
}

fn with_file(slot: kvm_userspace_memory_region2, file: &OwnedFd) -> kvm_userspace_memory_region2 {
    kvm_userspace_memory_region2 {
        flags: slot.flags | KVM_MEM_GUEST_MEMFD,
        guest_memfd: u32::try_from(file.as_raw_fd()).unwrap_or_default(),
        ..slot
    }
}

/// The error number if KVM refuses.
fn set(vm: &VmFd, slot: kvm_userspace_memory_region2) -> Result<(), i32> {
    // SAFETY: a guest that reaches memory which has gone finds nothing there.
    unsafe { vm.set_user_memory_region2(slot) }.map_err(|error| error.errno())
}

/// Shows a file and its mapping to the guest.
pub(super) fn bind(vm: &VmFd, number: u32, gpa: u64, file: &File) -> Result<()> {
    let slot = slot(number, 0, gpa, file.pages, file.map.address());
    set(vm, with_file(slot, &file.fd))
        .map_err(std::io::Error::from_raw_os_error)
        .context("a slot with a guest_memfd")
}

/// What is refused, and that all faults come from the file.
fn slots() -> Result<()> {
    let vm = uapi::vm(SW_PROTECTED)?;
    let mut vcpu = Vcpu::new(&vm)?;
    let file = File::new(&vm, PAGES)?;
    let place = slot(1, 0, GPA, PAGES, file.map.address());
    for (what, flags, errno) in [
        ("READONLY", KVM_MEM_READONLY, libc::EINVAL),
        ("LOG_DIRTY_PAGES", KVM_MEM_LOG_DIRTY_PAGES, libc::EINVAL),
    ] {
        let wrong = kvm_userspace_memory_region2 { flags, ..place };
        let answer = set(&vm, with_file(wrong, &file.fd));
        ensure!(answer == Err(errno), "{what}: {answer:?}");
    }
    ensure!(set(&vm, with_file(place, &file.fd)) == Ok(()), "a slot");
    let again = slot(2, 0, ALIAS, 1, file.map.address());
    let answer = set(&vm, with_file(again, &file.fd));
    ensure!(answer == Err(libc::EEXIST), "bound twice: {answer:?}");

    // A file that nobody can map, with other memory at its side.
    let flags = uapi::INIT_SHARED;
    let hidden = uapi::guest_memfd(&vm, PAGES * PAGE, flags).context("a guest_memfd")?;
    let other = Map::anonymous(PAGES * PAGE)?;
    other.write(0, 0x77);
    let place = slot(3, 0, ALIAS, PAGES, other.address());
    let bound = set(&vm, with_file(place, &hidden));
    ensure!(bound == Ok(()), "with other memory at its side: {bound:?}");
    let seen = vcpu.read(ALIAS)?;
    ensure!(
        seen == Seen::Value(0),
        "shared, but not the file's: {seen:?}"
    );
    Ok(())
}

/// A slot without guest_memfd over the same mapping shows shared pages.
fn unbound() -> Result<()> {
    let vm = uapi::vm(SW_PROTECTED)?;
    let mut vcpu = Vcpu::new(&vm)?;
    let file = File::new(&vm, PAGES)?;
    bind(&vm, 1, GPA, &file)?;
    let host = file.map.address();
    ensure!(set(&vm, slot(2, 0, ALIAS, PAGES, host)) == Ok(()), "slot 2");
    file.map.write(1, 0xabcd);
    let alias = ALIAS + PAGE;
    ensure!(vcpu.read(alias)? == Seen::Value(0xabcd), "shared");
    file.convert(1..2, true)?;
    // No memory fault, as nothing is known of the page there.
    let seen = vcpu.read(alias)?;
    let refused = Seen::Refused(rustix::io::Errno::FAULT);
    ensure!(seen == refused, "private: {seen:?}");
    file.convert(1..2, false)?;
    ensure!(vcpu.read(alias)? == Seen::Value(0xabcd), "shared again");
    Ok(())
}

/// Without its file a slot is empty.
fn closed() -> Result<()> {
    let vm = uapi::vm(SW_PROTECTED)?;
    let mut vcpu = Vcpu::new(&vm)?;
    let file = File::new(&vm, PAGES)?;
    bind(&vm, 1, GPA, &file)?;
    file.map.write(2, 3);
    let File { fd, map, .. } = file;
    drop(map);
    let at = GPA + 2 * PAGE;
    let seen = vcpu.read(at)?;
    ensure!(seen == Seen::Value(3), "without the mapping: {seen:?}");
    drop(fd);
    let seen = vcpu.read(at)?;
    let fault = Seen::Fault {
        private: false,
        gpa: at,
    };
    ensure!(seen == fault, "without the file: {seen:?}");
    Ok(())
}

/// There the address says which view the guest wants, and a memory fault that it is the other one.
fn strict(in_place: bool) -> Result<()> {
    let _strict = Setting::set(strict::PATH, &format!("{GPA:#x}"))?;
    let vm = uapi::vm(SW_PROTECTED)?;
    let mut vcpu = Vcpu::new(&vm)?;
    let memory = Memory::new(&vm, in_place)?;
    let at = |base: u64, page: u64| base + page * PAGE;
    for private in [false, true, false, true] {
        memory.convert(&vm, 1, private)?;
        let (open, shut) = match private {
            true => (GPA, ALIAS),
            false => (ALIAS, GPA),
        };
        let fault = Seen::Fault {
            private: !private,
            gpa: at(shut, 1),
        };
        let seen = vcpu.read(at(shut, 1))?;
        ensure!(
            seen == fault,
            "private: {private}, wanted otherwise: {seen:?}"
        );
        let seen = vcpu.write(at(open, 1), 5)?;
        ensure!(
            matches!(seen, Seen::Value(_)),
            "private: {private}: {seen:?}"
        );
        ensure!(
            vcpu.read(at(open, 1))? == Seen::Value(5),
            "what was written"
        );
    }
    Ok(())
}

/// Memory at two addresses, in place or with two files.
enum Memory {
    InPlace(File),
    TwoFiles { _private: OwnedFd, _shared: Map },
}

impl Memory {
    fn new(vm: &VmFd, in_place: bool) -> Result<Self> {
        let memory = if in_place {
            Self::InPlace(File::new(vm, PAGES)?)
        } else {
            Self::TwoFiles {
                _private: uapi::guest_memfd(vm, PAGES * PAGE, 0).context("a guest_memfd")?,
                _shared: Map::anonymous(PAGES * PAGE)?,
            }
        };
        let (fd, map) = match &memory {
            Self::InPlace(file) => (&file.fd, &file.map),
            Self::TwoFiles { _private, _shared } => (_private, _shared),
        };
        let bound = with_file(slot(1, 0, GPA, PAGES, map.address()), fd);
        for slot in [bound, slot(2, 0, ALIAS, PAGES, map.address())] {
            set(vm, slot)
                .map_err(std::io::Error::from_raw_os_error)
                .context("a slot")?;
        }
        Ok(memory)
    }

    fn convert(&self, vm: &VmFd, page: u64, private: bool) -> Result<()> {
        if let Self::InPlace(file) = self {
            return file.convert(page..page + 1, private);
        }
        for base in [GPA, ALIAS] {
            vm.set_memory_attributes(kvm_memory_attributes {
                address: base + page * PAGE,
                size: PAGE,
                attributes: if private { PRIVATE } else { 0 },
                flags: 0,
            })
            .context("KVM_SET_MEMORY_ATTRIBUTES")?;
        }
        Ok(())
    }
}
