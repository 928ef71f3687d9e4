// SPDX-License-Identifier: MIT OR Apache-2.0

//! A request takes effect as a whole or not at all, whichever call fails.

use std::sync::atomic::Ordering;

use guestmemfd::*;
use proptest::prelude::*;
use rustix::io::Errno;

use crate::fault::LASTING;
use crate::machine::*;
use crate::request::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Each request runs with its n-th call failing (0: none). Either all of it takes effect, with
    /// pages that changed views empty, or none of it, with all data where it was.
    #[test]
    fn a_request_takes_effect_as_a_whole_or_not_at_all(
        requests in prop::collection::vec((request(), 0u64..8), 1..25),
    ) {
        let machine = Machine::new();
        for (request, nth) in requests {
            let before = machine.states();
            let data = machine.fill();
            let expected = expect(&before, &request);
            machine.fault.arm(nth);
            let result = match &request {
                Request::Convert(guest, to) => machine.vm.convert(*guest, *to).map(|_| ()),
                Request::Discard(pages) => machine.vm.free_pages(&machine.backend, *pages),
            };
            let hit = nth != 0 && machine.fault.left() == 0;
            machine.fault.arm(0);
            machine.check_invariants();
            let after = machine.states();
            let exposed = machine.exposed();
            match result {
                Ok(()) => {
                    prop_assert_eq!(Some(&after), expected.as_ref());
                    for page in 0..PAGES as usize {
                        let stays = before[page].host_may_use() == after[page].host_may_use();
                        let discarded = matches!(&request, Request::Discard(p) if p.contains(page as u64));
                        let byte = if stays && !discarded { data[page] } else { 0 };
                        prop_assert_eq!(exposed[page], byte, "page {}", page);
                    }
                }
                Err(error) => {
                    prop_assert!(hit || expected.is_none(), "{} though nothing failed", error);
                    prop_assert_eq!(&after, &before);
                    if let Request::Convert(..) = request {
                        prop_assert_eq!(exposed, data);
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Where two calls fail, or all from some call on, even taking back can fail. Once the kernel
    /// serves again, the next conversion of the pages puts them right.
    #[test]
    fn after_several_failures_the_next_conversion_puts_things_right(
        requests in prop::collection::vec(
            (request(), 0u64..8, prop_oneof![Just(LASTING), 1u64..8]),
            1..12,
        ),
    ) {
        let machine = Machine::new();
        for (request, nth, again) in requests {
            machine.fault.arm_pair(nth, again);
            // Its answer is the other test's matter.
            let _ = match &request {
                Request::Convert(guest, to) => machine.vm.convert(*guest, *to).map(|_| ()),
                Request::Discard(pages) => machine.vm.free_pages(&machine.backend, *pages),
            };
            machine.fault.arm(0);
            prop_assert!(machine.states().iter().all(|s| *s != PageState::Transition));
            machine.forgive_listener();
        }
        for to in [View::Private, View::Shared] {
            for range in [guest(LOW, LOW + 16), guest(HIGH, HIGH + 8)] {
                machine.vm.convert(range, to).unwrap();
            }
            machine.check_invariants();
        }
        prop_assert!(machine.exposed().iter().all(|byte| *byte == 0));
        prop_assert_eq!(machine.backend.stats().owed_holes, 0);
    }
}

#[test]
fn what_a_device_wrote_before_the_pages_were_taken_back_is_not_kept() {
    let machine = Machine::new();
    for range in [guest(2, 4), guest(6, 8)] {
        machine.vm.convert(range, View::Private).unwrap();
    }
    machine.mapper.writes.store(true, Ordering::SeqCst);
    // Calls: the listener for each of two runs, then two windows for each.
    for (refuses, of_the_listener) in [(2, true), (3, false), (6, false)] {
        machine.fault.arm(refuses);
        let error = machine.vm.convert(guest(2, 8), View::Shared).unwrap_err();
        assert_eq!(
            matches!(error, Error::Listener { .. }),
            of_the_listener,
            "{error}"
        );
        machine.check_invariants();
    }
}

#[test]
fn a_listener_refuses_before_the_guest_can_see_anything() {
    let machine = Machine::new();
    let range = guest(2, 4);
    machine.vm.convert(range, View::Private).unwrap();
    // No attribute can be set from the refusal on: none is needed.
    machine.fault.arm_pair(1, LASTING);
    let error = machine.vm.convert(range, View::Shared).unwrap_err();
    assert!(matches!(error, Error::Listener { .. }), "{error}");
    machine.fault.arm(0);
    machine.check_invariants();
}

#[test]
fn a_listener_that_panics_leaves_pages_as_they_were() {
    let machine = Machine::new();
    machine.mapper.mapped.lock()[3] = false;
    let convert = || machine.vm.convert(guest(3, 4), View::Private);
    // The listener finds that it was told a lie.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(convert)).unwrap_err();
    assert_eq!(machine.states()[3], PageState::Undecided);
    machine.mapper.mapped.lock()[3] = true;
    convert().unwrap();
}

#[test]
fn what_is_so_already_costs_no_call() {
    let machine = Machine::new();
    let low = guest(LOW, LOW + 16);
    assert_eq!(machine.vm.convert(low, View::Private).unwrap(), 16);
    machine.fault.arm(1);
    assert_eq!(machine.vm.convert(low, View::Private).unwrap(), 0);
    assert_eq!(machine.fault.left(), 1, "nothing was called");
}

#[test]
fn a_hole_that_could_not_be_punched_is_punched_before_the_view_is_seen_again() {
    let machine = Machine::new();
    let page = guest(20, 21);
    machine.write(View::Shared, 16, 7);
    // Calls: one attribute, then the punch.
    machine.fault.arm(2);
    machine.vm.convert(page, View::Private).unwrap();
    assert_eq!(machine.backend.stats().owed_holes, PAGE_SIZE);
    assert_eq!(machine.read(View::Shared, 16), 7);

    machine.fault.arm(1);
    machine.vm.convert(page, View::Shared).unwrap_err();
    assert_eq!(machine.states()[16], PageState::Private);

    machine.fault.arm(0);
    machine.vm.convert(page, View::Shared).unwrap();
    assert_eq!(machine.read(View::Shared, 16), 0);
    assert_eq!(machine.backend.stats().owed_holes, 0);
}

#[test]
fn only_the_user_asks_for_a_request_to_come_again() {
    let machine = Machine::new();
    // The reasons of the fault in turn; EINTR and EAGAIN are among them.
    let again = [Errno::INTR, Errno::AGAIN].map(Errno::raw_os_error);
    let mut seen = Vec::new();
    for _ in 0..5 {
        machine.fault.arm_pair(1, LASTING);
        let refused = machine.vm.map_gpa_range(3 * PAGE_SIZE, 1, 1 << 4);
        machine.fault.arm(0);
        let Err(Error::SetAttributes { source, .. }) = &refused else {
            panic!("{refused:?}");
        };
        seen.push(source.raw_os_error().unwrap());
        let errno = refused.unwrap_err().errno();
        assert!(!again.contains(&errno), "{errno}");
    }
    assert!(again.iter().all(|errno| seen.contains(errno)), "{seen:?}");
}
