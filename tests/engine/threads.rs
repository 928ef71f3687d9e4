// SPDX-License-Identifier: MIT OR Apache-2.0

//! Several threads at once.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier, OnceLock, Weak};
use std::time::Duration;

use guestmemfd::owner::SoftwareOwner;
use guestmemfd::*;

use crate::machine::*;

#[test]
fn vcpus_that_convert_the_same_pages_at_once_leave_a_sound_state() {
    let machine = &Machine::lazy(Discard::Now);
    machine.fault.slow_down();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            scope.spawn(move || {
                for i in 0..300u64 {
                    let start = (i * 5 + thread * 3) % 14;
                    let to = if (i + thread) % 2 == 0 {
                        View::Private
                    } else {
                        View::Shared
                    };
                    machine.vm.convert(guest(start, start + 2), to).unwrap();
                    touch(machine, start);
                    if i % 16 == 0 {
                        machine
                            .vm
                            .free_pages(&machine.backend, file(8, 20))
                            .unwrap();
                    }
                }
            });
        }
    });
    machine.vm.punch_owed().unwrap();
    machine.check_invariants();
}

#[test]
fn a_request_returns_when_the_pages_are_where_it_asked_for_whoever_moves_them() {
    let machine = Machine::new();
    machine.fault.slow_down();
    for round in 0..100u64 {
        let to = [View::Private, View::Shared][round as usize % 2];
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let machine = &machine;
                scope.spawn(move || {
                    let start = (round * 3 + thread) % 8;
                    machine.vm.convert(guest(start, start + 6), to).unwrap();
                    let runs = machine
                        .backend
                        .state_map(file(start, start + 6), usize::MAX)
                        .runs;
                    assert_eq!(runs, [(file(start, start + 6), to.into())]);
                });
            }
        });
    }
    machine.check_invariants();
}

#[test]
fn a_request_that_is_interrupted_while_it_waits_is_counted_when_it_comes_again() {
    let machine = Machine::new();
    let everything = guest(LOW, LOW + 16);
    machine.fault.slow_down();
    machine.mapper.interrupts.store(true, Ordering::SeqCst);
    let mut interruptions = 0;
    let mut served = 0;
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            for round in 0..200 {
                let to = [View::Private, View::Shared][round % 2];
                while machine.vm.convert(everything, to).is_err() {}
            }
        });
        while !busy.is_finished() {
            match machine.vm.map_gpa_range(0, 1, 1 << 4) {
                Ok(_) => served += 1,
                Err(Error::Interrupted { .. }) => interruptions += 1,
                Err(error) => panic!("{error}"),
            }
        }
    });
    let stats = machine.backend.stats();
    assert!(interruptions > 0, "nobody had to wait");
    assert_eq!((stats.hypercalls, stats.refused), (served, 0));
}

/// Asks about other pages than those that it is told of.
struct Asks {
    vm: OnceLock<Weak<Vm>>,
    asked: Barrier,
    go: Barrier,
}

impl Listener for &'static Asks {
    fn begin(&self) -> bool {
        true
    }

    fn map(&self, backend: &Backend, _: FilePages) -> io::Result<()> {
        self.asked.wait();
        self.go.wait();
        let vm = self.vm.get().and_then(Weak::upgrade).unwrap();
        assert!(vm.host_may_use(backend, file(4, 5)));
        vm.pin(backend, file(4, 5)).unwrap();
        backend.unpin(file(4, 5)).unwrap();
        Ok(())
    }
}

#[test]
fn a_listener_that_asks_does_not_wait_for_those_that_wait_for_it() {
    let asks: &'static Asks = Box::leak(Box::new(Asks {
        vm: OnceLock::new(),
        asked: Barrier::new(2),
        go: Barrier::new(2),
    }));
    let vm = Arc::new(Vm::new(Arc::new(SoftwareOwner::default()), Box::new(asks)));
    asks.vm.set(Arc::downgrade(&vm)).unwrap();
    let backend = vm
        .create_backend(BackendConfig::new("ram", 8 * PAGE_SIZE))
        .unwrap();
    vm.add_window(&backend, guest(0, 8), 0, Binding::Bound)
        .unwrap();
    vm.convert(guest(0, 1), View::Private).unwrap();
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| vm.convert(guest(0, 1), View::Shared));
        asks.asked.wait();
        let waiting = scope.spawn(|| vm.convert(guest(0, 8), View::Private));
        // Until it is in the queue, behind the one whose listener asks.
        std::thread::sleep(Duration::from_millis(50));
        asks.go.wait();
        assert_eq!(asking.join().unwrap().unwrap(), 1);
        assert_eq!(waiting.join().unwrap().unwrap(), 8);
    });
}
