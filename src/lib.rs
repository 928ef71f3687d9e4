// SPDX-License-Identifier: GPL-2.0-or-later

//! Guest memory in KVM guest_memfd: which page is private to the guest, which is shared with the
//! host, and moving pages between the two.
//!
//! A [`Vm`] holds an [`Owner`] (the hypervisor), a table of [windows](window) (where pages appear in
//! guest physical space) and [backends](backend). A [`Backend`] has two views of each of its pages,
//! private (guest_memfd) and shared (memfd), and a [state](state) for each. A guest's hypercall and
//! a guest's memory fault both end in [`Vm::convert`]. The host reaches guest memory by
//! [`Vm::read`] and [`Vm::write`].
//!
//! C programs use it through the header `guestmemfd.h`, see [`ffi`].

#![deny(unsafe_code)]
#![warn(missing_docs)]

mod access;
pub mod addr;
pub mod backend;
pub mod backing;
pub mod claim;
pub mod convert;
pub mod error;
#[allow(unsafe_code)] // the C border: raw pointers from C
pub mod ffi;
pub mod guard;
pub mod lazy;
pub mod listener;
mod mapped_file;
mod moves;
pub mod owner;
pub mod page_set;
mod pins;
pub mod request;
pub mod state;
mod state_map;
pub mod stats;
mod sync;
mod userfault;
pub mod vm;
pub mod window;
mod worker;
mod zeroed;

pub use addr::{FilePages, GuestPages, PAGE_SIZE};
pub use backend::{Backend, BackendConfig, Discard, Prefault};
pub use backing::{Backing, Mode, ViewFile};
pub use error::{Error, Result};
pub use guard::{Guard, Stray};
pub use listener::Listener;
pub use owner::Owner;
pub use state::{PageState, View};
pub use state_map::StateMap;
pub use stats::BackendStats;
pub use vm::Vm;
