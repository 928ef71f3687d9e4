// SPDX-License-Identifier: MIT OR Apache-2.0

//! A mapping of its own for each array.
#![allow(unsafe_code)] // mmap()

use std::ffi::c_void;
use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

use bytemuck::Zeroable;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::pages::zeroed::pages_in_memory;

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
        assert_eq!(resident(&values), 4);
    }

    /// Whatever the machine's policy: no huge page for a single value, no promise of memory for all
    /// of them, no place in a dump.
    #[test]
    fn the_kernel_is_told_what_values_are_not_worth() {
        let values = Zeroed::<u64>::new(1 << 20).unwrap();
        let first = values.first.as_ptr() as usize;
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let has_first = |line: &&str| {
            let range = line
                .split(' ')
                .next()
                .and_then(|range| range.split_once('-'));
            let number = |text| usize::from_str_radix(text, 16).ok();
            range.is_some_and(|(start, end)| match (number(start), number(end)) {
                (Some(start), Some(end)) => (start..end).contains(&first),
                _ => false,
            })
        };
        let mut lines = maps.lines().skip_while(|line| !has_first(line));
        let flags = lines.find_map(|line| line.strip_prefix("VmFlags:"));
        let flags: Vec<_> = flags.unwrap().split_whitespace().collect();
        let has_huge_pages = Path::new("/sys/kernel/mm/transparent_hugepage").exists();
        assert!(!has_huge_pages || flags.contains(&"nh"), "{flags:?}");
        assert!(flags.contains(&"nr") && flags.contains(&"dd"), "{flags:?}");
    }
}
