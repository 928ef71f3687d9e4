// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests, and what must come of them.

use guestmemfd::*;
use proptest::prelude::*;

use crate::machine::{PAGES, at, file, guest};

#[derive(Clone, Debug)]
pub(crate) enum Request {
    Convert(GuestPages, View),
    Discard(FilePages),
}

pub(crate) fn request() -> impl Strategy<Value = Request> {
    let range = (prop_oneof![0u64..30, 98u64..110], 1u64..12);
    let view = prop_oneof![Just(View::Shared), Just(View::Private)];
    prop_oneof![
        5 => (range, view).prop_map(|((start, count), view)| {
            Request::Convert(guest(start, start + count), view)
        }),
        1 => (0..PAGES, 1..PAGES).prop_map(|(start, count)| {
            Request::Discard(file(start, (start + count).min(PAGES)))
        }),
    ]
}

/// Must the request be refused even if no call fails? Which pages change, and to what?
pub(crate) fn expect(states: &[PageState], request: &Request) -> Option<Vec<PageState>> {
    let mut after = states.to_vec();
    match *request {
        Request::Discard(pages) => {
            after[pages.start() as usize..pages.end() as usize].fill(PageState::Undecided);
        }
        Request::Convert(guest, to) => {
            for page in guest.start()..guest.end() {
                match (at(page), to) {
                    (Some((_, false)) | None, View::Private) => return None,
                    (Some((page, _)), to) => after[page as usize] = to.into(),
                    (None, View::Shared) => {}
                }
            }
        }
    }
    Some(after)
}
