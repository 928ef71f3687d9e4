// SPDX-License-Identifier: GPL-2.0-or-later
//! Capabilities and error numbers.

use std::os::fd::AsRawFd;

use anyhow::{Context as _, Result, ensure};
use kvm_bindings::kvm_memory_attributes;
use kvm_ioctls::VmFd;
use rustix::io::Errno;

use super::Test;
use super::memory::{File, Map, Refused, set};
use super::touch::{Touched, touch};
use super::uapi::{
    self, Attributes2, CAP_GUEST_MEMFD_FLAGS, CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES,
    CAP_MEMORY_ATTRIBUTES, INIT_SHARED, MMAP, ORDINARY, PAGE, PRIVATE, SW_PROTECTED,
};

/// Pages of a file here.
const PAGES: u64 = 16;

pub(super) fn tests(in_place: bool) -> Vec<Test> {
    let mut tests = vec![Test::new("kernel/capabilities", move || {
        capabilities(in_place)
    })];
    tests.extend(match in_place {
        true => vec![
            Test::new("kernel/refusals", refusals),
            Test::new("kernel/old-attributes-are-gone", old_attributes),
            Test::new("kernel/file-flags", file_flags),
        ],
        false => vec![Test::new("kernel/as-before", as_before)],
    });
    tests
}

/// What `/dev/kvm` and both types of VMs say: attributes of the VM, of files, and files' flags.
fn capabilities(in_place: bool) -> Result<()> {
    let of = |vm: &VmFd| {
        [
            CAP_MEMORY_ATTRIBUTES,
            CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES,
            CAP_GUEST_MEMFD_FLAGS,
        ]
        .map(|capability| vm.check_extension_raw(capability))
    };
    let kvm = uapi::kvm()?;
    let system = [CAP_MEMORY_ATTRIBUTES, CAP_GUEST_MEMFD_MEMORY_ATTRIBUTES]
        .map(|capability| kvm.check_extension_raw(capability));
    let answers = (
        system,
        of(&uapi::vm(SW_PROTECTED)?),
        of(&uapi::vm(ORDINARY)?),
    );
    let wanted = match in_place {
        true => ([0, 8], [0, 8, 3], [0, 0, 3]),
        false => ([8, 0], [8, 0, 1], [0, 0, 3]),
    };
    ensure!(answers == wanted, "{answers:?} in place of {wanted:?}");
    Ok(())
}

/// What is wrong is refused and changes nothing, what is right is not.
fn refusals() -> Result<()> {
    let vm = uapi::vm(SW_PROTECTED)?;
    let file = File::new(&vm, PAGES)?;
    let right = Attributes2 {
        size: PAGE,
        attributes: PRIVATE,
        ..Default::default()
    };
    let with = |change: &dyn Fn(&mut Attributes2)| {
        let mut attributes = right;
        change(&mut attributes);
        attributes
    };
    for (what, mut wrong) in [
        ("flags", with(&|a| a.flags = 1)),
        ("the last reserved word", with(&|a| a.reserved[10] = 1)),
        ("an unknown attribute", with(&|a| a.attributes = 1)),
        ("one beside PRIVATE", with(&|a| a.attributes = 9)),
        ("no size", with(&|a| a.size = 0)),
        ("an unaligned offset", with(&|a| a.offset = 1)),
        ("an unaligned size", with(&|a| a.size = 1)),
        ("past the end", with(&|a| a.offset = PAGES * PAGE)),
        ("over the end", with(&|a| a.size = (PAGES + 1) * PAGE)),
        (
            "a range that wraps",
            with(&|a| (a.offset, a.size) = (PAGE.wrapping_neg(), 2 * PAGE)),
        ),
    ] {
        let answer = uapi::set_attributes2(&file.fd, &mut wrong);
        ensure!(answer == Err(Errno::INVAL), "{what}: {answer:?}");
    }
    // SAFETY: nothing is mapped at this address, and the kernel does not write there.
    let answer = unsafe { libc::ioctl(file.fd.as_raw_fd(), uapi::SET_ATTRIBUTES2.into(), PAGE) };
    let errno = std::io::Error::last_os_error().raw_os_error();
    ensure!(
        answer == -1 && errno == Some(libc::EFAULT),
        "an address of nothing: {answer}, {errno:?}"
    );
    for page in [0, PAGES - 1] {
        file.expect(page, false)?;
    }
    // What the kernel is to write there does not matter.
    let mut good = with(&|a| a.error_offset = 1);
    uapi::set_attributes2(&file.fd, &mut good).context("a right request")?;
    file.convert(PAGES - 1..PAGES, true)?;
    file.expect(PAGES - 1, true)?;

    let ordinary = uapi::vm(ORDINARY)?;
    let file = File::new(&ordinary, PAGES)?;
    for private in [true, false] {
        let answer = file.set(0..1, private).map_err(|refused| refused.errno);
        ensure!(
            answer == Err(Errno::INVAL),
            "an ordinary VM's file: {answer:?}"
        );
    }
    file.expect(0, false)
}

/// Neither the old request nor the new one on another descriptor.
fn old_attributes() -> Result<()> {
    let vm = uapi::vm(SW_PROTECTED)?;
    let answer = vm.set_memory_attributes(old(PRIVATE));
    let errno = answer.err().map(|error| error.errno());
    ensure!(
        errno == Some(libc::ENOTTY),
        "KVM_SET_MEMORY_ATTRIBUTES: {errno:?}"
    );
    // SAFETY: the VM's descriptor is open as long as `vm` lives.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(vm.as_raw_fd()) };
    let answer = set(fd, 0..1, true).map_err(|refused| refused.errno);
    ensure!(answer == Err(Errno::NOTTY), "on the VM: {answer:?}");
    Ok(())
}

fn old(attributes: u64) -> kvm_memory_attributes {
    kvm_memory_attributes {
        address: 0,
        size: PAGE,
        attributes,
        flags: 0,
    }
}

/// Which of them make what of a file.
fn file_flags() -> Result<()> {
    let vm = uapi::vm(SW_PROTECTED)?;
    let create = |flags| {
        let file = uapi::guest_memfd(&vm, PAGES * PAGE, flags);
        file.with_context(|| format!("a file with flags {flags}"))
    };
    // All private at first.
    let file = create(MMAP)?;
    let map = Map::file(&file, PAGES * PAGE).context("mmap")?;
    ensure!(touch(&map, 3, false)? == Touched::BUS, "page 3 is shared");
    let converted = set(&file, 3..4, false);
    ensure!(converted.is_ok(), "page 3 stays private: {converted:?}");
    ensure!(touch(&map, 3, true)? == Touched::Done, "page 3 is private");
    ensure!(touch(&map, 4, false)? == Touched::BUS, "page 4 is shared");
    // Nothing to map, but to convert.
    for flags in [0, INIT_SHARED] {
        let file = create(flags)?;
        let mapped = Map::file(&file, PAGES * PAGE).map(|_| ());
        ensure!(mapped == Err(Errno::NODEV), "flags {flags}: {mapped:?}");
        for private in [true, false] {
            let converted = set(&file, 0..PAGES, private);
            ensure!(converted.is_ok(), "flags {flags}: {converted:?}");
        }
    }
    let unknown = uapi::guest_memfd(&vm, PAGE, 1 << 2).map(|_| ());
    ensure!(unknown == Err(Errno::INVAL), "unknown flag: {unknown:?}");
    Ok(())
}

/// Without in-place conversion all is as in Linux 7.3.
fn as_before() -> Result<()> {
    let vm = uapi::vm(SW_PROTECTED)?;
    let shared = uapi::guest_memfd(&vm, PAGE, MMAP | INIT_SHARED).map(|_| ());
    ensure!(
        shared == Err(Errno::INVAL),
        "a file that starts shared in a VM with private memory: {shared:?}"
    );
    let file = uapi::guest_memfd(&vm, PAGES * PAGE, MMAP).context("a guest_memfd")?;
    for private in [true, false] {
        let answer = set(&file, 0..1, private).map_err(|refused: Refused| refused.errno);
        ensure!(answer == Err(Errno::NOTTY), "{answer:?}");
    }
    for attributes in [PRIVATE, 0] {
        let answer = vm.set_memory_attributes(old(attributes));
        answer.context("KVM_SET_MEMORY_ATTRIBUTES")?;
    }
    Ok(())
}
