// SPDX-License-Identifier: GPL-2.0-or-later

//! A VM: its owner, its backends, and where their pages appear.

mod access;
pub mod convert;
mod moves;
pub mod request;
pub(crate) mod worker;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::unistd::{SysconfVar, sysconf};
use parking_lot::{Mutex, RwLock};

use crate::backend::{Backend, BackendConfig, BackendId, Discard};
use crate::error::{Error, Result};
use crate::exclusion::claims::{Claim, Claims};
use crate::listener::{Level, Listener, Told};
use crate::owner::Owner;
use crate::pages::ranges::{FilePages, GuestPages, PAGE_SIZE};
use crate::pages::states::{PageState, View};
use crate::views::{Backing, KernelFile, Mode, ViewFile};
use crate::vm::worker::{Backends, Worker};
use crate::windows::{Window, WindowTable};

/// A VM with backends. All functions may be called from any thread.
///
/// Locks are held for lookups only, never across a system call; what keeps a range of pages stable
/// while the kernel works is a [claim](crate::exclusion::claims).
pub struct Vm {
    owner: RwLock<Arc<dyn Owner>>,
    pub(crate) windows: RwLock<WindowTable>,
    /// Held while windows are added and removed, system calls included. No conversion takes it.
    layout: Mutex<()>,
    backends: Arc<Backends>,
    next_backend: AtomicU32,
    pub(crate) claims: Arc<Claims>,
    pub(crate) worker: Worker,
    pub(crate) listener: Box<dyn Listener>,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("owner", &self.owner)
            .field("windows", &self.windows)
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// A VM without backends.
    pub fn new(owner: Arc<dyn Owner>, listener: Box<dyn Listener>) -> Self {
        Self {
            owner: RwLock::new(owner),
            windows: RwLock::default(),
            layout: Mutex::default(),
            backends: Arc::default(),
            next_backend: AtomicU32::new(0),
            claims: Arc::default(),
            worker: Worker::default(),
            listener,
        }
    }

    pub(crate) fn owner(&self) -> Arc<dyn Owner> {
        self.owner.read().clone()
    }

    /// Creates a backend and its files: a guest_memfd and a memfd for a guest with private memory,
    /// one guest_memfd that the host maps for others.
    pub fn create_backend(&self, config: BackendConfig) -> Result<Arc<Backend>> {
        // The size is checked before files are created with it.
        FilePages::from_bytes(0, config.size)?;
        let mode = choose_mode(self.owner().as_ref(), config.mode)?;
        check_bind(&config, mode)?;
        if mode == Mode::Mapped {
            return self.create_mapped_backend(config);
        }
        let shared = KernelFile::memfd("guestmemfd-shared", config.size).map_err(|source| {
            Error::CreateFile {
                backend: config.name.clone(),
                view: View::Shared,
                size: config.size,
                source,
            }
        })?;
        self.create_backend_over(config, Arc::new(shared))
    }

    /// Creates a backend whose shared view is a file of the caller's.
    pub fn create_backend_over(
        &self,
        config: BackendConfig,
        shared: Arc<dyn ViewFile>,
    ) -> Result<Arc<Backend>> {
        check_page_size(kernel_page_size())?;
        check_lazy(&config, shared.as_ref())?;
        if config.discard == Discard::Coalesced {
            self.worker
                .start(self.claims.clone(), self.backends.clone())
                .map_err(|source| Error::Worker { source })?;
        }
        let private = create_private_file(self.owner().as_ref(), &config)?;
        self.add_backend(config, Backing::TwoFiles { private, shared })
    }

    /// Nothing is ever converted: there is nothing to decide lazily, or to discard later.
    fn create_mapped_backend(&self, config: BackendConfig) -> Result<Arc<Backend>> {
        check_page_size(kernel_page_size())?;
        let file = self.owner().create_mapped_file(config.size);
        let file = file.map_err(|source| Error::CreateFile {
            backend: config.name.clone(),
            view: View::Shared,
            size: config.size,
            source,
        })?;
        let config = BackendConfig {
            start: PageState::Shared,
            lazy: None,
            ..config
        };
        self.add_backend(config, Backing::Mapped { file })
    }

    fn add_backend(&self, config: BackendConfig, backing: Backing) -> Result<Arc<Backend>> {
        let id = BackendId(self.next_backend.fetch_add(1, Ordering::Relaxed));
        let backend = Arc::new(Backend::new(id, config, backing)?);
        self.backends.write().insert(id, backend.clone());
        Ok(backend)
    }

    /// Forgets a backend, which has no windows any more.
    pub fn remove_backend(&self, backend: &Backend) -> Result<()> {
        if self.windows.read().shows(backend.id()) {
            return Err(Error::InUse {
                what: "a backend cannot be removed",
                user: "the guest has windows on it",
            });
        }
        let cleared = self.clear_stale_windows();
        self.backends.write().remove(&backend.id());
        cleared
    }

    /// Punches every hole that is still owed, so that the kernel's accounts show what the states
    /// say. Returns the first error after all have been tried.
    pub fn drain(&self) -> Result<()> {
        let backends: Vec<_> = self.backends.read().values().cloned().collect();
        let drained = backends.iter().map(|b| worker::drain(&self.claims, b));
        drained.fold(Ok(()), Result::and)
    }

    /// For errors that no return value can carry.
    pub(crate) fn log_error(&self, error: &Error) {
        self.listener.log(Level::Error, &error.to_string());
    }

    /// The backend of a window.
    pub(crate) fn backend(&self, id: BackendId) -> Option<Arc<Backend>> {
        self.backends.read().get(&id).cloned()
    }

    /// Does any window show a part of this range?
    pub fn owns(&self, guest: GuestPages) -> bool {
        self.windows.read().owns(guest)
    }

    /// Shows pages of a backend to the guest and brings the attributes there in line with their
    /// states. Returns whether the window is bound: it is unless `bindable` or the backend forbids it
    /// or another window of these pages is.
    pub fn add_window(
        &self,
        backend: &Backend,
        guest: GuestPages,
        offset: u64,
        bindable: bool,
    ) -> Result<bool> {
        let file = backend.pages_at(offset, guest.bytes())?;
        let _layout = self.layout.lock();
        let stale = self.windows.read().stale_in(guest);
        let _claim = self.claim_layout(
            stale.iter().map(|w| (w.backend, w.file)),
            Some((backend, file)),
        );

        let mut windows = self.windows.write();
        let bound = bindable && backend.is_bindable() && !windows.is_bound(backend.id(), file);
        let window = Window::new(guest, backend.id(), file.start(), bound)
            .ok_or_else(|| backend.outside(offset, guest.bytes()))?;
        windows.add(window)?;
        let (other, fresh) = windows.take_stale_under(&window);
        drop(windows);

        let result = self
            .set_where_private(&other, View::Shared)
            .and_then(|()| self.set_where_private(&fresh, View::Private));
        if result.is_err() {
            self.windows.write().take_back(window, other);
        }
        result.map(|()| bound)
    }

    /// The guest no longer sees this window. Attributes stay until
    /// [`Vm::clear_stale_windows`], so that a window that comes back unchanged costs nothing.
    ///
    /// A conversion under way keeps the attributes of stale windows in line too, so there is nothing
    /// to wait for.
    pub fn remove_window(&self, guest: GuestPages) -> Result<()> {
        let _layout = self.layout.lock();
        match self.windows.write().remove(guest) {
            Some(_) => Ok(()),
            None => Err(Error::NoWindow { guest }),
        }
    }

    /// Clears the attributes where windows have been removed and none has come back.
    pub fn clear_stale_windows(&self) -> Result<()> {
        let _layout = self.layout.lock();
        let stale = self.windows.read().stale();
        if stale.is_empty() {
            return Ok(());
        }
        let _claim = self.claim_layout(stale.iter().map(|w| (w.backend, w.file)), None);
        self.set_where_private(&stale, View::Shared)?;
        self.windows.write().forget_stale();
        Ok(())
    }

    /// The guest runs under a new owner now, as after a confidential reset. All windows have been
    /// removed. Every backend gets a new private file, and its pages start over. What was private is
    /// gone; what was shared survives, as RAM does in any reset, unless pages start private. Mapped
    /// backends keep their file, which slots of another VM cannot carry: bound ones are refused.
    ///
    /// If a file cannot be created, nothing has changed. If a shared file cannot be emptied, the
    /// error comes before any backend starts over.
    pub fn rebind(&self, owner: Arc<dyn Owner>) -> Result<()> {
        let backends: Vec<_> = self.backends.read().values().cloned().collect();
        let told = Told::begin(self.listener.as_ref());
        let _layout = self.layout.lock();
        if !self.windows.read().is_empty() {
            return Err(Error::InUse {
                what: "a VM cannot get a new owner",
                user: "the guest has windows",
            });
        }
        let files = backends
            .iter()
            .map(|backend| file_for_new_owner(owner.as_ref(), backend))
            .collect::<Result<Vec<_>>>()?;
        let all = backends.iter().map(|b| (b.id(), b.pages()));
        let _claim = self.claim_layout(all, None);

        let mut to_populate = Vec::new();
        for backend in &backends {
            let start_private = !backend.config().start.host_may_use();
            for (pages, state) in backend.state_runs(backend.pages()) {
                match (state.host_may_use(), start_private) {
                    // What the host sees survives, as RAM does in any reset.
                    (true, false) => continue,
                    (true, true) => told.discard(backend, pages),
                    (false, false) => to_populate.push((backend, pages)),
                    (false, true) => {}
                }
                backend.punch(pages, View::Shared)?;
            }
        }
        // Their attributes went with the old owner.
        self.windows.write().forget_stale();
        *self.owner.write() = owner;
        for (backend, private) in backends.iter().zip(files) {
            if let Some(private) = private {
                backend.restart(private);
            }
        }
        to_populate
            .into_iter()
            .try_for_each(|(backend, pages)| told.populate(backend, pages))
    }

    /// Sets the attributes of windows where their pages are private. The caller has claimed them.
    fn set_where_private(&self, windows: &[Window], view: View) -> Result<()> {
        let owner = self.owner();
        for window in windows {
            let Some(backend) = self.backend(window.backend) else {
                continue;
            };
            for (run, state) in backend.state_runs(window.file) {
                let guest = run.translate(window.file.start(), window.guest.start());
                if let (PageState::Private, Some(guest)) = (state, guest) {
                    owner
                        .set_attributes(guest, view)
                        .map_err(|source| Error::SetAttributes {
                            guest,
                            view,
                            source,
                        })?;
                }
            }
        }
        Ok(())
    }

    /// Pages whose layout changes must not be converted meanwhile. Not interruptible: the user
    /// cannot take a layout change back.
    fn claim_layout<'b>(
        &self,
        stale: impl Iterator<Item = (BackendId, FilePages)>,
        new: impl IntoIterator<Item = (&'b Backend, FilePages)>,
    ) -> Claim<'_> {
        let new = new.into_iter().map(|(backend, file)| (backend.id(), file));
        let wanted: Vec<_> = stale.chain(new).collect();
        self.claims.claim_for_sure(&wanted)
    }
}

fn choose_mode(owner: &dyn Owner, wanted: Option<Mode>) -> Result<Mode> {
    match wanted {
        Some(Mode::Private) => demanded(Mode::Private, "private", owner.check_private_memory()),
        Some(Mode::Mapped) => demanded(Mode::Mapped, "mapped", owner.check_mapped_memory()),
        None => match (owner.check_private_memory(), owner.check_mapped_memory()) {
            (Ok(()), _) => Ok(Mode::Private),
            (Err(_), Ok(())) => Ok(Mode::Mapped),
            (Err(private), Err(mapped)) => Err(Error::NoMode {
                private: Box::new(private),
                mapped: Box::new(mapped),
            }),
        },
    }
}

/// The mode, or why it cannot be had.
fn demanded(mode: Mode, name: &'static str, check: Result<()>) -> Result<Mode> {
    check.map(|()| mode).map_err(|reason| Error::DemandedMode {
        name,
        reason: Box::new(reason),
    })
}

fn check_bind(config: &BackendConfig, mode: Mode) -> Result<()> {
    if config.bind && mode == Mode::Private {
        return Err(Error::Unsupported {
            wanted: "bind=on".into(),
            found: "it belongs to mode=mapped; with private memory slots are always bound".into(),
        });
    }
    Ok(())
}

/// The private file that a backend gets with a new owner.
fn file_for_new_owner(owner: &dyn Owner, backend: &Backend) -> Result<Option<Arc<dyn ViewFile>>> {
    match backend.mode() {
        Mode::Private => create_private_file(owner, backend.config()).map(Some),
        Mode::Mapped if backend.config().bind => Err(Error::InUse {
            what: "a VM cannot get a new owner",
            user: "slots carry a mapped guest_memfd (bind=on), which belongs to the old one; use bind=off",
        }),
        Mode::Mapped => Ok(None),
    }
}

/// Can lazy attributes be had as the backend is to be?
fn check_lazy(config: &BackendConfig, shared: &dyn ViewFile) -> Result<()> {
    if config.lazy.is_none() {
        return Ok(());
    }
    let unsupported = |found: &str| {
        Err(Error::Unsupported {
            wanted: "lazy attributes".into(),
            found: found.into(),
        })
    };
    if config.start != PageState::Undecided {
        return unsupported("all memory of this guest starts private");
    }
    let all = FilePages::from_bytes(0, config.size)?;
    // One that is empty and has data all the same tells nothing.
    match (shared.allocated(), shared.first_data(all)) {
        (Ok(_), Ok(None)) | (Ok(1..), Ok(Some(_))) => Ok(()),
        _ => unsupported("the file of the shared view cannot tell which pages have data"),
    }
}

fn create_private_file(owner: &dyn Owner, config: &BackendConfig) -> Result<Arc<dyn ViewFile>> {
    owner
        .create_private_file(config.size)
        .map_err(|source| Error::CreateFile {
            backend: config.name.clone(),
            view: View::Private,
            size: config.size,
            source,
        })
}

/// States are kept for pages of [`PAGE_SIZE`], which must be the kernel's: it punches and converts no
/// smaller ones. On arm64 it may have larger pages.
fn check_page_size(bytes: u64) -> Result<()> {
    if bytes == PAGE_SIZE {
        return Ok(());
    }
    Err(Error::Unsupported {
        wanted: format!("pages of {PAGE_SIZE} bytes"),
        found: format!("this kernel's have {bytes}; use one that was built with pages of 4 KiB"),
    })
}

/// Of the running kernel, in bytes.
fn kernel_page_size() -> u64 {
    let size = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    // Linux always tells.
    size.and_then(|size| size.try_into().ok())
        .unwrap_or(PAGE_SIZE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_with_larger_pages_is_refused() {
        check_page_size(kernel_page_size()).unwrap();
        let error = check_page_size(64 << 10).unwrap_err();
        assert!(error.to_string().contains("65536"), "{error}");
    }
}
