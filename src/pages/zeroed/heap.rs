// SPDX-License-Identifier: MIT OR Apache-2.0

//! A vector in place of a mapping, for small arrays.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// Zeroes on the heap.
pub(crate) struct Zeroed<T>(Vec<T>);

impl<T: Default> Zeroed<T> {
    /// So many zeroes, which is the default of all that there are arrays of. `None` where there is
    /// no memory, or no address space.
    pub(crate) fn new(count: u64) -> Option<Self> {
        let count = usize::try_from(count).ok()?;
        let mut values = Vec::new();
        values.try_reserve_exact(count).ok()?;
        values.resize_with(count, T::default);
        Some(Self(values))
    }
}

impl<T> Deref for Zeroed<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T> DerefMut for Zeroed<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

impl<T> fmt::Debug for Zeroed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} values]", self.0.len())
    }
}
