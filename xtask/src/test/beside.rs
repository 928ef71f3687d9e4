// SPDX-License-Identifier: GPL-2.0-or-later
//! Several at once.

use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Calls `act` for each item, for at most `jobs` at once, beginning with the first. The results come
/// in the order of the items.
pub(super) fn map<T: Sync, R: Send>(
    items: &[T],
    jobs: usize,
    act: impl Fn(&T) -> R + Sync,
) -> Vec<R> {
    let rest = Mutex::new(items.iter().enumerate());
    let take = || rest.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || -> Vec<(usize, R)> {
        std::iter::from_fn(|| take().map(|(place, item)| (place, act(item)))).collect()
    };
    let mut results: Vec<(usize, R)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.min(items.len()))
            .map(|_| scope.spawn(work))
            .collect();
        let results = workers.into_iter().map(|worker| worker.join());
        results
            .flat_map(|result| result.unwrap_or_else(|panic| resume_unwind(panic)))
            .collect()
    });
    results.sort_by_key(|(place, _)| *place);
    results.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn results_have_the_order_of_items_and_no_more_run_than_may() {
        let (running, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let results = map(&[3u64, 1, 2, 1, 3, 1], 2, |item| {
            let now = running.fetch_add(1, Ordering::SeqCst) + 1;
            most.fetch_max(now, Ordering::SeqCst);
            thread::sleep(std::time::Duration::from_millis(*item));
            running.fetch_sub(1, Ordering::SeqCst);
            item * 10
        });
        assert_eq!(results, [30, 10, 20, 10, 30, 10]);
        assert!(most.load(Ordering::SeqCst) <= 2);
    }

    #[test]
    fn as_many_run_at_once_as_may() {
        let all_here = Barrier::new(3);
        let results = map(&[1, 2, 3], 3, |item| {
            all_here.wait();
            *item
        });
        assert_eq!(results, [1, 2, 3]);
    }

    #[test]
    #[should_panic(expected = "the second fails")]
    fn a_panic_is_not_lost() {
        map(&[1, 2, 3], 2, |item| {
            assert!(*item != 2, "the second fails")
        });
    }
}
