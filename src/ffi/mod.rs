// SPDX-License-Identifier: MIT OR Apache-2.0

//! The C interface, from which `include/guestmemfd.h` is generated.
//!
//! Rules: functions return 0 (or what they are documented to return) or a negative errno, and then
//! fill the error that the caller passed, if any. No panic crosses the border: it becomes `-EIO`.
//! Pointers are checked for NULL and otherwise trusted: C callers keep them valid. Each entry turns
//! its pointers into references once, by `arg` and `Out::new`, before it does anything.
#![allow(non_camel_case_types)] // the names are C's
#![allow(clippy::missing_safety_doc)] // the rules above hold for every function

mod backend;
mod callbacks;
mod error;
mod guard;
mod opaques;
mod types;
mod vm;

pub use backend::*;
pub use callbacks::guestmemfd_callbacks;
pub use error::{GUESTMEMFD_ERROR_SIZE, guestmemfd_error};
pub use types::*;
pub use vm::*;

use std::any::Any;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;

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

/// An argument as it arrived: a reference, or what to say of a NULL.
type Arg<'a, T> = Result<&'a T, Failure>;

/// Runs what a function is for; panics and errors become numbers. What has to be carried across the
/// border of unwinding is one of those: a `Result` would be copied there and back, in every call.
#[inline]
fn catch(
    error: Option<Out<'_, guestmemfd_error>>,
    body: impl FnOnce() -> Result<(), Failure>,
) -> i32 {
    let error = AssertUnwindSafe(error);
    let number = || match body() {
        Ok(()) => 0,
        Err(failure) => report(error.as_ref(), &failure),
    };
    catch_unwind(AssertUnwindSafe(number))
        .unwrap_or_else(|panic| report_panic(error.as_ref(), &*panic))
}

#[cold]
fn report(error: Option<&Out<'_, guestmemfd_error>>, failure: &Failure) -> i32 {
    if let Some(out) = error {
        // Who does not ask is spared what a message costs.
        out.put(error::filled(failure.errno(), failure));
    }
    -failure.errno()
}

#[cold]
fn report_panic(error: Option<&Out<'_, guestmemfd_error>>, panic: &(dyn Any + Send)) -> i32 {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    report(error, &Failure::Panic(text.unwrap_or("panic").to_owned()))
}

/// For functions that return a plain value: `otherwise` if they panic.
fn catch_value<T>(otherwise: T, body: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(otherwise)
}

/// A reference from a pointer of C's.
///
/// # Safety
/// The pointer is NULL, or points to a T that nobody writes to while the reference is used.
#[inline]
unsafe fn arg<'a, T>(pointer: *const T, name: &'static str) -> Arg<'a, T> {
    // SAFETY: NULL is looked for; the rest is the caller's promise.
    unsafe { pointer.as_ref() }.ok_or(Failure::Null(name))
}

/// A place to write a result to, which may hold anything so far.
struct Out<'a, T>(NonNull<T>, PhantomData<&'a mut T>);

impl<T> Out<'_, T> {
    /// `None` for NULL.
    ///
    /// # Safety
    /// The pointer is NULL, or a place for as many T as will be written there, which nobody else
    /// uses as long as this lives.
    #[inline]
    unsafe fn new(pointer: *mut T) -> Option<Self> {
        NonNull::new(pointer).map(|pointer| Self(pointer, PhantomData))
    }

    fn put(&self, value: T) {
        // SAFETY: `new`'s caller has promised that this is a place for a T.
        unsafe { self.0.write(value) }
    }

    /// Writes several, one behind the other, and says how many.
    ///
    /// # Safety
    /// There is room for as many values as there are.
    unsafe fn put_all(&self, values: impl Iterator<Item = T>) -> u64 {
        let mut written = 0;
        for (index, value) in values.enumerate() {
            // SAFETY: this caller has promised that there is room.
            unsafe { self.0.add(index).write(value) }
            written += 1;
        }
        written
    }
}

/// A place that must be there.
fn wanted<'a, T>(out: Option<Out<'a, T>>, name: &'static str) -> Result<Out<'a, T>, Failure> {
    out.ok_or(Failure::Null(name))
}

/// # Safety
/// A descriptor that is not negative stays open for the duration of the call.
unsafe fn borrow_fd<'a>(fd: i32, name: &str) -> Result<BorrowedFd<'a>, Failure> {
    if fd < 0 {
        return Err(Failure::Argument(format!("{name} is {fd}, no descriptor")));
    }
    // SAFETY: not -1, and the caller's promise.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}
