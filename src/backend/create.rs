// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which strategy serves a VM, and the files that it needs.

use std::sync::Arc;

use crate::backend::reach::Chunk;
use crate::backend::{Backend, BackendConfig, Discard, Lazy};
use crate::error::{Error, Result};
use crate::owner::Owner;
use crate::pages::ranges::{FilePages, PAGE_SIZE};
use crate::pages::states::{PageState, View};
use crate::views::{InPlace, KernelFile, Mapped, Mode, TwoFiles, ViewFile, Views};

/// What a backend is made of.
pub(crate) struct Created {
    pub(crate) views: Views,
    /// Lazy attributes as they apply.
    pub(crate) lazy: Option<Chunk>,
}

/// Chooses a strategy and creates its files: one guest_memfd where it can serve both views, a
/// guest_memfd and a memfd for other guests with private memory, one guest_memfd that the host maps
/// for guests without.
pub(crate) fn create(owner: &dyn Owner, config: &mut BackendConfig) -> Result<Created> {
    // The size is checked before files are created with it.
    FilePages::from_bytes(0, config.size)?;
    let mode = choose_mode(owner, config)?;
    check_bind(config, mode)?;
    match mode {
        Mode::InPlace => create_in_place(owner, config),
        Mode::Mapped => create_mapped(owner, config),
        Mode::Private => {
            let shared = KernelFile::memfd("guestmemfd-shared", config.size);
            let shared = shared.map_err(|source| cannot_create(config, View::Shared, source))?;
            create_over(owner, config, Arc::new(shared))
        }
    }
}

/// Two files, of which the caller has one.
pub(crate) fn create_over(
    owner: &dyn Owner,
    config: &BackendConfig,
    shared: Arc<dyn ViewFile>,
) -> Result<Created> {
    check_page_size(kernel_page_size())?;
    let lazy = lazy_chunk(config, shared.as_ref())?;
    let private = create_private_file(owner, config)?;
    let views = Views::TwoFiles(TwoFiles { private, shared });
    Ok(Created { views, lazy })
}

/// All of memory is one range of attributes: there is nothing to decide lazily. Nothing is left
/// behind, so there is nothing to keep either.
fn create_in_place(owner: &dyn Owner, config: &BackendConfig) -> Result<Created> {
    check_page_size(kernel_page_size())?;
    let lacks = |wanted: &str, found: &str| {
        Err(Error::Unsupported {
            wanted: wanted.into(),
            found: found.into(),
        })
    };
    if matches!(config.lazy, Lazy::On(_)) {
        return lacks(
            "lazy attributes",
            "memory is converted in place, where the attributes of all memory cost as much as \
             those of a page; use lazy-attributes=auto or off",
        );
    }
    if config.discard == Discard::Keep {
        return lacks(
            "discard=keep",
            "memory is converted in place, where a page leaves nothing behind; use discard=now",
        );
    }
    let views = Views::InPlace(create_in_place_file(owner, config)?);
    Ok(Created { views, lazy: None })
}

fn create_in_place_file(owner: &dyn Owner, config: &BackendConfig) -> Result<InPlace> {
    let start = match config.start {
        PageState::Private => View::Private,
        _ => View::Shared,
    };
    let file = owner.create_in_place_file(config.size, start);
    let file = file.map_err(|source| cannot_create(config, start, source))?;
    Ok(InPlace { file })
}

/// Nothing is ever converted: there is nothing to decide lazily.
fn create_mapped(owner: &dyn Owner, config: &mut BackendConfig) -> Result<Created> {
    check_page_size(kernel_page_size())?;
    let file = owner.create_mapped_file(config.size);
    let file = file.map_err(|source| cannot_create(config, View::Shared, source))?;
    config.start = PageState::Shared;
    let views = Views::Mapped(Mapped { file });
    Ok(Created { views, lazy: None })
}

/// The files that a backend gets with a new owner, if it gets any.
pub(crate) fn for_new_owner(owner: &dyn Owner, backend: &Backend) -> Result<Option<Views>> {
    match &*backend.views() {
        Views::TwoFiles(files) => {
            let private = create_private_file(owner, backend.config())?;
            Ok(Some(Views::TwoFiles(files.with_private(private))))
        }
        Views::InPlace(_) => {
            let file = create_in_place_file(owner, backend.config())?;
            Ok(Some(Views::InPlace(file)))
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

fn choose_mode(owner: &dyn Owner, config: &BackendConfig) -> Result<Mode> {
    if let Some(mode) = config.mode {
        return match mode {
            Mode::InPlace => demanded(mode, "in-place", owner.check_in_place()),
            Mode::Private => demanded(mode, "private", owner.check_private_memory()),
            Mode::Mapped if config.confidential => demanded(mode, "mapped", never_mapped()),
            Mode::Mapped => demanded(mode, "mapped", owner.check_mapped_memory()),
        };
    }
    let in_place = match owner.check_in_place() {
        Ok(()) => return Ok(Mode::InPlace),
        Err(error) => error,
    };
    let private = match owner.check_private_memory() {
        Ok(()) => return Ok(Mode::Private),
        Err(error) => error,
    };
    let mapped = match config.confidential {
        true => never_mapped(),
        false => owner.check_mapped_memory(),
    };
    match mapped {
        Ok(()) => Ok(Mode::Mapped),
        Err(mapped) => Err(Error::NoMode {
            in_place: Box::new(in_place),
            private: Box::new(private),
            mapped: Box::new(mapped),
        }),
    }
}

/// The host would see all memory of a guest that believes part of it to be its own.
fn never_mapped() -> Result<()> {
    Err(Error::Unsupported {
        wanted: "memory that the host maps".into(),
        found:
            "the guest is confidential, and part of its memory is for itself alone; use mode=auto, \
                mode=in-place (Linux 7.4 or later, with kvm.gmem_in_place_conversion=1) or \
                mode=private (a kernel with CONFIG_KVM_VM_MEMORY_ATTRIBUTES)"
                .into(),
    })
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

/// Lazy attributes as they apply with two files.
fn lazy_chunk(config: &BackendConfig, shared: &dyn ViewFile) -> Result<Option<Chunk>> {
    let chunk = match config.lazy {
        Lazy::Off => return Ok(None),
        Lazy::Auto(_) if config.start != PageState::Undecided => return Ok(None),
        Lazy::Auto(chunk) | Lazy::On(chunk) => chunk,
    };
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
        (Ok(_), Ok(None)) | (Ok(1..), Ok(Some(_))) => Ok(Some(chunk)),
        _ if matches!(config.lazy, Lazy::Auto(_)) => Ok(None),
        _ => unsupported("the file of the shared view cannot tell which pages have data"),
    }
}

/// States are kept for pages of [`PAGE_SIZE`], which must be the kernel's: it punches and converts
/// no smaller ones. On arm64 it may have larger pages.
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
