// SPDX-License-Identifier: GPL-2.0-or-later

//! Claims: the exclusive right to convert ranges of pages.
//!
//! A claim on several ranges is granted as a whole or not at all, so two claims can never wait for
//! each other. Disjoint claims do not meet. Overlapping ones are granted in the order in which they
//! came, so a claim on much memory is not overtaken for ever by claims on parts of it.

use crate::exclusion::sync::thread::{self, ThreadId};
use crate::exclusion::sync::{ASK_INTERVAL, Condvar, Mutex};
use crate::pages::ranges::BackendId;
use crate::pages::ranges::FilePages;

/// The wait for a claim was interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interrupted;

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
    /// Is anything in the way of a claim, held or waited for before it?
    fn blocks(&self, claim: u64, wanted: &[(BackendId, FilePages)]) -> bool {
        let earlier = self.waiting.iter().take_while(|w| w.claim != claim);
        let queued = earlier.flat_map(|w| &w.wanted);
        wanted.iter().any(|&(backend, pages)| {
            let overlaps = |(b, p): &(BackendId, FilePages)| *b == backend && p.overlaps(pages);
            self.overlaps(backend, pages, |_| true) || queued.clone().any(overlaps)
        })
    }

    fn hold(&mut self, claim: u64, wanted: &[(BackendId, FilePages)]) {
        let thread = thread::current().id();
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
    /// Waits until no claim overlaps `wanted`, then claims all of it.
    ///
    /// The ranges of one request may overlap each other. `interrupted` is asked while waiting; it
    /// must not call back.
    pub fn claim(
        &self,
        wanted: &[(BackendId, FilePages)],
        interrupted: impl Fn() -> bool,
    ) -> Result<Claim<'_>, Interrupted> {
        let mut held = self.held.lock();
        let claim = held.next_id;
        held.next_id += 1;
        if held.blocks(claim, wanted) {
            let waiting = Waiting {
                claim,
                wanted: wanted.to_vec(),
            };
            held.waiting.push(waiting);
            let mut give_up = false;
            while !give_up && held.blocks(claim, wanted) {
                self.released.wait_for(&mut held, ASK_INTERVAL);
                give_up = interrupted();
            }
            held.waiting.retain(|waiting| waiting.claim != claim);
            if give_up {
                // Others may have queued behind it.
                self.released.notify_all();
                return Err(Interrupted);
            }
        }
        held.hold(claim, wanted);
        Ok(self.granted(claim))
    }

    /// The same for those who would rather do without than wait.
    pub fn try_claim(&self, wanted: &[(BackendId, FilePages)]) -> Option<Claim<'_>> {
        let mut held = self.held.lock();
        let claim = held.next_id;
        if held.blocks(claim, wanted) {
            return None;
        }
        held.next_id += 1;
        held.hold(claim, wanted);
        Some(self.granted(claim))
    }

    fn granted(&self, id: u64) -> Claim<'_> {
        Claim { claims: self, id }
    }

    /// The same for those who cannot give up.
    pub fn claim_for_sure(&self, wanted: &[(BackendId, FilePages)]) -> Claim<'_> {
        loop {
            if let Ok(claim) = self.claim(wanted, || false) {
                return claim;
            }
        }
    }

    /// Does a claim of this thread overlap the range?
    pub fn is_mine(&self, backend: BackendId, pages: FilePages) -> bool {
        let me = thread::current().id();
        self.held.lock().overlaps(backend, pages, |t| t == me)
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
#[cfg(not(feature = "shuttle"))]
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
        assert!(matches!(claims.claim(&wanted, || true), Err(Interrupted)));
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
            assert!(matches!(result, Err(Interrupted)));
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
            let overtaking = claims.claim(&[(RAM, pages(9, 10))], || true);
            assert!(matches!(overtaking, Err(Interrupted)));
            drop(claims.claim(&[(RAM, pages(100, 101))], || true).unwrap());
            drop(small);
            drop(wide.join().unwrap());
        });
        assert!(claims.held.lock().waiting.is_empty());
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
#[cfg(feature = "shuttle")]
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
