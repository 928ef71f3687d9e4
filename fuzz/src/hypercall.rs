// SPDX-License-Identifier: GPL-2.0-or-later

//! What a guest asks for: hypercalls and memory faults with any arguments, between discards, pins and
//! accesses of the host's.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use guestmemfd::backend::reach::Chunk;
use guestmemfd::owner::SoftwareOwner;
use guestmemfd::{
    Backend, BackendConfig, Binding, FilePages, GuestPages, Lazy, Listener, Mode, PAGE_SIZE,
    PageState, Pin, View, Vm,
};

/// Where the guest sees what: guest page, pages, backend, its page, binding.
type Shows = (u64, u64, usize, u64, Binding);

/// Two backends lie side by side, and some pages appear twice.
const WINDOWS: [Shows; 5] = [
    (0, 16, 0, 0, Binding::Bound),
    (16, 4, 1, 0, Binding::Bound),
    (20, 8, 0, 16, Binding::Bound),
    (30, 4, 1, 4, Binding::Bound),
    (40, 8, 0, 0, Binding::Unbound),
];

/// Pages of each backend.
const PAGES: [u64; 2] = [24, 8];

/// Where nothing is, the guest may share memory.
struct Gaps;

impl Listener for Gaps {
    fn gap(&self, _: GuestPages, to: View) -> io::Result<()> {
        match to {
            View::Shared => Ok(()),
            View::Private => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

/// The states of all pages.
type States = [Vec<PageState>; 2];

struct Machine {
    vm: Vm,
    owner: Arc<SoftwareOwner>,
    backends: [Arc<Backend>; 2],
    pins: Vec<Pin>,
}

impl Machine {
    fn new(mode: Mode) -> Self {
        let owner = match mode {
            Mode::InPlace => SoftwareOwner::in_place(),
            _ => SoftwareOwner::default(),
        };
        let owner = Arc::new(owner);
        let vm = Vm::new(owner.clone(), Box::new(Gaps));
        let backends = PAGES.map(|pages| {
            let mut config = BackendConfig::new("ram", pages * PAGE_SIZE);
            config.mode = Some(mode);
            config.convert_timeout = Duration::ZERO;
            let chunk = Chunk::from_bytes(8 * PAGE_SIZE);
            config.lazy = chunk.map_or(Lazy::Off, Lazy::Auto);
            vm.create_backend(config).expect("two small backends")
        });
        for (page, count, backend, offset, binding) in WINDOWS {
            let guest = GuestPages::new(page, page + count).expect("a window has pages");
            let added = vm.add_window(&backends[backend], guest, offset * PAGE_SIZE, binding);
            added.expect("windows do not overlap");
        }
        let pins = Vec::new();
        Self {
            vm,
            owner,
            backends,
            pins,
        }
    }

    fn states(&self) -> States {
        self.backends.each_ref().map(|backend| {
            let pages = 0..backend.pages().count();
            pages.map(|page| backend.state(page)).collect()
        })
    }

    /// What must hold between requests.
    fn check(&self, states: &States) {
        for (backend, states) in self.backends.iter().zip(states) {
            assert!(!states.contains(&PageState::Transition));
            let stats = backend.stats();
            for (state, bytes) in PageState::ALL.iter().zip(stats.state_bytes) {
                let count = states.iter().filter(|s| *s == state).count() as u64;
                assert_eq!(bytes, count * PAGE_SIZE, "{state:?}");
            }
            assert_eq!(stats.owed_holes, 0, "no call of the kernel's has failed");
            if backend.mode() != Mode::InPlace {
                self.check_holes(backend, states);
            }
        }
        let pages = self.pins.iter().map(|pin| (pin.backend(), pin.pages()));
        for (backend, pages) in pages {
            let mut pinned = pages.start()..pages.end();
            assert!(pinned.all(|page| backend.state(page).host_may_use()));
        }
        if self.backends[0].mode() != Mode::InPlace {
            self.check_attributes(states);
        }
    }

    /// The view that a page is not in is empty.
    fn check_holes(&self, backend: &Backend, states: &[PageState]) {
        let views = backend.views();
        for (page, state) in (0..).zip(states) {
            let left = match state {
                PageState::Private => View::Shared,
                _ => View::Private,
            };
            let pages = FilePages::new(page, page + 1).expect("one page");
            let data = views.file(left).first_data(pages);
            assert_eq!(data.expect("a memfd"), None, "{left} view of page {page}");
        }
    }

    /// The guest sees what the states say, wherever it sees a page.
    fn check_attributes(&self, states: &States) {
        for (first, count, backend, offset, _) in WINDOWS {
            for page in 0..count {
                let private = states[backend][(offset + page) as usize] == PageState::Private;
                let seen = self.owner.view(first + page) == View::Private;
                assert_eq!(seen, private, "guest page {}", first + page);
            }
        }
    }

    fn step(&mut self, bytes: &mut Unstructured) -> Result<()> {
        let before = self.states();
        match bytes.int_in_range(0..=7)? {
            0..=2 => self.hypercall(bytes, &before)?,
            3 | 4 => self.fault(bytes, &before)?,
            5 => self.free(bytes)?,
            6 => self.access(bytes)?,
            _ => self.pin(bytes)?,
        }
        self.check(&self.states());
        Ok(())
    }

    fn hypercall(&self, bytes: &mut Unstructured, before: &States) -> Result<()> {
        let (gpa, pages) = (address(bytes)?, count(bytes)?);
        let attributes = match bytes.ratio(7, 8)? {
            true => bytes.int_in_range(0..=2)? | bytes.int_in_range(0..=1)? << 4,
            false => bytes.arbitrary()?,
        };
        let result = self.vm.map_gpa_range(gpa, pages, attributes);
        let view = match attributes & 0x10 {
            0 => View::Shared,
            _ => View::Private,
        };
        let is_valid = attributes & !0x10 <= 2 && gpa % PAGE_SIZE == 0 && pages > 0;
        let request = gpa / PAGE_SIZE..(gpa / PAGE_SIZE).saturating_add(pages);
        let expected = expect(before, request.clone(), view)
            .filter(|_| is_valid && !self.shows_unbound(&request, view));
        match (&result, expected) {
            (Ok(changed), Some(expected)) => {
                assert_eq!(self.states(), expected);
                let differ =
                    |(a, b): (&Vec<_>, &Vec<_>)| a.iter().zip(b).filter(|(a, b)| a != b).count();
                let differing: usize = before.iter().zip(&expected).map(differ).sum();
                assert_eq!(*changed, differing as u64);
            }
            (Ok(_), None) => panic!("{gpa:#x}, {pages}, {attributes:#x} should be refused"),
            (Err(error), expected) => {
                assert_eq!(self.states(), *before, "{error}");
                // Not even the kernel has memory beyond that.
                let is_small = request.end < 1 << 40;
                assert!(
                    expected.is_none() || !is_small || !self.pins.is_empty(),
                    "{error}"
                );
            }
        }
        Ok(())
    }

    /// In place, pages that show through an unbound window as well cannot be private.
    fn shows_unbound(&self, request: &Range<u64>, to: View) -> bool {
        let file = |&(first, count, backend, offset, _): &Shows| {
            let start = request.start.max(first) - first + offset;
            let end = request.end.min(first + count).saturating_sub(first) + offset;
            (backend, start..end)
        };
        let is_unbound = |window: &&Shows| window.4 != Binding::Bound;
        let everywhere =
            |&(_, count, backend, offset, _): &Shows| (backend, offset..offset + count);
        let mut unbound = WINDOWS.iter().filter(is_unbound).map(everywhere);
        let meet = |a: &(usize, Range<u64>), b: &(usize, Range<u64>)| {
            a.0 == b.0 && a.1.start.max(b.1.start) < a.1.end.min(b.1.end)
        };
        let in_place = self.backends[0].mode() == Mode::InPlace;
        in_place
            && to == View::Private
            && unbound.any(|unbound| WINDOWS.iter().map(file).any(|asked| meet(&asked, &unbound)))
    }

    fn fault(&self, bytes: &mut Unstructured, before: &States) -> Result<()> {
        let gpa = address(bytes)?;
        let size = match bytes.ratio(7, 8)? {
            true => count(bytes)?.saturating_mul(PAGE_SIZE),
            false => bytes.arbitrary()?,
        };
        let intent = *bytes.choose(&View::BOTH)?;
        let result = self.vm.memory_fault(gpa, size, intent);
        let after = self.states();
        if result.is_err() {
            assert_eq!(after, *before);
            return Ok(());
        }
        // What was decided changes only where it was touched.
        let touched = gpa / PAGE_SIZE..gpa.saturating_add(size).div_ceil(PAGE_SIZE);
        for (index, (before, after)) in before.iter().zip(&after).enumerate() {
            for (page, (before, after)) in (0..).zip(before.iter().zip(after)) {
                let is_touched = WINDOWS.iter().any(|&(first, count, backend, offset, _)| {
                    let at = (first + page).wrapping_sub(offset);
                    backend == index
                        && (first..first + count).contains(&at)
                        && touched.contains(&at)
                });
                let decides = *before == PageState::Undecided && *after == PageState::Private;
                assert!(is_touched || before == after || decides, "page {page}");
            }
        }
        Ok(())
    }

    fn free(&mut self, bytes: &mut Unstructured) -> Result<()> {
        let backend = bytes.choose(&self.backends)?;
        let pages = file_pages(bytes, backend)?;
        // The host frees nothing that it uses.
        self.pins.clear();
        self.vm.free_pages(backend, pages).expect("nothing fails");
        for page in pages.start()..pages.end() {
            assert_eq!(backend.state(page), PageState::Undecided);
        }
        Ok(())
    }

    fn access(&self, bytes: &mut Unstructured) -> Result<()> {
        let gpa = address(bytes)?.wrapping_add(bytes.int_in_range(0..=PAGE_SIZE)?);
        let mut data = vec![0x5a; bytes.int_in_range(0..=3 * PAGE_SIZE as usize)?];
        if self.vm.write(gpa, &data).is_ok() {
            data.fill(0);
            self.vm.read(gpa, &mut data).expect("it can be written");
            assert!(data.iter().all(|byte| *byte == 0x5a));
        }
        Ok(())
    }

    fn pin(&mut self, bytes: &mut Unstructured) -> Result<()> {
        if self.pins.len() == 4 || bytes.arbitrary()? {
            self.pins.pop();
            return Ok(());
        }
        let backend = bytes.choose(&self.backends)?.clone();
        let pages = file_pages(bytes, &backend)?;
        let may_use = (pages.start()..pages.end()).all(|page| backend.state(page).host_may_use());
        let pin = self.vm.hold(&backend, pages);
        assert_eq!(pin.is_ok(), may_use);
        self.pins.extend(pin);
        Ok(())
    }
}

/// An address near the windows, or any.
fn address(bytes: &mut Unstructured) -> Result<u64> {
    match bytes.ratio(7, 8)? {
        true => Ok(bytes.int_in_range(0..=50)? * PAGE_SIZE),
        false => bytes.arbitrary(),
    }
}

/// A few pages, or any number.
fn count(bytes: &mut Unstructured) -> Result<u64> {
    match bytes.ratio(7, 8)? {
        true => bytes.int_in_range(0..=20),
        false => bytes.arbitrary(),
    }
}

fn file_pages(bytes: &mut Unstructured, backend: &Backend) -> Result<FilePages> {
    let last = backend.pages().count() - 1;
    let start = bytes.int_in_range(0..=last)?;
    let end = bytes.int_in_range(start..=last)? + 1;
    Ok(FilePages::new(start, end).expect("it is not empty"))
}

/// The states after a request for a view of guest pages; none if it is to be refused.
fn expect(before: &States, request: Range<u64>, to: View) -> Option<States> {
    let mut after = before.clone();
    let mut shown = 0;
    for (first, count, backend, offset, binding) in WINDOWS {
        let start = request.start.max(first);
        let end = request.end.min(first + count);
        if start >= end {
            continue;
        }
        if to == View::Private && binding != Binding::Bound {
            return None;
        }
        let at = |page: u64| (page - first + offset) as usize;
        after[backend][at(start)..at(end)].fill(to.into());
        shown += end - start;
    }
    let has_gaps = shown < request.end - request.start;
    (to == View::Shared || !has_gaps).then_some(after)
}

/// Makes requests as long as there are bytes for them.
pub fn try_bytes(bytes: &[u8]) {
    let mut bytes = Unstructured::new(bytes);
    let mode = match bytes.arbitrary() {
        Ok(true) => Mode::InPlace,
        _ => Mode::Private,
    };
    let mut machine = Machine::new(mode);
    while !bytes.is_empty() && machine.step(&mut bytes).is_ok() {}
}
