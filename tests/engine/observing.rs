// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a backend tells of its pages, and of requests that failed.

use guestmemfd::*;
use proptest::prelude::*;

use crate::fault::LASTING;
use crate::machine::*;
use crate::request::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// However few runs an answer has room for, the answers join up to the states as they are.
    #[test]
    fn a_map_read_in_parts_says_what_the_states_are(
        requests in prop::collection::vec(request(), 0..20),
        (start, count) in (0..PAGES, 1..PAGES),
        limit in 1usize..6,
    ) {
        let machine = Machine::new();
        for request in &requests {
            // A refused one changes nothing.
            let _ = match request {
                Request::Convert(guest, to) => machine.vm.convert(*guest, *to).map(drop),
                Request::Discard(pages) => machine.vm.free_pages(&machine.backend, *pages),
            };
        }
        let wanted = file(start, (start + count).min(PAGES));
        let mut told = Vec::new();
        let mut rest = Some(wanted);
        while let Some(pages) = rest {
            let map = machine.backend.state_map(pages, limit);
            prop_assert!(!map.runs.is_empty() && map.runs.len() <= limit);
            prop_assert!(map.runs.windows(2).all(|pair| pair[0].1 != pair[1].1));
            told.extend(map.runs);
            rest = map.rest;
        }
        prop_assert_eq!(told, machine.backend.state_map(wanted, usize::MAX).runs);
    }
}

#[test]
fn a_run_longer_than_one_look_is_told_as_one() {
    let size = 3 << 32;
    let vm = Machine::new().vm;
    let backend = vm.create_backend(BackendConfig::new("large", size));
    let backend = backend.unwrap();
    let all = backend.pages();
    let map = backend.state_map(all, 1);
    assert_eq!(map.runs, [(all, PageState::Undecided)]);
    assert_eq!(map.rest, None);
}

#[test]
fn a_map_without_room_is_all_rest() {
    let machine = Machine::new();
    let all = machine.backend.pages();
    let map = machine.backend.state_map(all, 0);
    assert_eq!((map.runs.len(), map.rest), (0, Some(all)));
}

#[test]
fn the_listener_hears_of_requests_that_the_host_fails_and_of_no_others() {
    let machine = Machine::new();
    let heard = || std::mem::take(&mut *machine.mapper.failed.lock());
    let hypercall = |page, attributes| {
        machine
            .vm
            .map_gpa_range(page * PAGE_SIZE, 1, attributes)
            .unwrap_err();
    };
    hypercall(3, 1 << 7);
    hypercall(ALIAS, 1 << 4);
    hypercall(18, 1 << 4);
    assert_eq!(heard(), []);

    machine.fault.arm(1);
    hypercall(3, 1 << 4);
    machine.fault.arm(0);
    assert_eq!(heard(), [(guest(3, 4), View::Private)]);

    touch(&machine, 3);
    let share = || {
        machine
            .vm
            .memory_fault(3 * PAGE_SIZE, PAGE_SIZE, View::Shared)
    };
    machine.fault.arm_pair(1, LASTING);
    share().unwrap_err();
    machine.fault.arm(0);
    assert_eq!(heard(), [(guest(3, 4), View::Shared)]);

    assert_eq!(share().unwrap(), 1);

    // Calls: the attribute.
    machine.fault.arm(1);
    touch(&machine, 5);
    assert_eq!(heard(), [], "the second try succeeds");
}

#[test]
fn latencies_are_counted_for_requests_that_move_pages() {
    let machine = Machine::new();
    let counts = || {
        let stats = machine.backend.stats();
        (
            stats.latency_to_private.iter().sum::<u64>(),
            stats.latency_to_shared.iter().sum::<u64>(),
        )
    };
    touch(&machine, 1);
    assert_eq!(
        counts(),
        (0, 0),
        "nobody watches, and asking is not watching"
    );
    touch(&machine, 4);
    assert_eq!(counts(), (0, 0));
    machine.backend.watch_latency();
    touch(&machine, 2);
    touch(&machine, 2);
    let shared = machine.vm.map_gpa_range(PAGE_SIZE, 2, 0);
    assert_eq!(shared.unwrap(), 2);
    assert_eq!(counts(), (1, 1), "one request moved pages each way");
}
