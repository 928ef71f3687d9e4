// SPDX-License-Identifier: GPL-2.0-or-later
//! What the scenarios are made of: requests, accesses, and the comparison of what is there with
//! what must be.

use crate::failure::Failure;
use crate::hypercall;
use crate::memory::TestMemory;
use crate::plan::Plan;
use core::ops::Range;
use guestmemfd_guest::PAGE_SIZE;
use guestmemfd_guest::cmdline::Contents;
use guestmemfd_guest::model::{Intent, Model, State};
use guestmemfd_guest::pattern::{self, WORDS};

/// The result of a step or of a test.
pub(crate) type Check = Result<(), Failure>;

pub(crate) use guestmemfd_guest::hostile::EINVAL;

/// An answer to a request, as a number and for people.
pub(crate) type Expected = (i64, &'static str);

pub(crate) const GRANTED: Expected = (0, "0");

/// What a page must hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Content {
    /// Whatever was there before.
    Unknown,
    /// Zeros.
    Empty,
    /// The pattern of a tag.
    Tag(u64),
    /// At its start, what QEMU writes.
    Host,
}

/// Pages under test, by number, and what must be true of them.
#[derive(Debug)]
pub(crate) struct Tester<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) memory: TestMemory,
    pub(crate) model: Model<'a>,
    /// What each page holds, as far as it has been filled and looked at here.
    pub(crate) contents: &'a mut [Content],
}

impl Tester<'_> {
    /// Asks by hypercall for a conversion that must succeed.
    pub(crate) fn request(&mut self, pages: Range<usize>, intent: Intent) -> Check {
        let gpa = self.memory.gpa(pages.start);
        let count = pages.len() as u64;
        let attributes = hypercall::attributes(intent);
        let got = hypercall::map_gpa_range(gpa, count, attributes);
        if got != 0 {
            self.model.counts.hypercalls += 1;
            self.model.counts.refused += 1;
            return Err(Failure::Request {
                gpa,
                pages: count,
                attributes,
                got,
                expected: "0",
            });
        }
        self.converted(pages, intent);
        Ok(())
    }

    /// Notes a request that was granted.
    pub(crate) fn converted(&mut self, pages: Range<usize>, intent: Intent) {
        for page in pages.clone() {
            self.enters(page, intent);
        }
        self.model.request(pages.start, pages.len(), intent);
    }

    /// Notes what a page holds once it is in a view.
    fn enters(&mut self, page: usize, intent: Intent) {
        // A page that nobody has decided shows the shared view.
        if self.view(page) == intent {
            return;
        }
        match self.plan.options.contents {
            Contents::Empty => self.contents[page] = Content::Empty,
            Contents::Unknown => self.contents[page] = Content::Unknown,
            Contents::Kept => {}
        }
    }

    /// Something that is not looked at here has written to pages.
    pub(crate) fn forget(&mut self, pages: Range<usize>) {
        self.contents[pages].fill(Content::Unknown);
    }

    /// Asks for a conversion of a page that is not noted here, or not only.
    pub(crate) fn convert(&mut self, gpa: u64, intent: Intent, expected: Expected) -> Check {
        let attributes = hypercall::attributes(intent);
        let got = hypercall::map_gpa_range(gpa, 1, attributes);
        self.model.counts.hypercalls += 1;
        self.model.counts.refused += u64::from(got != 0);
        let (number, expected) = expected;
        if got == number {
            return Ok(());
        }
        Err(Failure::Request {
            gpa,
            pages: 1,
            attributes,
            got,
            expected,
        })
    }

    /// Makes sure that no page is private.
    pub(crate) fn all_shared(&mut self, pages: Range<usize>) -> Check {
        if pages
            .clone()
            .any(|page| self.model.state(page) == State::Private)
        {
            self.request(pages, Intent::Shared)?;
        }
        Ok(())
    }

    /// Fills pages with the pattern of a tag.
    pub(crate) fn fill(&mut self, pages: Range<usize>, intent: Intent, tag: u64) {
        for page in pages {
            self.touch(page, intent);
            let gpa = self.memory.gpa(page);
            for index in 0..WORDS {
                self.memory
                    .write(page, intent, index, pattern::word(tag, gpa, index));
            }
            self.contents[page] = Content::Tag(tag);
        }
    }

    /// Pages must hold the pattern of a tag.
    pub(crate) fn holds(&mut self, pages: Range<usize>, intent: Intent, tag: u64) -> Check {
        for page in pages {
            let gpa = self.memory.gpa(page);
            self.compare(page, intent, WORDS, |index| pattern::word(tag, gpa, index))?;
        }
        Ok(())
    }

    /// Writes some words of every page, through the shared view: to fill pages takes emulators
    /// minutes.
    pub(crate) fn mark(&mut self, pages: Range<usize>, tag: u64) {
        self.forget(pages.clone());
        for (page, index) in marks(pages) {
            let word = pattern::word(tag, self.memory.gpa(page), index);
            self.memory.write(page, Intent::Shared, index, word);
        }
    }

    /// They must be there.
    pub(crate) fn is_marked(&self, pages: Range<usize>, tag: u64) -> Check {
        marks(pages).try_for_each(|(page, index)| {
            let word = pattern::word(tag, self.memory.gpa(page), index);
            let got = self.memory.read(page, Intent::Shared, index);
            self.word_is(page, Intent::Shared, index, got, word)
        })
    }

    /// Pages must read as zeros.
    pub(crate) fn is_empty(&mut self, pages: Range<usize>, intent: Intent) -> Check {
        pages
            .into_iter()
            .try_for_each(|page| self.compare(page, intent, WORDS, |_| 0))
    }

    /// Pages must hold what they were filled with, or what conversions since then leave of it.
    pub(crate) fn as_expected(&mut self, pages: Range<usize>, intent: Intent) -> Check {
        for page in pages {
            self.touch(page, intent);
            match self.contents[page] {
                Content::Unknown => {
                    self.memory.read(page, intent, 0);
                }
                Content::Empty => self.is_empty(page..page + 1, intent)?,
                Content::Tag(tag) => self.holds(page..page + 1, intent, tag)?,
                Content::Host => self.holds_the_hosts(page, intent)?,
            }
        }
        Ok(())
    }

    /// A word of a page that is as expected, if anything is known of it.
    pub(crate) fn expected_word(&self, page: usize, index: usize) -> Option<u64> {
        match self.contents[page] {
            Content::Unknown => None,
            Content::Empty => Some(0),
            Content::Tag(tag) => Some(pattern::word(tag, self.memory.gpa(page), index)),
            Content::Host => {
                let host = &self.plan.host;
                (index < host.words).then(|| host.word(index))
            }
        }
    }

    /// The view in which a page is.
    pub(crate) fn view(&self, page: usize) -> Intent {
        match self.model.state(page) {
            State::Private => Intent::Private,
            State::Shared | State::Undecided => Intent::Shared,
        }
    }

    /// Has QEMU write to a shared page, and looks at it through the shared view.
    pub(crate) fn host_writes(&mut self, page: usize) -> Check {
        let host = &self.plan.host;
        let gpa = self.memory.gpa(page);
        self.memory
            .host_writes(page, host.selector, host.words * 8)
            .map_err(|_| Failure::Host { gpa })?;
        self.contents[page] = Content::Host;
        self.holds_the_hosts(page, Intent::Shared)
    }

    fn holds_the_hosts(&mut self, page: usize, intent: Intent) -> Check {
        let host = &self.plan.host;
        self.compare(page, intent, host.words, |index| host.word(index))
    }

    /// Sends a request that must be refused with EINVAL.
    pub(crate) fn refused(&mut self, gpa: u64, pages: u64, attributes: u64) -> Check {
        let got = hypercall::map_gpa_range(gpa, pages, attributes);
        let frame = gpa / PAGE_SIZE;
        // KVM itself refuses what is not aligned, empty, or wraps as frame numbers.
        let passed_on =
            gpa.is_multiple_of(PAGE_SIZE) && pages > 0 && frame.checked_add(pages).is_some();
        if passed_on && self.memory.contains(gpa) {
            self.model.counts.hypercalls += 1;
            self.model.counts.refused += u64::from(got != 0);
        }
        if got == EINVAL {
            return Ok(());
        }
        Err(Failure::Request {
            gpa,
            pages,
            attributes,
            got,
            expected: "-22 (EINVAL)",
        })
    }

    /// Notes an access. With a shared bit it converts a page that is in the other view.
    pub(crate) fn touch(&mut self, page: usize, intent: Intent) {
        if self.memory.has_shared_bit() {
            self.enters(page, intent);
            self.model.touch(page, intent);
        }
    }

    fn compare(
        &mut self,
        page: usize,
        intent: Intent,
        words: usize,
        expected: impl Fn(usize) -> u64,
    ) -> Check {
        self.touch(page, intent);
        for index in 0..words {
            let got = self.memory.read(page, intent, index);
            self.word_is(page, intent, index, got, expected(index))?;
        }
        Ok(())
    }

    /// A word that was read must have a value.
    pub(crate) fn word_is(
        &self,
        page: usize,
        intent: Intent,
        index: usize,
        got: u64,
        expected: u64,
    ) -> Check {
        if got == expected {
            return Ok(());
        }
        Err(Failure::Memory {
            intent,
            gpa: self.memory.gpa(page) + 8 * index as u64,
            got,
            expected,
        })
    }
}

/// Pages, and numbers of words in them.
fn marks(pages: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
    pages.flat_map(|page| (0..WORDS).step_by(64).map(move |index| (page, index)))
}
