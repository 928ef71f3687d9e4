// SPDX-License-Identifier: GPL-2.0-or-later
//! What a page has left is freed: the kernel's numbers, compared with the map.

use anyhow::{Context as _, Result, ensure};

use super::{Context, GUEST_LIMIT, Test, guests};
use crate::guest;
use crate::memory::{self, Backing, Kind, System};
use crate::probe::{self, Need};
use crate::query::{self, Backend};
use crate::vm::Scenario;

/// Page cache that the logs and QEMU's own files may fill meanwhile.
const NOISE: u64 = 512 << 10;

pub(super) fn tests() -> Vec<Test> {
    let test = |scenario: Scenario| {
        let mut needs = scenario.needs().to_vec();
        needs.extend([Need::PageCounts, Need::Root]);
        let name = format!("freed/{}", scenario.name());
        Test::new(name, &needs, move |context| run(context, scenario))
    };
    [Scenario::Hypercall, Scenario::Fault].map(test).into()
}

fn run(context: &Context, scenario: Scenario) -> Result<()> {
    let _strict = guests::strict(scenario)?;
    let mut qemu = context.start(&guests::guest_vm(context, scenario, 1))?;
    guest::run(&mut qemu, GUEST_LIMIT)?;

    let backend = query::backend(&mut qemu.qmp)?;
    ensure!(
        backend.converted_to_private_bytes > backend.private_bytes,
        "nothing has left the private view, so this run shows nothing: {backend:?}"
    );
    files_match(&backend, qemu.pid())?;
    let files = memory::backings(qemu.pid())?;
    // There is none where memory is converted in place.
    let memfd = memory::allocated(&files, Kind::Memfd).context("memfd not counted")?;
    let gmem = memory::allocated(&files, Kind::GuestMemfd).context("guest_memfd not counted")?;
    ensure!(
        gmem > NOISE,
        "guest_memfd has {gmem} bytes: too few to tell from noise, so this run shows nothing"
    );

    // The second opinion: what the whole system gets back when QEMU ends is what its files had.
    let with = System::read()?;
    guest::finish(&mut qemu)?;
    let without = System::read()?;
    println!("# guest_memfd {gmem} memfd {memfd}; with QEMU {with:?}, without {without:?}");
    let gone = |with: u64, without: u64| with.saturating_sub(without);
    for (what, had, returned) in [
        ("guest_memfd", gmem, gone(with.files, without.files)),
        ("the memfd", memfd, gone(with.shmem, without.shmem)),
    ] {
        ensure!(
            returned.abs_diff(had) <= NOISE,
            "{what} had {had} bytes, the system got {returned} back"
        );
    }
    Ok(())
}

/// Has neither file more than the pages that are in its view? Only where the backend frees.
pub(super) fn files_match(backend: &Backend, pid: u32) -> Result<()> {
    all_files_match(std::slice::from_ref(backend), pid)
}

/// The same for all backends of a QEMU together.
pub(super) fn all_files_match(backends: &[Backend], pid: u32) -> Result<()> {
    let sum = |of: fn(&Backend) -> u64| backends.iter().map(of).sum::<u64>();
    let (shared_allocated, private) = (sum(|b| b.shared_allocated), sum(|b| b.private_bytes));
    let files = memory::backings(pid)?;
    if probe::in_place() {
        return one_file(&files, sum(|b| b.size));
    }
    let memfd = memory::allocated(&files, Kind::Memfd).context("memfd not counted")?;
    ensure!(
        shared_allocated == memfd,
        "query-guestmemfd says {shared_allocated} bytes of memfds are allocated, the kernel {memfd}"
    );
    let not_private = sum(|b| b.size) - private;
    ensure!(
        memfd <= not_private,
        "the memfd has {memfd} bytes but only {not_private} are not private"
    );
    // Where the kernel does not count there is nothing to compare.
    if let Some(gmem) = memory::allocated(&files, Kind::GuestMemfd) {
        ensure!(
            gmem <= private,
            "guest_memfd has {gmem} bytes, of which only {private} can be private pages"
        );
    }
    Ok(())
}

/// In place there is no second file, and the one has no more than the memory of the guest.
fn one_file(files: &[Backing], size: u64) -> Result<()> {
    ensure!(
        !files.iter().any(|file| file.kind == Kind::Memfd),
        "there is a memfd: {files:?}"
    );
    if let Some(gmem) = memory::allocated(files, Kind::GuestMemfd) {
        ensure!(
            gmem <= size,
            "guest_memfd has {gmem} bytes for {size} bytes of memory"
        );
    }
    Ok(())
}

/// There are the files of one backend of `size` bytes, and no others.
pub(super) fn files_are(files: &[Backing], size: u64) -> Result<()> {
    let kinds: &[Kind] = match probe::in_place() {
        true => &[Kind::GuestMemfd],
        false => &[Kind::GuestMemfd, Kind::Memfd],
    };
    for &kind in kinds {
        let of_kind = files.iter().filter(|file| file.kind == kind);
        let sizes: Vec<u64> = of_kind.map(|file| file.size).collect();
        ensure!(
            sizes == [size],
            "one {kind:?} of {size} bytes expected, found {sizes:?}"
        );
    }
    ensure!(
        files.len() == kinds.len(),
        "there are more files: {files:?}"
    );
    Ok(())
}
