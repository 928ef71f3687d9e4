// SPDX-License-Identifier: MIT OR Apache-2.0

//! Arrays of zeroes that cost memory only where they are written.
#![allow(unsafe_code)] // mmap(), mincore()

use std::ffi::c_void;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

use bytemuck::Zeroable;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::pages::ranges::PAGE_SIZE;

/// A mapping of its own. An allocator that has grown used to large blocks takes them from its heap,
/// and clears there what it has had before: 64 GiB of guest memory then cost megabytes from the
/// start.
pub(crate) struct Zeroed<T> {
    first: NonNull<T>,
    count: usize,
    owns: PhantomData<T>,
}

// SAFETY: it owns its values and nothing else, as a `Vec` does.
unsafe impl<T: Send> Send for Zeroed<T> {}
// SAFETY: a shared reference gives shared references to values, and nothing else.
unsafe impl<T: Sync> Sync for Zeroed<T> {}

impl<T: Zeroable> Zeroed<T> {
    /// So many zeroes. `None` where there is no memory, or no address space.
    pub(crate) fn new(count: u64) -> Option<Self> {
        const { assert!(align_of::<T>() <= 4096 && !std::mem::needs_drop::<T>()) };
        let count = usize::try_from(count).ok()?;
        let bytes = count.checked_mul(size_of::<T>())?;
        let first = match bytes {
            0 => NonNull::dangling(),
            _ => map(bytes)?.cast(),
        };
        Some(Self {
            first,
            count,
            owns: PhantomData,
        })
    }
}

fn map(bytes: usize) -> Option<NonNull<c_void>> {
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // Four bytes a page are a gigabyte for a large guest, of which little is ever written: it is
    // not to count against what the system may promise.
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: the kernel chooses the place, so that nothing is replaced.
    let mapped = unsafe { mmap_anonymous(ptr::null_mut(), bytes, access, flags) };
    let mapped = NonNull::new(mapped.ok()?)?;
    // A single pin would take 2 MiB, and a core dump of the host's has no use for counters. A
    // kernel that knows neither does without.
    for advice in [Advice::LinuxNoHugepage, Advice::LinuxDontDump] {
        // SAFETY: the mapping is ours, and these change nothing that can be read from it.
        let _ = unsafe { madvise(mapped.as_ptr(), bytes, advice) };
    }
    Some(mapped)
}

impl<T> Deref for Zeroed<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: where there are values, they have a mapping with room for them, aligned to a
        // page, that lives as long as `self`. What nobody has written reads as zeroes, which are a
        // value of T.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }
}

impl<T> DerefMut for Zeroed<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and nobody else has a reference while `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.count) }
    }
}

impl<T> Drop for Zeroed<T> {
    fn drop(&mut self) {
        let bytes = self.count * size_of::<T>();
        if bytes == 0 {
            return;
        }
        // SAFETY: this is the whole mapping, and no reference into it can outlive `self`.
        let unmapped = unsafe { munmap(self.first.as_ptr().cast(), bytes) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

impl<T> fmt::Debug for Zeroed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} values]", self.count)
    }
}

/// Which pages of a range of addresses are in memory. An error where nothing is mapped.
pub(crate) fn pages_in_memory(start: *mut u8, size: usize) -> io::Result<Vec<bool>> {
    let mut present = vec![0_u8; size.div_ceil(PAGE_SIZE as usize)];
    // SAFETY: the vector has a byte for each page, which is what the call writes; the range is only
    // looked up, and may be any.
    let status = unsafe { libc::mincore(start.cast(), size, present.as_mut_ptr()) };
    match status {
        0 => Ok(present.iter().map(|page| page & 1 != 0).collect()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_values_are_zero_and_can_be_written() {
        let mut values = Zeroed::<u32>::new(5000).unwrap();
        assert_eq!(*values, [0; 5000]);
        values.fill(7);
        assert_eq!(*values, [7; 5000]);
        assert!(Zeroed::<u32>::new(0).unwrap().is_empty());
    }

    #[test]
    fn what_no_address_space_has_room_for_is_an_error() {
        for count in [1 << 50, u64::MAX / 8, u64::MAX] {
            assert!(Zeroed::<u64>::new(count).is_none(), "{count}");
        }
    }

    /// In use, in KiB. Neighbours count apart, with which the kernel may have joined the mapping.
    fn resident(values: &Zeroed<u64>) -> usize {
        let pages = pages_in_memory(values.first.as_ptr().cast(), size_of_val(&**values)).unwrap();
        4 * pages.iter().filter(|present| **present).count()
    }

    #[test]
    fn untouched_values_take_no_memory() {
        let mut values = Zeroed::<u64>::new(1 << 20).unwrap();
        assert_eq!(resident(&values), 0);
        values[1 << 19] = 1;
        assert!(resident(&values) < 8 << 10);
    }
}
