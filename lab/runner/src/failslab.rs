// SPDX-License-Identifier: GPL-2.0-or-later
//! The kernel's fault injection: while a guest runs, the kernel finds no memory for some of what it
//! needs to set memory attributes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::probe;
use crate::setting::write;

const CONTROLS: &str = "/sys/kernel/debug/failslab";

/// Attributes of a VM are kept in nodes of this cache, and set by an ioctl of the VM. Other users of
/// the cache are let alone.
const CACHE: &str = "radix_tree_node";
const FUNCTION: &str = "kvm_vm_ioctl";

/// Where such an ioctl needs nodes for a slot instead, in Linux 7.3 and in older ones.
const SLOTS: [&str; 2] = ["kvm_gmem_commit_memory_region", "kvm_gmem_bind"];

/// The same where a guest_memfd keeps attributes.
const IN_PLACE: (&str, &str) = ("maple_node", "kvm_gmem_ioctl");

/// Allocations fail while this lives.
#[derive(Debug)]
#[must_use]
pub(crate) struct Failures(PathBuf);

impl Failures {
    /// Lets so many of a hundred allocations for a VM's attributes fail. The kernel tries twice for
    /// each node of a VM's.
    pub(crate) fn on(percent: u32) -> Result<Self> {
        let (cache, name) = match probe::in_place() {
            true => IN_PLACE,
            false => (CACHE, FUNCTION),
        };
        let symbols = fs::read_to_string("/proc/kallsyms")?;
        let (start, end) = function(&symbols, name)?;
        let (spared, spared_end) =
            function(&symbols, SLOTS[0]).or_else(|_| function(&symbols, SLOTS[1]))?;
        let cache = switch(cache);
        write(&cache, "1")?;
        let failures = Self(cache);
        for (control, value) in [
            ("cache-filter", "Y"),
            ("ignore-gfp-wait", "N"),
            ("require-start", &format!("{start:#x}")),
            ("require-end", &format!("{end:#x}")),
            ("reject-start", &format!("{spared:#x}")),
            ("reject-end", &format!("{spared_end:#x}")),
            ("times", "-1"),
            ("verbose", "0"),
            ("probability", &percent.to_string()),
        ] {
            write(&Path::new(CONTROLS).join(control), value)?;
        }
        Ok(failures)
    }
}

impl Drop for Failures {
    fn drop(&mut self) {
        let off =
            write(&Path::new(CONTROLS).join("probability"), "0").and_then(|()| write(&self.0, "0"));
        if let Err(why) = off {
            eprintln!("allocations go on failing: {why:#}");
        }
    }
}

/// Why this kernel cannot do it; nothing if it can.
pub(crate) fn lacking() -> Option<String> {
    let lacks = |path: &PathBuf| !path.exists();
    let lacking = [PathBuf::from(CONTROLS), switch(CACHE)]
        .into_iter()
        .find(lacks);
    let path = lacking?.display().to_string();
    Some(format!(
        "the kernel has no {path} (CONFIG_FAILSLAB, debugfs; lab kernel)"
    ))
}

/// The file that says whether allocations from a cache may fail.
fn switch(cache: &str) -> PathBuf {
    Path::new("/sys/kernel/slab").join(cache).join("failslab")
}

/// Where the function begins, and where the next one does.
fn function(symbols: &str, name: &str) -> Result<(u64, u64)> {
    let address = |line: &str| u64::from_str_radix(line.split(' ').next()?, 16).ok();
    let named = |line: &&str| line.split_whitespace().nth(2) == Some(name);
    let start = symbols.lines().find(named).and_then(address);
    let start = start
        .filter(|&start| start > 0)
        .with_context(|| format!("/proc/kallsyms does not say where {name} is: run as root"))?;
    let end = symbols.lines().filter_map(address).filter(|&a| a > start);
    let end = end.min().context("nothing comes after the function")?;
    Ok((start, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_ends_where_the_next_begins() {
        let symbols = "ffffffff81000300 T next\nffffffff81000100 t kvm_vm_ioctl\n\
                       ffffffff81000500 T kvm_vm_ioctl_more\nffffffffc0000000 t x\t[module]\n";
        let found = function(symbols, FUNCTION).unwrap();
        assert_eq!(found, (0xffff_ffff_8100_0100, 0xffff_ffff_8100_0300));
        assert!(function("0000000000000000 t kvm_vm_ioctl\n", FUNCTION).is_err());
    }
}
