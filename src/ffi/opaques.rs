// SPDX-License-Identifier: MIT OR Apache-2.0

//! What C users want to be told of their backends by.

use std::collections::BTreeMap;
use std::os::raw::c_void;
use std::ptr;

use parking_lot::RwLock;

use crate::backend::{Backend, BackendId};

/// What C passed for each backend, to get it back in callbacks.
#[derive(Debug, Default)]
pub(super) struct Opaques(RwLock<BTreeMap<BackendId, usize>>);

impl Opaques {
    /// Before the guest sees the backend, and so before there is a callback.
    pub(super) fn insert(&self, backend: BackendId, opaque: *mut c_void) {
        let opaque = opaque.expose_provenance();
        self.0.write().insert(backend, opaque);
    }

    pub(super) fn remove(&self, backend: BackendId) {
        self.0.write().remove(&backend);
    }

    pub(super) fn get(&self, backend: &Backend) -> *mut c_void {
        let opaque = self.0.read().get(&backend.id()).copied();
        opaque.map_or(ptr::null_mut(), ptr::with_exposed_provenance_mut)
    }
}
