// SPDX-License-Identifier: GPL-2.0-or-later

use std::sync::Arc;

use super::callbacks::{CListener, guestmemfd_callbacks};
use super::error::guestmemfd_error;
use super::types::*;
use super::{Failure, Out, check_fd, check_ref, guard, guard_value};
use crate::owner::{KvmOwner, Owner, SoftwareOwner};
use crate::pages::ranges::{GuestPages, PAGE_SIZE};
use crate::vm::Vm;

/// The number of the interface that the library has; compare with GUESTMEMFD_ABI.
#[unsafe(no_mangle)]
pub extern "C" fn guestmemfd_abi() -> u32 {
    GUESTMEMFD_ABI
}

/// A VM over one that the caller opened and runs. `abi` is GUESTMEMFD_ABI as the caller was compiled
/// with. Both descriptors are duplicated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_new(
    abi: u32,
    kvm_fd: i32,
    vm_fd: i32,
    callbacks: *const guestmemfd_callbacks,
    vm: *mut *mut guestmemfd_vm,
    error: *mut guestmemfd_error,
) -> i32 {
    guard(error, || {
        new_vm(abi, callbacks, vm, || {
            let owner = KvmOwner::new(check_fd(kvm_fd, "kvm_fd")?, check_fd(vm_fd, "vm_fd")?)?;
            Ok(Arc::new(owner))
        })
    })
}

/// A VM without a hypervisor, for tests and for machines without KVM: private pages are kept in a
/// memfd, attributes are remembered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_new_software(
    abi: u32,
    callbacks: *const guestmemfd_callbacks,
    vm: *mut *mut guestmemfd_vm,
    error: *mut guestmemfd_error,
) -> i32 {
    guard(error, || {
        new_vm(abi, callbacks, vm, || {
            Ok(Arc::new(SoftwareOwner::default()))
        })
    })
}

fn new_vm(
    abi: u32,
    callbacks: *const guestmemfd_callbacks,
    out: *mut *mut guestmemfd_vm,
    owner: impl FnOnce() -> Result<Arc<dyn Owner>, Failure>,
) -> Result<(), Failure> {
    if abi != GUESTMEMFD_ABI {
        return Err(Failure::Argument(format!(
            "the caller was built for version {abi} of the interface, the library has version \
             {GUESTMEMFD_ABI}: rebuild the caller with this library's header"
        )));
    }
    let out = Out::check(out, "vm")?;
    let callbacks = *check_ref(callbacks, "callbacks")?;
    if callbacks.gap.is_none() {
        return Err(Failure::Null("callbacks.gap"));
    }
    let vm = Vm::new(owner()?, Box::new(CListener::new(callbacks)));
    out.set(Box::into_raw(Box::new(guestmemfd_vm { vm: Arc::new(vm) })));
    Ok(())
}

/// Frees a VM. Its backends must have been freed. NULL is allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_free(vm: *mut guestmemfd_vm) {
    if !vm.is_null() {
        // SAFETY: guestmemfd_vm_new() made it; the caller gives it back.
        guard_value((), || drop(unsafe { Box::from_raw(vm) }));
    }
}

/// The VM got a new descriptor, as in a confidential reset. All windows must have been removed.
/// Every backend gets a new private file, which guestmemfd_backend_private_fd() then returns, and
/// all its pages start over.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_rebind(
    vm: *mut guestmemfd_vm,
    kvm_fd: i32,
    vm_fd: i32,
    error: *mut guestmemfd_error,
) -> i32 {
    guard(error, || {
        let vm = check_ref(vm, "vm")?;
        let owner = KvmOwner::new(check_fd(kvm_fd, "kvm_fd")?, check_fd(vm_fd, "vm_fd")?)?;
        Ok(vm.vm.rebind(Arc::new(owner))?)
    })
}

/// A KVM slot is about to be created over `size` bytes from `offset` of a backend. `*bound` tells
/// whether it is to carry the guest_memfd: yes, unless `flags` holds GUESTMEMFD_WINDOW_UNBINDABLE or
/// another window of these pages is bound. Attributes are brought in line with the pages' states.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_add_window(
    vm: *mut guestmemfd_vm,
    backend: *mut guestmemfd_backend,
    gpa: u64,
    offset: u64,
    size: u64,
    flags: u32,
    bound: *mut bool,
    error: *mut guestmemfd_error,
) -> i32 {
    guard(error, || {
        let vm = check_ref(vm, "vm")?;
        let backend = check_ref(backend, "backend")?;
        let bound = Out::check(bound, "bound")?;
        if flags & !GUESTMEMFD_WINDOW_UNBINDABLE != 0 {
            return Err(Failure::Argument(format!(
                "unknown window flags {flags:#x}"
            )));
        }
        let guest = GuestPages::from_bytes(gpa, size).map_err(crate::Error::from)?;
        bound.set(
            vm.vm
                .add_window(&backend.backend, guest, offset, flags == 0)?,
        );
        Ok(())
    })
}

/// A KVM slot has been deleted. Attributes stay until guestmemfd_vm_commit_windows(), so that a slot
/// that comes back unchanged costs nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_remove_window(
    vm: *mut guestmemfd_vm,
    gpa: u64,
    size: u64,
    error: *mut guestmemfd_error,
) -> i32 {
    guard(error, || {
        let vm = check_ref(vm, "vm")?;
        let guest = GuestPages::from_bytes(gpa, size).map_err(crate::Error::from)?;
        Ok(vm.vm.remove_window(guest)?)
    })
}

/// All changes of the layout have been made: attributes are cleared where windows have gone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_commit_windows(
    vm: *mut guestmemfd_vm,
    error: *mut guestmemfd_error,
) -> i32 {
    guard(error, || {
        Ok(check_ref(vm, "vm")?.vm.clear_stale_windows()?)
    })
}

/// Punches every hole that is still owed, so that the memory which the kernel accounts is what the
/// states say: before a pause or a report that somebody compares. An error is the first; all are
/// tried.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_drain(
    vm: *const guestmemfd_vm,
    error: *mut guestmemfd_error,
) -> i32 {
    guard(error, || Ok(check_ref(vm, "vm")?.vm.drain()?))
}

/// Does any part of the range lie in a window? Any numbers are allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_owns(vm: *const guestmemfd_vm, gpa: u64, size: u64) -> bool {
    guard_value(false, || {
        // What wraps is cut at the end of the address space: it belongs to whoever owns its
        // beginning, and is refused there.
        let room = (u64::MAX - PAGE_SIZE).saturating_sub(gpa).max(1);
        let guest = GuestPages::covering_bytes(gpa, size.clamp(1, room));
        match (check_ref(vm, "vm"), guest) {
            (Ok(vm), Some(guest)) => vm.vm.owns(guest),
            _ => false,
        }
    })
}

/// Serves KVM_EXIT_MEMORY_FAULT with the numbers of the exit, for an address that
/// guestmemfd_vm_owns(). Whatever it returns, enter the guest again: on an error nothing has changed,
/// and the next fault asks for the same.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_memory_fault(
    vm: *mut guestmemfd_vm,
    gpa: u64,
    size: u64,
    is_private: bool,
    error: *mut guestmemfd_error,
) -> i32 {
    guard(error, || {
        check_ref(vm, "vm")?
            .vm
            .memory_fault(gpa, size, is_private)?;
        Ok(())
    })
}

/// Serves KVM_HC_MAP_GPA_RANGE, which is x86's alone, with the arguments as the guest gave them; what
/// it returns is the answer to the guest. -EINTR only if the interrupted callback asked for it: then
/// call again, as the guest will not.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_map_gpa_range(
    vm: *mut guestmemfd_vm,
    gpa: u64,
    pages: u64,
    attributes: u64,
    error: *mut guestmemfd_error,
) -> i32 {
    guard(error, || {
        check_ref(vm, "vm")?
            .vm
            .map_gpa_range(gpa, pages, attributes)?;
        Ok(())
    })
}
