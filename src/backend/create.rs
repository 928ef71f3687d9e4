// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which strategy serves a VM, and the files that it needs.

use std::sync::Arc;

use crate::backend::{Backend, BackendConfig};
use crate::error::{Error, Result};
use crate::owner::Owner;
use crate::pages::ranges::{FilePages, PAGE_SIZE};
use crate::pages::states::{PageState, View};
use crate::views::{KernelFile, Mapped, Mode, TwoFiles, ViewFile, Views};

/// Chooses a strategy and creates its files: a guest_memfd and a memfd for a guest with private
/// memory, one guest_memfd that the host maps for others. Returns the configuration as it applies.
pub(crate) fn create(owner: &dyn Owner, config: BackendConfig) -> Result<(BackendConfig, Views)> {
    // The size is checked before files are created with it.
    FilePages::from_bytes(0, config.size)?;
    let mode = choose_mode(owner, config.mode)?;
    check_bind(&config, mode)?;
    if mode == Mode::Mapped {
        return create_mapped(owner, config);
    }
    let shared = KernelFile::memfd("guestmemfd-shared", config.size);
    let shared = shared.map_err(|source| cannot_create(&config, View::Shared, source))?;
    create_over(owner, config, Arc::new(shared))
}

/// Two files, of which the caller has one.
pub(crate) fn create_over(
    owner: &dyn Owner,
    config: BackendConfig,
    shared: Arc<dyn ViewFile>,
) -> Result<(BackendConfig, Views)> {
    check_page_size(kernel_page_size())?;
    check_lazy(&config, shared.as_ref())?;
    let private = create_private_file(owner, &config)?;
    Ok((config, Views::TwoFiles(TwoFiles { private, shared })))
}

/// Nothing is ever converted: there is nothing to decide lazily.
fn create_mapped(owner: &dyn Owner, config: BackendConfig) -> Result<(BackendConfig, Views)> {
    check_page_size(kernel_page_size())?;
    let file = owner.create_mapped_file(config.size);
    let file = file.map_err(|source| cannot_create(&config, View::Shared, source))?;
    let config = BackendConfig {
        start: PageState::Shared,
        lazy: None,
        ..config
    };
    Ok((config, Views::Mapped(Mapped { file })))
}

/// The files that a backend gets with a new owner, if it gets any.
pub(crate) fn for_new_owner(owner: &dyn Owner, backend: &Backend) -> Result<Option<Views>> {
    match &*backend.views() {
        Views::TwoFiles(files) => {
            let private = create_private_file(owner, backend.config())?;
            Ok(Some(Views::TwoFiles(files.with_private(private))))
        }
        Views::Mapped(_) if backend.config().bind => Err(Error::InUse {
            what: "a VM cannot get a new owner",
            user: "slots carry a mapped guest_memfd (bind=on), which belongs to the old one; use \
                   bind=off",
        }),
        Views::Mapped(_) => Ok(None),
    }
}

fn create_private_file(owner: &dyn Owner, config: &BackendConfig) -> Result<Arc<dyn ViewFile>> {
    let file = owner.create_private_file(config.size);
    file.map_err(|source| cannot_create(config, View::Private, source))
}

fn cannot_create(config: &BackendConfig, view: View, source: std::io::Error) -> Error {
    Error::CreateFile {
        backend: config.name.clone(),
        view,
        size: config.size,
        source,
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
    if config.bind && mode.has_private_pages() {
        return Err(Error::Unsupported {
            wanted: "bind=on".into(),
            found: "it belongs to mode=mapped; with private memory slots are always bound".into(),
        });
    }
    Ok(())
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
    rustix::param::page_size() as u64
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
