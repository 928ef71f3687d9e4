// SPDX-License-Identifier: MIT OR Apache-2.0

//! The hypervisor behind a trait. Nothing outside the KVM owner knows KVM.
//!
//! The guest_memfd library series for the kernel draws the same line with its operations table.

mod kvm;
mod kvm_file;
mod software;

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

pub use kvm::KvmOwner;
pub use software::SoftwareOwner;

use crate::error::{Error, Result};
use crate::pages::ranges::GuestPages;
use crate::pages::states::View;
use crate::views::ViewFile;
use crate::views::in_place::InPlaceFile;

/// Runs the guest, and lets it see one view of each page. Functions that are added have defaults.
pub trait Owner: Debug + Send + Sync {
    /// Can guests of this owner have private memory in a file that keeps attributes itself? Not
    /// unless an owner says so.
    ///
    /// # Errors
    /// What kernel or VM lack, and what would work.
    fn check_in_place(&self) -> Result<()> {
        lacks_in_place("this owner does not know of it")
    }

    /// Can guests of this owner have private memory in a file of its own?
    ///
    /// # Errors
    /// What kernel or VM lack, and what would work.
    fn check_private_memory(&self) -> Result<()>;

    /// Can a guest of this owner that has no private memory, and the host, use one file that the
    /// owner provides?
    ///
    /// # Errors
    /// What kernel or VM lack, and what would work.
    fn check_mapped_memory(&self) -> Result<()>;

    /// A file for both views of a backend, all of it a hole, whose pages start in this view.
    ///
    /// # Errors
    /// The kernel's refusal.
    fn create_in_place_file(&self, bytes: u64, start: View) -> io::Result<Arc<dyn InPlaceFile>> {
        let _ = (bytes, start);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// A file for the private view of a backend. All of it is a hole.
    ///
    /// # Errors
    /// The kernel's refusal.
    fn create_private_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>>;

    /// A file that the host can map, for all memory of a backend whose guest has no private memory.
    /// All of it is a hole.
    ///
    /// # Errors
    /// The kernel's refusal.
    fn create_mapped_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>>;

    /// The guest sees this view of these pages from now on. Not for files that keep attributes
    /// themselves.
    ///
    /// # Errors
    /// The kernel's refusal; nothing has changed then.
    fn set_attributes(&self, guest: GuestPages, view: View) -> io::Result<()>;
}

fn lacks_in_place(found: &str) -> Result<()> {
    Err(Error::Unsupported {
        wanted: "private memory in place".into(),
        found: found.into(),
    })
}
