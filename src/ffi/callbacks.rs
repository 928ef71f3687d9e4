// SPDX-License-Identifier: GPL-2.0-or-later

use std::ffi::{CStr, CString};
use std::io;
use std::os::raw::{c_char, c_void};

use super::types::guestmemfd_stray;
use crate::backend::Backend;
use crate::error::Error;
use crate::guard::Stray;
use crate::listener::{Level, Listener};
use crate::pages::ranges::{FilePages, GuestPages};
use crate::pages::states::View;

/// What the library asks of, and tells, its user; copied by guestmemfd_vm_new(). All are called from
/// the thread that entered the library, but for stray, and for log with what a guard has to say; every
/// one but `gap` may be NULL. None may ask for a conversion, a discard or a change of windows.
///
/// begin and end bracket every conversion and discard. begin comes before any claim is taken, so it
/// is the place for a lock that populate and discard need (in QEMU, the BQL): a thread that holds
/// such a lock may itself wait for a claim. Between the two, nobody may start to depend on populate
/// and discard who did not when begin answered.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct guestmemfd_callbacks {
    /// Passed to all but populate, discard and stray.
    pub opaque: *mut c_void,
    /// A request begins. Are populate and discard to be called in it? If so, a private touch decides its
    /// own page alone even with lazy attributes: the bytes around it may be in use.
    pub begin: Option<unsafe extern "C" fn(opaque: *mut c_void) -> bool>,
    /// It is over; `listeners` is what begin answered.
    pub end: Option<unsafe extern "C" fn(opaque: *mut c_void, listeners: bool)>,
    /// The host can use the bytes from now on; 0, or -errno to leave them private.
    pub populate:
        Option<unsafe extern "C" fn(backend_opaque: *mut c_void, offset: u64, size: u64) -> i32>,
    /// The bytes are about to become private: let go of them.
    pub discard: Option<unsafe extern "C" fn(backend_opaque: *mut c_void, offset: u64, size: u64)>,
    /// A hypercall has made the range private, and guestmemfd_backend_config.prefault asks that it
    /// be allocated now. Called after end, by the thread that serves the hypercall.
    pub prefault: Option<unsafe extern "C" fn(opaque: *mut c_void, gpa: u64, size: u64)>,
    /// May a part of a request that no backend owns take part in it? 0, or -errno to refuse.
    pub gap: Option<
        unsafe extern "C" fn(opaque: *mut c_void, gpa: u64, size: u64, to_private: bool) -> i32,
    >,
    /// The kernel, pins or a refusing populate kept a request of the guest's from being served. Nothing
    /// has changed. Called after end; a guest can cause it as often as it likes. `id` is that of the
    /// backend that the range begins in, or NULL.
    pub failed: Option<
        unsafe extern "C" fn(
            opaque: *mut c_void,
            id: *const c_char,
            gpa: u64,
            size: u64,
            to_private: bool,
            message: *const c_char,
        ),
    >,
    /// A guard has caught an access to private bytes. Called from a thread of the library's while the
    /// thread that was caught, if it is one of this process, waits: so it must not wait for a lock that
    /// the other may hold, touch guest memory, or free the backend.
    pub stray:
        Option<unsafe extern "C" fn(backend_opaque: *mut c_void, stray: *const guestmemfd_stray)>,
    /// Should a thread that waits for a claim give up (-EINTR)?
    pub interrupted: Option<unsafe extern "C" fn(opaque: *mut c_void) -> bool>,
    /// A line for the user; level 0 is an error, 1 a warning.
    pub log: Option<unsafe extern "C" fn(opaque: *mut c_void, level: u32, message: *const c_char)>,
}

/// The callbacks as a listener.
pub(super) struct CListener(guestmemfd_callbacks);

// SAFETY: the user promises that its functions may be called, with its opaque pointer, from every
// thread that enters the library; the struct itself is never written.
unsafe impl Send for CListener {}
// SAFETY: as above.
unsafe impl Sync for CListener {}

impl CListener {
    pub(super) fn new(callbacks: guestmemfd_callbacks) -> Self {
        Self(callbacks)
    }
}

const EIO: i32 = rustix::io::Errno::IO.raw_os_error();

fn opaque_of(backend: &Backend) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(backend.config().tag)
}

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
        // SAFETY: a function of the user's with the arguments that the header promises it; so below.
        self.0
            .begin
            .is_some_and(|begin| unsafe { begin(self.0.opaque) })
    }

    fn end(&self, told: bool) {
        if let Some(end) = self.0.end {
            // SAFETY: see begin.
            unsafe { end(self.0.opaque, told) }
        }
    }

    fn populate(&self, backend: &Backend, pages: FilePages) -> io::Result<()> {
        let Some(populate) = self.0.populate else {
            return Ok(());
        };
        // SAFETY: see begin.
        check(unsafe { populate(opaque_of(backend), pages.start_bytes(), pages.bytes()) })
    }

    fn discard(&self, backend: &Backend, pages: FilePages) {
        if let Some(discard) = self.0.discard {
            // SAFETY: see begin.
            unsafe { discard(opaque_of(backend), pages.start_bytes(), pages.bytes()) }
        }
    }

    fn prefault(&self, guest: GuestPages) {
        if let Some(prefault) = self.0.prefault {
            // SAFETY: see begin.
            unsafe { prefault(self.0.opaque, guest.start_bytes(), guest.bytes()) }
        }
    }

    fn gap(&self, guest: GuestPages, to: View) -> io::Result<()> {
        let Some(gap) = self.0.gap else {
            return Err(rustix::io::Errno::INVAL.into());
        };
        let (gpa, size) = (guest.start_bytes(), guest.bytes());
        // SAFETY: see begin.
        check(unsafe { gap(self.0.opaque, gpa, size, to == View::Private) })
    }

    fn failed(&self, backend: Option<&Backend>, guest: GuestPages, to: View, error: &Error) {
        let id = backend.and_then(|backend| CString::new(backend.config().name.as_str()).ok());
        let id = id.as_deref().map_or(std::ptr::null(), CStr::as_ptr);
        let (gpa, size) = (guest.start_bytes(), guest.bytes());
        if let (Some(failed), Ok(message)) = (self.0.failed, CString::new(error.to_string())) {
            let (opaque, private) = (self.0.opaque, to == View::Private);
            // SAFETY: see begin; the strings live until the function returns.
            unsafe { failed(opaque, id, gpa, size, private, message.as_ptr()) }
        }
    }

    fn stray(&self, backend: &Backend, stray: Stray) {
        let seen = guestmemfd_stray {
            offset: stray.pages.start_bytes(),
            size: stray.pages.bytes(),
            gpa: stray.gpa.unwrap_or(u64::MAX),
            thread: stray.thread.unwrap_or(0),
        };
        if let Some(stray) = self.0.stray {
            // SAFETY: see begin; the structure lives until the function returns.
            unsafe { stray(opaque_of(backend), &raw const seen) }
        }
    }

    fn interrupted(&self) -> bool {
        self.0
            .interrupted
            // SAFETY: see begin.
            .is_some_and(|interrupted| unsafe { interrupted(self.0.opaque) })
    }

    fn log(&self, level: Level, message: &str) {
        let level = match level {
            Level::Error => 0,
            Level::Warning => 1,
        };
        if let (Some(log), Ok(message)) = (self.0.log, CString::new(message)) {
            // SAFETY: see begin; the string lives until the function returns.
            unsafe { log(self.0.opaque, level, message.as_ptr()) }
        }
    }
}
