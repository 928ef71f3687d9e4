// SPDX-License-Identifier: MIT OR Apache-2.0

//! Backends whose memory is one file that the host maps: nothing is ever private.

#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

use std::io;
use std::sync::Arc;

use guestmemfd::listener::Level;
use guestmemfd::owner::SoftwareOwner;
use guestmemfd::*;

const PAGES: u64 = 16;

/// A listener that hears nothing and allows nothing.
struct Silent;

impl Listener for Silent {
    fn gap(&self, _: GuestPages, _: View) -> io::Result<()> {
        Err(io::ErrorKind::InvalidInput.into())
    }

    fn log(&self, _: Level, message: &str) {
        panic!("{message}");
    }
}

fn config(mode: Option<Mode>, bind: bool) -> BackendConfig {
    let mut config = BackendConfig::new("ram", PAGES * PAGE_SIZE);
    config.mode = mode;
    config.bind = bind;
    config.lazy = Lazy::On(backend::reach::Chunk::default());
    config
}

fn mapped(bind: bool) -> (Vm, Arc<Backend>) {
    let vm = Vm::new(Arc::new(SoftwareOwner::default()), Box::new(Silent));
    let backend = vm.create_backend(config(Some(Mode::Mapped), bind)).unwrap();
    (vm, backend)
}

fn guest(start: u64, end: u64) -> GuestPages {
    GuestPages::new(start, end).unwrap()
}

/// One file, as data in it shows.
fn write(backend: &Backend, page: u64) {
    let views = backend.views();
    let file = views.file(View::Shared).fd();
    rustix::io::pwrite(file, b"data", page * PAGE_SIZE).unwrap();
}

fn data(backend: &Backend, view: View) -> Option<FilePages> {
    let views = backend.views();
    views.file(view).first_data(backend.pages()).unwrap()
}

#[test]
fn both_views_are_one_file_and_all_pages_are_shared() {
    let (_vm, backend) = mapped(false);
    assert_eq!(backend.mode(), Mode::Mapped);
    write(&backend, 3);
    assert_eq!(data(&backend, View::Private), FilePages::new(3, 4));
    assert_eq!(
        backend.state_map(backend.pages(), usize::MAX).runs,
        [(backend.pages(), PageState::Shared)]
    );
}

#[test]
fn nothing_can_become_private() {
    for bind in [false, true] {
        let (vm, backend) = mapped(bind);
        vm.add_window(&backend, guest(0, PAGES), 0, Binding::Bound)
            .unwrap();
        let error = vm.convert(guest(2, 4), View::Private).unwrap_err();
        assert!(matches!(error, Error::NeverPrivate { .. }), "{error}");
        // EINVAL is what the guest gets.
        assert_eq!(error.errno(), 22);
        assert!(vm.map_gpa_range(0, 1, 1 << 4).is_err());
        // Only a window that is bound can show a private page at all.
        assert_eq!(vm.memory_fault(0, PAGE_SIZE, View::Private).is_err(), bind);
        assert_eq!(vm.convert(guest(2, 4), View::Shared).unwrap(), 0);
        assert_eq!(
            backend.state_map(backend.pages(), usize::MAX).runs,
            [(backend.pages(), PageState::Shared)]
        );
    }
}

#[test]
fn a_discard_punches_and_the_pages_stay_shared() {
    let (vm, backend) = mapped(false);
    (0..PAGES).for_each(|page| write(&backend, page));
    vm.free_pages(&backend, FilePages::new(0, PAGES - 1).unwrap())
        .unwrap();
    assert_eq!(
        data(&backend, View::Shared),
        FilePages::new(PAGES - 1, PAGES)
    );
    assert!(vm.host_may_use(&backend, backend.pages()));
    assert_eq!(
        backend.state_map(backend.pages(), usize::MAX).runs,
        [(backend.pages(), PageState::Shared)]
    );
}

#[test]
fn slots_carry_the_file_only_if_asked_to_and_once() {
    for bind in [false, true] {
        let (vm, backend) = mapped(bind);
        assert_eq!(backend.is_bindable(), bind);
        let add = |at, wanted| {
            vm.add_window(&backend, guest(at, at + 4), 0, wanted)
                .unwrap()
        };
        let first = if bind {
            Binding::Bound
        } else {
            Binding::Unbound
        };
        assert_eq!(add(0, Binding::Unbound), Binding::Unbound);
        assert_eq!(add(20, Binding::Bound), first);
        assert_eq!(add(40, Binding::Bound), Binding::Unbound);
    }
}

#[test]
fn the_host_reads_and_writes_all_of_it() {
    for bind in [false, true] {
        let (vm, backend) = mapped(bind);
        vm.add_window(&backend, guest(0, PAGES), 0, Binding::Bound)
            .unwrap();
        vm.write(3 * PAGE_SIZE + 1, b"data").unwrap();
        let mut bytes = [0xff; 7];
        vm.read(3 * PAGE_SIZE, &mut bytes).unwrap();
        assert_eq!(&bytes, b"\0data\0\0");
        vm.read(0, &mut [0; 3 * PAGE_SIZE as usize]).unwrap();
        assert_eq!(data(&backend, View::Shared), FilePages::new(3, 4));
        vm.read(PAGES * PAGE_SIZE - 1, &mut [0; 2]).unwrap_err();
    }
}

#[test]
fn bind_belongs_to_mapped_memory() {
    let vm = Vm::new(Arc::new(SoftwareOwner::default()), Box::new(Silent));
    let error = vm.create_backend(config(None, true)).unwrap_err();
    assert!(error.to_string().contains("bind=on"), "{error}");
}

#[test]
fn a_new_owner_gets_the_file_unless_slots_carried_it() {
    for bind in [false, true] {
        let (vm, backend) = mapped(bind);
        write(&backend, 3);
        let rebound = vm.rebind(Arc::new(SoftwareOwner::default()));
        assert_eq!(rebound.is_err(), bind);
        assert_eq!(data(&backend, View::Shared), FilePages::new(3, 4));
    }
}

/// An owner of ordinary VMs on a kernel that cannot map a guest_memfd.
#[derive(Debug)]
struct OldKernel;

impl Owner for OldKernel {
    fn check_private_memory(&self) -> Result<()> {
        self.check_mapped_memory()
    }

    fn check_mapped_memory(&self) -> Result<()> {
        Err(Error::Unsupported {
            wanted: "this".into(),
            found: "that".into(),
        })
    }

    fn create_private_file(&self, _: u64) -> io::Result<Arc<dyn ViewFile>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn create_mapped_file(&self, _: u64) -> io::Result<Arc<dyn ViewFile>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_attributes(&self, _: GuestPages, _: View) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn where_no_mode_serves_the_message_says_why_of_both() {
    let vm = Vm::new(Arc::new(OldKernel), Box::new(Silent));
    let text = vm
        .create_backend(config(None, false))
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("mode=private: this: that") && text.contains("mode=mapped: this: that"),
        "{text}"
    );
}

#[test]
fn a_mode_that_is_demanded_and_cannot_be_had_is_named() {
    let vm = Vm::new(Arc::new(OldKernel), Box::new(Silent));
    for (mode, name) in [(Mode::Private, "private"), (Mode::Mapped, "mapped")] {
        let error = vm.create_backend(config(Some(mode), false)).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("mode={name} is not possible: this: that")
        );
        assert_eq!(error.errno(), 95, "EOPNOTSUPP");
    }
}
