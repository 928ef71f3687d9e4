// SPDX-License-Identifier: MIT OR Apache-2.0

//! States that are saved and restored.

use std::io::{self, Read, Write};

use guestmemfd::*;
use proptest::prelude::*;

use crate::machine::*;

const WORD: usize = 8;

/// Brings a machine into states that only conversions and freed pages can make.
fn make(machine: &Machine, states: &[PageState]) {
    for (page, state) in (0..).zip(states) {
        let at = guest(bound(page), bound(page) + 1);
        match state {
            PageState::Undecided => machine
                .vm
                .free_pages(&machine.backend, file(page, page + 1))
                .unwrap(),
            PageState::Shared => drop(machine.vm.convert(at, View::Shared).unwrap()),
            _ => drop(machine.vm.convert(at, View::Private).unwrap()),
        }
    }
    assert_eq!(machine.states(), states);
}

fn states() -> impl Strategy<Value = Vec<PageState>> {
    let state = (0usize..3).prop_map(|n| PageState::ALL[n]);
    prop::collection::vec(state, PAGES as usize)
}

fn save(machine: &Machine) -> Vec<u8> {
    let mut saved = Vec::new();
    machine
        .vm
        .save_states(&machine.backend, &mut saved)
        .unwrap();
    saved
}

fn restore(machine: &Machine, mut saved: &[u8]) -> Result<()> {
    machine.vm.restore_states(&machine.backend, &mut saved)
}

/// What words say of pages, and whether they are states of this backend.
fn parse(saved: &[u8]) -> (Vec<PageState>, bool) {
    let words = saved.chunks_exact(WORD);
    let mut words = words.map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    let mut states = Vec::new();
    let magic = u64::from_le_bytes(*b"gmfdsta1");
    if words.next() != Some(magic) || words.next() != Some(PAGES) {
        return (states, false);
    }
    for word in words {
        let (count, state) = (word >> 2, PageState::ALL[(word & 3) as usize]);
        let left = PAGES - states.len() as u64;
        if !(1..=left).contains(&count) || state == PageState::Transition {
            return (states, false);
        }
        states.extend((0..count).map(|_| state));
        if states.len() as u64 == PAGES {
            return (states, true);
        }
    }
    (states, false)
}

fn is_bad(result: &Result<()>) -> bool {
    matches!(result, Err(Error::BadStates { backend, .. }) if backend == "ram")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Another backend has the states then, its attributes follow, its listener is told, and the
    /// data in the views that the guest sees are as they were.
    #[test]
    fn restored_states_are_those_that_were_saved(
        saved in states(),
        before in states(),
        kind in 0..3,
    ) {
        let source = Machine::new();
        make(&source, &saved);
        let stream = save(&source);

        let target = match kind {
            0 => Machine::new(),
            1 => Machine::with(Discard::Keep, PageState::Undecided),
            _ => Machine::in_place(),
        };
        make(&target, &before);
        // The data of the guest to come, in the views that it will see.
        for (page, state) in (0..).zip(&saved) {
            let view = match state {
                PageState::Private => View::Private,
                _ => View::Shared,
            };
            target.write(view, page, 1 + page as u8);
        }
        restore(&target, &stream).unwrap();
        prop_assert_eq!(target.states(), saved);
        match kind {
            0 => target.check_invariants(),
            1 => {}
            _ => crate::in_place::check(&target),
        }
        let data: Vec<u8> = (0..PAGES).map(|page| 1 + page as u8).collect();
        prop_assert_eq!(target.exposed(), data);
        prop_assert_eq!(save(&target), stream);
    }

    /// However a stream is damaged, it is refused where the damage shows, and what has been
    /// restored until then is sound and what the stream says.
    #[test]
    fn damaged_streams_leave_a_sound_state(
        saved in states(),
        before in states(),
        damage in prop_oneof![
            (0..=PAGES as usize + 2, any::<u64>()).prop_map(|(word, value)| (word, Some(value))),
            (0..=PAGES as usize + 2, 0u64..64).prop_map(|(word, bit)| (word, Some(1 << bit))),
            (0..(PAGES as usize + 2) * WORD).prop_map(|cut| (cut, None)),
        ],
    ) {
        let source = Machine::new();
        make(&source, &saved);
        let mut stream = save(&source);
        match damage {
            (word, Some(flip)) => {
                let word = word % (stream.len() / WORD);
                let bytes = &mut stream[word * WORD..][..WORD];
                let value = u64::from_le_bytes(bytes.try_into().unwrap()) ^ flip;
                bytes.copy_from_slice(&value.to_le_bytes());
            }
            (cut, None) => stream.truncate(cut % stream.len()),
        }
        let target = Machine::new();
        make(&target, &before);
        let result = restore(&target, &stream);
        let (mut expected, whole) = parse(&stream);
        prop_assert_eq!(result.is_ok(), whole);
        prop_assert!(whole || is_bad(&result), "{:?}", result);
        expected.extend(&before[expected.len()..]);
        prop_assert_eq!(target.states(), expected);
        target.check_invariants();
    }

    /// Whichever call fails, the pages before that have their new states, the others their old
    /// ones.
    #[test]
    fn a_restore_that_fails_leaves_a_sound_state(
        saved in states(),
        before in states(),
        nth in 1u64..40,
    ) {
        let source = Machine::new();
        make(&source, &saved);
        let stream = save(&source);
        let target = Machine::new();
        make(&target, &before);
        target.fault.arm(nth);
        let result = restore(&target, &stream);
        target.fault.arm(0);
        target.check_invariants();
        let states = target.states();
        let done = states.iter().zip(&saved).take_while(|(a, b)| a == b).count();
        if result.is_ok() {
            prop_assert_eq!(done, PAGES as usize);
        } else {
            prop_assert_eq!(&states[done..], &before[done..]);
        }
        // Once the kernel serves again, so does the stream.
        restore(&target, &stream).unwrap();
        prop_assert_eq!(target.states(), saved);
        target.check_invariants();
    }
}

#[test]
fn every_prefix_and_every_word_out_of_range_is_refused() {
    let machine = Machine::new();
    machine.vm.convert(guest(2, 5), View::Private).unwrap();
    machine.vm.convert(guest(8, 9), View::Shared).unwrap();
    let stream = save(&machine);
    for cut in 0..stream.len() {
        let result = restore(&machine, &stream[..cut]);
        assert!(is_bad(&result), "{cut}: {result:?}");
    }
    for word in 0..stream.len() / WORD {
        for value in [0, 2, 3, 7, u64::MAX, 1 << 62 | 1, (PAGES + 1) << 2] {
            let mut bad = stream.clone();
            bad[word * WORD..][..WORD].copy_from_slice(&value.to_le_bytes());
            let result = restore(&machine, &bad);
            assert!(is_bad(&result), "{word}: {value:#x}: {result:?}");
        }
    }
    machine.check_invariants();
    let error = restore(&machine, &stream[..9]).unwrap_err();
    assert_eq!(error.errno(), 22, "EINVAL: {error}");
    restore(&machine, &stream).unwrap();
}

#[test]
fn states_of_another_size_or_kind_are_refused() {
    let machine = Machine::new();
    machine.vm.convert(guest(2, 5), View::Private).unwrap();
    let stream = save(&machine);
    let vm = Machine::new().vm;
    let backend = |pages, mode| {
        let mut config = BackendConfig::new("other", pages * PAGE_SIZE);
        config.mode = Some(mode);
        vm.create_backend(config).unwrap()
    };
    for (pages, mode) in [
        (PAGES - 1, Mode::Private),
        (PAGES + 1, Mode::Private),
        (PAGES, Mode::Mapped),
    ] {
        let other = backend(pages, mode);
        let error = vm.restore_states(&other, &mut stream.as_slice());
        let error = error.unwrap_err();
        assert!(matches!(error, Error::BadStates { .. }), "{error}");
        let start = match mode {
            Mode::Mapped => PageState::Shared,
            _ => PageState::Undecided,
        };
        assert_eq!(
            other.state_map(other.pages(), 1).runs,
            [(other.pages(), start)]
        );
    }

    let [one, two] = [(); 2].map(|()| backend(PAGES, Mode::Mapped));
    let mut mapped = Vec::new();
    vm.save_states(&one, &mut mapped).unwrap();
    vm.restore_states(&two, &mut mapped.as_slice()).unwrap();
}

/// As they may lie in a larger snapshot.
#[test]
fn what_follows_the_states_is_left_to_the_caller() {
    let machine = Machine::new();
    machine.vm.convert(guest(2, 5), View::Private).unwrap();
    let mut stream = save(&machine);
    stream.extend(b"more");
    let mut from = stream.as_slice();
    machine
        .vm
        .restore_states(&machine.backend, &mut from)
        .unwrap();
    assert_eq!(from, b"more");
}

#[test]
fn pages_that_the_host_uses_do_not_become_private() {
    let machine = Machine::new();
    machine.vm.convert(guest(2, 5), View::Private).unwrap();
    let stream = save(&machine);
    machine.vm.convert(guest(2, 5), View::Shared).unwrap();
    let pin = machine.vm.hold(&machine.backend, file(3, 4)).unwrap();
    let before = machine.states();
    let error = restore(&machine, &stream).unwrap_err();
    assert!(
        matches!(error, Error::Pinned { pages, .. } if pages == file(3, 4)),
        "{error}"
    );
    assert_eq!(machine.states(), before);
    machine.check_invariants();
    drop(pin);
    restore(&machine, &stream).unwrap();
    machine.check_invariants();
    assert_eq!(machine.states()[3], PageState::Private);
}

struct Broken;

impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(rustix::io::Errno::NOSPC.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Broken {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(rustix::io::Errno::CONNRESET.into())
    }
}

#[test]
fn a_stream_that_fails_is_named() {
    let machine = Machine::new();
    let error = machine
        .vm
        .save_states(&machine.backend, &mut Broken)
        .unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("cannot save the states of backend 'ram'")
    );
    assert_eq!(error.errno(), 28, "ENOSPC");
    let error = machine
        .vm
        .restore_states(&machine.backend, &mut Broken)
        .unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("cannot restore the states of backend 'ram'")
    );
    assert_eq!(error.errno(), 104, "ECONNRESET");
}

/// As many runs as a step may have, and more; a run longer than a step.
#[test]
fn states_of_a_large_backend_take_several_steps() {
    let vm = Machine::lazy(Discard::Now).vm;
    let pages = (3 << 30) / PAGE_SIZE;
    let new = || {
        let mut config = BackendConfig::new("large", pages * PAGE_SIZE);
        config.mode = Some(Mode::Private);
        vm.create_backend(config).unwrap()
    };
    let (source, target) = (new(), new());
    let at = guest(1 << 20, (1 << 20) + pages);
    vm.add_window(&source, at, 0, Binding::Bound).unwrap();
    for page in (0..6000).step_by(2) {
        let page = at.start() + page;
        vm.convert(guest(page, page + 1), View::Private).unwrap();
    }
    vm.convert(guest(at.start() + 10_000, at.end()), View::Private)
        .unwrap();
    let mut stream = Vec::new();
    vm.save_states(&source, &mut stream).unwrap();
    // Private and not, 3000 times; nothing; and the rest.
    assert_eq!(stream.len(), (2 + 6001) * WORD);
    vm.restore_states(&target, &mut stream.as_slice()).unwrap();
    let map = |backend: &Backend| backend.state_map(backend.pages(), usize::MAX);
    assert_eq!(map(&target), map(&source));
    let back = vec![
        u64::from_le_bytes(*b"gmfdsta1"),
        pages,
        pages << 2 | PageState::Shared as u64,
    ];
    let back: Vec<u8> = back.into_iter().flat_map(u64::to_le_bytes).collect();
    vm.restore_states(&target, &mut back.as_slice()).unwrap();
    assert_eq!(map(&target).runs, [(target.pages(), PageState::Shared)]);
}
