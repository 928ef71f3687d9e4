// SPDX-License-Identifier: GPL-2.0-or-later

//! The C interface, called as a C program would that keeps the header's rules; what the library promises
//! in return is checked at each call.

use std::ffi::{CStr, CString, c_void};
use std::ptr;

use guestmemfd::ffi::*;

/// A negative number, and the error that came with it.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) code: i32,
    pub(crate) message: String,
}

pub(crate) type Answer<T> = Result<T, Refused>;

/// Makes a call with an error to fill.
fn call(function: impl FnOnce(*mut guestmemfd_error) -> i32) -> Answer<()> {
    let mut error = guestmemfd_error {
        code: i32::MIN,
        message: [0x55; GUESTMEMFD_ERROR_SIZE],
    };
    let answer = function(&raw mut error);
    if answer == 0 {
        assert_eq!(
            error.code,
            i32::MIN,
            "an error is written only where there is one"
        );
        return Ok(());
    }
    assert!(
        answer < 0 && error.code == -answer,
        "{answer}, {}",
        error.code
    );
    let bytes = error.message.map(|byte| byte as u8);
    let message = CStr::from_bytes_until_nul(&bytes).expect("a message ends");
    let message = message.to_str().expect("a message is UTF-8").to_owned();
    assert!(
        !message.is_empty() && !message.contains(char::is_control),
        "{message:?}"
    );
    Err(Refused {
        code: error.code,
        message,
    })
}

unsafe extern "C" fn share_gaps(_: *mut c_void, _: u64, _: u64, to: guestmemfd_view) -> i32 {
    match to {
        GUESTMEMFD_VIEW_SHARED => 0,
        _ => -EINVAL,
    }
}

const EINVAL: i32 = 22;

const CALLBACKS: guestmemfd_callbacks = guestmemfd_callbacks {
    opaque: ptr::null_mut(),
    begin: None,
    end: None,
    map: None,
    unmap: None,
    revoke: None,
    prefault: None,
    gap: Some(share_gaps),
    failed: None,
    stray: None,
    interrupted: None,
    log: None,
    new_files: None,
};

/// A software VM.
#[derive(Debug)]
pub(crate) struct Vm(*mut guestmemfd_vm);

impl Vm {
    pub(crate) fn new(abi: u32) -> Answer<Self> {
        let (callbacks, mut vm) = (CALLBACKS, ptr::null_mut());
        // SAFETY: all pointers are valid; so below.
        let made = call(|e| unsafe {
            guestmemfd_vm_new_software(abi, &raw const callbacks, &raw mut vm, e)
        });
        assert_eq!(made.is_ok(), !vm.is_null());
        made.map(|()| Self(vm))
    }

    /// The identifier, if any, is put into the configuration.
    pub(crate) fn backend(
        &self,
        mut config: guestmemfd_backend_config,
        id: Option<&CString>,
    ) -> Answer<Backend> {
        config.id = id.map_or(ptr::null(), |id| id.as_ptr());
        let mut backend = ptr::null_mut();
        // SAFETY: see `new`; the identifier outlives the call.
        let made = call(|e| unsafe {
            guestmemfd_backend_new(self.0, &raw const config, &raw mut backend, e)
        });
        assert_eq!(made.is_ok(), !backend.is_null());
        made.map(|()| Backend(backend))
    }

    pub(crate) fn add_window(
        &self,
        backend: &Backend,
        gpa: u64,
        offset: u64,
        size: u64,
        wanted: guestmemfd_binding,
    ) -> Answer<guestmemfd_binding> {
        let mut binding = u32::MAX;
        // SAFETY: see `new`.
        call(|e| unsafe {
            let out = &raw mut binding;
            guestmemfd_vm_add_window(self.0, backend.0, gpa, offset, size, wanted, out, e)
        })
        .map(|()| binding)
    }

    pub(crate) fn remove_window(&self, gpa: u64, size: u64) -> Answer<()> {
        // SAFETY: see `new`.
        call(|e| unsafe { guestmemfd_vm_remove_window(self.0, gpa, size, e) })
    }

    pub(crate) fn owns(&self, gpa: u64, size: u64) -> bool {
        // SAFETY: see `new`.
        unsafe { guestmemfd_vm_owns(self.0, gpa, size) }
    }

    pub(crate) fn memory_fault(&self, gpa: u64, size: u64, to: guestmemfd_view) -> Answer<()> {
        // SAFETY: see `new`.
        call(|e| unsafe { guestmemfd_vm_memory_fault(self.0, gpa, size, to, e) })
    }

    pub(crate) fn map_gpa_range(&self, gpa: u64, pages: u64, attributes: u64) -> Answer<()> {
        // SAFETY: see `new`.
        call(|e| unsafe { guestmemfd_vm_map_gpa_range(self.0, gpa, pages, attributes, e) })
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and used no more.
        unsafe { guestmemfd_vm_free(self.0) }
    }
}

/// A backend, to be dropped before its VM.
#[derive(Debug)]
pub(crate) struct Backend(*mut guestmemfd_backend);

impl Backend {
    pub(crate) fn stats(&self) -> guestmemfd_stats {
        let mut stats = guestmemfd_stats::default();
        // SAFETY: see `Vm::new`.
        let answer = unsafe { guestmemfd_backend_stats(self.0, &raw mut stats) };
        assert_eq!(answer, 0);
        stats
    }

    pub(crate) fn shared_fd(&self) -> i32 {
        // SAFETY: see `Vm::new`.
        unsafe { guestmemfd_backend_shared_fd(self.0) }
    }

    pub(crate) fn pin(&self, offset: u64, size: u64) -> Answer<()> {
        // SAFETY: see `Vm::new`.
        call(|e| unsafe { guestmemfd_backend_pin(self.0, offset, size, e) })
    }

    pub(crate) fn unpin(&self, offset: u64, size: u64) -> Answer<()> {
        // SAFETY: see `Vm::new`.
        call(|e| unsafe { guestmemfd_backend_unpin(self.0, offset, size, e) })
    }

    pub(crate) fn free_pages(&self, offset: u64, size: u64) -> Answer<()> {
        // SAFETY: see `Vm::new`.
        call(|e| unsafe { guestmemfd_backend_free_pages(self.0, offset, size, e) })
    }

    pub(crate) fn host_may_use(&self, offset: u64, size: u64) -> bool {
        // SAFETY: see `Vm::new`.
        unsafe { guestmemfd_backend_host_may_use(self.0, offset, size) }
    }

    /// The first runs of a range, no more than `room`, and where to go on.
    pub(crate) fn map(
        &self,
        offset: u64,
        size: u64,
        room: u64,
    ) -> Answer<(Vec<guestmemfd_run>, u64)> {
        // Nothing is written that is not a run, nor behind the last.
        let blank = guestmemfd_run {
            offset: u64::MAX,
            size: u64::MAX,
            state: u32::MAX,
        };
        let mut runs = vec![blank; room.min(MOST_RUNS) as usize + 1];
        let (mut count, mut next) = (room.min(MOST_RUNS), u64::MAX);
        let answer = call(|e| {
            let (runs, count, next) = (runs.as_mut_ptr(), &raw mut count, &raw mut next);
            // SAFETY: see `Vm::new`; there is room for as many runs as are asked for.
            unsafe { guestmemfd_backend_map(self.0, offset, size, runs, count, next, e) }
        });
        let found = if answer.is_ok() { count as usize } else { 0 };
        assert!(runs[found..].iter().all(|run| *run == blank));
        runs.truncate(found);
        answer.map(|()| (runs, next))
    }
}

/// Room for more is not asked for.
pub(crate) const MOST_RUNS: u64 = 256;

impl Drop for Backend {
    fn drop(&mut self) {
        // SAFETY: made by `Vm::backend`, and used no more.
        unsafe { guestmemfd_backend_free(self.0) }
    }
}

/// A configuration to change, as in C where nothing is set.
pub(crate) fn blank_config() -> guestmemfd_backend_config {
    guestmemfd_backend_config {
        id: ptr::null(),
        size: 0,
        mode: GUESTMEMFD_MODE_AUTO,
        confidential: false,
        bind: false,
        discard: GUESTMEMFD_DISCARD_NOW,
        start_private: false,
        lazy: GUESTMEMFD_LAZY_AUTO,
        lazy_chunk: 0,
        prefault: GUESTMEMFD_PREFAULT_OFF,
        convert_timeout: 1,
        opaque: ptr::null_mut(),
    }
}
