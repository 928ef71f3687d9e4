// SPDX-License-Identifier: MIT OR Apache-2.0

use std::os::raw::{c_char, c_void};
use std::sync::Arc;

use parking_lot::Mutex;

use super::guard::Guard;
use super::opaques::Opaques;
use crate::backend::stats::LATENCY_BUCKETS;
use crate::backend::{Backend, Discard};
use crate::pages::states::{PageState, View};
use crate::views::Mode;
use crate::vm::Vm;

/// Number of the interface that this header describes, for guestmemfd_vm_new().
pub const GUESTMEMFD_ABI: u32 = 9;

/// One of the two views of a page: one of GUESTMEMFD_VIEW_*.
pub type guestmemfd_view = u32;
/// Host and guest use it.
pub const GUESTMEMFD_VIEW_SHARED: guestmemfd_view = 0;
/// Only the guest does.
pub const GUESTMEMFD_VIEW_PRIVATE: guestmemfd_view = 1;

/// Which views can appear in a window: one of GUESTMEMFD_BINDING_*.
pub type guestmemfd_binding = u32;
/// The shared view alone: its KVM slot does not carry the guest_memfd. So it must be where the
/// section is read-only or dirty-logged.
pub const GUESTMEMFD_BINDING_UNBOUND: guestmemfd_binding = 0;
/// Both: its KVM slot carries the guest_memfd.
pub const GUESTMEMFD_BINDING_BOUND: guestmemfd_binding = 1;
/// The shared view alone, at a place where KVM reports an access to a private page: the shared
/// alias that a guest reaches by an address bit.
pub const GUESTMEMFD_BINDING_SHARED_ALIAS: guestmemfd_binding = 2;

/// A virtual machine: its owner, and where pages of its backends appear.
#[derive(Debug)]
pub struct guestmemfd_vm {
    pub(super) vm: Arc<Vm>,
    pub(super) opaques: Arc<Opaques>,
}

/// Guest memory of one size: one object of QEMU's.
#[derive(Debug)]
pub struct guestmemfd_backend {
    pub(super) vm: Arc<Vm>,
    pub(super) backend: Arc<Backend>,
    pub(super) opaques: Arc<Opaques>,
    pub(super) guard: Mutex<Option<Guard>>,
}

const _: () = {
    const fn from_any_thread<T: Send + Sync>() {}
    from_any_thread::<guestmemfd_vm>();
    from_any_thread::<guestmemfd_backend>();
};

/// How a backend keeps its pages: one of GUESTMEMFD_MODE_*.
pub type guestmemfd_mode = u32;
/// The library chooses.
pub const GUESTMEMFD_MODE_AUTO: guestmemfd_mode = 0;
/// Two files: a guest_memfd for private pages, a memfd for shared ones.
pub const GUESTMEMFD_MODE_PRIVATE: guestmemfd_mode = 1;
/// One guest_memfd, mapped by the host; for VMs without private memory.
pub const GUESTMEMFD_MODE_MAPPED: guestmemfd_mode = 2;
/// One guest_memfd behind both views, mapped by the host, which keeps the attributes of its pages.
pub const GUESTMEMFD_MODE_IN_PLACE: guestmemfd_mode = 3;

/// What becomes of the side that a page has left: one of GUESTMEMFD_DISCARD_*.
pub type guestmemfd_discard = u32;
/// Its hole is punched inside the conversion.
pub const GUESTMEMFD_DISCARD_NOW: guestmemfd_discard = 0;
/// It is not freed.
pub const GUESTMEMFD_DISCARD_KEEP: guestmemfd_discard = 1;

/// Does a private touch of an undecided page decide the pages around it: one of GUESTMEMFD_LAZY_*.
pub type guestmemfd_lazy = u32;
/// Yes, unless pages start private.
pub const GUESTMEMFD_LAZY_AUTO: guestmemfd_lazy = 0;
/// Yes, or the backend is refused.
pub const GUESTMEMFD_LAZY_ON: guestmemfd_lazy = 1;
/// No.
pub const GUESTMEMFD_LAZY_OFF: guestmemfd_lazy = 2;

/// Which pages are allocated as soon as a hypercall has made them private: one of
/// GUESTMEMFD_PREFAULT_*. It takes the callback of that name.
pub type guestmemfd_prefault = u32;
/// None.
pub const GUESTMEMFD_PREFAULT_OFF: guestmemfd_prefault = 0;
/// Those of requests for 64 KiB or less.
pub const GUESTMEMFD_PREFAULT_SMALL: guestmemfd_prefault = 1;
/// All of them.
pub const GUESTMEMFD_PREFAULT_ON: guestmemfd_prefault = 2;

/// The state of a page: one of GUESTMEMFD_STATE_*.
pub type guestmemfd_state = u32;
/// Nobody has chosen a view yet.
pub const GUESTMEMFD_STATE_UNDECIDED: guestmemfd_state = 0;
/// Host and guest use the shared view.
pub const GUESTMEMFD_STATE_SHARED: guestmemfd_state = 1;
/// Only the guest uses it, through the private view.
pub const GUESTMEMFD_STATE_PRIVATE: guestmemfd_state = 2;
/// A conversion has claimed it.
pub const GUESTMEMFD_STATE_TRANSITION: guestmemfd_state = 3;

/// Neighbouring bytes of a backend in one state.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct guestmemfd_run {
    /// The first of them.
    pub offset: u64,
    /// How many; a multiple of 4096.
    pub size: u64,
    /// Their state.
    pub state: guestmemfd_state,
}

/// An access to private bytes that a guard has caught.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct guestmemfd_stray {
    /// The first byte of the pages.
    pub offset: u64,
    /// How many bytes they have.
    pub size: u64,
    /// Where the guest sees the first byte; UINT64_MAX if it does not.
    pub gpa: u64,
    /// The kernel's id of the thread; 0 if it belongs to another process.
    pub thread: u32,
}

/// What a backend is to be.
#[repr(C)]
#[derive(Debug)]
pub struct guestmemfd_backend_config {
    /// Its name in messages, UTF-8.
    pub id: *const c_char,
    /// Bytes; a multiple of 4096, not 0.
    pub size: u64,
    /// How it is to keep its pages.
    pub mode: guestmemfd_mode,
    /// It is a confidential guest's memory: never GUESTMEMFD_MODE_MAPPED.
    pub confidential: bool,
    /// KVM slots are to carry the file of GUESTMEMFD_MODE_MAPPED, in place of ordinary slots over
    /// its mapping.
    pub bind: bool,
    /// Discard policy.
    pub discard: guestmemfd_discard,
    /// Pages start private (SEV-SNP, TDX) instead of undecided.
    pub start_private: bool,
    /// Lazy attributes.
    pub lazy: guestmemfd_lazy,
    /// How many bytes the first private touch of undecided pages decides: a power of two, not less
    /// than 4096; 0 leaves the choice to the library.
    pub lazy_chunk: u64,
    /// Whether pages that have become private are allocated at once.
    pub prefault: guestmemfd_prefault,
    /// How many milliseconds a request waits for pages that are to become private but are pinned; 0
    /// stands for a second.
    pub convert_timeout: u32,
    /// Passed to guestmemfd_callbacks.map, unmap, new_files, revoke and stray.
    pub opaque: *mut c_void,
}

/// What a backend holds and has done since it was created.
#[repr(C)]
#[derive(Debug, Default)]
pub struct guestmemfd_stats {
    /// Bytes in all.
    pub size: u64,
    /// Bytes that nobody has chosen a view for.
    pub undecided_bytes: u64,
    /// Bytes in the shared view.
    pub shared_bytes: u64,
    /// Bytes in the private view.
    pub private_bytes: u64,
    /// Bytes claimed by conversions under way.
    pub transition_bytes: u64,
    /// Bytes of the shared file that the kernel has allocated.
    pub shared_allocated: u64,
    /// Requests that moved pages to the private view.
    pub conversions_to_private: u64,
    /// Requests that moved pages to the shared view.
    pub conversions_to_shared: u64,
    /// Bytes moved to the private view.
    pub converted_to_private_bytes: u64,
    /// Bytes moved to the shared view.
    pub converted_to_shared_bytes: u64,
    /// Bytes that lazy attributes made private as neighbours of what was touched.
    pub converted_neighbour_bytes: u64,
    /// Requests by hypercall, refused ones too.
    pub hypercalls: u64,
    /// Memory faults that asked for the private view.
    pub faults_private: u64,
    /// Memory faults that asked for the shared view.
    pub faults_shared: u64,
    /// Requests that were refused.
    pub refused: u64,
    /// Requests that waited for pinned pages.
    pub waits: u64,
    /// Accesses to private bytes that a guard has caught.
    pub stray_accesses: u64,
    /// Bytes of all pins.
    pub pinned_bytes: u64,
    /// Bytes whose hole the kernel has refused to punch, and that is punched before they are
    /// exposed again.
    pub owed_hole_bytes: u64,
    /// How the backend keeps its pages; never GUESTMEMFD_MODE_AUTO.
    pub mode: guestmemfd_mode,
    /// Discard policy.
    pub discard: guestmemfd_discard,
    /// Bytes of the chunk of lazy attributes; 0 without them.
    pub lazy_chunk: u64,
    /// How long requests that moved pages to the private view have taken since
    /// guestmemfd_backend_watch_latency(): element 0 counts those under 1 us, element N those under
    /// 2^N us, the last one the rest.
    pub latency_to_private: [u64; GUESTMEMFD_LATENCY_BUCKETS],
    /// The same for the shared view.
    pub latency_to_shared: [u64; GUESTMEMFD_LATENCY_BUCKETS],
}

/// Elements of the histograms of guestmemfd_stats.
pub const GUESTMEMFD_LATENCY_BUCKETS: usize = 24;
const _: () = assert!(GUESTMEMFD_LATENCY_BUCKETS == LATENCY_BUCKETS);

pub(super) fn state_number(state: PageState) -> guestmemfd_state {
    match state {
        PageState::Undecided => GUESTMEMFD_STATE_UNDECIDED,
        PageState::Shared => GUESTMEMFD_STATE_SHARED,
        PageState::Private => GUESTMEMFD_STATE_PRIVATE,
        PageState::Transition => GUESTMEMFD_STATE_TRANSITION,
    }
}

pub(super) fn mode_number(mode: Mode) -> guestmemfd_mode {
    match mode {
        Mode::Private => GUESTMEMFD_MODE_PRIVATE,
        Mode::Mapped => GUESTMEMFD_MODE_MAPPED,
        Mode::InPlace => GUESTMEMFD_MODE_IN_PLACE,
    }
}

pub(super) fn discard_number(discard: Discard) -> guestmemfd_discard {
    match discard {
        Discard::Now => GUESTMEMFD_DISCARD_NOW,
        Discard::Keep => GUESTMEMFD_DISCARD_KEEP,
    }
}

pub(super) fn view_number(view: View) -> guestmemfd_view {
    match view {
        View::Shared => GUESTMEMFD_VIEW_SHARED,
        View::Private => GUESTMEMFD_VIEW_PRIVATE,
    }
}
