// SPDX-License-Identifier: GPL-2.0-or-later

//! The host's accesses to guest memory, by guest physical address. They see what the guest has
//! shared, and nothing else.

use std::ops::Range;
use std::sync::Arc;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::exclusion::claims::Claim;
use crate::pages::ranges::{Few, GuestPages, PAGE_SIZE, RangeError};
use crate::vm::Vm;
use crate::windows::{Part, Window};

/// An access that has been checked. Its pages stay as they are while this lives.
struct Access<'a> {
    pieces: Few<Piece>,
    _claim: Claim<'a>,
}

/// What one window has of an access.
struct Piece {
    backend: Arc<Backend>,
    /// Of the first byte, in the backend's files.
    offset: u64,
    /// Which bytes of the caller's.
    bytes: Range<usize>,
}

impl Vm {
    /// Reads guest memory from a guest physical address on, which needs no alignment, into all of
    /// `bytes`.
    ///
    /// The pages must be shared or undecided. They are read as the guest sees them through any
    /// window, bound or not; a page that nobody has written to reads zero and is not allocated.
    /// Conversions of these pages wait for the access, and the access for them.
    ///
    /// # Errors
    /// [`Error::PrivateMemory`] and [`Error::NoBackend`] name the first address that cannot be
    /// accessed, [`Error::Range`] is for addresses that wrap, and [`Error::Interrupted`] comes if the
    /// listener says so while the access waits. `bytes` is then as it was. After
    /// [`Error::Transfer`], which is the kernel's refusal, some of it may have been read.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<()> {
        let access = self.access(gpa, bytes.len())?;
        access.iter().flat_map(|a| &a.pieces).try_for_each(|piece| {
            let bytes = &mut bytes[piece.bytes.clone()];
            piece.backend.read_shared(piece.offset, bytes)
        })
    }

    /// Writes all of `bytes` to guest memory from a guest physical address on, which needs no
    /// alignment.
    ///
    /// The pages must be shared or undecided; undecided ones stay so. Conversions of these pages
    /// wait for the access, and the access for them. A hypervisor's log of dirty pages does not
    /// learn of it.
    ///
    /// # Errors
    /// As for [`Vm::read`]: nothing is written unless all of it can be. Only [`Error::Transfer`] may
    /// come after a part has been written.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<()> {
        let access = self.access(gpa, bytes.len())?;
        access.iter().flat_map(|a| &a.pieces).try_for_each(|piece| {
            let bytes = &bytes[piece.bytes.clone()];
            piece.backend.write_shared(piece.offset, bytes)
        })
    }

    /// Claims the pages of an access and checks it. `None` for one of no bytes.
    fn access(&self, gpa: u64, length: usize) -> Result<Option<Access<'_>>> {
        let size = length as u64;
        if size == 0 {
            return Ok(None);
        }
        let wraps = RangeError::Wraps { start: gpa, size };
        let guest = GuestPages::covering_bytes(gpa, size).ok_or(wraps)?;
        let (windows, claim) = loop {
            let (parts, layout) = self.parts(guest);
            let windows = parts.iter().map(|part| window_of(part, gpa));
            let windows = windows.collect::<Result<Few<Window>>>()?;
            let wanted: Few<_> = windows.iter().map(|w| (w.backend, w.file)).collect();
            if let Some(claim) = self.claim_in(layout, guest, &wanted)? {
                break (windows, claim);
            }
        };
        let pieces = windows
            .iter()
            .map(|window| self.piece(window, gpa, length))
            .collect::<Result<_>>()?;
        Ok(Some(Access {
            pieces,
            _claim: claim,
        }))
    }

    /// The bytes of an access in a window, if the host may use them. The caller has claimed them.
    fn piece(&self, window: &Window, gpa: u64, length: usize) -> Result<Piece> {
        let start = window.guest.start_bytes();
        let Some(backend) = self.backend(window.backend) else {
            return Err(Error::NoBackend {
                gpa: gpa.max(start),
            });
        };
        let runs = backend.state_runs(window.file);
        if let Some((kept, _)) = runs.iter().find(|(_, state)| !state.host_may_use()) {
            let page = start + (kept.start() - window.file.start()) * PAGE_SIZE;
            return Err(Error::PrivateMemory {
                gpa: gpa.max(page),
                backend: backend.config().name.clone(),
            });
        }
        // Neither sum wraps: both ranges have been checked.
        let from = gpa.max(start);
        let to = (gpa + length as u64).min(start + window.guest.bytes());
        Ok(Piece {
            backend,
            offset: window.file.start_bytes() + (from - start),
            bytes: (from - gpa) as usize..(to - gpa) as usize,
        })
    }
}

/// The window of a part, which must not be a gap.
fn window_of(part: &Part, gpa: u64) -> Result<Window> {
    match *part {
        Part::Window(window) => Ok(window),
        Part::Gap(gap) => Err(Error::NoBackend {
            gpa: gpa.max(gap.start_bytes()),
        }),
    }
}
