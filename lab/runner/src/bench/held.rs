// SPDX-License-Identifier: GPL-2.0-or-later
//! What it costs to be refused: somebody holds a page for longer than a request waits. No guest takes
//! part: in processor time, because a request that waits mostly sleeps.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use guestmemfd::owner::KvmOwner;
use guestmemfd::views::in_place::{InPlaceFile, Refusal};
use guestmemfd::{
    Backend, BackendConfig, Binding, Error, FilePages, GuestPages, Owner, PAGE_SIZE, View,
    ViewFile, Views, Vm,
};
use rustix::time::{ClockId, clock_gettime};

use super::alone::{Alone, Quiet};
use super::{Subject, measured, nanoseconds};
use crate::kernel::held::hold;
use crate::kernel::memory::Map;

/// Rows, and pages of a request, of which the last is held.
const CASES: [(&str, u64); 2] = [("held-4k", 1), ("held-2m", 512)];

/// The longest a request waits unless told otherwise.
const TIMEOUT: Duration = Duration::from_secs(1);

pub(super) fn measure(subject: Subject) -> Result<()> {
    for (row, count) in CASES {
        let machine = Alone::new()?;
        let owner = CountingOwner {
            kvm: machine.owner()?,
            tries: Arc::default(),
        };
        let tries = Arc::clone(&owner.tries);
        let vm = Vm::new(Arc::new(owner), Box::new(Quiet));
        let mut config = BackendConfig::new("ram0", count * PAGE_SIZE);
        config.convert_timeout = TIMEOUT;
        let backend = vm.create_backend(config)?;
        let all = GuestPages::new(0, count).context("no pages")?;
        vm.add_window(&backend, all, 0, Binding::Bound)?;

        let views = backend.views();
        let file = views.file(View::Shared);
        let map = Map::file(file.fd(), count * PAGE_SIZE).context("mmap")?;
        (0..count).for_each(|page| map.write(page, 1));
        let pipe = hold(&map, count - 1)?;
        let asked = |vm: &Vm| match subject {
            Subject::Floor | Subject::FloorInPlace => once(&backend, count),
            Subject::Ours | Subject::Upstream => until_the_end(vm, all),
        };
        // The first one also unmaps what nobody will map again.
        once(&backend, count)?;
        tries.store(0, Ordering::Relaxed);
        let before = processor_time()?;
        asked(&vm)?;
        measured(row, "time", 1, nanoseconds(processor_time()? - before)?);
        measured(row, "tries", 1, tries.load(Ordering::Relaxed));
        drop(pipe);
    }
    Ok(())
}

/// Asks the kernel, once.
fn once(backend: &Backend, count: u64) -> Result<()> {
    let pages = FilePages::new(0, count).context("no pages")?;
    let Views::InPlace(in_place) = &*backend.views() else {
        bail!("this kernel does not convert in place");
    };
    match in_place.file.set_attributes(pages, View::Private) {
        Err(Refusal::InUse { page }) if page == count - 1 => Ok(()),
        other => bail!("the kernel has answered {other:?}"),
    }
}

/// Asks the library, which tries until it has waited long enough.
fn until_the_end(vm: &Vm, all: GuestPages) -> Result<()> {
    match vm.convert(all, View::Private) {
        Err(Error::Held { .. }) => Ok(()),
        other => bail!("the library has answered {other:?}"),
    }
}

fn processor_time() -> Result<Duration> {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).context("a clock")
}

/// KVM as the owner, whose files count how often they are asked.
#[derive(Debug)]
struct CountingOwner {
    kvm: KvmOwner,
    tries: Arc<AtomicU64>,
}

impl Owner for CountingOwner {
    fn check_in_place(&self) -> guestmemfd::Result<()> {
        self.kvm.check_in_place()
    }

    fn check_private_memory(&self) -> guestmemfd::Result<()> {
        self.kvm.check_private_memory()
    }

    fn check_mapped_memory(&self) -> guestmemfd::Result<()> {
        self.kvm.check_mapped_memory()
    }

    fn create_in_place_file(&self, bytes: u64, start: View) -> io::Result<Arc<dyn InPlaceFile>> {
        Ok(Arc::new(CountingFile {
            file: self.kvm.create_in_place_file(bytes, start)?,
            tries: Arc::clone(&self.tries),
        }))
    }

    fn create_private_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        self.kvm.create_private_file(bytes)
    }

    fn create_mapped_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        self.kvm.create_mapped_file(bytes)
    }

    fn set_attributes(&self, guest: GuestPages, view: View) -> io::Result<()> {
        self.kvm.set_attributes(guest, view)
    }
}

#[derive(Debug)]
struct CountingFile {
    file: Arc<dyn InPlaceFile>,
    tries: Arc<AtomicU64>,
}

impl InPlaceFile for CountingFile {
    fn set_attributes(&self, pages: FilePages, view: View) -> std::result::Result<(), Refusal> {
        self.tries.fetch_add(1, Ordering::Relaxed);
        self.file.set_attributes(pages, view)
    }
}

impl ViewFile for CountingFile {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.fd()
    }

    fn punch_hole(&self, pages: FilePages) -> io::Result<()> {
        self.file.punch_hole(pages)
    }

    fn first_data(&self, pages: FilePages) -> io::Result<Option<FilePages>> {
        self.file.first_data(pages)
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_at(offset, bytes)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_at(offset, bytes)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }
}
