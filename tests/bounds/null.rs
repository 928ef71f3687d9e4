// SPDX-License-Identifier: GPL-2.0-or-later

//! An owner and files that take no time, so that what is left is the library's own. For tests of
//! bounds and for their benchmark.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use guestmemfd::views::KernelFile;
use guestmemfd::{
    BackendConfig, Binding, FilePages, GuestPages, Listener, Owner, PAGE_SIZE, Result, View,
    ViewFile, Vm,
};

/// What the library has asked of its owner and files.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    /// Attributes that were set, and holes that were punched.
    pub(crate) count: AtomicU64,
    /// The page of the guest's whose attribute was set last.
    pub(crate) page: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct NullOwner(pub(crate) Arc<Calls>);

impl Owner for NullOwner {
    fn check_private_memory(&self) -> Result<()> {
        Ok(())
    }

    fn check_mapped_memory(&self) -> Result<()> {
        Ok(())
    }

    fn create_private_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        Ok(Arc::new(NullFile::new(bytes, self.0.clone())?))
    }

    fn create_mapped_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        self.create_private_file(bytes)
    }

    fn set_attributes(&self, guest: GuestPages, _: View) -> io::Result<()> {
        self.0.count.fetch_add(1, Relaxed);
        self.0.page.store(guest.start(), Relaxed);
        Ok(())
    }
}

/// A file that stays empty.
#[derive(Debug)]
pub(crate) struct NullFile {
    file: KernelFile,
    calls: Arc<Calls>,
}

impl NullFile {
    pub(crate) fn new(bytes: u64, calls: Arc<Calls>) -> io::Result<Self> {
        let file = KernelFile::memfd("null", bytes)?;
        Ok(Self { file, calls })
    }
}

impl ViewFile for NullFile {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.fd()
    }

    fn punch_hole(&self, _: FilePages) -> io::Result<()> {
        self.calls.count.fetch_add(1, Relaxed);
        Ok(())
    }

    fn first_data(&self, _: FilePages) -> io::Result<Option<FilePages>> {
        Ok(None)
    }

    fn read_at(&self, _: u64, bytes: &mut [u8]) -> io::Result<()> {
        bytes.fill(0);
        Ok(())
    }

    fn write_at(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Ok(())
    }

    fn allocated(&self) -> io::Result<u64> {
        Ok(0)
    }
}

/// A VM whose backend of `pages` pages the guest sees from address 0 on.
pub(crate) fn machine(
    pages: u64,
    calls: Arc<Calls>,
    listener: Box<dyn Listener>,
) -> Result<(Vm, Arc<guestmemfd::Backend>)> {
    let vm = Vm::new(Arc::new(NullOwner(calls.clone())), listener);
    let config = BackendConfig::new("ram", pages * PAGE_SIZE);
    let shared = NullFile::new(config.size, calls).expect("a memfd");
    let backend = vm.create_backend_over(config, Arc::new(shared))?;
    let all = GuestPages::new(0, pages).expect("a range");
    vm.add_window(&backend, all, 0, Binding::Bound)?;
    Ok((vm, backend))
}

/// Moves every second page of a range, so that no two neighbours are alike.
pub(crate) fn scatter(vm: &Vm, guest: GuestPages, to: View) -> Result<()> {
    for page in (guest.start()..guest.end()).step_by(2) {
        vm.convert(GuestPages::new(page, page + 1).expect("a range"), to)?;
    }
    Ok(())
}
