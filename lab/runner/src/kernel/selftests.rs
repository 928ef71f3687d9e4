// SPDX-License-Identifier: GPL-2.0-or-later
//! The kernel's own tests, built with it (tools/testing/selftests/kvm).

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::Test;

/// Each, and whether it is about attributes of the VM, which are gone with in-place conversion.
const PROGRAMS: [(&str, bool); 3] = [
    ("guest_memfd_test", false),
    ("private_mem_conversions_test", true),
    ("private_mem_kvm_exits_test", true),
];

pub(super) fn tests(folder: &Path, in_place: bool) -> Vec<Test> {
    let fits = |(_, of_vm): &(&str, bool)| !(*of_vm && in_place);
    let test = |(name, _): (&str, bool)| {
        let program = folder.join(name);
        Test::new(format!("kernel/selftests/{name}"), move || run(&program))
    };
    PROGRAMS.into_iter().filter(fits).map(test).collect()
}

fn run(program: &PathBuf) -> Result<()> {
    let output = Command::new(program).output();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    ensure!(
        output.status.success(),
        "{}: {}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
