// SPDX-License-Identifier: MIT OR Apache-2.0

//! Pins against conversions in every order of their steps, and with every value that the memory
//! model lets a load return. No wait times out: a wake-up that is missing is a deadlock.
//! `cargo test --lib --features loom orders`

use std::time::{Duration, Instant};

use loom::sync::Arc;
use loom::thread::{self, JoinHandle};

use crate::exclusion::pins::{Pins, Waited};
use crate::pages::closed::{CHUNK, Closed};
use crate::pages::ranges::{FilePages, PAGE_SIZE};

/// A whole chunk, and a part of another.
const PAGES: u64 = CHUNK + 1;

fn pages(start: u64, end: u64) -> FilePages {
    FilePages::new(start, end).unwrap()
}

fn page(page: u64) -> FilePages {
    pages(page, page + 1)
}

/// What the host and a conversion share.
struct Shared {
    pins: Pins,
    closed: Closed,
}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            pins: Pins::new(PAGES).unwrap(),
            closed: Closed::new(PAGES).unwrap(),
        })
    }

    fn pin_one(&self, page: u64) -> bool {
        self.pins.add_one(&self.closed, page * PAGE_SIZE, 1)
    }

    fn unpin_one(&self, page: u64) -> bool {
        self.pins.remove_one(page * PAGE_SIZE, 1)
    }

    /// As `Vm::pin` does.
    fn pin(&self, pages: FilePages) -> bool {
        self.pins.add(pages);
        let holds = self.closed.no_closed_page_near(pages);
        holds || !self.pins.remove(pages)
    }

    /// As a conversion begins. True if it has the pages for itself.
    fn take(&self, pages: FilePages) -> bool {
        self.closed.close(pages);
        self.pins.first_in(pages).is_none()
    }

    fn is_unpinned(&self) -> bool {
        self.pins.first_in(pages(0, PAGES)).is_none() && self.pins.bytes() == 0
    }
}

fn on_a_thread<T: 'static>(
    shared: &Arc<Shared>,
    act: impl FnOnce(&Shared) -> T + 'static,
) -> JoinHandle<T> {
    let shared = shared.clone();
    thread::spawn(move || act(&shared))
}

/// A conversion of `taken` while somebody else pins pages of it.
fn never_both(taken: FilePages, pin: impl Fn(&Shared) -> bool + Copy + Send + Sync + 'static) {
    loom::model(move || {
        let shared = Shared::new();
        let host = on_a_thread(&shared, pin);
        let is_taken = shared.take(taken);
        let is_pinned = host.join().unwrap();
        assert!(!(is_taken && is_pinned), "pages are pinned and private");
        assert_eq!(shared.is_unpinned(), !is_pinned);
    });
}

#[test]
fn a_pin_of_bytes_and_a_conversion_see_each_other() {
    never_both(page(1), |shared| shared.pin_one(1));
}

#[test]
fn a_pin_of_a_part_and_a_conversion_see_each_other() {
    never_both(page(1), |shared| shared.pin(page(1)));
}

#[test]
fn a_pin_of_a_whole_chunk_and_a_conversion_see_each_other() {
    never_both(page(1), |shared| shared.pin(pages(0, CHUNK)));
}

#[test]
fn pins_and_conversions_of_several_chunks_see_each_other() {
    never_both(pages(1, PAGES), |shared| shared.pin(pages(0, PAGES)));
}

/// What one conversion leaves, another takes and the host pins.
#[test]
fn a_pin_holds_between_conversions_that_follow_each_other() {
    loom::model(|| {
        let shared = Shared::new();
        let host = on_a_thread(&shared, |shared| shared.pin_one(0));
        shared.closed.close(page(0));
        shared.closed.open(page(0));
        let is_taken = shared.take(page(0));
        assert!(!(is_taken && host.join().unwrap()));
    });
}

#[test]
fn a_pin_is_taken_back_once() {
    loom::model(|| {
        let shared = Shared::new();
        assert!(shared.pin_one(1));
        let other = on_a_thread(&shared, |shared| shared.unpin_one(1));
        let (mine, its) = (shared.unpin_one(1), other.join().unwrap());
        assert!(mine != its, "one of the two");
        // No counter has kept a part of it, which would show now.
        shared.pins.add(page(0));
        assert_eq!(shared.pins.first_in(pages(0, PAGES)), Some(page(0)));
    });
}

#[test]
fn pins_of_one_page_are_all_counted() {
    loom::model(|| {
        let shared = Shared::new();
        let other = on_a_thread(&shared, |shared| {
            assert!(shared.pin_one(1));
        });
        assert!(shared.pin_one(1));
        assert_eq!(shared.pins.first_in(pages(0, PAGES)), Some(page(1)));
        other.join().unwrap();
        assert_eq!(shared.pins.bytes(), 2 * PAGE_SIZE);
        assert!(shared.unpin_one(1) && shared.unpin_one(1) && !shared.unpin_one(1));
        assert!(shared.is_unpinned());
    });
}

/// Whoever goes to sleep is woken, whatever the other has done by then.
#[test]
fn a_wait_ends_with_the_last_unpin() {
    loom::model(|| {
        let shared = Shared::new();
        shared.pins.add(page(1));
        let other = on_a_thread(&shared, |shared| assert!(shared.unpin_one(1)));
        wait_for(&shared, page(1));
        other.join().unwrap();
    });
}

/// All orders of three threads are too many: those in which threads are interrupted twice.
#[test]
fn a_wait_ends_when_two_have_unpinned() {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(2);
    model.check(|| {
        let shared = Shared::new();
        (0..2).for_each(|_| shared.pins.add(page(1)));
        let others = [(); 2].map(|()| on_a_thread(&shared, |s| assert!(s.unpin_one(1))));
        wait_for(&shared, page(1));
        for other in others {
            other.join().unwrap();
        }
        assert!(shared.is_unpinned());
    });
}

fn wait_for(shared: &Shared, pages: FilePages) {
    let deadline = Instant::now() + Duration::from_secs(3600);
    let waited = shared.pins.wait(pages, deadline, || false);
    assert_eq!(waited, Waited::Unpinned);
    assert_eq!(shared.pins.first_in(pages), None);
}
