// SPDX-License-Identifier: MIT OR Apache-2.0

//! A VM: its owner, its backends, and where their pages appear.

pub(crate) mod access;
mod attributes;
mod convert;
mod free;
pub(crate) mod guest_memory;
mod layout;
mod moves;
mod rebind;
mod request;
mod restore;
mod told;
mod wait;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::backend::create::{self, Created};
use crate::backend::{Backend, BackendConfig};
use crate::error::{Error, Result};
use crate::exclusion::claims::{Claim, Claims};
use crate::listener::{Caller, Level, Listener, Notifier, check_no_callback};
use crate::owner::Owner;
use crate::pages::ranges::{BackendId, FilePages, GuestPages, SmallList, VmId};
use crate::pages::states::View;
use crate::views::{Mode, ViewFile};
use crate::windows::{Layout, Part, WindowTable};

/// At most so many pages (64 MiB) are claimed at once: whoever waits for a step of a request does
/// not wait for all of it. Much longer than it takes to begin a step, the kernel frees the data of
/// so many.
const STEP_PAGES: u64 = 1 << 14;

/// The same (1 GiB) where nothing is freed.
const STEP_PAGES_IN_PLACE: u64 = 1 << 18;

/// A VM with backends. All functions may be called from any thread.
///
/// Locks are held for lookups only, never across a system call; what keeps a range of pages stable
/// while the kernel works is a claim.
pub struct Vm {
    id: VmId,
    owner: RwLock<Arc<dyn Owner>>,
    pub(crate) places: RwLock<Places>,
    /// Held while windows are added and removed, system calls included. No conversion takes it.
    layout: Mutex<()>,
    pub(crate) claims: Claims,
    pub(crate) listener: Caller,
}

/// Where pages of which backends appear.
#[derive(Default)]
pub(crate) struct Places {
    pub(crate) windows: WindowTable,
    /// By number. One that has been removed leaves its place empty: no number comes again.
    backends: Vec<Option<Arc<Backend>>>,
}

impl Places {
    fn new_id(&mut self) -> BackendId {
        self.backends.push(None);
        BackendId((self.backends.len() - 1) as u32)
    }

    fn set_backend(&mut self, id: BackendId, backend: Option<Arc<Backend>>) {
        if let Some(place) = self.backends.get_mut(id.0 as usize) {
            *place = backend;
        }
    }

    /// Checks that a backend of this VM has not been removed.
    fn check_known(&self, backend: &Backend) -> Result<()> {
        match self.backend(backend.id()) {
            Some(_) => Ok(()),
            None => Err(Error::Removed {
                backend: backend.config().name.clone(),
            }),
        }
    }

    /// Checks that the guest does not see a backend.
    fn check_unseen(&self, backend: &Backend) -> Result<()> {
        match self.windows.shows(backend.id()) {
            false => Ok(()),
            true => Err(Error::InUse {
                what: "a backend cannot be removed",
                user: "the guest has windows on it",
            }),
        }
    }

    /// The backend of a window.
    fn backend(&self, id: BackendId) -> Option<Arc<Backend>> {
        self.backends.get(id.0 as usize)?.clone()
    }
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("owner", &self.owner)
            .field("windows", &self.places.read().windows)
            .finish_non_exhaustive()
    }
}

impl Vm {
    /// A VM without backends.
    pub fn new(owner: Arc<dyn Owner>, listener: Box<dyn Listener>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = VmId(NEXT.fetch_add(1, Ordering::Relaxed));
        Self {
            id,
            owner: RwLock::new(owner),
            places: RwLock::default(),
            layout: Mutex::default(),
            claims: Claims::default(),
            listener: Caller::new(listener, id),
        }
    }

    /// Creates a backend and its files: one guest_memfd for both views where the kernel offers
    /// that, a guest_memfd and a memfd for other guests with private memory, one guest_memfd that
    /// the host maps for guests without.
    ///
    /// # Errors
    /// [`Error::Range`] for a size that is none, [`Error::Unsupported`], [`Error::DemandedMode`]
    /// and [`Error::NoMode`] for what kernel or VM lack, [`Error::CreateFile`],
    /// [`Error::NoMemory`].
    pub fn create_backend(&self, mut config: BackendConfig) -> Result<Arc<Backend>> {
        let created = create::create(self.owner().as_ref(), &mut config)?;
        self.add_backend(config, created)
    }

    /// Creates a backend whose shared view is a file of the caller's.
    ///
    /// # Errors
    /// As for [`Vm::create_backend`].
    pub fn create_backend_over(
        &self,
        config: BackendConfig,
        shared: Arc<dyn ViewFile>,
    ) -> Result<Arc<Backend>> {
        let created = create::create_over(self.owner().as_ref(), &config, shared)?;
        self.add_backend(config, created)
    }

    fn add_backend(&self, config: BackendConfig, created: Created) -> Result<Arc<Backend>> {
        let id = self.places.write().new_id();
        let backend = Arc::new(Backend::new(self.id, id, config, created)?);
        self.places.write().set_backend(id, Some(backend.clone()));
        Ok(backend)
    }

    /// Forgets a backend, which has no windows any more.
    ///
    /// # Errors
    /// [`Error::InUse`] while it has windows, [`Error::OtherVm`]; it is still there then.
    /// [`Error::SetAttributes`] if attributes of its old places could not be cleared: the backend
    /// is forgotten, and they are cleared when the layout changes the next time.
    pub fn remove_backend(&self, backend: &Backend) -> Result<()> {
        backend.check_vm(self.id)?;
        check_no_callback(self.id)?;
        self.places.read().check_unseen(backend)?;
        if backend.mode() == Mode::InPlace {
            // Its file keeps the attributes, and goes.
            self.places.write().windows.forget_stale_of(backend.id());
        }
        let cleared = self.clear_stale_windows();
        let mut places = self.places.write();
        // Another thread may have added a window meanwhile.
        places.check_unseen(backend)?;
        places.set_backend(backend.id(), None);
        cleared
    }

    /// Tries again to punch every hole that the kernel has refused to punch, so that its accounts
    /// show what the states say.
    ///
    /// # Errors
    /// The first [`Error::Punch`], after all have been tried.
    pub fn punch_owed(&self) -> Result<()> {
        check_no_callback(self.id)?;
        let mut result = Ok(());
        for backend in self.all_backends() {
            for view in View::BOTH {
                let mut rest = Some(backend.pages());
                while let Some(hole) = rest.and_then(|rest| backend.first_owed_hole(rest, view)) {
                    let step = hole.first(STEP_PAGES);
                    let _claim = self.claims.claim_for_sure(&[(backend.id(), step)]);
                    // What has been punched before it was claimed is no longer owed.
                    result = result.and(backend.punch_owed(step, view));
                    rest = FilePages::new(step.end(), backend.pages().end());
                }
            }
        }
        result
    }

    /// Does any window show a part of this range?
    pub fn owns(&self, guest: GuestPages) -> bool {
        self.places.read().windows.owns(guest)
    }
}

/// Lookups.
impl Vm {
    pub(crate) fn id(&self) -> VmId {
        self.id
    }

    pub(crate) fn owner(&self) -> Arc<dyn Owner> {
        self.owner.read().clone()
    }

    /// The backend of a window.
    pub(crate) fn backend(&self, id: BackendId) -> Option<Arc<Backend>> {
        self.places.read().backend(id)
    }

    fn all_backends(&self) -> Vec<Arc<Backend>> {
        let places = self.places.read();
        places.backends.iter().flatten().cloned().collect()
    }

    /// What a range shows, and in which layout.
    pub(crate) fn parts(&self, guest: GuestPages) -> (SmallList<Part>, Layout) {
        let windows = &self.places.read().windows;
        (windows.resolve(guest), windows.layout())
    }

    /// Claims pages that a range shows in a layout. `None` if that is another by then: it cannot
    /// change under a claim, but it can while one is waited for.
    fn claim_in(
        &self,
        layout: Layout,
        guest: GuestPages,
        wanted: &[(BackendId, FilePages)],
    ) -> Result<Option<Claim<'_>>> {
        let Some(claim) = self.claims.claim(wanted, || self.is_interrupted()) else {
            return Err(Error::Interrupted { guest });
        };
        let is_same = self.places.read().windows.layout() == layout;
        Ok(is_same.then_some(claim))
    }

    /// A step of a request begins.
    fn begin(&self) -> Result<Notifier<'_>> {
        Notifier::begin(&self.listener)
    }

    /// Is a request to give up?
    fn is_interrupted(&self) -> bool {
        self.listener.call(|user| user.interrupted())
    }

    /// For errors that no return value can carry.
    pub(crate) fn log_error(&self, error: &Error) {
        self.log(Level::Error, &error.to_string());
    }

    pub(crate) fn log(&self, level: Level, message: &str) {
        self.listener.call(|user| user.log(level, message));
    }
}
