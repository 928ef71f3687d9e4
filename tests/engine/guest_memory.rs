// SPDX-License-Identifier: MIT OR Apache-2.0

//! vm-memory's interface to guest memory: devices of others, over pins.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guestmemfd::owner::SoftwareOwner;
use guestmemfd::*;
use proptest::prelude::*;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryError, GuestMemoryResult,
    Permissions, VolatileArrayRef, VolatileMemory, VolatileSlice,
};

use crate::access::{Model, Outcome, SetOnDrop, with_next};
use crate::machine::*;
use crate::request::*;

const PAGE: usize = PAGE_SIZE as usize;
const ALL: [Permissions; 4] = [
    Permissions::No,
    Permissions::Read,
    Permissions::Write,
    Permissions::ReadWrite,
];

fn at(page: u64) -> GuestAddress {
    GuestAddress(page * PAGE_SIZE)
}

/// A slice of each window.
fn slices(
    vm: &Vm,
    address: GuestAddress,
    count: usize,
) -> GuestMemoryResult<Vec<VolatileSlice<'_, SlicePin>>> {
    vm.get_slices(address, count, Permissions::ReadWrite)?
        .collect()
}

/// The only one.
fn slice(vm: &Vm, address: GuestAddress, count: usize) -> VolatileSlice<'_, SlicePin> {
    let mut slices = slices(vm, address, count).unwrap();
    assert_eq!(slices.len(), 1);
    slices.remove(0)
}

fn pinned(machine: &Machine) -> u64 {
    machine.backend.stats().pinned / PAGE_SIZE
}

/// What has come of asking for slices, in the words of the model.
fn outcome(result: GuestMemoryResult<Vec<VolatileSlice<'_, SlicePin>>>) -> Outcome {
    match result {
        Ok(_) => Outcome::Done,
        Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(gpa))) => Outcome::Nobody(gpa),
        Err(GuestMemoryError::IOError(error)) => {
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
            let own = error.get_ref().and_then(|own| own.downcast_ref());
            match own {
                Some(Error::PrivateMemory { gpa, .. }) => Outcome::Private(*gpa),
                other => panic!("{other:?}"),
            }
        }
        Err(error) => panic!("{error}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// An access is granted or refused as a whole, with the first address in the way; slices show
    /// what the guest sees, of any window; nothing is pinned or allocated that nobody holds or
    /// touches.
    #[test]
    fn slices_match_a_plain_model(
        requests in prop::collection::vec(request(), 0..10),
        (page, byte) in (prop_oneof![0u64..33, 98u64..110], 0..PAGE_SIZE),
        count in prop_oneof![0usize..16, 1..3 * PAGE],
        in_place in any::<bool>(),
    ) {
        let machine = with_next(match in_place {
            true => Machine::in_place(),
            false => Machine::new(),
        });
        for request in &requests {
            // A refused one changes nothing.
            let _ = match request {
                Request::Convert(guest, to) => machine.vm.convert(*guest, *to).map(drop),
                Request::Discard(pages) => machine.vm.free_pages(&machine.backend, *pages),
            };
        }
        let gpa = page * PAGE_SIZE + byte;
        let (places, expected) = Model::places(&machine.states(), gpa, count);
        for access in ALL {
            let granted = machine.vm.check_range(GuestAddress(gpa), count, access);
            prop_assert_eq!(granted, expected == Outcome::Done);
        }
        let found = slices(&machine.vm, GuestAddress(gpa), count);
        prop_assert_eq!(machine.backend.stats().shared_allocated, 0);
        if let Ok(slices) = &found {
            let sum: usize = slices.iter().map(VolatileSlice::len).sum();
            prop_assert_eq!(sum, count);
            let pages: u64 = slices.iter().map(|slice| slice.bitmap().pin().pages().count()).sum();
            prop_assert_eq!(pinned(&machine), pages);
            for (number, slice) in (1_u8..).zip(slices) {
                slice.as_volatile_slice().copy_from(&vec![number; slice.len()]);
            }
            let mut bytes = vec![0; count];
            machine.vm.read(gpa, &mut bytes).unwrap();
            let numbers = slices.iter().zip(1..).flat_map(|(s, n)| vec![n; s.len()]);
            prop_assert_eq!(bytes, numbers.collect::<Vec<u8>>());
            let mut touched: Vec<_> = places.iter().map(|place| place / PAGE).collect();
            touched.sort_unstable();
            touched.dedup();
            let allocated = machine.backend.stats().shared_allocated / PAGE_SIZE;
            prop_assert_eq!(allocated, touched.len() as u64);
        } else {
            prop_assert_eq!(pinned(&machine), 0, "what was refused holds nothing");
        }
        prop_assert_eq!(outcome(found), expected);
        prop_assert_eq!(pinned(&machine), 0);
    }
}

/// Nothing that vm-memory makes of a slice outlives the pin.
#[test]
fn pages_stay_shared_as_long_as_anything_of_a_slice_is_held() {
    let machine = Machine::new();
    let page = guest(3, 4);
    // A conversion that has to wait gives up.
    machine.mapper.interrupts.store(true, Ordering::SeqCst);
    let is_held = || match machine.vm.convert(page, View::Private) {
        Ok(_) => false,
        Err(Error::Interrupted { .. }) => true,
        Err(error) => panic!("{error}"),
    };
    let whole = slice(&machine.vm, at(2), 2 * PAGE);
    assert_eq!(pinned(&machine), 2);
    assert!(is_held());
    // Of all of it, and of the page beside the one that is asked for.
    let part = whole.subslice(8, 16).unwrap();
    let (head, tail) = whole.split_at(PAGE).unwrap();
    let clone = whole.clone();
    let offset = whole.offset(1).unwrap();
    // References borrow their slice, but for arrays.
    let array = VolatileArrayRef::from(whole);
    let element = array.ref_at(2).to_slice();
    drop(array);
    assert_eq!(pinned(&machine), 2, "clones share a pin");
    for held in [part, head, tail, clone, offset, element] {
        assert!(is_held());
        held.write_obj(7_u8, 0).unwrap();
        drop(held);
    }
    assert_eq!(pinned(&machine), 0);
    assert!(!is_held());
    machine.check_invariants();
}

#[test]
fn a_conversion_waits_for_a_slice_and_fails_if_it_stays() {
    let machine = Machine::new();
    let held = slice(&machine.vm, at(2), PAGE);
    let error = machine.vm.convert(guest(2, 3), View::Private).unwrap_err();
    assert!(
        matches!(error, Error::Pinned { pages, .. } if pages == file(2, 3)),
        "{error}"
    );
    assert_eq!(error.errno(), 16, "EBUSY");
    std::thread::scope(|scope| {
        let vcpu = scope.spawn(|| machine.vm.convert(guest(2, 3), View::Private));
        while machine.backend.stats().waits < 2 {
            std::thread::yield_now();
        }
        assert!(!vcpu.is_finished());
        held.write_obj(7_u8, 0).unwrap();
        drop(held);
        assert_eq!(vcpu.join().unwrap().unwrap(), 1);
    });
    machine.check_invariants();
    assert!(machine.is_hole(View::Shared, 2), "what was written is gone");
}

#[test]
fn what_nobody_has_taken_yet_is_pinned_and_let_go_of() {
    let machine = with_next(Machine::new());
    // Two windows that touch each other.
    let mut two = machine
        .vm
        .get_slices(at(HIGH + 7), 2 * PAGE, Permissions::Read)
        .unwrap();
    assert_eq!(pinned(&machine), 2);
    let first = two.next().unwrap().unwrap();
    assert_eq!(first.len(), PAGE);
    drop(two);
    assert_eq!(pinned(&machine), 1);
    drop(first);
    assert_eq!(pinned(&machine), 0);
}

/// A device that knows of vm-memory alone, as those of rust-vmm do.
fn device<A: GuestAddressSpace>(memory: &A, address: GuestAddress) -> GuestMemoryResult<u64> {
    let memory = memory.memory();
    let value: u64 = memory.read_obj(address)?;
    memory.write_obj(value + 1, address)?;
    let last = GuestAddress(address.0 + 8);
    memory.store(value + 2, last, Ordering::SeqCst)?;
    memory.load::<u64>(last, Ordering::SeqCst)
}

#[test]
fn devices_and_the_library_see_the_same_bytes() {
    for machine in [Machine::new(), Machine::in_place()] {
        let vm = Arc::new(machine.vm);
        let address = PAGE_SIZE + 8;
        vm.write(address, &41_u64.to_ne_bytes()).unwrap();
        assert_eq!(device(&vm, GuestAddress(address)).unwrap(), 43);
        assert_eq!(device(&vm.as_ref(), GuestAddress(address)).unwrap(), 44);
        let mut bytes = [0; 16];
        vm.read(address, &mut bytes).unwrap();
        let expected = [43_u64, 44].map(u64::to_ne_bytes);
        assert_eq!(bytes, expected.as_flattened());
        // Through the alias as well.
        let alias = GuestAddress(ALIAS * PAGE_SIZE + address);
        assert_eq!(vm.read_obj::<u64>(alias).unwrap(), 43);

        // From and to something else, across a window's end into a gap: what there is.
        let end = GuestAddress(16 * PAGE_SIZE - 2);
        let all = vm.read_volatile_from(end, &mut &b"data"[..], 4);
        assert!(matches!(all, Err(GuestMemoryError::InvalidGuestAddress(_))));
        vm.read_exact_volatile_from(end, &mut &b"da"[..], 2)
            .unwrap();
        let mut out = Vec::new();
        vm.write_all_volatile_to(end, &mut out, 2).unwrap();
        assert_eq!(out, b"da");

        // And not what is the guest's alone.
        vm.convert(guest(1, 2), View::Private).unwrap();
        let error = device(&vm, GuestAddress(address)).unwrap_err();
        let text = "cannot access guest memory at 0x1008: the page is private (backend 'ram')";
        assert!(error.to_string().ends_with(text), "{error}");
        let across = GuestAddress(PAGE_SIZE - 4);
        vm.write_slice(&[1; 8], across).unwrap_err();
        assert_eq!(
            vm.read_obj::<u32>(across).unwrap(),
            0,
            "as a whole or not at all"
        );
    }
}

#[test]
fn looking_allocates_nothing_and_a_touch_one_page() {
    let machine = Machine::new();
    let (memory, allocated) = (&machine.vm, || machine.backend.stats().shared_allocated);
    assert!(memory.check_range(at(0), 16 * PAGE, Permissions::Read));
    let whole = slice(memory, at(0), 16 * PAGE);
    assert_eq!(allocated(), 0);
    let mut byte = [1];
    memory.read(5 * PAGE_SIZE, &mut byte).unwrap();
    assert_eq!((byte, allocated()), ([0], 0), "the library reads the file");
    // The kernel makes a page of what is touched through a mapping.
    assert_eq!(whole.read_obj::<u8>(5 * PAGE).unwrap(), 0);
    assert_eq!(allocated(), PAGE_SIZE);
}

#[test]
fn addresses_that_wrap_and_accesses_of_no_bytes() {
    let machine = Machine::new();
    for (gpa, count) in [(u64::MAX, 2), (u64::MAX - 1, 4), (8, usize::MAX)] {
        let gpa = GuestAddress(gpa);
        assert!(!machine.vm.check_range(gpa, count, Permissions::Read));
        let error = slices(&machine.vm, gpa, count).unwrap_err();
        let wraps = matches!(
            error,
            GuestMemoryError::GuestAddressOverflow | GuestMemoryError::InvalidGuestAddress(_)
        );
        assert!(wraps, "{error}");
    }
    for gpa in [0, 50 * PAGE_SIZE, u64::MAX].map(GuestAddress) {
        assert!(machine.vm.check_range(gpa, 0, Permissions::Read));
        assert!(slices(&machine.vm, gpa, 0).unwrap().is_empty());
    }
    assert!(machine.vm.physical_memory().is_none());
}

/// A slice may be the last that knows a backend, or one of its files.
#[test]
fn a_slice_outlives_its_backend_and_new_files() {
    for machine in [Machine::new(), Machine::in_place()] {
        let in_place = machine.backend.mode() == Mode::InPlace;
        let held = slice(&machine.vm, at(2), PAGE);
        held.write_obj(7_u8, 9).unwrap();
        let windows = [guest(0, 16), guest(20, 28), guest(100, 108)];
        for window in windows {
            machine.vm.remove_window(window).unwrap();
        }
        let owner = match in_place {
            true => SoftwareOwner::in_place(),
            false => SoftwareOwner::default(),
        };
        machine.vm.rebind(Arc::new(owner)).unwrap();
        assert_eq!(held.read_obj::<u8>(9).unwrap(), 7);
        let (vm, backend) = (&machine.vm, &machine.backend);
        vm.add_window(backend, guest(0, 16), 0, Binding::Bound)
            .unwrap();
        // What was shared has survived.
        let new = slice(vm, at(2), PAGE);
        assert_eq!(new.read_obj::<u8>(9).unwrap(), 7);
        vm.remove_window(guest(0, 16)).unwrap();
        vm.remove_backend(backend).unwrap();
        let Machine { vm: _vm, .. } = &machine;
        for slice in [held, new] {
            slice.write_obj(8_u8, 9).unwrap();
            assert_eq!(slice.read_obj::<u8>(9).unwrap(), 8);
        }
        assert_eq!(pinned(&machine), 0);
    }
}

#[test]
fn memory_that_is_always_shared_is_the_hosts_without_pins() {
    let vm = Machine::new().vm;
    let mut config = BackendConfig::new("mapped", 16 * PAGE_SIZE);
    config.mode = Some(Mode::Mapped);
    let backend = vm.create_backend(config).unwrap();
    let place = guest(500, 516);
    vm.add_window(&backend, place, 0, Binding::Bound).unwrap();
    let held = slice(&vm, at(500), 16 * PAGE);
    held.write_obj(7_u32, 3).unwrap();
    assert_eq!(
        vm.read_obj::<u32>(GuestAddress(500 * PAGE_SIZE + 3))
            .unwrap(),
        7
    );
    assert_eq!(backend.stats().pinned, 0);
    assert!(!vm.check_range(at(499), 2 * PAGE, Permissions::Read));
}

/// Pages on the move, a device that writes them, and one that reads them: nothing that was written
/// stays behind in the shared view of a private page, and no read or write ends half-way.
#[test]
fn devices_and_conversions_of_the_same_pages_exclude_each_other() {
    let machine = Machine::new();
    let (machine, done) = (&machine, AtomicBool::new(false));
    let is_refused = |result: GuestMemoryResult<()>| match result {
        Ok(()) => false,
        Err(GuestMemoryError::IOError(error)) => {
            assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied);
            true
        }
        Err(error) => panic!("{error}"),
    };
    let (mut written, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _done = SetOnDrop(&done);
            for round in 0..150 {
                let to = [View::Private, View::Shared][round % 2];
                machine.convert_in_the_end(guest(1, 3), to);
                machine.convert_in_the_end(guest(2, 4), to);
                std::thread::yield_now();
            }
        });
        scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                is_refused(machine.vm.read_slice(&mut [0; 2 * PAGE], at(1)));
            }
        });
        for byte in (1..=255).cycle() {
            if done.load(Ordering::SeqCst) {
                break;
            }
            match is_refused(machine.vm.write_slice(&[byte; 3 * PAGE], at(1))) {
                false => written += 1,
                true => refused += 1,
            }
        }
    });
    assert!(
        written > 0 && refused > 0,
        "{written} written, {refused} refused"
    );
    machine.vm.convert(guest(1, 4), View::Private).unwrap();
    machine.check_invariants();
    assert!((1..4).all(|page| machine.is_hole(View::Shared, page)));
    assert_eq!(pinned(machine), 0);
}
