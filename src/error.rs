// SPDX-License-Identifier: MIT OR Apache-2.0

//! What can go wrong, with the values a reader of the message needs.

use std::io;
use std::time::Duration;

use rustix::io::Errno;

use crate::pages::ranges::{FilePages, GuestPages, RangeError};
use crate::pages::states::View;
use crate::windows::Overlap;

/// A result of this library.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of this library. [`Error::errno`] gives the number that C callers and guests get.
///
/// Where a request is carried out in several steps, those before the one that failed have taken
/// effect.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Numbers that are no range of pages.
    #[error(transparent)]
    Range(#[from] RangeError),

    /// Attribute bits that `KVM_HC_MAP_GPA_RANGE` does not define.
    #[error("unknown attributes {attributes:#x} for a guest physical range")]
    UnknownAttributes {
        /// All attributes, as given.
        attributes: u64,
    },

    /// A part of a request that no backend owns, and that may not take part in it.
    #[error("cannot make {guest} {to}: no backend owns it: {source}")]
    Gap {
        /// The part.
        guest: GuestPages,
        /// What was asked for.
        to: View,
        /// Why not.
        source: io::Error,
    },

    /// Private pages were asked for where only the shared view can appear.
    #[error("cannot make {guest} private: its window is not bound to the guest_memfd")]
    Unbound {
        /// The part of the request.
        guest: GuestPages,
    },

    /// Private pages were asked for that also show where only the shared view can appear, and
    /// memory is converted in place.
    #[error(
        "cannot make {guest} private: it also shows at {unbound}, in a window that is not bound"
    )]
    ShownUnbound {
        /// The part of the request.
        guest: GuestPages,
        /// Where some of it shows.
        unbound: GuestPages,
    },

    /// Private pages were asked for in a guest that has none.
    #[error("cannot make {guest} private: the host maps all memory of backend '{backend}'")]
    NeverPrivate {
        /// The part of the request.
        guest: GuestPages,
        /// Name of the backend.
        backend: String,
    },

    /// Pages were to become private, but the host went on using them.
    #[error(
        "cannot make {pages} of backend '{backend}' private: the host has used them for {timeout:?}"
    )]
    Pinned {
        /// Name of the backend.
        backend: String,
        /// The first of the pages.
        pages: FilePages,
        /// How long the request has waited.
        timeout: Duration,
    },

    /// The host was to use pages that are the guest's alone.
    #[error(
        "the host cannot use {pages} of backend '{backend}' before the guest has made all of it \
         shared"
    )]
    NotShared {
        /// Name of the backend.
        backend: String,
        /// What was asked for.
        pages: FilePages,
    },

    /// Pages were to be unpinned more often than they had been pinned.
    #[error("not all of {pages} of backend '{backend}' is pinned")]
    NotPinned {
        /// Name of the backend.
        backend: String,
        /// What was asked for.
        pages: FilePages,
    },

    /// The listener asked to give up. What has been done stays done; asked again, it costs nothing.
    #[error("interrupted before all of {guest} was converted")]
    Interrupted {
        /// The request.
        guest: GuestPages,
    },

    /// A listener asked for something that would wait for the request that it was called in.
    #[error("a callback cannot ask for a conversion, free pages or change the layout")]
    InCallback,

    /// A backend was used with a VM that it does not belong to.
    #[error("backend '{backend}' belongs to another VM")]
    OtherVm {
        /// Name of the backend.
        backend: String,
    },

    /// A backend was to be shown to the guest after its VM had forgotten it.
    #[error("backend '{backend}' has been removed")]
    Removed {
        /// Name of the backend.
        backend: String,
    },

    /// States that were to be restored are not those of this backend.
    #[error("cannot restore the states of backend '{backend}': {found}")]
    BadStates {
        /// Name of the backend.
        backend: String,
        /// What is wrong.
        found: String,
    },

    /// Saved states could not be written or read.
    #[error("cannot {what} the states of backend '{backend}': {source}")]
    StateStream {
        /// Save or restore.
        what: &'static str,
        /// Name of the backend.
        backend: String,
        /// What the stream has answered.
        source: io::Error,
    },

    /// The hypervisor refused to set memory attributes.
    #[error("cannot set the attributes of {guest} to {view}: {source}")]
    SetAttributes {
        /// The range.
        guest: GuestPages,
        /// What they were to be.
        view: View,
        /// Why not.
        source: io::Error,
    },

    /// A file refused to set the attributes that it keeps.
    #[error("cannot set the attributes of {pages} of backend '{backend}' to {view}: {source}")]
    SetFileAttributes {
        /// Name of the backend.
        backend: String,
        /// The pages.
        pages: FilePages,
        /// What they were to be.
        view: View,
        /// Why not.
        source: io::Error,
    },

    /// Pages were to become private in place, and the kernel says that somebody uses one of them.
    #[error(
        "cannot make {pages} of backend '{backend}' private: the page at offset {offset:#x} has \
         been in use for {timeout:?}, by no pin of the library's"
    )]
    Held {
        /// Name of the backend.
        backend: String,
        /// The pages.
        pages: FilePages,
        /// The page in use, in bytes.
        offset: u64,
        /// How long the request has waited.
        timeout: Duration,
    },

    /// A file refused to free pages.
    #[error(
        "cannot punch a hole for {pages} into the {view} file of backend '{backend}': {source}"
    )]
    Punch {
        /// Name of the backend.
        backend: String,
        /// The pages.
        pages: FilePages,
        /// Which file.
        view: View,
        /// Why not.
        source: io::Error,
    },

    /// A file did not tell which pages have data.
    #[error("cannot look for data in {pages} of the {view} file of backend '{backend}': {source}")]
    FindData {
        /// Name of the backend.
        backend: String,
        /// The pages.
        pages: FilePages,
        /// Which file.
        view: View,
        /// Why not.
        source: io::Error,
    },

    /// The host was to access a page that is the guest's alone.
    #[error("cannot access guest memory at {gpa:#x}: the page is private (backend '{backend}')")]
    PrivateMemory {
        /// The first address of the access that lies in such a page.
        gpa: u64,
        /// Name of the backend.
        backend: String,
    },

    /// The host was to access guest physical space where no backend is.
    #[error("cannot access guest memory at {gpa:#x}: no backend owns it")]
    NoBackend {
        /// The first address of the access that no backend owns.
        gpa: u64,
    },

    /// The shared file of a backend could not be read or written.
    #[error(
        "cannot {what} {bytes:#x} bytes at offset {offset:#x} of the shared file of backend \
         '{backend}': {source}"
    )]
    Transfer {
        /// Read or write.
        what: &'static str,
        /// Name of the backend.
        backend: String,
        /// First byte.
        offset: u64,
        /// Bytes.
        bytes: usize,
        /// Why not.
        source: io::Error,
    },

    /// A listener cannot use pages that were to be shared.
    #[error("a listener refused {pages} of backend '{backend}': {source}")]
    Listener {
        /// Name of the backend.
        backend: String,
        /// The pages.
        pages: FilePages,
        /// Its answer.
        source: io::Error,
    },

    /// A file of a backend could not be created.
    #[error("cannot create the {view} file of backend '{backend}' with {size:#x} bytes: {source}")]
    CreateFile {
        /// Name of the backend.
        backend: String,
        /// Which file.
        view: View,
        /// Bytes.
        size: u64,
        /// Why not.
        source: io::Error,
    },

    /// There is no memory for the page states of a backend.
    #[error("no memory for the page states of backend '{backend}' with {size:#x} bytes")]
    NoMemory {
        /// Name of the backend.
        backend: String,
        /// Bytes.
        size: u64,
    },

    /// The kernel or the VM lacks something that the configuration needs.
    #[error("{wanted}: {found}")]
    Unsupported {
        /// What was asked for.
        wanted: String,
        /// What was found, and what would work.
        found: String,
    },

    /// The mode that was demanded does not serve the VM.
    #[error("mode={name} is not possible: {reason}")]
    DemandedMode {
        /// Of the mode, as users write it.
        name: &'static str,
        /// Why it does not.
        reason: Box<Error>,
    },

    /// No mode serves the VM.
    #[error(
        "no mode serves this VM: mode=in-place: {in_place}; mode=private: {private}; mode=mapped: \
         {mapped}"
    )]
    NoMode {
        /// Why the first does not.
        in_place: Box<Error>,
        /// Why the second does not.
        private: Box<Error>,
        /// Why the third does not.
        mapped: Box<Error>,
    },

    /// A file descriptor could not be used.
    #[error("cannot use {what}: {source}")]
    Descriptor {
        /// Whose.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },

    /// A stray guard can no longer do its work.
    #[error("the guard of backend '{backend}' has ended: {source}")]
    Guard {
        /// Name of the backend.
        backend: String,
        /// Why.
        source: io::Error,
    },

    /// The thread of a stray guard could not be started.
    #[error("cannot start a thread: {source}")]
    Thread {
        /// Why not.
        source: io::Error,
    },

    /// Two windows at one guest address.
    #[error(transparent)]
    Overlap(#[from] Overlap),

    /// There is no such window.
    #[error("no window at {guest}")]
    NoWindow {
        /// The range that was named.
        guest: GuestPages,
    },

    /// Pages beyond the end of a backend.
    #[error("pages {offset:#x}+{bytes:#x} lie outside backend '{backend}' of {size:#x} bytes")]
    OutsideBackend {
        /// Name of the backend.
        backend: String,
        /// First byte.
        offset: u64,
        /// Bytes.
        bytes: u64,
        /// Its size in bytes.
        size: u64,
    },

    /// Something is still in use.
    #[error("{what} while {user}")]
    InUse {
        /// What was asked for.
        what: &'static str,
        /// Why it cannot be.
        user: &'static str,
    },
}

impl Error {
    /// Has the host failed to do what a guest may ask for? Not if the request was bad, or if it
    /// comes again by itself.
    pub(crate) fn is_failure(&self) -> bool {
        matches!(
            self,
            Error::SetAttributes { .. }
                | Error::SetFileAttributes { .. }
                | Error::Held { .. }
                | Error::Punch { .. }
                | Error::FindData { .. }
                | Error::Listener { .. }
                | Error::Pinned { .. }
        )
    }

    /// May a page that was decided along with another be the reason?
    pub(crate) fn may_be_a_neighbours(&self) -> bool {
        self.is_failure() && !matches!(self, Error::Pinned { .. } | Error::Held { .. })
    }

    /// The error number, positive, as Linux defines it.
    ///
    /// `EINTR` means that the listener's `interrupted` asked to give up, and nothing else, and
    /// `EAGAIN` comes of its `gap` alone: callers try again on these. Where the kernel or `map`
    /// answers one of the two, it is `EIO`.
    pub fn errno(&self) -> i32 {
        let errno = match self {
            Error::Range(_)
            | Error::UnknownAttributes { .. }
            | Error::Unbound { .. }
            | Error::ShownUnbound { .. }
            | Error::NeverPrivate { .. }
            | Error::OutsideBackend { .. }
            | Error::OtherVm { .. }
            | Error::Removed { .. }
            | Error::BadStates { .. }
            | Error::NotPinned { .. } => Errno::INVAL,
            Error::NoBackend { .. } => Errno::FAULT,
            Error::Interrupted { .. } => Errno::INTR,
            Error::InCallback => Errno::DEADLK,
            Error::Gap { source, .. } => {
                return source.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
            }
            Error::SetAttributes { source, .. }
            | Error::SetFileAttributes { source, .. }
            | Error::Punch { source, .. }
            | Error::FindData { source, .. }
            | Error::Transfer { source, .. }
            | Error::Listener { source, .. }
            | Error::CreateFile { source, .. }
            | Error::StateStream { source, .. }
            | Error::Guard { source, .. }
            | Error::Thread { source }
            | Error::Descriptor { source, .. } => match Errno::from_io_error(source) {
                None | Some(Errno::INTR | Errno::AGAIN) => Errno::IO,
                Some(errno) => errno,
            },
            Error::NoMemory { .. } => Errno::NOMEM,
            Error::DemandedMode { reason, .. } => return reason.errno(),
            Error::Unsupported { .. } | Error::NoMode { .. } => Errno::OPNOTSUPP,
            Error::Overlap(_) => Errno::EXIST,
            Error::NoWindow { .. } => Errno::NOENT,
            Error::NotShared { .. } | Error::PrivateMemory { .. } => Errno::ACCESS,
            Error::InUse { .. } | Error::Pinned { .. } | Error::Held { .. } => Errno::BUSY,
        };
        errno.raw_os_error()
    }
}
