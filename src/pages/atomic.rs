// SPDX-License-Identifier: MIT OR Apache-2.0

//! The counters that pins and closed pages are made of: std's, or, with the feature `loom`, ones
//! whose every order that the memory model allows a test explores.

pub(crate) use std::sync::atomic::Ordering;

#[cfg(not(feature = "loom"))]
pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64};

#[cfg(feature = "loom")]
pub(crate) use explored::{AtomicU32, AtomicU64};

/// Loom takes `SeqCst` accesses for acquiring and releasing ones, but knows what a `SeqCst` fence
/// is. One before a load keeps it behind all that its thread has done before, which is what a
/// `SeqCst` load adds; a change reads the newest value anyway.
#[cfg(feature = "loom")]
mod explored {
    use loom::sync::atomic::{self, Ordering, fence};

    macro_rules! counter {
        ($name:ident, $value:ty) => {
            #[derive(Debug, Default)]
            pub(crate) struct $name(atomic::$name);

            impl $name {
                pub(crate) fn new(value: $value) -> Self {
                    Self(atomic::$name::new(value))
                }

                pub(crate) fn load(&self, with: Ordering) -> $value {
                    if with == Ordering::SeqCst {
                        fence(with);
                    }
                    self.0.load(with)
                }

                #[allow(dead_code)] // of one of the two
                pub(crate) fn store(&self, value: $value, with: Ordering) {
                    self.0.store(value, with);
                }

                pub(crate) fn fetch_add(&self, value: $value, with: Ordering) -> $value {
                    self.0.fetch_add(value, with)
                }

                pub(crate) fn fetch_sub(&self, value: $value, with: Ordering) -> $value {
                    self.0.fetch_sub(value, with)
                }

                pub(crate) fn fetch_update(
                    &self,
                    set: Ordering,
                    fetch: Ordering,
                    change: impl FnMut($value) -> Option<$value>,
                ) -> Result<$value, $value> {
                    self.0.fetch_update(set, fetch, change)
                }
            }
        };
    }

    counter!(AtomicU32, u32);
    counter!(AtomicU64, u64);
}
