// SPDX-License-Identifier: GPL-2.0-or-later

//! What a C program asks for: backends of any configuration, and calls with any numbers.

use std::ffi::CString;

use arbitrary::{Result, Unstructured};
use guestmemfd::PAGE_SIZE;
use guestmemfd::ffi::*;

use crate::c::{Backend, Vm, blank_config};

/// Makes a VM and a backend, and calls as long as there are bytes for them.
pub fn try_bytes(bytes: &[u8]) {
    // Bytes that are too few have been tried as far as they go.
    let _ = try_config(&mut Unstructured::new(bytes));
}

fn try_config(bytes: &mut Unstructured) -> Result<()> {
    let abi = match bytes.ratio(15, 16)? {
        true => GUESTMEMFD_ABI,
        false => bytes.arbitrary()?,
    };
    let vm = match Vm::new(abi) {
        Ok(vm) => vm,
        Err(refused) => {
            assert!(abi != GUESTMEMFD_ABI && refused.message.contains("rebuild"));
            return Ok(());
        }
    };
    let (config, id) = (config(bytes)?, id(bytes)?);
    let (size, start_private) = (config.size, config.start_private);
    let backend = match vm.backend(config, id.as_ref()) {
        Ok(backend) => backend,
        Err(refused) => {
            assert!(id.is_some() || refused.code > 0, "{}", refused.message);
            return Ok(());
        }
    };
    assert!(id.is_some() && size > 0 && size % PAGE_SIZE == 0 && abi == GUESTMEMFD_ABI);
    assert!(backend.shared_fd() >= 0);
    check(&backend, size);
    let stats = backend.stats();
    let first = match (start_private, stats.mode) {
        (_, GUESTMEMFD_MODE_MAPPED) => stats.shared_bytes,
        (true, _) => stats.private_bytes,
        (false, _) => stats.undecided_bytes,
    };
    assert_eq!(first, size, "the state that it starts in");
    let mut windows = Vec::new();
    while !bytes.is_empty() && call(&vm, &backend, size, &mut windows, bytes).is_ok() {
        check(&backend, size);
    }
    for (gpa, size) in windows {
        vm.remove_window(gpa, size).expect("it is there");
    }
    drop(backend);
    Ok(())
}

/// Numbers that make a backend mostly, and any numbers at times.
fn config(bytes: &mut Unstructured) -> Result<guestmemfd_backend_config> {
    let mut config = blank_config();
    config.size = match bytes.ratio(7, 8)? {
        true => bytes.int_in_range(1..=2048)? * PAGE_SIZE,
        false => bytes.arbitrary()?,
    };
    config.mode = number(bytes, 3)?;
    config.confidential = bytes.arbitrary()?;
    config.bind = bytes.arbitrary()?;
    config.discard = number(bytes, 1)?;
    config.start_private = bytes.arbitrary()?;
    config.lazy = number(bytes, 2)?;
    config.lazy_chunk = match bytes.ratio(7, 8)? {
        true => PAGE_SIZE << bytes.int_in_range(0..=10)?,
        false => bytes.arbitrary()?,
    };
    config.prefault = number(bytes, 2)?;
    if config.start_private || config.mode == GUESTMEMFD_MODE_MAPPED {
        // Each page that does not start undecided costs a bit that is written.
        config.size %= 1 << 36;
    }
    Ok(config)
}

/// A number of an enumeration, or of none.
fn number(bytes: &mut Unstructured, last: u32) -> Result<u32> {
    match bytes.ratio(15, 16)? {
        true => bytes.int_in_range(0..=last),
        false => bytes.arbitrary(),
    }
}

/// Any bytes but NUL, or none at all.
fn id(bytes: &mut Unstructured) -> Result<Option<CString>> {
    if bytes.ratio(1, 16)? {
        return Ok(None);
    }
    let length = bytes.int_in_range(0..=16)?;
    let id: Vec<u8> = bytes
        .bytes(length)?
        .iter()
        .copied()
        .filter(|byte| *byte != 0)
        .collect();
    Ok(CString::new(id).ok())
}

/// States and their runs cover all of a backend.
fn check(backend: &Backend, size: u64) {
    let stats = backend.stats();
    assert_eq!(stats.size, size);
    assert_eq!(stats.transition_bytes, 0);
    assert_eq!(
        stats.undecided_bytes + stats.shared_bytes + stats.private_bytes,
        size
    );
}

/// One call with numbers that fit mostly.
fn call(
    vm: &Vm,
    backend: &Backend,
    backend_size: u64,
    windows: &mut Vec<(u64, u64)>,
    bytes: &mut Unstructured,
) -> Result<()> {
    let (at, size) = (place(bytes)?, place(bytes)?);
    match bytes.int_in_range(0..=6)? {
        0 => {
            let (offset, wanted) = (place(bytes)?, number(bytes, 2)?);
            if let Ok(binding) = vm.add_window(backend, at, offset, size, wanted) {
                assert!(binding <= wanted.max(GUESTMEMFD_BINDING_BOUND));
                assert!(
                    offset
                        .checked_add(size)
                        .is_some_and(|end| end <= backend_size)
                );
                assert!(vm.owns(at, size));
                windows.push((at, size));
            }
        }
        1 => {
            let index = windows.iter().position(|window| *window == (at, size));
            assert_eq!(vm.remove_window(at, size).is_ok(), index.is_some());
            index.map(|index| windows.swap_remove(index));
        }
        2 => {
            let _ = vm.map_gpa_range(at, size / PAGE_SIZE, bytes.int_in_range(0..=0x13)?);
        }
        3 => {
            let _ = vm.memory_fault(at, size, number(bytes, 1)?);
        }
        4 if backend.pin(at, size).is_ok() => {
            assert!(backend.host_may_use(at, size));
            backend.unpin(at, size).expect("it is pinned");
        }
        4 => {}
        5 => assert!(
            backend.unpin(at, size).is_err() || backend.stats().mode == GUESTMEMFD_MODE_MAPPED
        ),
        // Step by step, which takes long for what is large.
        _ if size <= 1 << 32 => {
            let _ = backend.free_pages(at, size);
        }
        _ => {}
    }
    Ok(())
}

/// An offset, an address or a size.
fn place(bytes: &mut Unstructured) -> Result<u64> {
    match bytes.ratio(7, 8)? {
        true => Ok(bytes.int_in_range(0..=32)? * PAGE_SIZE),
        false => bytes.arbitrary(),
    }
}
