// SPDX-License-Identifier: MIT OR Apache-2.0

//! The host reads and writes guest memory.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use guestmemfd::owner::SoftwareOwner;
use guestmemfd::views::KernelFile;
use guestmemfd::*;
use parking_lot::{Condvar, Mutex};
use proptest::prelude::*;

use crate::machine::*;
use crate::request::*;

/// Right behind the window at [`HIGH`], the guest sees pages 4..8 again.
const NEXT: u64 = HIGH + 8;

const PAGE: usize = PAGE_SIZE as usize;

fn machine(discard: Discard) -> Machine {
    with_next(Machine::with(discard, PageState::Undecided))
}

pub(crate) fn with_next(machine: Machine) -> Machine {
    let next = guest(NEXT, NEXT + 4);
    let wanted = match machine.backend.mode() {
        Mode::InPlace => Binding::SharedAlias,
        _ => Binding::Unbound,
    };
    let added = machine
        .vm
        .add_window(&machine.backend, next, 4 * PAGE_SIZE, wanted);
    assert_eq!(added.unwrap(), wanted);
    machine
}

/// The page of the backend at a guest page.
fn file_page(page: u64) -> Option<u64> {
    match page {
        NEXT..32 => Some(page - NEXT + 4),
        page => at(page).map(|(page, _)| page),
    }
}

/// What the shared view of a backend holds.
pub(crate) struct Model {
    bytes: Vec<u8>,
    allocated: Vec<bool>,
}

/// What must come of an access.
#[derive(Debug, PartialEq)]
pub(crate) enum Outcome {
    Done,
    Private(u64),
    Nobody(u64),
}

impl Model {
    fn new() -> Self {
        Self {
            bytes: vec![0; PAGES as usize * PAGE],
            allocated: vec![false; PAGES as usize],
        }
    }

    /// Where each byte of an access lies in the backend, and what must come of it.
    pub(crate) fn places(states: &[PageState], gpa: u64, length: usize) -> (Vec<usize>, Outcome) {
        let addresses = || gpa..gpa + length as u64;
        let page_of = |gpa| file_page(gpa / PAGE_SIZE);
        if let Some(gpa) = addresses().find(|gpa| page_of(*gpa).is_none()) {
            return (Vec::new(), Outcome::Nobody(gpa));
        }
        let is_private = |gpa: &u64| {
            page_of(*gpa).is_some_and(|page| states[page as usize] == PageState::Private)
        };
        if let Some(gpa) = addresses().find(is_private) {
            return (Vec::new(), Outcome::Private(gpa));
        }
        let place = |gpa| Some((page_of(gpa)? * PAGE_SIZE + gpa % PAGE_SIZE) as usize);
        (addresses().filter_map(place).collect(), Outcome::Done)
    }

    fn free(&mut self, page: usize) {
        self.bytes[page * PAGE..(page + 1) * PAGE].fill(0);
        self.allocated[page] = false;
    }
}

fn outcome(result: Result<()>) -> Outcome {
    match result {
        Ok(()) => Outcome::Done,
        Err(Error::PrivateMemory { gpa, backend }) if backend == "ram" => Outcome::Private(gpa),
        Err(Error::NoBackend { gpa }) => Outcome::Nobody(gpa),
        Err(error) => panic!("{error}"),
    }
}

#[derive(Clone, Debug)]
enum Step {
    Read(u64, usize),
    Write(u64, usize),
    Ask(Request),
}

fn step() -> impl Strategy<Value = Step> {
    let gpa = (prop_oneof![0u64..33, 98u64..110], 0..PAGE_SIZE);
    let gpa = gpa.prop_map(|(page, byte)| page * PAGE_SIZE + byte);
    let access = (gpa, prop_oneof![0usize..16, 1..3 * PAGE]);
    prop_oneof![
        access
            .clone()
            .prop_map(|(gpa, length)| Step::Read(gpa, length)),
        access.prop_map(|(gpa, length)| Step::Write(gpa, length)),
        request().prop_map(Step::Ask),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Accesses see what is shared, are refused as a whole with the first address that is not, and
    /// allocate what they write and nothing else.
    #[test]
    fn accesses_match_a_plain_model(
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let machine = machine(Discard::Now);
        let mut model = Model::new();
        for (number, step) in (1..).zip(steps) {
            let before = machine.states();
            match step {
                Step::Read(gpa, length) => {
                    let (places, expected) = Model::places(&before, gpa, length);
                    let mut bytes = vec![0xee; length];
                    let result = outcome(machine.vm.read(gpa, &mut bytes));
                    prop_assert_eq!(&result, &expected);
                    let content: Vec<u8> = match result {
                        Outcome::Done => places.iter().map(|at| model.bytes[*at]).collect(),
                        _ => vec![0xee; length],
                    };
                    prop_assert_eq!(bytes, content);
                }
                Step::Write(gpa, length) => {
                    let (places, expected) = Model::places(&before, gpa, length);
                    let bytes: Vec<u8> = (0..length).map(|i| number ^ i as u8).collect();
                    prop_assert_eq!(outcome(machine.vm.write(gpa, &bytes)), expected);
                    for (at, byte) in places.iter().zip(bytes) {
                        model.bytes[*at] = byte;
                        model.allocated[at / PAGE] = true;
                    }
                }
                Step::Ask(Request::Convert(guest, to)) => {
                    let _ = machine.vm.convert(guest, to);
                }
                Step::Ask(Request::Discard(pages)) => {
                    machine.vm.free_pages(&machine.backend, pages).unwrap();
                    (pages.start()..pages.end()).for_each(|page| model.free(page as usize));
                }
            }
            let after = machine.states();
            for page in 0..PAGES as usize {
                if before[page].host_may_use() != after[page].host_may_use() {
                    model.free(page);
                }
                let allocated = !machine.is_hole(View::Shared, page as u64);
                prop_assert_eq!(allocated, model.allocated[page], "page {}", page);
            }
            machine.check_invariants();
        }
    }
}

#[test]
fn an_access_of_no_bytes_is_none() {
    let machine = machine(Discard::Now);
    for gpa in [0, 50 * PAGE_SIZE, u64::MAX] {
        machine.vm.read(gpa, &mut []).unwrap();
        machine.vm.write(gpa, &[]).unwrap();
    }
}

#[test]
fn addresses_that_wrap_are_refused() {
    let machine = machine(Discard::Now);
    for gpa in [u64::MAX, u64::MAX - 1] {
        let error = machine.vm.write(gpa, &[1, 2]).unwrap_err();
        assert!(matches!(error, Error::Range(_)), "{error}");
    }
}

#[test]
fn messages_name_the_address_and_the_backend() {
    let machine = machine(Discard::Now);
    machine.vm.convert(guest(2, 3), View::Private).unwrap();
    let error = machine.vm.read(0x1fff, &mut [0; 8]).unwrap_err();
    let private = "cannot access guest memory at 0x2000: the page is private (backend 'ram')";
    assert_eq!(error.to_string(), private);
    let error = machine.vm.read(0xffff, &mut [0; 8]).unwrap_err();
    let nobody = "cannot access guest memory at 0x10000: no backend owns it";
    assert_eq!(error.to_string(), nobody);
}

#[test]
fn a_kernel_that_refuses_is_named() {
    let machine = machine(Discard::Now);
    machine.fault.arm(1);
    let error = machine.vm.write(0x1008, &[1; 8]).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Transfer {
                offset: 0x1008,
                bytes: 8,
                ..
            }
        ),
        "{error}"
    );
    machine.fault.arm(1);
    let error = machine.vm.read(0x1008, &mut [1; 8]).unwrap_err();
    assert!(matches!(error, Error::Transfer { .. }), "{error}");
}

/// Ends the other threads of a test however this one ends.
pub(crate) struct SetOnDrop<'a>(pub(crate) &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Pages on the move, a host that writes them, and hosts that read them: nothing that was written
/// stays behind in the shared view of a private page, and no read or write ends half-way.
#[test]
fn accesses_and_conversions_of_the_same_pages_exclude_each_other() {
    let machine = machine(Discard::Now);
    machine.fault.slow_down();
    let (machine, done) = (&machine, AtomicBool::new(false));
    let (mut written, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _done = SetOnDrop(&done);
            for round in 0..200 {
                let to = [View::Private, View::Shared][round % 2];
                machine.convert_in_the_end(guest(1, 3), to);
                machine.convert_in_the_end(guest(2, 4), to);
            }
        });
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    match machine.vm.read(PAGE_SIZE, &mut [0; 2 * PAGE]) {
                        Ok(()) | Err(Error::PrivateMemory { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        for byte in (1..=255).cycle() {
            if done.load(Ordering::SeqCst) {
                break;
            }
            match machine.vm.write(PAGE_SIZE, &[byte; 3 * PAGE]) {
                Ok(()) => written += 1,
                Err(Error::PrivateMemory { .. }) => refused += 1,
                Err(error) => panic!("{error}"),
            }
        }
    });
    assert!(
        written > 0 && refused > 0,
        "{written} written, {refused} refused"
    );
    machine.vm.convert(guest(1, 4), View::Private).unwrap();
    machine.check_invariants();
    assert!((1..4).all(|page| machine.is_hole(View::Shared, page)));
}

/// A file that is read by two threads at once, or not at all.
#[derive(Debug)]
struct ReadByTwo {
    file: KernelFile,
    readers: Mutex<u32>,
    came: Condvar,
}

impl ViewFile for ReadByTwo {
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
        let mut readers = self.readers.lock();
        *readers += 1;
        self.came.notify_all();
        let both = |readers: &mut u32| *readers < 2;
        let waited = Duration::from_secs(10);
        match self.came.wait_while_for(&mut readers, both, waited) {
            waited if waited.timed_out() => Err(io::ErrorKind::TimedOut.into()),
            _ => self.file.read_at(offset, bytes),
        }
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_at(offset, bytes)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }
}

#[test]
fn two_threads_read_a_page_at_once() {
    struct Nobody;

    impl Listener for Nobody {}

    let vm = &Vm::new(Arc::new(SoftwareOwner::default()), Box::new(Nobody));
    let file = ReadByTwo {
        file: KernelFile::memfd("shared", PAGE_SIZE).unwrap(),
        readers: Mutex::default(),
        came: Condvar::new(),
    };
    let config = BackendConfig::new("ram", PAGE_SIZE);
    let backend = vm.create_backend_over(config, Arc::new(file)).unwrap();
    vm.add_window(&backend, guest(0, 1), 0, Binding::Bound)
        .unwrap();
    vm.write(0, b"data").unwrap();
    let read = || {
        let mut bytes = [0; 4];
        vm.read(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"data");
    };
    std::thread::scope(|scope| {
        scope.spawn(read);
        scope.spawn(read);
    });
}
