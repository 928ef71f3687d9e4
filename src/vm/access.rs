// SPDX-License-Identifier: MIT OR Apache-2.0

//! The host's use of guest memory: pins, and accesses by guest physical address. They see what the
//! guest has shared, and nothing else.

use std::ops::Range;
use std::sync::Arc;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::pages::ranges::{FilePages, GuestPages, PAGE_SIZE, RangeError, SmallList};
use crate::pages::states::PageState;
use crate::vm::Vm;
use crate::windows::{Part, Window};

/// Shared pages that the host has pinned; none of them becomes private before this is dropped.
#[derive(Debug)]
pub struct Pin {
    backend: Arc<Backend>,
    pages: FilePages,
}

impl Pin {
    /// Whose pages.
    pub fn backend(&self) -> &Arc<Backend> {
        &self.backend
    }

    /// Which.
    pub fn pages(&self) -> FilePages {
        self.pages
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // They are pinned: nothing else takes this pin back.
        let unpinned = self.backend.unpin(self.pages);
        debug_assert!(unpinned.is_ok(), "{unpinned:?}");
    }
}

/// What one window has of an access.
pub(super) struct Piece {
    pub(super) pin: Pin,
    /// Of the first byte, in the backend's files.
    pub(super) offset: u64,
    /// Which bytes of the caller's.
    pub(super) bytes: Range<usize>,
}

impl Vm {
    /// Lets the host use pages of the shared view until they are [unpinned](Backend::unpin): none
    /// of them becomes private meanwhile. Waits for steps of conversions of these pages that other
    /// threads are in, but for nothing else.
    ///
    /// # Errors
    /// [`Error::NotShared`] if a page is private, [`Error::OtherVm`].
    ///
    /// # Panics
    /// If the range does not lie inside the backend.
    #[inline]
    pub fn pin(&self, backend: &Backend, pages: FilePages) -> Result<()> {
        backend.check_vm(self.id())?;
        if backend.add_pin(pages) {
            return Ok(());
        }
        self.pin_near_private(backend, pages)
    }

    /// The pin has been added, and there are closed pages near it.
    #[inline(never)]
    fn pin_near_private(&self, backend: &Backend, pages: FilePages) -> Result<()> {
        let Err(state) = backend.check_pin(pages) else {
            return Ok(());
        };
        // What this thread has in transition stays so: it is the listener that asks.
        if state == PageState::Transition && !self.claims.is_mine(backend.id(), pages) {
            // In its turn, or conversions that follow each other could keep it waiting for ever.
            let _claim = self.claims.claim_for_sure(&[(backend.id(), pages)]);
            if backend.add_pin(pages) || backend.check_pin(pages).is_ok() {
                return Ok(());
            }
        }
        Err(Error::NotShared {
            backend: backend.config().name.clone(),
            pages,
        })
    }

    /// Pins pages as long as the [`Pin`] lives.
    ///
    /// # Errors
    /// As for [`Vm::pin`].
    ///
    /// # Panics
    /// If the range does not lie inside the backend.
    pub fn hold(&self, backend: &Arc<Backend>, pages: FilePages) -> Result<Pin> {
        self.pin(backend, pages)?;
        let backend = backend.clone();
        Ok(Pin { backend, pages })
    }

    /// May the host use all of these pages now? Waits for steps of conversions of these pages that
    /// other threads are in. No page of another VM's backend may be used.
    pub fn host_may_use(&self, backend: &Backend, pages: FilePages) -> bool {
        if backend.check_vm(self.id()).is_err() {
            return false;
        }
        match backend.first_closed(pages) {
            None => true,
            // What is in transition may be this thread's own, whose listener asks.
            Some((moving, PageState::Transition)) if !self.claims.is_mine(backend.id(), moving) => {
                let _claim = self.claims.claim_for_sure(&[(backend.id(), pages)]);
                backend.first_closed(pages).is_none()
            }
            Some(_) => false,
        }
    }

    /// Reads guest memory from a guest physical address on, which needs no alignment, into all of
    /// `bytes`.
    ///
    /// The pages must be shared or undecided. They are read as the guest sees them through any
    /// window, bound or not; a page that nobody has written to reads zero and is not allocated.
    /// Conversions of these pages wait for the access, and the access for the steps that they are
    /// in. Accesses do not wait for each other: of bytes that another thread writes meanwhile, some
    /// may be old and some new, as with any memory.
    ///
    /// # Errors
    /// [`Error::PrivateMemory`] and [`Error::NoBackend`] name the first address that cannot be
    /// accessed, [`Error::Range`] is for addresses that wrap; `bytes` is then as it was. After
    /// [`Error::Transfer`], which is the kernel's refusal, some of it may have been read.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<()> {
        if let Some((pin, offset)) = self.access_one(gpa, bytes.len()) {
            return pin.backend.read_shared(offset, bytes);
        }
        for piece in self.access(gpa, bytes.len())? {
            let bytes = &mut bytes[piece.bytes.clone()];
            piece.pin.backend.read_shared(piece.offset, bytes)?;
        }
        Ok(())
    }

    /// Writes all of `bytes` to guest memory from a guest physical address on, which needs no
    /// alignment.
    ///
    /// The pages must be shared or undecided; undecided ones stay so. Conversions of these pages
    /// wait for the access, and the access for the steps that they are in. A hypervisor's log of
    /// dirty pages does not learn of it.
    ///
    /// # Errors
    /// As for [`Vm::read`]: nothing is written unless all of it can be. Only [`Error::Transfer`]
    /// may come after a part has been written.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<()> {
        if let Some((pin, offset)) = self.access_one(gpa, bytes.len()) {
            return pin.backend.write_shared(offset, bytes);
        }
        for piece in self.access(gpa, bytes.len())? {
            let bytes = &bytes[piece.bytes.clone()];
            piece.pin.backend.write_shared(piece.offset, bytes)?;
        }
        Ok(())
    }

    /// Pins the pages of an access, and says where in their file it begins: if one window shows all
    /// of it, as mostly, and nothing is to be waited for or refused.
    #[inline]
    fn access_one(&self, gpa: u64, length: usize) -> Option<(Pin, u64)> {
        let guest = GuestPages::covering_bytes(gpa, length as u64)?;
        // Until they are pinned: pins keep states, not windows.
        let places = self.places.read();
        let window = places.windows.showing(guest)?;
        let (backend, pages) = (places.backend(window.backend)?, window.file);
        let may_use = backend.add_pin(pages) || backend.check_pin(pages).is_ok();
        let offset = pages.start_bytes() + gpa % PAGE_SIZE;
        may_use.then(|| (Pin { backend, pages }, offset))
    }

    /// Checks an access and pins its pages.
    pub(super) fn access(&self, gpa: u64, length: usize) -> Result<SmallList<Piece>> {
        let size = length as u64;
        if size == 0 {
            return Ok(SmallList::new());
        }
        let wraps = RangeError::Wraps { start: gpa, size };
        let guest = GuestPages::covering_bytes(gpa, size).ok_or(wraps)?;
        loop {
            let (parts, layout) = self.parts(guest);
            if let Some(gap) = parts.iter().find_map(Part::gap) {
                return Err(Error::NoBackend {
                    gpa: gpa.max(gap.start_bytes()),
                });
            }
            let windows = parts.iter().filter_map(Part::window);
            let pieces = windows.map(|window| self.piece(window, gpa, length));
            let pieces = pieces.collect::<Result<_>>()?;
            // Pins keep states, not windows.
            if self.places.read().windows.layout() == layout {
                return Ok(pieces);
            }
        }
    }

    /// The bytes of an access in a window, if the host may use them.
    fn piece(&self, window: &Window, gpa: u64, length: usize) -> Result<Piece> {
        let start = window.guest.start_bytes();
        let Some(backend) = self.backend(window.backend) else {
            return Err(Error::NoBackend {
                gpa: gpa.max(start),
            });
        };
        let pin = match self.hold(&backend, window.file) {
            Err(Error::NotShared { .. }) => return Err(private_memory(&backend, window, gpa)),
            held => held?,
        };
        // Neither sum wraps: both ranges have been checked.
        let from = gpa.max(start);
        let to = (gpa + length as u64).min(start + window.guest.bytes());
        Ok(Piece {
            pin,
            offset: window.file.start_bytes() + (from - start),
            bytes: (from - gpa) as usize..(to - gpa) as usize,
        })
    }
}

/// Names the first address of an access that was private, or is by now.
fn private_memory(backend: &Backend, window: &Window, gpa: u64) -> Error {
    let closed = backend.first_closed(window.file).map(|(pages, _)| pages);
    let closed = closed.unwrap_or(window.file);
    let page = window.guest.start_bytes() + (closed.start() - window.file.start()) * PAGE_SIZE;
    Error::PrivateMemory {
        gpa: gpa.max(page),
        backend: backend.config().name.clone(),
    }
}
