// SPDX-License-Identifier: GPL-2.0-or-later
//! A guest that sends any numbers and touches any memory: nothing comes of it.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::{Context, SIZE, Test, freed, guests};
use crate::guest;
use crate::memory::{self, Holdings, Kind};
use crate::probe::Need;
use crate::query;
use crate::strict::Strict;
use crate::vm::{Scenario, Vm};

/// What QEMU and the kernel may need on top of guest RAM.
const OVERHEAD: u64 = 16 << 20;

/// Kinds of messages that a guest can cause over and over.
const KINDS: u64 = 4;

pub(super) fn tests() -> Vec<Test> {
    let needs = &[Need::PrivateMemory, Need::StrictMode];
    let test = |name: &str, count, smp, limit| {
        Test::new(format!("hostile/{name}"), needs, move |context| {
            hostile(context, count, smp, Duration::from_secs(limit))
        })
    };
    vec![
        test("1e5", 100_000, 2, 300),
        test("1e4-1", 10_000, 1, 300).only_in_full(),
        test("1e4-4", 10_000, 4, 300).only_in_full(),
        test("1e4-8", 10_000, 8, 300),
        test("1e6", 1_000_000, 2, 1800).only_in_full(),
    ]
}

/// `count` calls and touches, shared out among the CPUs.
fn hostile(context: &Context, count: u64, smp: u32, limit: Duration) -> Result<()> {
    let _strict = Strict::on()?;
    let words = format!("count={count} timeout={}", limit.as_secs());
    let vm = Vm::conformance(&context.files, Scenario::Hostile, true, SIZE, smp).with_words(&words);
    let start = Instant::now();
    let mut qemu = context.start(&vm)?;
    let before = (Holdings::of(qemu.pid())?, memory::kernel_bytes()?);
    guest::run(&mut qemu, limit)?;
    let after = (Holdings::of(qemu.pid())?, memory::kernel_bytes()?);
    println!("# before {before:?}, after {after:?}");
    ensure!(
        after.0.anonymous <= before.0.anonymous + OVERHEAD,
        "QEMU's own memory has grown from {} to {} bytes",
        before.0.anonymous,
        after.0.anonymous
    );
    ensure!(
        after.1 <= before.1 + OVERHEAD,
        "the kernel's own memory has grown from {} to {} bytes",
        before.1,
        after.1
    );
    let files = memory::backings(qemu.pid())?;
    let allocated: u64 = [Kind::Memfd, Kind::GuestMemfd]
        .iter()
        .filter_map(|kind| memory::allocated(&files, *kind))
        .sum();
    ensure!(
        allocated <= SIZE.0,
        "{allocated} bytes are allocated for {} bytes of RAM",
        SIZE.0
    );
    let backend = query::backend(&mut qemu.qmp)?;
    ensure!(
        backend.refused > count / 100 && backend.faults_private > 0 && backend.faults_shared > 0,
        "the guest was not hostile: {backend:?}"
    );
    guests::settled(&backend)?;
    freed::files_match(&backend, qemu.pid())?;
    guest::finish(&mut qemu)?;
    println!("# {backend:?}");
    // One of each kind in five seconds.
    let (said, seconds) = (context.said()?, start.elapsed().as_secs());
    ensure!(
        u64::try_from(said)? <= 10 + KINDS * seconds / 5,
        "QEMU has said {said} lines in {seconds} s"
    );
    Ok(())
}
