// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a guest asks for: by hypercall, or by touching memory. Both end in [`Vm::convert`].
//!
//! The hypercall is x86's alone; memory faults are the same on all architectures.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::backend::Backend;
use crate::backend::stats::{Counters, Latencies};
use crate::error::{Error, Result};
use crate::pages::ranges::GuestPages;
use crate::pages::states::View;
use crate::vm::Vm;
use crate::vm::convert::Decide;
use crate::windows::Part;

/// `KVM_MAP_GPA_RANGE_ENCRYPTED` of `arch/x86/include/uapi/asm/kvm_para.h`.
const MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;

/// The page sizes of the same header: 4 KiB, 2 MiB, 1 GiB. A hint that changes nothing here.
const MAP_GPA_RANGE_PAGE_SIZES: u64 = 2;

impl Vm {
    /// Serves `KVM_HC_MAP_GPA_RANGE` (Documentation/virt/kvm/x86/hypercalls.rst) with the arguments
    /// as the guest gave them. Returns how many pages have changed.
    ///
    /// # Errors
    /// [`Error::UnknownAttributes`], [`Error::Range`], and those of [`Vm::convert`].
    pub fn map_gpa_range(&self, gpa: u64, pages: u64, attributes: u64) -> Result<u64> {
        let backend = self.backend_at(gpa);
        let result = parse_map_gpa_range(gpa, pages, attributes)
            .and_then(|(guest, to)| self.map_pages(backend.as_deref(), guest, to));
        count(backend.as_deref(), result, |counters| {
            counters.hypercalls.fetch_add(1, Ordering::Relaxed);
        })
    }

    fn map_pages(&self, backend: Option<&Backend>, guest: GuestPages, to: View) -> Result<u64> {
        let changed = self.watch(backend, guest, to, || self.convert(guest, to))?;
        let wants = |backend: &Backend| backend.config().prefault.wants(guest);
        if changed > 0 && to == View::Private && backend.is_some_and(wants) {
            self.listener.call(|user| user.prefault(guest));
        }
        Ok(changed)
    }

    /// Serves `KVM_EXIT_MEMORY_FAULT`. Returns how many pages have changed.
    ///
    /// `intent` is the view that the access asks for. Only the shared view appears in a window that
    /// is not bound, so an access there asks for that one, whatever the exit says.
    ///
    /// # Errors
    /// [`Error::Range`], and those of [`Vm::convert`] but [`Error::Pinned`] and [`Error::Held`]:
    /// the guest touches the page again, and waits again.
    pub fn memory_fault(&self, gpa: u64, size: u64, intent: View) -> Result<u64> {
        let guest = GuestPages::from_bytes(gpa, size)?;
        let unbound = |part: &Part| matches!(part, Part::Window(w) if !w.is_bound());
        let to = match intent {
            View::Private if !self.parts(guest).0.iter().any(unbound) => View::Private,
            _ => View::Shared,
        };
        let decide = match to {
            View::Private => Decide::Around,
            View::Shared => Decide::Exactly,
        };
        let backend = self.backend_at(gpa);
        let serve = || match self.convert_with(guest, to, decide) {
            // The window has changed meanwhile.
            Err(Error::Unbound { .. }) => self.convert(guest, View::Shared),
            // It may be a neighbour's trouble, or there may be memory for a single page.
            Err(error) if decide == Decide::Around && error.may_be_a_neighbours() => {
                self.convert(guest, to)
            }
            result => result,
        };
        let result = match self.watch(backend.as_deref(), guest, to, serve) {
            // The guest touches it again, and waits again. The listener has been told.
            Err(Error::Pinned { .. } | Error::Held { .. }) => Ok(0),
            result => result,
        };
        count(backend.as_deref(), result, |counters| {
            counters.faults.add(to, 1);
        })
    }

    /// Has a request served, measures that if somebody wants to know, and tells if it fails through
    /// no fault of the guest's.
    fn watch(
        &self,
        backend: Option<&Backend>,
        guest: GuestPages,
        to: View,
        serve: impl FnOnce() -> Result<u64>,
    ) -> Result<u64> {
        let latencies = backend.map(|backend| &backend.counters().latencies);
        let started = latencies.and_then(Latencies::start);
        let result = serve();
        match (&result, latencies) {
            (Ok(1..), Some(latencies)) => latencies.end(started, to),
            (Err(error), _) if error.is_failure() => {
                self.listener
                    .call(|user| user.failed(backend, guest, to, error));
            }
            _ => {}
        }
        result
    }

    fn backend_at(&self, gpa: u64) -> Option<Arc<Backend>> {
        let page = GuestPages::covering_bytes(gpa, 1)?;
        let id = self.places.read().windows.at(page)?.backend;
        self.backend(id)
    }
}

fn parse_map_gpa_range(gpa: u64, pages: u64, attributes: u64) -> Result<(GuestPages, View)> {
    if attributes & !MAP_GPA_RANGE_ENCRYPTED > MAP_GPA_RANGE_PAGE_SIZES {
        return Err(Error::UnknownAttributes { attributes });
    }
    let guest = GuestPages::from_address_and_pages(gpa, pages)?;
    let view = match attributes & MAP_GPA_RANGE_ENCRYPTED {
        0 => View::Shared,
        _ => View::Private,
    };
    Ok((guest, view))
}

/// Counts a request that has come to its end. One that was interrupted comes again.
fn count<T>(
    backend: Option<&Backend>,
    result: Result<T>,
    request: impl Fn(&Counters),
) -> Result<T> {
    let counters = backend.map(|backend| backend.counters());
    match (&result, counters) {
        (Err(Error::Interrupted { .. }), _) | (_, None) => {}
        (Ok(_), Some(counters)) => request(counters),
        (Err(_), Some(counters)) => {
            request(counters);
            counters.refused.fetch_add(1, Ordering::Relaxed);
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_that_the_abi_does_not_define_are_refused() {
        for attributes in [3, 4, 8, 15, 0x20, 0x13, 1 << 63, u64::MAX] {
            assert!(
                parse_map_gpa_range(0, 1, attributes).is_err(),
                "{attributes:#x}"
            );
        }
        for (attributes, view) in [
            (0, View::Shared),
            (2, View::Shared),
            (0x10, View::Private),
            (0x11, View::Private),
        ] {
            assert_eq!(parse_map_gpa_range(0, 1, attributes).unwrap().1, view);
        }
    }
}
