// SPDX-License-Identifier: MIT OR Apache-2.0

//! The locks that claims and pins are made of: parking_lot's, or ones whose schedules a test
//! explores. With the feature `shuttle` those are many by chance, with `loom` all there are.

use std::time::Duration;

/// How often a waiting thread asks whether it is to give up.
pub(crate) const ASK_INTERVAL: Duration = Duration::from_millis(10);

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
pub(crate) use parking_lot::{Condvar, Mutex};
#[cfg(not(any(feature = "loom", feature = "shuttle")))]
pub(crate) use std::thread;

#[cfg(feature = "loom")]
use loom as explorer;
#[cfg(all(feature = "shuttle", not(feature = "loom")))]
use shuttle as explorer;

#[cfg(any(feature = "loom", feature = "shuttle"))]
pub(crate) use {explored::Condvar, explored::Mutex, explorer::thread};

/// Their locks with parking_lot's interface.
#[cfg(any(feature = "loom", feature = "shuttle"))]
mod explored {
    use std::ops::{Deref, DerefMut};
    use std::time::Duration;

    use super::explorer::sync;

    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(sync::Mutex<T>);

    /// Empty only while a condition is waited for.
    pub(crate) struct Guard<'a, T>(Option<sync::MutexGuard<'a, T>>);

    #[derive(Debug, Default)]
    pub(crate) struct Condvar(sync::Condvar);

    const HELD: &str = "the lock is held while its guard can be used";

    impl<T> Mutex<T> {
        pub(crate) fn lock(&self) -> Guard<'_, T> {
            Guard(self.0.lock().ok())
        }
    }

    impl<T> Deref for Guard<'_, T> {
        type Target = T;
        fn deref(&self) -> &T {
            self.0.as_ref().expect(HELD)
        }
    }

    impl<T> DerefMut for Guard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.0.as_mut().expect(HELD)
        }
    }

    impl Condvar {
        pub(crate) fn wait<T>(&self, guard: &mut Guard<'_, T>) {
            guard.0 = guard.0.take().and_then(|held| self.0.wait(held).ok());
        }

        /// Never times out, so that a wake-up that is missing shows as a deadlock.
        pub(crate) fn wait_for<T>(&self, guard: &mut Guard<'_, T>, _: Duration) {
            self.wait(guard);
        }

        pub(crate) fn notify_all(&self) {
            self.0.notify_all();
        }
    }
}
