// SPDX-License-Identifier: MIT OR Apache-2.0

//! Claims: the exclusive right to convert ranges of pages.
//!
//! A claim on several ranges is granted as a whole or not at all, so two claims can never wait for
//! each other. Disjoint claims do not meet. Overlapping ones are granted in the order in which they
//! came, so a claim on much memory is not overtaken for ever by claims on parts of it. A thread
//! that holds a claim already does not queue behind others: they may be waiting for it.
//!
//! Two threads that each hold a claim and want the other's pages wait for ever. The library never
//! does that; a listener could, by asking in a callback about pages other than its own.

use crate::exclusion::sync::thread::{self, ThreadId};
use crate::exclusion::sync::{ASK_INTERVAL, Condvar, Mutex};
use crate::pages::ranges::BackendId;
use crate::pages::ranges::FilePages;

/// The claims of a VM.
#[derive(Debug, Default)]
pub struct Claims {
    held: Mutex<Held>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct Held {
    next_id: u64,
    ranges: Vec<HeldRange>,
    /// In the order in which they came.
    waiting: Vec<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    claim: u64,
    wanted: Vec<(BackendId, FilePages)>,
}

#[derive(Debug)]
struct HeldRange {
    claim: u64,
    thread: ThreadId,
    backend: BackendId,
    pages: FilePages,
}

impl Held {
    /// Is anything in the way of a claim of a thread's, held or waited for before it?
    fn blocks(&self, me: ThreadId, claim: u64, wanted: &[(BackendId, FilePages)]) -> bool {
        let holds = self.ranges.iter().any(|held| held.thread == me);
        let earlier = self
            .waiting
            .iter()
            .take_while(|w| !holds && w.claim != claim);
        let queued = earlier.flat_map(|w| &w.wanted);
        wanted.iter().any(|&(backend, pages)| {
            let overlaps = |(b, p): &(BackendId, FilePages)| *b == backend && p.overlaps(pages);
            self.overlaps(backend, pages, |_| true) || queued.clone().any(overlaps)
        })
    }

    fn hold(&mut self, thread: ThreadId, claim: u64, wanted: &[(BackendId, FilePages)]) {
        let ranges = wanted.iter().map(|&(backend, pages)| HeldRange {
            claim,
            thread,
            backend,
            pages,
        });
        self.ranges.extend(ranges);
    }

    /// Does a claim of such a thread overlap the range?
    fn overlaps(
        &self,
        backend: BackendId,
        pages: FilePages,
        of: impl Fn(ThreadId) -> bool,
    ) -> bool {
        self.ranges
            .iter()
            .any(|held| held.backend == backend && held.pages.overlaps(pages) && of(held.thread))
    }
}

impl Claims {
    /// Waits until no claim overlaps `wanted`, then claims all of it. `None` if `interrupted` says
    /// so while this thread waits. It is asked every 10 ms, with no lock held.
    ///
    /// The ranges of one request may overlap each other.
    pub fn claim(
        &self,
        wanted: &[(BackendId, FilePages)],
        interrupted: impl Fn() -> bool,
    ) -> Option<Claim<'_>> {
        let me = thread::current().id();
        let mut held = self.held.lock();
        let claim = held.next_id;
        held.next_id += 1;
        if held.blocks(me, claim, wanted) {
            held.waiting.push(Waiting {
                claim,
                wanted: wanted.to_vec(),
            });
            // However this ends, a panic in `interrupted` included.
            let place = Place {
                claims: self,
                claim,
            };
            while held.blocks(me, claim, wanted) {
                self.released.wait_for(&mut held, ASK_INTERVAL);
                drop(held);
                if interrupted() {
                    return None;
                }
                held = self.held.lock();
            }
            held.hold(me, claim, wanted);
            drop(held);
            drop(place);
        } else {
            held.hold(me, claim, wanted);
        }
        Some(self.granted(claim))
    }

    /// The same for those who would rather do without than wait.
    pub fn try_claim(&self, wanted: &[(BackendId, FilePages)]) -> Option<Claim<'_>> {
        let me = thread::current().id();
        let mut held = self.held.lock();
        let claim = held.next_id;
        if held.blocks(me, claim, wanted) {
            return None;
        }
        held.next_id += 1;
        held.hold(me, claim, wanted);
        Some(self.granted(claim))
    }

    /// The same for those who cannot give up.
    pub fn claim_for_sure(&self, wanted: &[(BackendId, FilePages)]) -> Claim<'_> {
        loop {
            if let Some(claim) = self.claim(wanted, || false) {
                return claim;
            }
        }
    }

    fn granted(&self, id: u64) -> Claim<'_> {
        Claim { claims: self, id }
    }

    /// Does a claim of this thread overlap the range?
    pub fn is_mine(&self, backend: BackendId, pages: FilePages) -> bool {
        let me = thread::current().id();
        self.held.lock().overlaps(backend, pages, |t| t == me)
    }
}

/// A place in the queue; dropping it leaves the queue.
struct Place<'a> {
    claims: &'a Claims,
    claim: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut held = self.claims.held.lock();
        held.waiting.retain(|waiting| waiting.claim != self.claim);
        // Others may have queued behind it.
        self.claims.released.notify_all();
    }
}

/// Claimed ranges; dropping it releases them.
#[derive(Debug)]
pub struct Claim<'a> {
    claims: &'a Claims,
    id: u64,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut held = self.claims.held.lock();
        held.ranges.retain(|range| range.claim != self.id);
        self.claims.released.notify_all();
    }
}

#[cfg(test)]
#[cfg(not(any(feature = "loom", feature = "shuttle")))]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::Duration;

    const RAM: BackendId = BackendId(0);

    fn pages(start: u64, end: u64) -> FilePages {
        FilePages::new(start, end).unwrap()
    }

    #[test]
    fn disjoint_claims_do_not_wait() {
        let claims = Claims::default();
        let _a = claims.claim(&[(RAM, pages(0, 4))], || true).unwrap();
        let _b = claims.claim(&[(RAM, pages(4, 8))], || true).unwrap();
        let _c = claims
            .claim(&[(BackendId(1), pages(0, 4))], || true)
            .unwrap();
    }

    #[test]
    fn a_waiting_thread_can_be_interrupted_and_leaves_nothing_behind() {
        let claims = Claims::default();
        let held = claims.claim(&[(RAM, pages(2, 3))], || true).unwrap();
        let wanted = [(RAM, pages(8, 9)), (RAM, pages(0, 4))];
        assert!(claims.claim(&wanted, || true).is_none());
        drop(held);
        claims.claim(&[(RAM, pages(8, 9))], || true).unwrap();
    }

    #[test]
    fn an_interruption_is_seen_however_busy_others_are() {
        let claims = Claims::default();
        let done = AtomicBool::new(false);
        let _held = claims.claim(&[(RAM, pages(0, 1))], || false).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    drop(claims.claim(&[(RAM, pages(50, 51))], || false));
                }
            });
            let start = std::time::Instant::now();
            let result = claims.claim(&[(RAM, pages(0, 1))], || true);
            done.store(true, Ordering::SeqCst);
            assert!(result.is_none());
            assert!(start.elapsed() < Duration::from_secs(1));
        });
    }

    #[test]
    fn a_later_claim_does_not_overtake_an_earlier_one_that_it_overlaps() {
        let claims = Claims::default();
        let small = claims.claim(&[(RAM, pages(0, 1))], || false).unwrap();
        thread::scope(|scope| {
            let wide = scope.spawn(|| claims.claim(&[(RAM, pages(0, 100))], || false).unwrap());
            while claims.held.lock().waiting.is_empty() {
                thread::yield_now();
            }
            let later = scope.spawn(|| {
                assert!(claims.claim(&[(RAM, pages(9, 10))], || true).is_none());
                drop(claims.claim(&[(RAM, pages(100, 101))], || true).unwrap());
            });
            later.join().unwrap();
            // The first one's holder does not wait for those that wait for it.
            drop(claims.claim(&[(RAM, pages(9, 10))], || true).unwrap());
            drop(small);
            drop(wide.join().unwrap());
        });
        assert!(claims.held.lock().waiting.is_empty());
    }

    #[test]
    fn a_panic_of_who_is_asked_leaves_nobody_in_the_queue() {
        let claims = Claims::default();
        let held = claims.claim(&[(RAM, pages(0, 1))], || false).unwrap();
        thread::scope(|scope| {
            let waiter = || claims.claim(&[(RAM, pages(0, 2))], || panic!("a bug of the user's"));
            scope.spawn(waiter).join().unwrap_err();
        });
        drop(held);
        assert!(claims.try_claim(&[(RAM, pages(0, 2))]).is_some());
    }

    #[test]
    fn what_others_hold_is_waited_for_or_done_without() {
        let claims = Claims::default();
        let wanted = [(RAM, pages(0, 1))];
        let held = claims.claim(&[(RAM, pages(0, 4))], || true).unwrap();
        assert!(claims.is_mine(RAM, pages(0, 1)));
        let granted = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                assert!(!claims.is_mine(RAM, pages(0, 1)));
                assert!(claims.try_claim(&wanted).is_none());
                drop(claims.claim_for_sure(&wanted));
                granted.store(true, Ordering::SeqCst);
            });
            thread::sleep(Duration::from_millis(30));
            assert!(!granted.load(Ordering::SeqCst));
            drop(held);
        });
        assert!(granted.load(Ordering::SeqCst));
        assert!(claims.try_claim(&wanted).is_some());
    }

    #[test]
    fn overlapping_claims_exclude_each_other() {
        let claims = Claims::default();
        let inside: [AtomicU64; 8] = Default::default();
        thread::scope(|scope| {
            for t in 0..4u64 {
                let (claims, inside) = (&claims, &inside);
                scope.spawn(move || {
                    for i in 0..500 {
                        let start = (i * 3 + t) % 6;
                        let wanted = [(RAM, pages(start, start + 2))];
                        let _claim = claims.claim(&wanted, || false).unwrap();
                        for page in start..start + 2 {
                            assert_eq!(inside[page as usize].fetch_add(1, Ordering::SeqCst), 0);
                        }
                        for page in start..start + 2 {
                            inside[page as usize].fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
    }
}

/// The same protocol under many schedules, in which no wait ever times out: a wake-up that is
/// missing is a deadlock. `cargo test --lib --features shuttle claim`
#[cfg(test)]
#[cfg(all(feature = "shuttle", not(feature = "loom")))]
mod schedules {
    use super::*;
    use shuttle::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    const RAM: BackendId = BackendId(0);
    const SCHEDULES: usize = 2000;

    fn pages(start: u64, end: u64) -> FilePages {
        FilePages::new(start, end).unwrap()
    }

    /// Both a random walk and one that is good at bugs of little depth.
    fn explore(test: impl Fn() + Send + Sync + Copy + 'static) {
        shuttle::check_random(test, SCHEDULES);
        shuttle::check_pct(test, SCHEDULES, 3);
    }

    #[test]
    fn overlapping_claims_exclude_each_other_and_all_are_granted() {
        explore(|| {
            let claims = Arc::new(Claims::default());
            let inside = Arc::new([const { AtomicU64::new(0) }; 6]);
            let threads: Vec<_> = [(0, 4), (2, 6), (1, 3), (3, 5)]
                .map(|(start, end)| {
                    let (claims, inside) = (claims.clone(), inside.clone());
                    thread::spawn(move || {
                        let wanted = [(RAM, pages(start, end)), (RAM, pages(0, 1))];
                        let claim = claims.claim(&wanted, || false).unwrap();
                        for page in start..end {
                            assert_eq!(inside[page as usize].fetch_add(1, Ordering::SeqCst), 0);
                        }
                        thread::yield_now();
                        for page in start..end {
                            inside[page as usize].fetch_sub(1, Ordering::SeqCst);
                        }
                        drop(claim);
                    })
                })
                .into();
            for thread in threads {
                thread.join().unwrap();
            }
        });
    }

    #[test]
    fn one_that_gives_up_does_not_hold_up_those_behind_it() {
        explore(|| {
            let claims = Arc::new(Claims::default());
            let held = claims.claim(&[(RAM, pages(0, 2))], || false).unwrap();
            let gives_up = {
                let claims = claims.clone();
                thread::spawn(move || drop(claims.claim(&[(RAM, pages(0, 4))], || true)))
            };
            let behind = {
                let claims = claims.clone();
                thread::spawn(move || {
                    drop(claims.claim(&[(RAM, pages(3, 4))], || false).unwrap());
                    drop(claims.claim_for_sure(&[(RAM, pages(0, 4))]));
                })
            };
            drop(held);
            gives_up.join().unwrap();
            behind.join().unwrap();
            assert!(claims.try_claim(&[(RAM, pages(0, 8))]).is_some());
        });
    }
}
