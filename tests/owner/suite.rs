// SPDX-License-Identifier: MIT OR Apache-2.0

//! The tests.

use guestmemfd::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

use crate::machine::{Machine, PAGES, WINDOWS};

type Check = std::result::Result<(), TestCaseError>;

/// What guest and host do with a page of the backend. The numbers are bytes that are written.
#[derive(Clone, Copy, Debug)]
enum Step {
    GuestWrites(u64, u8),
    HostWrites(u64, u8),
    Convert(FilePages, View),
    Discard(FilePages),
}

fn step() -> impl Strategy<Value = Step> {
    let range = || {
        let ends = (0..PAGES, 1..6u64);
        ends.prop_map(|(start, count)| FilePages::new(start, PAGES.min(start + count)).unwrap())
    };
    let view = prop_oneof![Just(View::Shared), Just(View::Private)];
    prop_oneof![
        3 => (0..PAGES, 1..=u8::MAX).prop_map(|(page, byte)| Step::GuestWrites(page, byte)),
        2 => (0..PAGES, 1..=u8::MAX).prop_map(|(page, byte)| Step::HostWrites(page, byte)),
        3 => (range(), view).prop_map(|(pages, view)| Step::Convert(pages, view)),
        1 => range().prop_map(Step::Discard),
    ]
}

/// Where the guest sees a page: in its first window, and in the second if there is one.
fn places(page: u64) -> impl Iterator<Item = u64> {
    let shows = move |(_, first, count): &(u64, u64, u64)| (*first..first + count).contains(&page);
    let windows = WINDOWS.into_iter().filter(shows);
    windows.map(move |(start, first, _)| (start + page - first) * PAGE_SIZE)
}

fn first_place(page: u64) -> u64 {
    places(page).next().unwrap()
}

/// One byte a page, and who may use it.
struct Model([(u8, bool); PAGES as usize]);

impl Model {
    fn page(&mut self, page: u64) -> &mut (u8, bool) {
        &mut self.0[page as usize]
    }

    /// With two files, what a page held stays in the view that it leaves, and goes with it.
    fn set_private(&mut self, page: u64, private: bool, keeps: bool) {
        let page = self.page(page);
        if page.1 != private {
            *page = (if keeps { page.0 } else { 0 }, private);
        }
    }

    fn empty(&mut self, pages: FilePages) {
        for page in pages.start()..pages.end() {
            *self.page(page) = (0, false);
        }
    }
}

/// Guest and host see the same of shared pages, the guest alone sees what it keeps in private ones,
/// and nothing comes back that has been left or discarded.
pub(crate) fn guest_and_host_match_a_plain_model(cases: u32, machine: impl Fn() -> Machine) {
    let mut runner = TestRunner::new(Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    });
    let steps = prop::collection::vec(step(), 1..20);
    let result = runner.run(&steps, |steps| {
        let mut machine = machine();
        let mut model = Model([(0, false); PAGES as usize]);
        steps.into_iter().try_for_each(|step| {
            take(&mut machine, &mut model, step)?;
            compare(&mut machine, &model)
        })
    });
    result.unwrap();
}

fn take(machine: &mut Machine, model: &mut Model, step: Step) -> Check {
    let vm = &machine.vm;
    match step {
        Step::GuestWrites(page, byte) => {
            machine.guest.write(vm, first_place(page), byte);
            model.page(page).0 = byte;
        }
        Step::HostWrites(page, byte) => {
            let result = vm.write(first_place(page), &[byte]);
            prop_assert_eq!(result.is_err(), model.page(page).1, "{:?}", result);
            if result.is_ok() {
                model.page(page).0 = byte;
            }
        }
        Step::Convert(pages, to) => {
            let private = to == View::Private;
            let mode = machine.backend.mode();
            for page in pages.start()..pages.end() {
                let never = match mode {
                    Mode::Mapped => private,
                    // A guest that touched it in its other window would stop the VM.
                    Mode::InPlace => private && places(page).count() > 1,
                    _ => false,
                };
                let guest = GuestPages::from_bytes(first_place(page), PAGE_SIZE).unwrap();
                prop_assert_eq!(vm.convert(guest, to).is_err(), never);
                if !never {
                    model.set_private(page, private, mode == Mode::InPlace);
                }
            }
        }
        Step::Discard(pages) => {
            vm.free_pages(&machine.backend, pages).unwrap();
            model.empty(pages);
        }
    }
    Ok(())
}

fn compare(machine: &mut Machine, model: &Model) -> Check {
    let Machine { vm, guest, .. } = machine;
    for (page, (byte, private)) in (0..).zip(model.0) {
        // The host first: it must not find what the guest's look has just allocated.
        for gpa in places(page) {
            let mut seen = [0xee];
            let result = vm.read(gpa, &mut seen);
            prop_assert_eq!(result.is_err(), private, "{:?}", result);
            let expected = if private { 0xee } else { byte };
            prop_assert_eq!(seen[0], expected, "the host, page {} at {:#x}", page, gpa);
        }
        // Private pages are not to be seen in windows that are not bound.
        let visible = if private { 1 } else { 2 };
        for gpa in places(page).take(visible) {
            let seen = guest.read(vm, gpa);
            prop_assert_eq!(seen, byte, "the guest, page {} at {:#x}", page, gpa);
        }
    }
    Ok(())
}
