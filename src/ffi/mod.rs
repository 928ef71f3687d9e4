// SPDX-License-Identifier: GPL-2.0-or-later

//! The C interface, from which `include/guestmemfd.h` is generated.
//!
//! Rules: functions return 0 (or what they are documented to return) or a negative errno, and then
//! fill the error that the caller passed, if any. No panic crosses the border: it becomes
//! `-EIO`. Pointers are checked for NULL and otherwise trusted: C callers keep them valid.
#![allow(non_camel_case_types)] // the names are C's
#![allow(clippy::missing_safety_doc)] // the rules above hold for every function

mod backend;
mod callbacks;
mod error;
mod types;
mod vm;

pub use backend::*;
pub use callbacks::guestmemfd_callbacks;
pub use error::{GUESTMEMFD_ERROR_SIZE, guestmemfd_error};
pub use types::*;
pub use vm::*;

use std::any::Any;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::io::Errno;

use crate::error::Error;

/// Why a call from C failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Library(#[from] Error),
    #[error("{0} must not be NULL")]
    Null(&'static str),
    #[error("{0}")]
    Argument(String),
    #[error("internal error: {0}")]
    Panic(String),
}

impl Failure {
    fn errno(&self) -> i32 {
        match self {
            Failure::Library(error) => error.errno(),
            Failure::Null(_) | Failure::Argument(_) => Errno::INVAL.raw_os_error(),
            Failure::Panic(_) => Errno::IO.raw_os_error(),
        }
    }
}

/// Runs what a function is for; panics and errors become numbers. What has to be carried across the
/// border of unwinding is one of those: a `Result` would be copied there and back, in every call.
#[inline]
fn guard(error: *mut guestmemfd_error, body: impl FnOnce() -> Result<(), Failure>) -> i32 {
    let number = || match body() {
        Ok(()) => 0,
        Err(failure) => report(error, &failure),
    };
    catch_unwind(AssertUnwindSafe(number)).unwrap_or_else(|panic| report_panic(error, &*panic))
}

#[cold]
fn report(error: *mut guestmemfd_error, failure: &Failure) -> i32 {
    error::fill(error, failure.errno(), failure);
    -failure.errno()
}

#[cold]
fn report_panic(error: *mut guestmemfd_error, panic: &(dyn Any + Send)) -> i32 {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    report(error, &Failure::Panic(text.unwrap_or("panic").to_owned()))
}

/// For functions that return a plain value: `otherwise` if they panic.
fn guard_value<T>(otherwise: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(otherwise)
}

/// A reference from a pointer of C's.
fn check_ref<'a, T>(pointer: *const T, name: &'static str) -> Result<&'a T, Failure> {
    // SAFETY: not NULL is checked; that it points to a valid T is C's side of the contract.
    unsafe { pointer.as_ref() }.ok_or(Failure::Null(name))
}

/// A place to write a result to, which may hold anything so far.
struct Out<T>(std::ptr::NonNull<T>);

impl<T> Out<T> {
    fn check(pointer: *mut T, name: &'static str) -> Result<Self, Failure> {
        std::ptr::NonNull::new(pointer)
            .map(Self)
            .ok_or(Failure::Null(name))
    }

    fn set(self, value: T) {
        // SAFETY: not NULL; C's side of the contract is that it is a valid place for a T.
        unsafe { self.0.write(value) }
    }

    /// Writes several, one behind the other, and says how many. The caller has made sure that C promised
    /// room for them.
    fn set_many(self, values: impl Iterator<Item = T>) -> u64 {
        let mut written = 0;
        for (index, value) in values.enumerate() {
            // SAFETY: not NULL; C's side of the contract is room for as many as the caller lets through.
            unsafe { self.0.add(index).write(value) }
            written += 1;
        }
        written
    }
}

fn check_fd<'a>(fd: i32, name: &str) -> Result<BorrowedFd<'a>, Failure> {
    if fd < 0 {
        return Err(Failure::Argument(format!("{name} is {fd}, no descriptor")));
    }
    // SAFETY: not -1; the caller keeps it open for the duration of the call.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}
