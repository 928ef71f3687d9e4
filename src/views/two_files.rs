// SPDX-License-Identifier: MIT OR Apache-2.0

//! Two files: each view has a page of its own, and the one that a page has left is a hole.

use std::sync::Arc;

use crate::pages::states::View;
use crate::views::ViewFile;

/// A guest_memfd for private pages, and a file that the host maps for shared ones.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TwoFiles {
    /// The guest_memfd.
    pub private: Arc<dyn ViewFile>,
    /// The memfd.
    pub shared: Arc<dyn ViewFile>,
}

impl TwoFiles {
    pub(super) fn file(&self, view: View) -> &dyn ViewFile {
        match view {
            View::Private => self.private.as_ref(),
            View::Shared => self.shared.as_ref(),
        }
    }

    /// For another owner, whose guest_memfd is new.
    pub(crate) fn with_private(&self, private: Arc<dyn ViewFile>) -> Self {
        Self {
            private,
            shared: self.shared.clone(),
        }
    }
}
