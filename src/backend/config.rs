// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a backend is to be, as its user says it.

use std::time::Duration;

use crate::backend::reach::Chunk;
use crate::pages::ranges::{GuestPages, PAGE_SIZE};
use crate::pages::states::PageState;
use crate::views::Mode;

/// What becomes of the side that a page has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Discard {
    /// A hole is punched inside the conversion.
    Now,
    /// Nothing is freed: for guests that flip the same pages all the time. A page that comes back
    /// to a view may show what it held there before.
    Keep,
}

/// Which pages are allocated as soon as a hypercall has made them private. Pages that become shared
/// never are: the host often touches them first, and it costs more than the guest's touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Prefault {
    /// None: a page that nobody touches costs no memory.
    Off,
    /// Those of requests for 64 KiB or less.
    Small,
    /// All of them.
    On,
}

impl Prefault {
    const SMALL: u64 = (64 << 10) / PAGE_SIZE;

    pub(crate) fn wants(self, request: GuestPages) -> bool {
        match self {
            Prefault::Off => false,
            Prefault::Small => request.count() <= Self::SMALL,
            Prefault::On => true,
        }
    }
}

/// Lazy attributes: does a private touch of an undecided page decide the chunk around it?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lazy {
    /// No: its page alone.
    Off,
    /// Where that is of use: with two files, and pages that start undecided.
    Auto(Chunk),
    /// Yes, or the backend is refused.
    On(Chunk),
}

/// How long a conversion to private waits for the host unless told otherwise.
pub const DEFAULT_CONVERT_TIMEOUT: Duration = Duration::from_secs(1);

/// What a backend is to be.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BackendConfig {
    /// Its name in messages.
    pub name: String,
    /// Size in bytes: a multiple of [`PAGE_SIZE`], not 0.
    pub size: u64,
    /// How it is to keep its pages; `None` leaves the choice to the library.
    pub mode: Option<Mode>,
    /// Is its memory of a confidential guest's? The library then never chooses [`Mode::Mapped`].
    pub confidential: bool,
    /// Do KVM slots carry the file of [`Mode::Mapped`]? If not, they are ordinary slots over the
    /// mapping.
    pub bind: bool,
    /// Discard policy.
    pub discard: Discard,
    /// The state that pages start in: undecided, or private where the guest's launch demands it.
    pub start: PageState,
    /// Lazy attributes.
    pub lazy: Lazy,
    /// Whether pages that have become private are allocated at once.
    pub prefault: Prefault,
    /// How long a conversion to private waits for pages that the host uses.
    pub convert_timeout: Duration,
}

impl BackendConfig {
    /// For a size in bytes, with what is usual for all else: the library chooses the mode, pages
    /// start undecided and are decided one by one, holes are punched at once.
    pub fn new(name: impl Into<String>, size: u64) -> Self {
        Self {
            name: name.into(),
            size,
            mode: None,
            confidential: false,
            bind: false,
            discard: Discard::Now,
            start: PageState::Undecided,
            lazy: Lazy::Off,
            prefault: Prefault::Off,
            convert_timeout: DEFAULT_CONVERT_TIMEOUT,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_nobody_touches_is_allocated_only_in_small_requests() {
        let request = |pages| GuestPages::new(0, pages).unwrap();
        assert!(Prefault::Small.wants(request(16)));
        assert!(!Prefault::Small.wants(request(17)));
        assert!(Prefault::On.wants(request(1 << 30)));
        assert!(!Prefault::Off.wants(request(1)));
    }
}
