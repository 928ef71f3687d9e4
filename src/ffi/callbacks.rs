// SPDX-License-Identifier: MIT OR Apache-2.0

use std::ffi::{CStr, CString};
use std::io;
use std::os::raw::{c_char, c_void};
use std::sync::Arc;

use super::opaques::Opaques;
use super::types::{guestmemfd_stray, guestmemfd_view, view_number};
use crate::backend::Backend;
use crate::error::Error;
use crate::listener::{Level, Listener, Stray};
use crate::pages::ranges::{FilePages, GuestPages};
use crate::pages::states::View;

/// What the library asks of, and tells, its user; copied by guestmemfd_vm_new(). Every one but
/// `gap` may be NULL.
///
/// All are called from the thread that entered the library, but for stray, and for log with what a
/// guard has to say. None may ask for a conversion, free pages or change the windows: that fails
/// with -EDEADLK. Pins and questions are allowed, but not of bytes that another request may be
/// moving, which would wait for it.
///
/// begin and end bracket every step of a conversion, and of what frees pages. begin comes before
/// any claim is taken, so it is the place for a lock that map and unmap need (in QEMU, the BQL): a
/// thread that holds such a lock may itself wait for a claim. Register those who are told by map
/// and unmap before begin answers: one that comes later is not told of this step.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct guestmemfd_callbacks {
    /// Passed to all but map, unmap, new_files, revoke and stray.
    pub opaque: *mut c_void,
    /// A step begins. Are map and unmap to be called in it? If so, a private touch decides its own
    /// page alone even with lazy attributes: the bytes around it may be in use.
    pub begin: Option<unsafe extern "C" fn(opaque: *mut c_void) -> bool>,
    /// It is over; `listeners` is what begin answered.
    pub end: Option<unsafe extern "C" fn(opaque: *mut c_void, listeners: bool)>,
    /// The host can use the bytes from now on; 0, or -errno to leave them private.
    pub map:
        Option<unsafe extern "C" fn(backend_opaque: *mut c_void, offset: u64, size: u64) -> i32>,
    /// The bytes are about to become private: let go of them.
    pub unmap: Option<unsafe extern "C" fn(backend_opaque: *mut c_void, offset: u64, size: u64)>,
    /// A backend has new files: guestmemfd_backend_private_fd() and, with GUESTMEMFD_MODE_IN_PLACE,
    /// guestmemfd_backend_shared_fd(), which is to be mapped anew, now. unmap has been told before
    /// of all bytes whose file has gone, and map is told after this of those that may be used.
    pub new_files: Option<unsafe extern "C" fn(backend_opaque: *mut c_void)>,
    /// The bytes are to become private, and some are pinned. Whoever can do without lets go of its
    /// pins now, or soon: the request waits for those that stay. Called with no claim held, and not
    /// between begin and end.
    pub revoke: Option<unsafe extern "C" fn(backend_opaque: *mut c_void, offset: u64, size: u64)>,
    /// A hypercall has made the range private, and guestmemfd_backend_config.prefault asks that it
    /// be allocated now. Called after end, by the thread that serves the hypercall.
    pub prefault: Option<unsafe extern "C" fn(opaque: *mut c_void, gpa: u64, size: u64)>,
    /// May a part of a request that no backend owns take part in it? 0, or -errno to refuse.
    pub gap: Option<
        unsafe extern "C" fn(opaque: *mut c_void, gpa: u64, size: u64, to: guestmemfd_view) -> i32,
    >,
    /// The kernel, pins or a refusing map kept a request of the guest's from being served. Earlier
    /// steps of it have taken effect. Called after end; a guest can cause it as often as it likes.
    /// `id` is that of the backend that the range begins in, or NULL.
    pub failed: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            id: *const c_char,
            gpa: u64,
            size: u64,
            to: guestmemfd_view,
            message: *const c_char,
        ),
    >,
    /// A guard has caught an access to private bytes. Called from a thread of the library's while
    /// the thread that was caught, if it is one of this process, waits: so it must not wait for a
    /// lock that the other may hold, touch guest memory, or free the backend.
    pub stray:
        Option<unsafe extern "C" fn(backend_opaque: *mut c_void, stray: *const guestmemfd_stray)>,
    /// Should a thread that waits, or has a part of a request still to do, give up (-EINTR)?
    pub interrupted: Option<unsafe extern "C" fn(opaque: *mut c_void) -> bool>,
    /// A line for the user; level 0 is an error, 1 a warning.
    pub log: Option<unsafe extern "C" fn(opaque: *mut c_void, level: u32, message: *const c_char)>,
}

/// The callbacks as a listener.
pub(super) struct CListener {
    callbacks: guestmemfd_callbacks,
    opaques: Arc<Opaques>,
}

// SAFETY: the user promises that its functions may be called, with its opaque pointer, from every
// thread that enters the library; the struct itself is never written.
unsafe impl Send for CListener {}
// SAFETY: as above.
unsafe impl Sync for CListener {}

impl CListener {
    pub(super) fn new(callbacks: guestmemfd_callbacks, opaques: Arc<Opaques>) -> Self {
        Self { callbacks, opaques }
    }
}

const EIO: i32 = rustix::io::Errno::IO.raw_os_error();

fn check(result: i32) -> io::Result<()> {
    match result {
        0 => Ok(()),
        // -errno as promised, and no number that is none.
        result => Err(io::Error::from_raw_os_error(
            result
                .checked_neg()
                .filter(|errno| *errno > 0)
                .unwrap_or(EIO),
        )),
    }
}

impl Listener for CListener {
    fn begin(&self) -> bool {
        // SAFETY: a function of the user's with the arguments that the header promises it; so
        // below.
        self.callbacks
            .begin
            .is_some_and(|begin| unsafe { begin(self.callbacks.opaque) })
    }

    fn end(&self, told: bool) {
        if let Some(end) = self.callbacks.end {
            // SAFETY: see begin.
            unsafe { end(self.callbacks.opaque, told) }
        }
    }

    fn map(&self, backend: &Backend, pages: FilePages) -> io::Result<()> {
        let Some(map) = self.callbacks.map else {
            return Ok(());
        };
        // SAFETY: see begin.
        check(unsafe {
            map(
                self.opaques.get(backend),
                pages.start_bytes(),
                pages.bytes(),
            )
        })
    }

    fn unmap(&self, backend: &Backend, pages: FilePages) {
        if let Some(unmap) = self.callbacks.unmap {
            // SAFETY: see begin.
            unsafe {
                unmap(
                    self.opaques.get(backend),
                    pages.start_bytes(),
                    pages.bytes(),
                )
            }
        }
    }

    fn new_files(&self, backend: &Backend) {
        if let Some(new_files) = self.callbacks.new_files {
            // SAFETY: see begin.
            unsafe { new_files(self.opaques.get(backend)) }
        }
    }

    fn revoke(&self, backend: &Backend, pages: FilePages) {
        if let Some(revoke) = self.callbacks.revoke {
            // SAFETY: see begin.
            unsafe {
                revoke(
                    self.opaques.get(backend),
                    pages.start_bytes(),
                    pages.bytes(),
                )
            }
        }
    }

    fn prefault(&self, guest: GuestPages) {
        if let Some(prefault) = self.callbacks.prefault {
            // SAFETY: see begin.
            unsafe { prefault(self.callbacks.opaque, guest.start_bytes(), guest.bytes()) }
        }
    }

    fn gap(&self, guest: GuestPages, to: View) -> io::Result<()> {
        let Some(gap) = self.callbacks.gap else {
            return Err(rustix::io::Errno::INVAL.into());
        };
        let (gpa, size) = (guest.start_bytes(), guest.bytes());
        // SAFETY: see begin.
        check(unsafe { gap(self.callbacks.opaque, gpa, size, view_number(to)) })
    }

    fn failed(&self, backend: Option<&Backend>, guest: GuestPages, to: View, error: &Error) {
        let id = backend.and_then(|backend| CString::new(backend.config().name.as_str()).ok());
        let id = id.as_deref().map_or(std::ptr::null(), CStr::as_ptr);
        let (gpa, size) = (guest.start_bytes(), guest.bytes());
        if let (Some(failed), Ok(message)) =
            (self.callbacks.failed, CString::new(error.to_string()))
        {
            let (opaque, to) = (self.callbacks.opaque, view_number(to));
            // SAFETY: see begin; the strings live until the function returns.
            unsafe { failed(opaque, id, gpa, size, to, message.as_ptr()) }
        }
    }

    fn stray(&self, backend: &Backend, stray: Stray) {
        let seen = guestmemfd_stray {
            offset: stray.pages.start_bytes(),
            size: stray.pages.bytes(),
            gpa: stray.gpa.unwrap_or(u64::MAX),
            thread: stray.thread.unwrap_or(0),
        };
        if let Some(stray) = self.callbacks.stray {
            // SAFETY: see begin; the structure lives until the function returns.
            unsafe { stray(self.opaques.get(backend), &raw const seen) }
        }
    }

    fn interrupted(&self) -> bool {
        self.callbacks
            .interrupted
            // SAFETY: see begin.
            .is_some_and(|interrupted| unsafe { interrupted(self.callbacks.opaque) })
    }

    fn log(&self, level: Level, message: &str) {
        let level = match level {
            Level::Error => 0,
            Level::Warning => 1,
        };
        if let (Some(log), Ok(message)) = (self.callbacks.log, CString::new(message)) {
            // SAFETY: see begin; the string lives until the function returns.
            unsafe { log(self.callbacks.opaque, level, message.as_ptr()) }
        }
    }
}
