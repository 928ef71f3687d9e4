// SPDX-License-Identifier: MIT OR Apache-2.0

//! Guest memory in KVM guest_memfd: which page is private to the guest, which is shared with the
//! host, and moving pages between the two.
//!
//! A [`Vm`] holds an [`Owner`] (the hypervisor), windows (where pages appear in guest physical
//! space) and [backends](backend). A [`Backend`] has two views of each of its pages, private and
//! shared, and a [state](pages::states) for each. A guest's hypercall and a guest's memory fault
//! both end in [`Vm::convert`]. The host reaches guest memory by [`Vm::read`] and [`Vm::write`];
//! for the devices of rust-vmm, [`Vm`] is a [`GuestMemory`](vm_memory::GuestMemory). What the
//! library asks of its user, and tells him, goes through a [`Listener`].
//!
//! No thread is started unless somebody asks for one, by `StrayGuard::spawn` of the feature
//! `guard`.
//!
//! C programs use it through the header `guestmemfd.h`, see [`ffi`].

#![deny(unsafe_code)]
#![warn(missing_docs, clippy::missing_errors_doc)]

pub mod backend;
pub mod error;
#[doc(hidden)] // for benchmarks
pub mod exclusion;
#[allow(unsafe_code)] // the C border: raw pointers from C
pub mod ffi;
#[cfg(feature = "guard")]
pub mod guard;
pub mod listener;
pub mod owner;
pub mod pages;
pub mod views;
pub mod vm;
#[doc(hidden)] // for benchmarks, but for what is named below
pub mod windows;

pub use backend::map::StateMap;
pub use backend::stats::BackendStats;
pub use backend::{Backend, BackendConfig, Discard, Lazy, Prefault};
pub use error::{Error, Result};
#[cfg(feature = "guard")]
pub use guard::{GuardThread, StrayGuard};
pub use listener::{Listener, Stray};
pub use owner::Owner;
pub use pages::ranges::{FilePages, GuestPages, PAGE_SIZE, RangeError};
pub use pages::states::{PageState, View};
pub use views::{Mode, ViewFile, Views};
pub use vm::Vm;
pub use vm::access::Pin;
pub use vm::guest_memory::SlicePin;
/// The version whose traits [`Vm`] implements.
pub use vm_memory;
pub use windows::{Binding, Overlap};
