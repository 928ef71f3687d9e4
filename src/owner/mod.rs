// SPDX-License-Identifier: MIT OR Apache-2.0

//! The hypervisor behind a trait. Nothing outside the KVM owner knows KVM.
//!
//! The guest_memfd library series for the kernel draws the same line with its operations table.

mod kvm;
mod software;

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

pub use kvm::KvmOwner;
pub use software::SoftwareOwner;

use crate::error::Result;
use crate::pages::ranges::GuestPages;
use crate::pages::states::View;
use crate::views::ViewFile;

/// Runs the guest, and lets it see one view of each page.
pub trait Owner: Debug + Send + Sync {
    /// Can guests of this owner have private memory?
    fn check_private_memory(&self) -> Result<()>;

    /// Can a guest of this owner, and the host, use one file that the owner provides?
    fn check_mapped_memory(&self) -> Result<()>;

    /// A file for the private view of a backend. All of it is a hole.
    fn create_private_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>>;

    /// A file that the host can map, for all memory of a backend whose guest has no private memory.
    /// All of it is a hole.
    fn create_mapped_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>>;

    /// The guest sees this view of these pages from now on. On an error nothing has changed.
    fn set_attributes(&self, guest: GuestPages, view: View) -> io::Result<()>;
}
