// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guest memory as vm-memory's [`GuestMemory`]: devices that know nothing of private pages run on
//! it.
//!
//! A slice that is held is pinned: none of its pages becomes private before the last clone and the
//! last part of it is gone. An access is granted as a whole or not at all, before anything is
//! touched; pages that are private, and addresses where no backend is, are errors.
//!
//! Slices are pointers into a mapping of the shared file, which is made once. To get one, and
//! [`GuestMemory::check_range`], allocates no guest memory. To touch a page does, if nobody has
//! before: the kernel makes a hole of a mapped file a page even where it is only read.
//! [`Vm::read`], which reads the file, does not. Where the kernel has no memory for a page, a touch
//! ends in SIGBUS.

use std::fmt;
use std::io;
use std::iter::FusedIterator;
use std::marker::PhantomData;
use std::sync::Arc;

use smallvec::IntoIter;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap, GuestMemoryResult, MmapRegion,
    Permissions, VolatileMemory, VolatileSlice,
};

use crate::error::Error;
use crate::vm::Vm;
use crate::vm::access::{Piece, Pin};

/// The pin of a slice, shared by its clones and parts; the pages are unpinned with the last.
/// vm-memory calls what a slice carries its bitmap, which this is not: it tracks no writes.
#[derive(Clone)]
pub struct SlicePin(Arc<Held>);

/// What a slice needs.
struct Held {
    pin: Pin,
    /// The bytes are there as long as this is, whatever becomes of the backend's file.
    _mapping: Arc<MmapRegion>,
}

impl SlicePin {
    /// What is pinned: all pages of the slice that [`GuestMemory::get_slices`] has given.
    pub fn pin(&self) -> &Pin {
        &self.0.pin
    }
}

impl fmt::Debug for SlicePin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = &self.pin().backend().config().name;
        write!(f, "SlicePin({} of '{name}')", self.pin().pages())
    }
}

impl WithBitmapSlice<'_> for SlicePin {
    type S = Self;
}

impl BitmapSlice for SlicePin {}

impl Bitmap for SlicePin {
    fn mark_dirty(&self, _: usize, _: usize) {}

    fn dirty_at(&self, _: usize) -> bool {
        false
    }

    fn slice_at(&self, _: usize) -> Self {
        self.clone()
    }
}

impl GuestMemory for Vm {
    /// There is none: what is behind an address changes with every conversion.
    type PhysicalMemory = GuestMemoryMmap<()>;
    type Bitmap = SlicePin;

    /// May the host use all of these bytes now? Only a slice keeps that so. Waits for steps of
    /// conversions of these pages that other threads are in.
    fn check_range(&self, address: GuestAddress, count: usize, _: Permissions) -> bool {
        self.access(address.0, count).is_ok()
    }

    /// A slice for each window that shows some of these bytes. All are pinned before this returns.
    /// What is wanted of them makes no difference: what is shared can be read and written.
    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        _: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, SlicePin>> {
        let pieces = self.access(address.0, count).map_err(vm_memory_error)?;
        Ok(Slices {
            pieces: pieces.into_iter(),
            vm: PhantomData,
        })
    }
}

/// The slices of an access.
struct Slices<'a> {
    pieces: IntoIter<[Piece; 1]>,
    vm: PhantomData<&'a Vm>,
}

impl<'a> Iterator for Slices<'a> {
    type Item = GuestMemoryResult<VolatileSlice<'a, SlicePin>>;

    fn next(&mut self) -> Option<Self::Item> {
        let slice = slice(self.pieces.next()?);
        if slice.is_err() {
            // Nothing follows an error.
            self.pieces.by_ref().for_each(drop);
        }
        Some(slice)
    }
}

impl FusedIterator for Slices<'_> {}

impl<'a> GuestMemorySliceIterator<'a, SlicePin> for Slices<'a> {}

#[allow(unsafe_code)] // a slice of a mapping, with a pin of its own
fn slice<'a>(piece: Piece) -> GuestMemoryResult<VolatileSlice<'a, SlicePin>> {
    let Piece { pin, offset, bytes } = piece;
    let mapping = pin.backend().host_mapping();
    let mapping = mapping.map_err(GuestMemoryError::IOError)?;
    let offset = usize::try_from(offset).map_err(|_| GuestMemoryError::InvalidBackendAddress)?;
    let first = mapping.get_slice(offset, bytes.len())?.ptr_guard_mut();
    let first = first.as_ptr();
    let held = SlicePin(Arc::new(Held {
        pin,
        _mapping: mapping,
    }));
    // SAFETY: these bytes lie in the mapping, which is there as long as anybody holds it, and
    // vm-memory clones what holds it into all that it makes of a slice. Guest and devices use the
    // bytes as well, and the library gives no reference to them.
    Ok(unsafe { VolatileSlice::with_bitmap(first, bytes.len(), held, None) })
}

/// The error of an access in vm-memory's words. What they have no word for keeps its own: the
/// source of an I/O error.
fn vm_memory_error(error: Error) -> GuestMemoryError {
    match error {
        Error::NoBackend { gpa } => GuestMemoryError::InvalidGuestAddress(GuestAddress(gpa)),
        Error::Range(_) => GuestMemoryError::GuestAddressOverflow,
        error => {
            let kind = io::Error::from_raw_os_error(error.errno()).kind();
            GuestMemoryError::IOError(io::Error::new(kind, error))
        }
    }
}
