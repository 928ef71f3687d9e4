// SPDX-License-Identifier: MIT OR Apache-2.0

use std::sync::Arc;

use super::callbacks::{CListener, guestmemfd_callbacks};
use super::error::guestmemfd_error;
use super::opaques::Opaques;
use super::types::*;
use super::{Arg, Failure, Out, arg, borrow_fd, catch, catch_value, wanted};
use crate::owner::{KvmOwner, Owner, SoftwareOwner};
use crate::pages::ranges::{GuestPages, PAGE_SIZE};
use crate::pages::states::View;
use crate::vm::Vm;
use crate::windows::Binding;

/// The number of the interface that the library has; compare with GUESTMEMFD_ABI.
#[unsafe(no_mangle)]
pub extern "C" fn guestmemfd_abi() -> u32 {
    GUESTMEMFD_ABI
}

/// A VM over one that the caller opened and runs. `abi` is GUESTMEMFD_ABI as the caller was
/// compiled with. Both descriptors are duplicated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_new(
    abi: u32,
    kvm_fd: i32,
    vm_fd: i32,
    callbacks: *const guestmemfd_callbacks,
    vm: *mut *mut guestmemfd_vm,
    error: *mut guestmemfd_error,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (callbacks, vm, error) =
        unsafe { (arg(callbacks, "callbacks"), Out::new(vm), Out::new(error)) };
    catch(error, || {
        new_vm(abi, callbacks, vm, || {
            // SAFETY: the contract of the header: both stay open for the duration of the call.
            let (kvm, vm) = unsafe { (borrow_fd(kvm_fd, "kvm_fd"), borrow_fd(vm_fd, "vm_fd")) };
            Ok(Arc::new(KvmOwner::new(kvm?, vm?)?))
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
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (callbacks, vm, error) =
        unsafe { (arg(callbacks, "callbacks"), Out::new(vm), Out::new(error)) };
    catch(error, || {
        new_vm(abi, callbacks, vm, || {
            Ok(Arc::new(SoftwareOwner::default()))
        })
    })
}

fn new_vm(
    abi: u32,
    callbacks: Arg<'_, guestmemfd_callbacks>,
    out: Option<Out<'_, *mut guestmemfd_vm>>,
    owner: impl FnOnce() -> Result<Arc<dyn Owner>, Failure>,
) -> Result<(), Failure> {
    if abi != GUESTMEMFD_ABI {
        return Err(Failure::Argument(format!(
            "the caller was built for version {abi} of the interface, the library has version \
             {GUESTMEMFD_ABI}: rebuild the caller with this library's header"
        )));
    }
    let (out, callbacks) = (wanted(out, "vm")?, *callbacks?);
    if callbacks.gap.is_none() {
        return Err(Failure::Null("callbacks.gap"));
    }
    let opaques = Arc::new(Opaques::default());
    let listener = CListener::new(callbacks, opaques.clone());
    let vm = Arc::new(Vm::new(owner()?, Box::new(listener)));
    out.put(Box::into_raw(Box::new(guestmemfd_vm { vm, opaques })));
    Ok(())
}

/// Frees a VM. Its backends must have been freed. No other call with it may be under way, and none
/// may follow. NULL is allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_free(vm: *mut guestmemfd_vm) {
    if !vm.is_null() {
        // SAFETY: guestmemfd_vm_new() made it; the caller gives it back.
        catch_value((), || drop(unsafe { Box::from_raw(vm) }));
    }
}

/// The VM got a new descriptor, as in a confidential reset. All windows must have been removed.
/// Every backend gets a new guest_memfd, which guestmemfd_backend_private_fd() then returns, and
/// all its pages start over. With GUESTMEMFD_MODE_IN_PLACE that is the only file: what was shared
/// is copied to it, and guestmemfd_backend_shared_fd() is to be mapped again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_rebind(
    vm: *mut guestmemfd_vm,
    kvm_fd: i32,
    vm_fd: i32,
    error: *mut guestmemfd_error,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (vm, error) = unsafe { (arg(vm, "vm"), Out::new(error)) };
    catch(error, || {
        // SAFETY: the contract of the header: both stay open for the duration of the call.
        let fds = unsafe { (borrow_fd(kvm_fd, "kvm_fd"), borrow_fd(vm_fd, "vm_fd")) };
        let owner = KvmOwner::new(fds.0?, fds.1?)?;
        Ok(vm?.vm.rebind(Arc::new(owner))?)
    })
}

/// A KVM slot is about to be created over `size` bytes from `offset` of a backend. `*binding` tells
/// whether it is to carry the guest_memfd: GUESTMEMFD_BINDING_BOUND if that is `wanted`, unless the
/// backend forbids it or another window of these pages is bound. Attributes are brought in line
/// with the pages' states.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_add_window(
    vm: *mut guestmemfd_vm,
    backend: *mut guestmemfd_backend,
    gpa: u64,
    offset: u64,
    size: u64,
    wanted: guestmemfd_binding,
    binding: *mut guestmemfd_binding,
    error: *mut guestmemfd_error,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (vm, backend) = unsafe { (arg(vm, "vm"), arg(backend, "backend")) };
    // SAFETY: as above.
    let (out, error) = unsafe { (Out::new(binding), Out::new(error)) };
    catch(error, || {
        let (vm, backend, out) = (vm?, backend?, super::wanted(out, "binding")?);
        let wanted = match wanted {
            GUESTMEMFD_BINDING_UNBOUND => Binding::Unbound,
            GUESTMEMFD_BINDING_BOUND => Binding::Bound,
            GUESTMEMFD_BINDING_SHARED_ALIAS => Binding::SharedAlias,
            other => return Err(Failure::Argument(format!("unknown binding {other}"))),
        };
        let guest = GuestPages::from_bytes(gpa, size).map_err(crate::Error::from)?;
        let binding = vm.vm.add_window(&backend.backend, guest, offset, wanted)?;
        out.put(match binding {
            Binding::Unbound => GUESTMEMFD_BINDING_UNBOUND,
            Binding::Bound => GUESTMEMFD_BINDING_BOUND,
            Binding::SharedAlias => GUESTMEMFD_BINDING_SHARED_ALIAS,
        });
        Ok(())
    })
}

/// A KVM slot has been deleted. Attributes stay until guestmemfd_vm_commit_windows(), so that a
/// slot that comes back unchanged costs nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_remove_window(
    vm: *mut guestmemfd_vm,
    gpa: u64,
    size: u64,
    error: *mut guestmemfd_error,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (vm, error) = unsafe { (arg(vm, "vm"), Out::new(error)) };
    catch(error, || {
        let guest = GuestPages::from_bytes(gpa, size).map_err(crate::Error::from)?;
        Ok(vm?.vm.remove_window(guest)?)
    })
}

/// All changes of the layout have been made: attributes are cleared where windows have gone.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_commit_windows(
    vm: *mut guestmemfd_vm,
    error: *mut guestmemfd_error,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (vm, error) = unsafe { (arg(vm, "vm"), Out::new(error)) };
    catch(error, || Ok(vm?.vm.clear_stale_windows()?))
}

/// Tries again to punch every hole that the kernel has refused to punch, so that the memory which
/// it accounts is what the states say. An error is the first; all are tried.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_punch_owed(
    vm: *const guestmemfd_vm,
    error: *mut guestmemfd_error,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (vm, error) = unsafe { (arg(vm, "vm"), Out::new(error)) };
    catch(error, || Ok(vm?.vm.punch_owed()?))
}

/// Does any part of the range lie in a window? Any numbers are allowed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_owns(vm: *const guestmemfd_vm, gpa: u64, size: u64) -> bool {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let vm = unsafe { arg(vm, "vm") };
    catch_value(false, || {
        // What wraps is cut at the end of the address space: it belongs to whoever owns its
        // beginning, and is refused there.
        let room = (u64::MAX - PAGE_SIZE).saturating_sub(gpa).max(1);
        let guest = GuestPages::covering_bytes(gpa, size.clamp(1, room));
        match (vm, guest) {
            (Ok(vm), Some(guest)) => vm.vm.owns(guest),
            _ => false,
        }
    })
}

/// Serves KVM_EXIT_MEMORY_FAULT with the numbers of the exit, for an address that
/// guestmemfd_vm_owns(). `intent` is the view that the guest's access asks for: private if the
/// exit's flags hold KVM_MEMORY_EXIT_FLAG_PRIVATE. Whatever it returns, enter the guest again: on
/// an error the next fault asks for the same.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_memory_fault(
    vm: *mut guestmemfd_vm,
    gpa: u64,
    size: u64,
    intent: guestmemfd_view,
    error: *mut guestmemfd_error,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (vm, error) = unsafe { (arg(vm, "vm"), Out::new(error)) };
    catch(error, || {
        let intent = match intent {
            GUESTMEMFD_VIEW_SHARED => View::Shared,
            GUESTMEMFD_VIEW_PRIVATE => View::Private,
            other => return Err(Failure::Argument(format!("unknown view {other}"))),
        };
        vm?.vm.memory_fault(gpa, size, intent)?;
        Ok(())
    })
}

/// Serves KVM_HC_MAP_GPA_RANGE, which is x86's alone, with the arguments as the guest gave them;
/// what it returns is the answer to the guest.
///
/// All of the request is checked before anything moves. It is then carried out in steps of at most
/// 64 MiB (1 GiB in place); after an error those before it have taken effect, and asked again they
/// cost nothing.
/// -EINTR only if the interrupted callback asked for it: then call again, as the guest will not.
/// -EAGAIN only if the gap callback answered that.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn guestmemfd_vm_map_gpa_range(
    vm: *mut guestmemfd_vm,
    gpa: u64,
    pages: u64,
    attributes: u64,
    error: *mut guestmemfd_error,
) -> i32 {
    // SAFETY: the contract of the header: each pointer is NULL, or valid for the whole call.
    let (vm, error) = unsafe { (arg(vm, "vm"), Out::new(error)) };
    catch(error, || {
        vm?.vm.map_gpa_range(gpa, pages, attributes)?;
        Ok(())
    })
}
