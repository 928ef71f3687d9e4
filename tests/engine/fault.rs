// SPDX-License-Identifier: MIT OR Apache-2.0

//! Calls that fail when they are told to.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use guestmemfd::owner::SoftwareOwner;
use guestmemfd::views::KernelFile;
use guestmemfd::views::in_place::{InPlaceFile, Refusal};
use guestmemfd::*;
use parking_lot::Mutex;
use rustix::io::Errno;

/// Lets calls fail.
#[derive(Debug, Default)]
pub(crate) struct Fault {
    /// The n-th call from now fails; 0: none does.
    pub(crate) nth: AtomicU64,
    /// And the n-th after that, or all if this is [`LASTING`].
    again: AtomicU64,
    /// How many have failed: they fail for different reasons.
    failed: AtomicU64,
    pub(crate) slow: AtomicBool,
    /// What another vCPU does right before an attribute is set, and right after.
    before_attribute: Act,
    after_attribute: Act,
    /// Of a file that keeps attributes: which pages are private.
    file_attributes: Mutex<Vec<bool>>,
    held: Mutex<Held>,
}

/// A page that somebody holds, and how many more tries find it so.
#[derive(Debug, Default)]
struct Held {
    page: u64,
    left: u64,
    refusals: u64,
}

/// Something that is done once.
#[derive(Default)]
struct Act(Mutex<Option<Box<dyn FnOnce() + Send>>>);

impl std::fmt::Debug for Act {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Act").finish_non_exhaustive()
    }
}

impl Act {
    fn set(&self, act: impl FnOnce() + Send + 'static) {
        *self.0.lock() = Some(Box::new(act));
    }

    fn act(&self) {
        let act = self.0.lock().take();
        if let Some(act) = act {
            act();
        }
    }
}

/// All calls after the first that fails fail too.
pub(crate) const LASTING: u64 = u64::MAX;

const REASONS: [Errno; 5] = [
    Errno::NOMEM,
    Errno::INTR,
    Errno::AGAIN,
    Errno::INVAL,
    Errno::FAULT,
];

impl Fault {
    pub(crate) fn arm(&self, nth: u64) {
        self.arm_pair(nth, 0);
    }

    /// The n-th call from now fails, and the n-th after it (0: none; or [`LASTING`]).
    pub(crate) fn arm_pair(&self, nth: u64, again: u64) {
        self.nth.store(nth, Ordering::SeqCst);
        self.again.store(again, Ordering::SeqCst);
    }

    /// Calls until the next failure; 0 once it has happened.
    pub(crate) fn left(&self) -> u64 {
        self.nth.load(Ordering::SeqCst)
    }

    /// Lets somebody act once, when the next attribute is set: before it for what needs the shared
    /// view, after it for what needs the private one.
    pub(crate) fn at_attribute(&self, view: View, act: impl FnOnce() + Send + 'static) {
        match view {
            View::Shared => self.before_attribute.set(act),
            View::Private => self.after_attribute.set(act),
        }
    }

    /// Which pages are private for a file that keeps attributes.
    pub(crate) fn file_attributes(&self) -> Vec<bool> {
        self.file_attributes.lock().clone()
    }

    /// Somebody uses a page as long as so many tries to make it private ([`LASTING`]: for ever).
    pub(crate) fn hold(&self, page: u64, tries: u64) {
        let (left, refusals) = (tries, 0);
        *self.held.lock() = Held {
            page,
            left,
            refusals,
        };
    }

    /// How many tries have found it held.
    pub(crate) fn refusals(&self) -> u64 {
        self.held.lock().refusals
    }

    fn is_held(&self, pages: FilePages) -> Option<u64> {
        let mut held = self.held.lock();
        if held.left == 0 || !pages.contains(held.page) {
            return None;
        }
        if held.left != LASTING {
            held.left -= 1;
        }
        held.refusals += 1;
        Some(held.page)
    }

    pub(crate) fn nobody_acts(&self) {
        for act in [&self.before_attribute, &self.after_attribute] {
            *act.0.lock() = None;
        }
    }

    /// Every call takes long enough for other threads to get in between.
    pub(crate) fn slow_down(&self) {
        self.slow.store(true, Ordering::SeqCst);
    }

    /// Long enough for a whole conversion.
    fn linger(&self) {
        if self.slow.load(Ordering::SeqCst) {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    pub(crate) fn call(&self) -> io::Result<()> {
        if self.slow.load(Ordering::SeqCst) {
            std::thread::sleep(std::time::Duration::from_micros(50));
        }
        match self.left() {
            0 => Ok(()),
            1 => {
                match self.again.load(Ordering::SeqCst) {
                    LASTING => {}
                    again => self.arm(again),
                }
                let failed = self.failed.fetch_add(1, Ordering::SeqCst);
                Err(REASONS[failed as usize % REASONS.len()].into())
            }
            left => {
                self.nth.store(left - 1, Ordering::SeqCst);
                Ok(())
            }
        }
    }
}

#[derive(Debug)]
pub(crate) struct FaultyOwner(pub(crate) Arc<SoftwareOwner>, pub(crate) Arc<Fault>);

impl Owner for FaultyOwner {
    fn check_private_memory(&self) -> Result<()> {
        self.0.check_private_memory()
    }

    fn create_private_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        self.1.call()?;
        let file = self.0.create_private_file(bytes)?;
        Ok(Arc::new(FaultyFile(file, self.1.clone())))
    }

    fn check_in_place(&self) -> Result<()> {
        self.0.check_in_place()
    }

    fn create_in_place_file(&self, bytes: u64, start: View) -> io::Result<Arc<dyn InPlaceFile>> {
        self.1.call()?;
        let pages = (bytes / PAGE_SIZE) as usize;
        *self.1.file_attributes.lock() = vec![start == View::Private; pages];
        let file = KernelFile::memfd("in-place", bytes)?;
        Ok(Arc::new(FaultyFile(Arc::new(file), self.1.clone())))
    }

    fn check_mapped_memory(&self) -> Result<()> {
        self.0.check_mapped_memory()
    }

    fn create_mapped_file(&self, bytes: u64) -> io::Result<Arc<dyn ViewFile>> {
        self.0.create_mapped_file(bytes)
    }

    fn set_attributes(&self, guest: GuestPages, view: View) -> io::Result<()> {
        self.1.before_attribute.act();
        self.1.call()?;
        self.0.set_attributes(guest, view)?;
        self.1.after_attribute.act();
        Ok(())
    }
}

#[derive(Debug)]
pub(crate) struct FaultyFile(pub(crate) Arc<dyn ViewFile>, pub(crate) Arc<Fault>);

impl ViewFile for FaultyFile {
    fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    fn punch_hole(&self, pages: FilePages) -> io::Result<()> {
        self.1.call()?;
        self.0.punch_hole(pages)
    }

    fn first_data(&self, pages: FilePages) -> io::Result<Option<FilePages>> {
        self.1.call()?;
        self.0.first_data(pages)
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.1.call()?;
        self.0.read_at(offset, bytes)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.1.call()?;
        // In two halves, so that it can be seen if anybody gets in between.
        let (first, rest) = bytes.split_at(bytes.len() / 2);
        self.0.write_at(offset, first)?;
        self.1.linger();
        self.0.write_at(offset + first.len() as u64, rest)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.0.allocated()
    }
}

/// A memfd whose attributes are on record.
impl InPlaceFile for FaultyFile {
    fn set_attributes(&self, pages: FilePages, view: View) -> std::result::Result<(), Refusal> {
        self.1.call().map_err(Refusal::Other)?;
        if let (View::Private, Some(page)) = (view, self.1.is_held(pages)) {
            return Err(Refusal::InUse { page });
        }
        let mut attributes = self.1.file_attributes.lock();
        let (start, end) = (pages.start() as usize, pages.end() as usize);
        attributes[start..end].fill(view == View::Private);
        Ok(())
    }
}
