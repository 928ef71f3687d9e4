// SPDX-License-Identifier: MIT OR Apache-2.0

//! Arrays of zeroes that cost memory only where they are written; on the heap where there is no
//! `mmap()`, as under Miri, and where a test has counters of its own in them.
#![allow(unsafe_code)] // mincore()

#[cfg(any(miri, feature = "loom"))]
mod heap;
#[cfg(not(any(miri, feature = "loom")))]
mod mapping;

use std::io;

use crate::pages::ranges::PAGE_SIZE;

#[cfg(any(miri, feature = "loom"))]
pub(crate) use heap::Zeroed;
#[cfg(not(any(miri, feature = "loom")))]
pub(crate) use mapping::Zeroed;

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
    #[cfg_attr(miri, ignore = "Miri ends where its own memory does")]
    fn what_no_address_space_has_room_for_is_an_error() {
        for count in [1 << 50, u64::MAX / 8, u64::MAX] {
            assert!(Zeroed::<u64>::new(count).is_none(), "{count}");
        }
    }
}
