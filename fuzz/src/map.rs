// SPDX-License-Identifier: GPL-2.0-or-later

//! Questions for maps of states, with any numbers.

use arbitrary::{Result, Unstructured};
use guestmemfd::PAGE_SIZE;
use guestmemfd::ffi::*;

use crate::c::{Backend, MOST_RUNS, Vm, blank_config};

/// Enough for words of bits that begin and end anywhere.
const PAGES: u64 = 200;

/// The state of each page.
type States = [guestmemfd_state; PAGES as usize];

/// Gives pages states, then asks as long as there are bytes.
pub fn try_bytes(bytes: &[u8]) {
    let mut config = blank_config();
    config.size = PAGES * PAGE_SIZE;
    config.lazy = GUESTMEMFD_LAZY_OFF;
    let vm = Vm::new(GUESTMEMFD_ABI).expect("a software VM");
    let backend = vm
        .backend(config, Some(&c"ram".to_owned()))
        .expect("a small backend");
    vm.add_window(&backend, 0, 0, PAGES * PAGE_SIZE, GUESTMEMFD_BINDING_BOUND)
        .expect("it fits");
    let _ = try_maps(&vm, &backend, &mut Unstructured::new(bytes));
    vm.remove_window(0, PAGES * PAGE_SIZE).expect("it is there");
    drop(backend);
}

fn try_maps(vm: &Vm, backend: &Backend, bytes: &mut Unstructured) -> Result<()> {
    let mut states = [GUESTMEMFD_STATE_UNDECIDED; PAGES as usize];
    for _ in 0..bytes.int_in_range(0..=40)? {
        let start = bytes.int_in_range(0..=PAGES - 1)?;
        let count = bytes
            .int_in_range(1..=PAGES - start)?
            .min(bytes.int_in_range(1..=PAGES)?);
        let (attributes, state) = match bytes.arbitrary()? {
            true => (0x10, GUESTMEMFD_STATE_PRIVATE),
            false => (0, GUESTMEMFD_STATE_SHARED),
        };
        vm.map_gpa_range(start * PAGE_SIZE, count, attributes)
            .expect("it is a request");
        states[start as usize..][..count as usize].fill(state);
    }
    while !bytes.is_empty() {
        let (offset, size) = (number(bytes)?, number(bytes)?);
        let room = match bytes.ratio(3, 4)? {
            true => bytes.int_in_range(0..=5)?,
            false => bytes.arbitrary()?,
        };
        ask(backend, &states, offset, size, room);
    }
    Ok(())
}

fn number(bytes: &mut Unstructured) -> Result<u64> {
    match bytes.ratio(7, 8)? {
        true => Ok(bytes.int_in_range(0..=PAGES + 1)? * PAGE_SIZE),
        false => bytes.arbitrary(),
    }
}

/// Asks for a range, and goes on until its end.
fn ask(backend: &Backend, states: &States, offset: u64, size: u64, room: u64) {
    let aligned = offset.is_multiple_of(PAGE_SIZE) && size.is_multiple_of(PAGE_SIZE) && size > 0;
    let end = offset
        .checked_add(size)
        .filter(|end| *end <= PAGES * PAGE_SIZE && aligned);
    let Some(end) = end.filter(|_| room > 0) else {
        assert!(
            backend.map(offset, size, room).is_err(),
            "{offset:#x}, {size:#x}, {room}"
        );
        return;
    };
    let mut at = offset;
    let mut before = None;
    while at < end {
        let (runs, next) = backend.map(at, end - at, room).expect("it is a question");
        assert!(!runs.is_empty() && runs.len() as u64 <= room.min(MOST_RUNS));
        for run in runs {
            assert_eq!(run.offset, at);
            assert_ne!(before, Some(run.state), "neighbours differ");
            let pages = (at / PAGE_SIZE) as usize..((at + run.size) / PAGE_SIZE) as usize;
            assert!(
                states[pages].iter().all(|state| *state == run.state),
                "{run:?}"
            );
            (at, before) = (at + run.size, Some(run.state));
        }
        assert_eq!(next, at);
    }
    assert_eq!(at, end);
}
