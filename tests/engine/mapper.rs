// SPDX-License-Identifier: GPL-2.0-or-later

//! A listener.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guestmemfd::*;
use rustix::io::Errno;

use crate::fault::Fault;

/// Maps what is shared, as VFIO would, and sees that it is told the truth.
#[derive(Debug, Default)]
pub(crate) struct Mapper {
    pub(crate) mapped: parking_lot::Mutex<Vec<bool>>,
    /// Is told nothing, and maps nothing.
    pub(crate) absent: AtomicBool,
    pub(crate) fault: Arc<Fault>,
    /// Its device writes to what it has just mapped.
    pub(crate) writes: AtomicBool,
    /// Threads that wait are wanted elsewhere.
    pub(crate) interrupts: AtomicBool,
    /// What was to be allocated.
    pub(crate) prefaulted: parking_lot::Mutex<Vec<GuestPages>>,
    /// Requests that it has been told of as failed.
    pub(crate) failed: parking_lot::Mutex<Vec<(GuestPages, View)>>,
}

pub(crate) struct MapperHandle(pub(crate) Arc<Mapper>);

impl Listener for MapperHandle {
    fn begin(&self) -> bool {
        !self.0.absent.load(Ordering::SeqCst)
    }

    fn map(&self, backend: &Backend, pages: FilePages) -> io::Result<()> {
        self.0.fault.call()?;
        let mut mapped = self.0.mapped.lock();
        for page in pages.start()..pages.end() {
            assert!(!std::mem::replace(&mut mapped[page as usize], true));
        }
        if self.0.writes.load(Ordering::SeqCst) {
            let views = backend.views();
            rustix::io::pwrite(views.file(View::Shared).fd(), &[1], pages.start_bytes())?;
        }
        Ok(())
    }

    fn unmap(&self, _: &Backend, pages: FilePages) {
        let mut mapped = self.0.mapped.lock();
        for page in pages.start()..pages.end() {
            assert!(std::mem::replace(&mut mapped[page as usize], false));
        }
    }

    fn prefault(&self, guest: GuestPages) {
        self.0.prefaulted.lock().push(guest);
    }

    fn interrupted(&self) -> bool {
        self.0.interrupts.load(Ordering::SeqCst)
    }

    fn gap(&self, _: GuestPages, to: View) -> io::Result<()> {
        match to {
            View::Shared => Ok(()),
            View::Private => Err(Errno::INVAL.into()),
        }
    }

    fn failed(&self, backend: Option<&Backend>, guest: GuestPages, to: View, _: &Error) {
        assert!(backend.is_some());
        self.0.failed.lock().push((guest, to));
    }
}
