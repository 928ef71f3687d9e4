// SPDX-License-Identifier: MIT OR Apache-2.0

//! Debts: what must be made good before a page moves again. The kernel has refused something that a
//! conversion could not wait for; the page's state is right, but what lies behind it may not be.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::backend::stats::ByView;
use crate::pages::ranges::{FilePages, FileSpace};
use crate::pages::set::PageSet;
use crate::pages::states::View;

/// The debts of a backend. Those of a page change only under a claim of it.
#[derive(Debug, Default)]
pub(super) struct Debts {
    /// Mostly there are none, and to know that takes no lock.
    any: AtomicBool,
    owed: Mutex<Owed>,
}

#[derive(Debug, Default)]
struct Owed {
    /// Pages that are still allocated in a view that they have left.
    holes: ByView<PageSet<FileSpace>>,
    /// Pages whose attributes may not follow their state.
    doubtful: PageSet<FileSpace>,
}

impl Debts {
    /// Looks at what is owed; `none` where nothing is.
    fn read<T>(&self, none: T, look: impl FnOnce(&Owed) -> T) -> T {
        match self.any.load(Ordering::Acquire) {
            true => look(&self.owed.lock()),
            false => none,
        }
    }

    fn change(&self, change: impl FnOnce(&mut Owed)) {
        let mut owed = self.owed.lock();
        change(&mut owed);
        let holes = &owed.holes;
        let sets = [
            holes.of(View::Shared),
            holes.of(View::Private),
            &owed.doubtful,
        ];
        let any = sets.iter().any(|set| !set.is_empty());
        self.any.store(any, Ordering::Release);
    }

    /// A hole could not be punched.
    pub(super) fn owe_hole(&self, pages: FilePages, view: View) {
        self.change(|owed| owed.holes.of_mut(view).insert(pages));
    }

    /// It has been punched.
    pub(super) fn hole_punched(&self, pages: FilePages, view: View) {
        if self.any.load(Ordering::Acquire) {
            self.change(|owed| owed.holes.of_mut(view).remove(pages));
        }
    }

    /// The first of some pages whose hole is owed.
    pub(super) fn first_hole(&self, pages: FilePages, view: View) -> Option<FilePages> {
        self.read(None, |owed| owed.holes.of(view).first_in(pages))
    }

    /// Bytes of holes that are owed.
    pub(super) fn hole_bytes(&self) -> u64 {
        self.read(0, |owed| {
            owed.holes.of(View::Shared).bytes() + owed.holes.of(View::Private).bytes()
        })
    }

    /// Attributes may not follow the states of these pages.
    pub(super) fn doubt_attributes(&self, pages: FilePages) {
        self.change(|owed| owed.doubtful.insert(pages));
    }

    /// They do.
    pub(super) fn attributes_are_right(&self, pages: FilePages) {
        if self.any.load(Ordering::Acquire) {
            self.change(|owed| owed.doubtful.remove(pages));
        }
    }

    /// The first of some pages whose attributes may not follow their state.
    pub(super) fn first_doubtful(&self, pages: FilePages) -> Option<FilePages> {
        self.read(None, |owed| owed.doubtful.first_in(pages))
    }

    /// All of it is void: the files are new, and so is the owner.
    pub(super) fn forget(&self) {
        self.change(|owed| *owed = Owed::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(start: u64, end: u64) -> FilePages {
        FilePages::new(start, end).unwrap()
    }

    #[test]
    fn what_is_owed_is_known_until_it_is_made_good() {
        let debts = Debts::default();
        assert_eq!(debts.first_hole(pages(0, 9), View::Shared), None);
        debts.owe_hole(pages(2, 6), View::Shared);
        debts.doubt_attributes(pages(5, 8));
        assert_eq!(
            debts.first_hole(pages(0, 9), View::Shared),
            Some(pages(2, 6))
        );
        assert_eq!(debts.first_hole(pages(0, 9), View::Private), None);
        assert_eq!(debts.hole_bytes(), 4 * crate::PAGE_SIZE);
        debts.hole_punched(pages(0, 9), View::Shared);
        assert_eq!(debts.first_hole(pages(0, 9), View::Shared), None);
        assert_eq!(debts.first_doubtful(pages(0, 9)), Some(pages(5, 8)));
        debts.attributes_are_right(pages(5, 8));
        assert_eq!(debts.first_doubtful(pages(0, 9)), None);
        assert!(!debts.any.load(Ordering::SeqCst), "nobody looks in vain");
    }
}
