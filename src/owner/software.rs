// SPDX-License-Identifier: MIT OR Apache-2.0

//! An owner without a hypervisor: it remembers attributes and keeps private pages in a memfd. For
//! tests, and for machines without KVM.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use super::Owner;
use crate::error::Result;
use crate::pages::ranges::{GuestPages, GuestSpace};
use crate::pages::set::PageSet;
use crate::pages::states::View;
use crate::views::{KernelFile, ViewFile};

/// An owner without a hypervisor.
#[derive(Debug, Default)]
pub struct SoftwareOwner {
    private: Mutex<PageSet<GuestSpace>>,
}

impl SoftwareOwner {
    /// The view that a guest would see of a page.
    pub fn view(&self, page: u64) -> View {
        let set = GuestPages::new(page, page + 1)
            .is_some_and(|page| !self.private.lock().within(page).is_empty());
        if set { View::Private } else { View::Shared }
    }
}

impl Owner for SoftwareOwner {
    fn check_private_memory(&self) -> Result<()> {
        Ok(())
    }

    fn check_mapped_memory(&self) -> Result<()> {
        Ok(())
    }

    fn create_private_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        Ok(Arc::new(KernelFile::memfd("guestmemfd-private", bytes)?))
    }

    fn create_mapped_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        Ok(Arc::new(KernelFile::memfd("guestmemfd-mapped", bytes)?))
    }

    fn set_attributes(&self, guest: GuestPages, view: View) -> io::Result<()> {
        let mut private = self.private.lock();
        match view {
            View::Private => private.insert(guest),
            View::Shared => private.remove(guest),
        }
        Ok(())
    }
}
