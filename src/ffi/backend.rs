// SPDX-License-Identifier: MIT OR Apache-2.0

use std::ffi::{CStr, c_void};
use std::os::fd::AsRawFd;
use std::time::Duration;

use parking_lot::Mutex;

use super::error::guestmemfd_error;
use super::types::*;
use super::{Arg, Failure, Out, arg, catch, catch_value, guard, wanted};
use crate::backend::reach::Chunk;
use crate::backend::{BackendConfig, DEFAULT_CONVERT_TIMEOUT, Discard, Lazy, Prefault};
use crate::pages::ranges::PAGE_SIZE;
use crate::pages::states::{PageState, View};
use crate::views::Mode;

/// Creates a backend and its files.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_backend_new(
    vm: *mut guestmemfd_vm,
    config: *const guestmemfd_backend_config,
    backend: *mut *mut guestmemfd_backend,
    error: *mut guestmemfd_error,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (vm, config, backend, error) = unsafe {
        (
            arg(vm, "vm"),
            arg(config, "config"),
            Out::new(backend),
            Out::new(error),
        )
    };
    catch(error, || {
        let (vm, out, config) = (vm?, wanted(backend, "backend")?, config?);
        let created = vm.vm.create_backend(backend_config(config)?)?;
        vm.opaques.insert(created.id(), config.opaque);
        let backend = guestmemfd_backend {
            vm: vm.vm.clone(),
            backend: created,
            opaques: vm.opaques.clone(),
            guard: Mutex::default(),
        };
        out.put(Box::into_raw(Box::new(backend)));
        Ok(())
    })
}

fn backend_config(config: &guestmemfd_backend_config) -> Result<BackendConfig, Failure> {
    if config.id.is_null() {
        return Err(Failure::Null("config.id"));
    }
    // SAFETY: not NULL; the contract of the header is that it is a C string.
    let name = unsafe { CStr::from_ptr(config.id) };
    let size = config.size;
    if size == 0 {
        return Err(Failure::Argument("can't create backend with size 0".into()));
    }
    if size % PAGE_SIZE != 0 {
        return Err(Failure::Argument(format!(
            "size {size:#x} is not a multiple of {PAGE_SIZE:#x}"
        )));
    }
    let mut wanted = BackendConfig::new(name.to_string_lossy(), size);
    wanted.mode = match config.mode {
        GUESTMEMFD_MODE_AUTO => None,
        GUESTMEMFD_MODE_PRIVATE => Some(Mode::Private),
        GUESTMEMFD_MODE_MAPPED => Some(Mode::Mapped),
        GUESTMEMFD_MODE_IN_PLACE => Some(Mode::InPlace),
        other => return Err(unknown("mode", other)),
    };
    wanted.confidential = config.confidential;
    wanted.bind = config.bind;
    wanted.discard = match config.discard {
        GUESTMEMFD_DISCARD_NOW => Discard::Now,
        GUESTMEMFD_DISCARD_KEEP => Discard::Keep,
        other => return Err(unknown("discard policy", other)),
    };
    wanted.start = match config.start_private {
        true => PageState::Private,
        false => PageState::Undecided,
    };
    wanted.lazy = lazy(config)?;
    wanted.prefault = match config.prefault {
        GUESTMEMFD_PREFAULT_OFF => Prefault::Off,
        GUESTMEMFD_PREFAULT_SMALL => Prefault::Small,
        GUESTMEMFD_PREFAULT_ON => Prefault::On,
        other => return Err(unknown("choice of prefault", other)),
    };
    wanted.convert_timeout = match config.convert_timeout {
        0 => DEFAULT_CONVERT_TIMEOUT,
        milliseconds => Duration::from_millis(milliseconds.into()),
    };
    Ok(wanted)
}

fn unknown(what: &str, number: u32) -> Failure {
    Failure::Argument(format!("unknown {what} {number}"))
}

fn lazy(config: &guestmemfd_backend_config) -> Result<Lazy, Failure> {
    let chunk = match config.lazy_chunk {
        0 => Chunk::default(),
        bytes => Chunk::from_bytes(bytes).ok_or_else(|| {
            Failure::Argument(format!(
                "the chunk of lazy attributes, {bytes:#x} bytes, is not a power of two of \
                 {PAGE_SIZE:#x} or more"
            ))
        })?,
    };
    match config.lazy {
        GUESTMEMFD_LAZY_AUTO => Ok(Lazy::Auto(chunk)),
        GUESTMEMFD_LAZY_ON => Ok(Lazy::On(chunk)),
        GUESTMEMFD_LAZY_OFF => Ok(Lazy::Off),
        other => Err(unknown("choice of lazy attributes", other)),
    }
}

/// Frees a backend, whose windows must have been removed, and closes its files. No other call with
/// this backend may be under way, and none may follow. NULL is allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_backend_free(backend: *mut guestmemfd_backend) {
    if backend.is_null() {
        return;
    }
    catch_value((), || {
        // SAFETY: guestmemfd_backend_new() made it; the caller gives it back.
        let backend = unsafe { Box::from_raw(backend) };
        *backend.guard.lock() = None;
        backend.opaques.remove(backend.backend.id());
        if let Err(error) = backend.vm.remove_backend(&backend.backend) {
            backend.vm.log_error(&error);
        }
    });
}

/// The guest_memfd for the KVM slots of bound windows; -1 for a backend that has none
/// (GUESTMEMFD_MODE_MAPPED without bind). Borrowed: guestmemfd_vm_rebind() and
/// guestmemfd_backend_free() close it. Duplicate it to keep it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_backend_private_fd(backend: *const guestmemfd_backend) -> i32 {
    // SAFETY: the contract of the header: the pointer is NULL, or valid for the whole call.
    match unsafe { arg(backend, "backend") } {
        Ok(backend) if backend.backend.is_bindable() => fd_of(backend, View::Private),
        _ => -1,
    }
}

/// The file that the host maps. Borrowed: guestmemfd_backend_free() closes it. Duplicate it to keep
/// it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_backend_shared_fd(backend: *const guestmemfd_backend) -> i32 {
    // SAFETY: the contract of the header: the pointer is NULL, or valid for the whole call.
    let backend = unsafe { arg(backend, "backend") };
    backend.map_or(-1, |backend| fd_of(backend, View::Shared))
}

fn fd_of(backend: &guestmemfd_backend, view: View) -> i32 {
    catch_value(-1, || backend.backend.views().file(view).fd().as_raw_fd())
}

/// Frees both views of some pages; they become undecided. Those of GUESTMEMFD_MODE_MAPPED are freed
/// and stay shared. In steps of at most 64 MiB; on an error those before have been done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_backend_free_pages(
    backend: *mut guestmemfd_backend,
    offset: u64,
    size: u64,
    error: *mut guestmemfd_error,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (backend, error) = unsafe { (arg(backend, "backend"), Out::new(error)) };
    catch(error, || {
        let backend = backend?;
        let pages = backend.backend.pages_at(offset, size)?;
        Ok(backend.vm.free_pages(&backend.backend, pages)?)
    })
}

/// Frees all that is private; those pages become undecided, and what is shared stays: for a reset
/// of a guest that does not run. Takes the kernel seconds for tens of gigabytes, in steps between
/// which others get their turn, so call it from a thread that may take them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_backend_free_private(
    backend: *mut guestmemfd_backend,
    error: *mut guestmemfd_error,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (backend, error) = unsafe { (arg(backend, "backend"), Out::new(error)) };
    catch(error, || {
        let backend = backend?;
        Ok(backend.vm.free_private(&backend.backend)?)
    })
}

/// May the host use all of these bytes (QEMU's RamDiscardSource calls them populated)? Waits for
/// steps of conversions of them that other threads are in. No alignment is needed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_backend_host_may_use(
    backend: *const guestmemfd_backend,
    offset: u64,
    size: u64,
) -> bool {
    // SAFETY: the contract of the header: the pointer is NULL, or valid for the whole call.
    let backend = unsafe { arg(backend, "backend") };
    catch_value(false, || {
        let Ok(backend) = backend else {
            return false;
        };
        let pages = backend.backend.pages_covering(offset, size);
        pages.is_ok_and(|pages| backend.vm.host_may_use(&backend.backend, pages))
    })
}

/// Lets the host use these bytes until guestmemfd_backend_unpin(): none of their pages becomes
/// private meanwhile. -EACCES if one is private. Waits for steps of conversions of them that other
/// threads are in, but for nothing else. No alignment is needed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_backend_pin(
    backend: *const guestmemfd_backend,
    offset: u64,
    size: u64,
    error: *mut guestmemfd_error,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (backend, error) = unsafe { (arg(backend, "backend"), Out::new(error)) };
    match backend {
        // Most pins. Nothing in it panics, so nothing has to be caught.
        Ok(backend) if backend.backend.pin_one(offset, size) => 0,
        backend => pin(backend, offset, size, error),
    }
}

#[inline(never)]
fn pin(
    backend: Arg<'_, guestmemfd_backend>,
    offset: u64,
    size: u64,
    error: Option<Out<'_, guestmemfd_error>>,
) -> i32 {
    catch(error, || {
        let backend = backend?;
        let pages = backend.backend.pages_covering(offset, size)?;
        Ok(backend.vm.pin(&backend.backend, pages)?)
    })
}

/// Takes back guestmemfd_backend_pin() for the same bytes. -EINVAL, and in the end nothing is done,
/// if a page of them is not pinned; meanwhile a conversion may miss pins of the others.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_backend_unpin(
    backend: *const guestmemfd_backend,
    offset: u64,
    size: u64,
    error: *mut guestmemfd_error,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (backend, error) = unsafe { (arg(backend, "backend"), Out::new(error)) };
    match backend {
        // As for pins.
        Ok(backend) if backend.backend.unpin_one(offset, size) => 0,
        backend => unpin(backend, offset, size, error),
    }
}

#[inline(never)]
fn unpin(
    backend: Arg<'_, guestmemfd_backend>,
    offset: u64,
    size: u64,
    error: Option<Out<'_, guestmemfd_error>>,
) -> i32 {
    catch(error, || {
        let backend = &backend?.backend;
        Ok(backend.unpin(backend.pages_covering(offset, size)?)?)
    })
}

/// Guards private bytes, until the backend is freed, against accesses that go around every check:
/// guestmemfd_callbacks.stray tells of them. `host` is where this process has mapped all of the
/// shared file, and keeps it mapped until the backend is freed. -EOPNOTSUPP where nothing is
/// private, where memory starts private, with GUESTMEMFD_DISCARD_KEEP, and without userfaultfd.
///
/// A thread that is caught reads zeros or writes for nothing. Of other processes only what they
/// leave behind is found, within some seconds, and freed. Each first touch of a shared page costs
/// some tens of microseconds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_backend_guard(
    backend: *mut guestmemfd_backend,
    host: *mut c_void,
    error: *mut guestmemfd_error,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (backend, error) = unsafe { (arg(backend, "backend"), Out::new(error)) };
    catch(error, || {
        let backend = backend?;
        let mut running = backend.guard.lock();
        if running.is_some() {
            return Err(Failure::Argument("the backend has a guard already".into()));
        }
        // SAFETY: the contract of the header: the mapping is there until the backend is freed, and
        // so is the guard.
        *running = Some(unsafe { guard::start(&backend.vm, &backend.backend, host.addr()) }?);
        Ok(())
    })
}

/// Starts to measure how long conversions take, which costs each of them two looks at a clock.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_backend_watch_latency(
    backend: *const guestmemfd_backend,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let backend = unsafe { arg(backend, "backend") };
    catch(None, || {
        backend?.backend.watch_latency();
        Ok(())
    })
}

/// Bytes per state and counters, without a scan.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_backend_stats(
    backend: *const guestmemfd_backend,
    stats: *mut guestmemfd_stats,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (backend, stats) = unsafe { (arg(backend, "backend"), Out::new(stats)) };
    catch(None, || {
        let (backend, out) = (&backend?.backend, wanted(stats, "stats")?);
        let stats = backend.stats();
        let bytes = |state: PageState| stats.state_bytes[state as usize];
        out.put(guestmemfd_stats {
            size: backend.config().size,
            undecided_bytes: bytes(PageState::Undecided),
            shared_bytes: bytes(PageState::Shared),
            private_bytes: bytes(PageState::Private),
            transition_bytes: bytes(PageState::Transition),
            shared_allocated: stats.shared_allocated,
            conversions_to_private: stats.conversions_to_private,
            conversions_to_shared: stats.conversions_to_shared,
            converted_to_private_bytes: stats.converted_to_private,
            converted_to_shared_bytes: stats.converted_to_shared,
            converted_neighbour_bytes: stats.converted_neighbours,
            hypercalls: stats.hypercalls,
            faults_private: stats.faults_private,
            faults_shared: stats.faults_shared,
            refused: stats.refused,
            waits: stats.waits,
            stray_accesses: stats.strays,
            pinned_bytes: stats.pinned,
            owed_hole_bytes: stats.owed_holes,
            mode: mode_number(backend.mode()),
            discard: discard_number(backend.config().discard),
            lazy_chunk: backend.lazy_chunk().map_or(0, Chunk::bytes),
            latency_to_private: stats.latency_to_private,
            latency_to_shared: stats.latency_to_shared,
        });
        Ok(())
    })
}

/// The states of a range: up to `*count` runs, of which `*count` then says how many there are.
/// Neighbouring runs differ. `*next` is where to go on if there was no room for all: the offset
/// behind the last run. Conversions go on meanwhile.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_backend_map(
    backend: *const guestmemfd_backend,
    offset: u64,
    size: u64,
    runs: *mut guestmemfd_run,
    count: *mut u64,
    next: *mut u64,
    error: *mut guestmemfd_error,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (backend, room) = unsafe { (arg(backend, "backend"), arg(count, "count").copied()) };
    // SAFETY: as above; the room was read before.
    let (runs, count) = unsafe { (Out::new(runs), Out::new(count)) };
    // SAFETY: as above.
    let (next, error) = unsafe { (Out::new(next), Out::new(error)) };
    catch(error, || {
        let (backend, room) = (&backend?.backend, room?);
        let (count, next) = (wanted(count, "count")?, wanted(next, "next")?);
        let runs = wanted(runs, "runs")?;
        if room == 0 {
            return Err(Failure::Argument("count is 0, no room for a run".into()));
        }
        let pages = backend.pages_at(offset, size)?;
        // There are no more runs than pages.
        let room = room.min(pages.count());
        let map = backend.state_map(pages, usize::try_from(room).unwrap_or(usize::MAX));
        let found = map.runs.into_iter().map(|(run, state)| guestmemfd_run {
            offset: run.start_bytes(),
            size: run.bytes(),
            state: state_number(state),
        });
        let end = map.rest.map_or(offset + size, |rest| rest.start_bytes());
        // SAFETY: the map has at most `room` runs, for which the header asks for room.
        count.put(unsafe { runs.put_all(found) });
        next.put(end);
        Ok(())
    })
}
