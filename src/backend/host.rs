// SPDX-License-Identifier: MIT OR Apache-2.0

//! The host's mapping of the shared view, for those who use guest memory through pointers.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use vm_memory::{FileOffset, MmapRegion};

use crate::backend::Backend;
use crate::pages::states::View;

/// A mapping that is made for the first who asks.
#[derive(Debug, Default)]
pub(super) struct HostMapping(Mutex<Option<Arc<MmapRegion>>>);

impl HostMapping {
    /// The next who asks gets another.
    pub(super) fn forget(&self) {
        *self.0.lock() = None;
    }
}

impl Backend {
    /// All of the shared view, mapped: once for each file that is behind it.
    pub(crate) fn host_mapping(&self) -> io::Result<Arc<MmapRegion>> {
        let known = self.host_mapping.0.lock().clone();
        if let Some(mapping) = known {
            return Ok(mapping);
        }
        // Without the lock. If somebody else is as fast, there is one mapping too many, which goes.
        let views = self.views();
        let file = views.file(View::Shared).fd().try_clone_to_owned()?;
        let size = usize::try_from(self.config.size).map_err(io::Error::other)?;
        let mapping = MmapRegion::from_file(FileOffset::new(file.into(), 0), size);
        let mapping = Arc::new(mapping.map_err(io::Error::other)?);
        let mut known = self.host_mapping.0.lock();
        if Arc::ptr_eq(&views, &self.views()) {
            return Ok(known.get_or_insert(mapping).clone());
        }
        // There are new files by now.
        Ok(mapping)
    }
}
