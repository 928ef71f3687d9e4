// SPDX-License-Identifier: GPL-2.0-or-later
//! Guests much larger than the host's memory: they start as fast as small ones, and cost what they
//! touch.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::storm::FIXED;
use super::{Context, GUEST_LIMIT, Test, freed, guests};
use crate::cgroup::Group;
use crate::guest;
use crate::memory::{self, Kind};
use crate::probe::{self, Need};
use crate::qemu::{EXIT_LIMIT, START_LIMIT};
use crate::query;
use crate::strict::Strict;
use crate::vm::{BACKEND, Scenario, Size, Vm};

const GIB: u64 = 1 << 30;
const LARGE: Size = Size(64 * GIB);
const SMALL: Size = Size(GIB);

/// Starts of each kind, of which the best counts: others use the machine too, so that on a busy one
/// it takes more to see what a start costs.
const STARTS: [usize; 2] = [3, 12];

/// How much more a large guest may cost, in percent.
const TOLERANCE: u64 = 10;

/// What KVM keeps for each 2 MiB of a slot (`lpage_info`), whoever uses it: four bytes.
const SLOT_TABLE: u64 = (LARGE.0 - SMALL.0) / (2 << 20) * 4;

pub(super) fn tests() -> Vec<Test> {
    let strict = &[Need::PrivateMemory, Need::StrictMode];
    vec![
        Test::new("large/touches-1", strict, |c| touches(c, 1)).only_in_full(),
        Test::new("large/touches-4", strict, |c| touches(c, 4)),
        Test::new("large/touches-8", strict, |c| touches(c, 8)).only_in_full(),
        // Takes long on a machine that is busy otherwise.
        Test::new("large/start", &[Need::PrivateMemory, Need::Root], start).only_in_full(),
    ]
}

/// A guest that touches 1024 pages spread over 64 GiB.
fn touches(context: &Context, smp: u32) -> Result<()> {
    let _strict = Strict::on()?;
    let vm = Vm::conformance(&context.files, Scenario::Large, true, LARGE, smp);
    let mut qemu = context.start(&vm)?;
    let before = memory::kernel_bytes()?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let after = memory::kernel_bytes()?;
    let backend = query::backend(&mut qemu.qmp)?;
    println!("# kernel {before}, then {after}; {backend:?}");
    guests::settled(&backend)?;
    freed::files_match(&backend, qemu.pid())?;
    let files = memory::backings(qemu.pid())?;
    let tap = guest::finish(&mut qemu)?;
    let touched = tap
        .note("touched-private")
        .context("the guest does not say what it touched")?;
    ensure!(
        backend.private_bytes >= touched * 4096 && backend.faults_private <= touched,
        "{touched} pages touched privately: {backend:?}"
    );
    if let Some(bytes) = memory::allocated(&files, Kind::GuestMemfd) {
        let as_expected = match probe::in_place() {
            true => {
                let shared = tap.note("touched-shared");
                let shared = shared.context("the guest does not say what it touched")?;
                bytes <= (touched + shared) * 4096 + FIXED
            }
            false => bytes == touched * 4096,
        };
        ensure!(
            as_expected,
            "guest_memfd has {bytes} bytes for {touched} pages"
        );
    }
    Ok(())
}

/// What it takes until the guest's first instruction.
#[derive(Debug, Clone, Copy)]
struct Cost {
    /// Until QEMU has started the vCPU.
    started: Duration,
    /// Until the guest itself, after the firmware, says its first word.
    first_word: Duration,
    /// The kernel's own memory.
    kernel: u64,
}

impl Cost {
    const UNKNOWN: Self = Self {
        started: Duration::MAX,
        first_word: Duration::MAX,
        kernel: u64::MAX,
    };

    fn best(self, other: Self) -> Self {
        Self {
            started: self.started.min(other.started),
            first_word: self.first_word.min(other.first_word),
            kernel: self.kernel.min(other.kernel),
        }
    }
}

/// Our backend, small and large, beside upstream's path with another backend.
fn start(context: &Context) -> Result<()> {
    let ours = |size: Size| format!("{BACKEND},id=ram0,size={}", size.0);
    let theirs = |size: Size| format!("memory-backend-memfd,id=ram0,size={}", size.0);
    let kinds = [
        ("small", SMALL, ours(SMALL)),
        ("large", LARGE, ours(LARGE)),
        ("upstream-small", SMALL, theirs(SMALL)),
        ("upstream-large", LARGE, theirs(LARGE)),
    ];
    let mut best = [Cost::UNKNOWN; 4];
    for number in 1..=STARTS[1] {
        // Upstream's are only shown.
        let wanted = if number < STARTS[0] { 4 } else { 2 };
        for ((name, size, object), best) in kinds.iter().zip(&mut best).take(wanted) {
            *best = best.best(cost(context, name, *size, object)?);
        }
        if number >= STARTS[0] && same(best[0], best[1]).is_ok() {
            break;
        }
    }
    for ((name, ..), cost) in kinds.iter().zip(best) {
        println!("# {name}: {cost:?}");
    }
    same(best[0], best[1])
}

/// Do both cost the same?
fn same(small: Cost, large: Cost) -> Result<()> {
    let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
    for (what, small, large) in [
        (
            "nanoseconds of QEMU's start",
            nanoseconds(small.started),
            nanoseconds(large.started),
        ),
        (
            "nanoseconds until the first word",
            nanoseconds(small.first_word),
            nanoseconds(large.first_word),
        ),
        (
            "bytes of kernel memory without KVM's table",
            small.kernel,
            large.kernel.saturating_sub(SLOT_TABLE),
        ),
    ] {
        ensure!(
            large <= small + small * TOLERANCE / 100,
            "{what}: {small} with 1 GiB, {large} with 64 GiB"
        );
    }
    Ok(())
}

fn cost(context: &Context, name: &str, size: Size, object: &str) -> Result<Cost> {
    let vm = Vm::conformance(&context.files, Scenario::Idle, false, size, 1).with_backend(object);
    let group = Group::new(name)?;
    let before = memory::slab_bytes()?;
    let begin = Instant::now();
    let mut qemu = {
        let _inside = group.enter()?;
        context.start_as(name, &vm)?
    };
    qemu.qmp.run("cont", json!({}))?;
    let started = begin.elapsed();
    guest::wait_line(&qemu, "TAP version", START_LIMIT)?;
    let first_word = begin.elapsed();
    qemu.qmp.wait_event(&["SHUTDOWN"], EXIT_LIMIT)?;
    // Memory for attributes is in no cgroup, page tables are in no slab.
    let stat = |name| group.value("memory.stat", name);
    let slab = memory::slab_bytes()?.saturating_sub(before);
    let kernel = slab + stat("kernel")?.saturating_sub(stat("slab")?);
    guest::finish(&mut qemu)?;
    Ok(Cost {
        started,
        first_word,
        kernel,
    })
}
