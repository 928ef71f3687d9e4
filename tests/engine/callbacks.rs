// SPDX-License-Identifier: MIT OR Apache-2.0

//! Listeners with bugs: they panic, and they ask for what would wait for the request that they are
//! called in.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use guestmemfd::owner::SoftwareOwner;
use guestmemfd::*;
use parking_lot::Mutex;
use proptest::prelude::*;

use crate::machine::*;
use crate::mapper::{CALLBACKS, Callback};
use crate::request::*;

/// A window of these pages is added and removed.
const NEW: u64 = 300;

/// Makes a request in which a function is called, on pages 2..8. Its pages, private, and how often
/// it is called.
fn prepare(machine: &Machine, callback: Callback) {
    match callback {
        Callback::Map => {
            for pages in [guest(2, 4), guest(6, 8)] {
                machine.vm.convert(pages, View::Private).unwrap();
            }
        }
        Callback::Unmap => drop(machine.vm.convert(guest(4, 6), View::Private).unwrap()),
        Callback::Revoke | Callback::Interrupted => {
            machine.vm.pin(&machine.backend, file(3, 4)).unwrap();
        }
        Callback::Failed => machine.fault.arm(1),
        // Calls: the attributes of two windows, then the punch.
        Callback::Log => machine.fault.arm(3),
        Callback::Begin
        | Callback::End
        | Callback::Prefault
        | Callback::Gap
        | Callback::NewFiles => {}
    }
}

fn request(machine: &Machine, callback: Callback) -> Result<u64> {
    match callback {
        Callback::Map => machine.vm.convert(guest(2, 8), View::Shared),
        Callback::Gap => machine.vm.convert(guest(2, HIGH), View::Shared),
        _ => machine.vm.map_gpa_range(2 * PAGE_SIZE, 6, 1 << 4),
    }
}

/// What has to be undone before the request can be made once more.
fn clean_up(machine: &Machine, callback: Callback) {
    machine.mapper.hook.clear();
    machine.fault.arm(0);
    if matches!(callback, Callback::Revoke | Callback::Interrupted) {
        // A listener may have done so.
        let _ = machine.backend.unpin(file(3, 4));
    }
}

fn outcome(states: &[PageState], callback: Callback) -> bool {
    let to = match callback {
        Callback::Map | Callback::Gap => PageState::Shared,
        _ => PageState::Private,
    };
    states[2..8].iter().all(|state| *state == to)
}

#[test]
fn a_panic_in_any_function_leaves_a_sound_state_and_the_next_request_works() {
    for callback in CALLBACKS {
        // Two runs of pages are mapped and unmapped.
        let calls = match callback {
            Callback::Map | Callback::Unmap => 2,
            _ => 1,
        };
        for nth in 1..=calls {
            let machine = Machine::new();
            prepare(&machine, callback);
            let before = machine.states();
            // A device uses at once what it gets.
            machine.mapper.writes.store(true, Ordering::SeqCst);
            machine.mapper.hook.panic_at(nth, move |c| c == callback);
            let asked = || request(&machine, callback);
            let panic = catch_unwind(AssertUnwindSafe(asked)).expect_err("it is called");
            assert!(panic.is::<&str>(), "{callback:?}");
            clean_up(&machine, callback);
            machine.check_invariants();
            let after = machine.states();
            let is_done = outcome(&after, callback);
            assert!(after == before || is_done, "{callback:?} {after:?}");
            let late = [Callback::End, Callback::Prefault, Callback::Log];
            assert_eq!(is_done, late.contains(&callback), "{callback:?}");
            request(&machine, callback).unwrap();
            machine.check_invariants();
            assert!(outcome(&machine.states(), callback), "{callback:?}");
            let stats = machine.backend.stats();
            assert_eq!(stats.pinned, 0, "{callback:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whichever call panics, a request has changed everything or nothing, with all data where it
    /// was; what devices write to pages that were theirs for a moment is not kept.
    #[test]
    fn a_request_in_which_the_listener_panics_takes_effect_as_a_whole_or_not_at_all(
        requests in prop::collection::vec((crate::request::request(), 1u64..8), 1..25),
        writes in any::<bool>(),
    ) {
        let machine = Machine::new();
        for (request, nth) in requests {
            let before = machine.states();
            let data = machine.fill();
            let expected = expect(&before, &request);
            machine.mapper.writes.store(writes, Ordering::SeqCst);
            machine.mapper.hook.panic_at(nth, |_| true);
            let result = catch_unwind(AssertUnwindSafe(|| match &request {
                Request::Convert(guest, to) => machine.vm.convert(*guest, *to).map(|_| ()),
                Request::Discard(pages) => machine.vm.free_pages(&machine.backend, *pages),
            }));
            machine.mapper.hook.clear();
            machine.mapper.writes.store(false, Ordering::SeqCst);
            machine.check_invariants();
            let after = machine.states();
            if let Ok(result) = result {
                prop_assert_eq!(result.is_ok(), expected.is_some());
            }
            if after == before {
                let converts = matches!(request, Request::Convert(..));
                for (page, state) in (0..).zip(after).filter(|_| converts) {
                    let (view, devices_write) = match state {
                        PageState::Private => (View::Private, false),
                        _ => (View::Shared, writes),
                    };
                    if !devices_write {
                        prop_assert_eq!(machine.read(view, page), data[page as usize]);
                    }
                }
            } else {
                prop_assert_eq!(Some(after), expected);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// In place a listener is told after the attribute is clear. Where it panics then, the
    /// attribute is in doubt, and is put right when the page moves the next time.
    #[test]
    fn a_request_in_place_in_which_the_listener_panics_takes_effect_as_a_whole_or_not_at_all(
        requests in prop::collection::vec((crate::request::request(), 1u64..8), 1..25),
    ) {
        let machine = Machine::in_place();
        for (request, nth) in requests {
            let before = machine.states();
            let expected = expect(&before, &request);
            machine.mapper.hook.panic_at(nth, |_| true);
            let _ = catch_unwind(AssertUnwindSafe(|| match &request {
                Request::Convert(guest, to) => machine.vm.convert(*guest, *to).map(|_| ()),
                Request::Discard(pages) => machine.vm.free_pages(&machine.backend, *pages),
            }));
            machine.mapper.hook.clear();
            let after = machine.states();
            let mapped = machine.mapper.mapped.lock().clone();
            for (mapped, state) in mapped.into_iter().zip(&after) {
                prop_assert_eq!(mapped, state.host_may_use());
            }
            prop_assert!(after == before || Some(&after) == expected.as_ref());
        }
        for to in [View::Private, View::Shared] {
            for range in [guest(LOW, LOW + 16), guest(HIGH, HIGH + 8)] {
                machine.vm.convert(range, to).unwrap();
            }
            crate::in_place::check(&machine);
        }
    }
}

#[test]
fn a_panic_while_a_failed_request_is_taken_back_leaves_a_sound_state() {
    // Calls: the listener for each of two runs, then the attributes of two windows for each. From
    // the third on all fail: what is set cannot be set back, which is logged.
    let machine = Machine::new();
    prepare(&machine, Callback::Map);
    machine.fault.arm_pair(4, crate::fault::LASTING);
    machine.mapper.hook.panic_at(1, |c| c == Callback::Log);
    let asked = || request(&machine, Callback::Map);
    catch_unwind(AssertUnwindSafe(asked)).expect_err("it is logged");
    clean_up(&machine, Callback::Map);
    let mapped = machine.mapper.mapped.lock().clone();
    for (mapped, state) in mapped.into_iter().zip(machine.states()) {
        assert_eq!(mapped, state.host_may_use());
    }
    assert_eq!(request(&machine, Callback::Map).unwrap(), 6);
    machine.check_invariants();
}

#[test]
fn all_start_over_under_a_new_owner_though_the_listener_panics() {
    for (start, callback) in [
        (PageState::Undecided, Callback::Map),
        (PageState::Private, Callback::Unmap),
        (PageState::Undecided, Callback::NewFiles),
        (PageState::Private, Callback::NewFiles),
        (PageState::Undecided, Callback::Begin),
        (PageState::Undecided, Callback::End),
    ] {
        let machine = Machine::with(Discard::Now, start);
        for (page, to) in [(2, View::Private), (4, View::Shared), (6, View::Private)] {
            machine.vm.convert(guest(page, page + 1), to).unwrap();
        }
        machine.vm.convert(guest(9, 12), View::Shared).unwrap();
        let mut config = BackendConfig::new("dimm", 4 * PAGE_SIZE);
        config.mode = Some(Mode::Private);
        let dimm = machine.vm.create_backend(config).unwrap();
        for window in [guest(0, 16), guest(20, 28), guest(100, 108)] {
            machine.vm.remove_window(window).unwrap();
        }
        let file = |backend: &Backend| {
            let views = backend.views();
            let fd = views.file(View::Private).fd();
            rustix::fs::fstat(fd).unwrap().st_ino
        };
        let (before, files) = (machine.states(), [file(&machine.backend), file(&dimm)]);
        machine.mapper.hook.panic_at(1, move |c| c == callback);
        let rebind = || machine.vm.rebind(Arc::new(SoftwareOwner::default()));
        let panic = catch_unwind(AssertUnwindSafe(rebind));
        panic.expect_err("it is called");
        machine.mapper.hook.clear();
        let new = [file(&machine.backend), file(&dimm)];
        if callback == Callback::Begin {
            assert_eq!((machine.states(), new), (before, files));
        } else {
            assert!(machine.states().iter().all(|state| *state == start));
            assert!(files.iter().zip(new).all(|(old, new)| *old != new));
        }
        // What is beside the pages that it panicked at has been told.
        let told = machine.mapper.mapped.lock().clone();
        let wrong = told.iter().filter(|m| **m != start.host_may_use()).count();
        assert!(wrong <= 1 || callback == Callback::Begin, "{told:?}");
        machine
            .vm
            .rebind(Arc::new(SoftwareOwner::default()))
            .unwrap();
    }
}

type Answers = Arc<Mutex<Vec<(&'static str, Result<()>)>>>;

/// Asks for all that a listener may not ask for.
fn ask_for_what_is_forbidden(machine: &Machine) -> Vec<(&'static str, Result<()>)> {
    let (vm, backend) = (&machine.vm, &machine.backend);
    let new = guest(NEW, NEW + 4);
    let owner = || Arc::new(SoftwareOwner::default());
    let mut states = Vec::new();
    // Of another backend, all of whose pages are undecided.
    states.extend(*b"gmfdsta1");
    states.extend(PAGES.to_le_bytes());
    states.extend((PAGES << 2).to_le_bytes());
    vec![
        ("convert", vm.convert(guest(9, 10), View::Private).map(drop)),
        // What would cost nothing is refused as well.
        (
            "convert to what is",
            vm.convert(guest(9, 10), View::Shared).map(drop),
        ),
        (
            "hypercall",
            vm.map_gpa_range(PAGE_SIZE, 1, 1 << 4).map(drop),
        ),
        (
            "fault",
            vm.memory_fault(PAGE_SIZE, PAGE_SIZE, View::Private)
                .map(drop),
        ),
        ("free pages", vm.free_pages(backend, file(9, 10))),
        ("free private", vm.free_private(backend)),
        ("punch", vm.punch_owed()),
        (
            "add window",
            vm.add_window(backend, new, 0, Binding::Bound).map(drop),
        ),
        ("remove window", vm.remove_window(guest(HIGH, HIGH + 8))),
        ("clear windows", vm.clear_stale_windows()),
        ("remove backend", vm.remove_backend(backend)),
        ("rebind", vm.rebind(owner())),
        (
            "restore",
            vm.restore_states(backend, &mut states.as_slice()),
        ),
    ]
}

/// Uses pages that no request is moving.
fn use_other_pages(machine: &Machine) {
    let (vm, backend) = (&machine.vm, &machine.backend);
    let other = file(12, 14);
    vm.pin(backend, other).unwrap();
    backend.unpin(other).unwrap();
    drop(vm.hold(backend, other).unwrap());
    assert!(vm.host_may_use(backend, other));
    vm.write(12 * PAGE_SIZE, b"data").unwrap();
    let mut bytes = [0; 4];
    vm.read(12 * PAGE_SIZE, &mut bytes).unwrap();
    assert_eq!(&bytes, b"data");
    assert_eq!(backend.state(12), PageState::Undecided);
    let map = backend.state_map(backend.pages(), usize::MAX);
    assert!(!map.runs.is_empty() && backend.stats().state_bytes[0] > 0);
    assert!(vm.owns(guest(2, 3)));
}

/// A listener that acts in one of its functions, once.
fn in_callback(
    machine: &Arc<Machine>,
    callback: Callback,
    act: impl Fn(&Machine) + Send + Sync + 'static,
) {
    let weak: Weak<Machine> = Arc::downgrade(machine);
    let acts = Mutex::new(Some(act));
    machine.mapper.hook.set(move |called| {
        if called != callback {
            return;
        }
        let act = acts.lock().take();
        if let (Some(act), Some(machine)) = (act, weak.upgrade()) {
            act(&machine);
        }
    });
}

#[test]
fn what_would_wait_for_its_own_request_is_refused_in_every_function() {
    for callback in CALLBACKS {
        let machine = Arc::new(Machine::new());
        prepare(&machine, callback);
        let before = machine.states();
        let answers = Answers::default();
        let given = answers.clone();
        in_callback(&machine, callback, move |machine| {
            use_other_pages(machine);
            *given.lock() = ask_for_what_is_forbidden(machine);
            use_other_pages(machine);
            if matches!(callback, Callback::Revoke | Callback::Interrupted) {
                machine.backend.unpin(file(3, 4)).unwrap();
            }
        });
        let result = request(&machine, callback);
        assert_eq!(
            result.is_err(),
            callback == Callback::Failed,
            "{callback:?}: {result:?}"
        );
        let answers = std::mem::take(&mut *answers.lock());
        assert_eq!(answers.len(), 13, "{callback:?} is called");
        for (what, answer) in answers {
            let refused = matches!(answer, Err(Error::InCallback));
            assert!(refused, "{what} in {callback:?}: {answer:?}");
        }
        clean_up(&machine, callback);
        machine.check_invariants();
        let after = machine.states();
        assert!(
            after == before || outcome(&after, callback),
            "{callback:?} {after:?}"
        );
        assert!(!machine.vm.owns(guest(NEW, NEW + 4)));

        // Nothing is left of the refusals.
        request(&machine, callback).unwrap();
        machine.vm.convert(guest(9, 10), View::Private).unwrap();
        machine.vm.remove_window(guest(HIGH, HIGH + 8)).unwrap();
        machine.vm.clear_stale_windows().unwrap();
    }
}

#[test]
fn what_would_wait_is_refused_while_new_files_are_mapped() {
    let machine = Arc::new(Machine::new());
    let answers = Answers::default();
    let given = answers.clone();
    in_callback(&machine, Callback::NewFiles, move |machine| {
        *given.lock() = ask_for_what_is_forbidden(machine);
    });
    for window in [guest(0, 16), guest(20, 28), guest(100, 108)] {
        machine.vm.remove_window(window).unwrap();
    }
    machine
        .vm
        .rebind(Arc::new(SoftwareOwner::default()))
        .unwrap();
    let answers = std::mem::take(&mut *answers.lock());
    assert_eq!(answers.len(), 13);
    for (what, answer) in answers {
        let refused = matches!(answer, Err(Error::InCallback));
        assert!(refused, "{what}: {answer:?}");
    }
}

#[test]
fn the_host_does_not_get_the_pages_that_its_callback_is_about() {
    let machine = Arc::new(Machine::new());
    prepare(&machine, Callback::Map);
    for (callback, to) in [
        (Callback::Map, View::Shared),
        (Callback::Unmap, View::Private),
    ] {
        let answers = Arc::new(Mutex::new(Vec::new()));
        let given = answers.clone();
        in_callback(&machine, callback, move |machine| {
            let moving = file(2, 3);
            let pinned = machine.vm.pin(&machine.backend, moving);
            let may_use = machine.vm.host_may_use(&machine.backend, moving);
            let read = machine.vm.read(2 * PAGE_SIZE, &mut [0; 4]);
            given.lock().push((pinned.is_ok(), may_use, read.is_ok()));
        });
        machine.vm.convert(guest(2, 4), to).unwrap();
        assert_eq!(*answers.lock(), [(false, false, false)], "{callback:?}");
    }
    machine.mapper.hook.clear();
    machine.check_invariants();
}

#[test]
fn a_listener_may_use_another_vm() {
    let machine = Arc::new(Machine::new());
    let other = Arc::new(Machine::new());
    let used = other.clone();
    let answers = Answers::default();
    let given = answers.clone();
    in_callback(&machine, Callback::Unmap, move |machine| {
        used.vm.convert(guest(2, 4), View::Private).unwrap();
        let again = machine.vm.convert(guest(9, 10), View::Private).map(drop);
        given.lock().push(("its own", again));
    });
    machine.vm.convert(guest(2, 4), View::Private).unwrap();
    assert!(matches!(answers.lock()[..], [(_, Err(Error::InCallback))]));
    machine.check_invariants();
    other.check_invariants();
}

/// Whoever is asked whether to give up may let go of pins in the same breath.
#[test]
fn pins_can_be_let_go_of_while_a_wait_for_them_asks() {
    let machine = Arc::new(Machine::new());
    machine.vm.pin(&machine.backend, file(3, 4)).unwrap();
    in_callback(&machine, Callback::Interrupted, |machine| {
        machine.backend.unpin(file(3, 4)).unwrap();
    });
    machine.vm.convert(guest(3, 4), View::Private).unwrap();
    machine.check_invariants();
}
