// SPDX-License-Identifier: GPL-2.0-or-later
//! A control group that this process and what it starts are in: how much memory they use, the
//! kernel's own for them included.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

const ROOT: &str = "/sys/fs/cgroup";

/// Left again when it is dropped.
#[derive(Debug)]
#[must_use]
pub(crate) struct Group(PathBuf);

impl Group {
    /// Makes one and enters it.
    pub(crate) fn enter(name: &str) -> Result<Self> {
        let path = Path::new(ROOT).join(name);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        let group = Self(path);
        move_to(&group.0)?;
        Ok(group)
    }

    /// Bytes in use now.
    pub(crate) fn current(&self) -> Result<u64> {
        number(&self.read("memory.current")?)
    }

    /// The most bytes that were in use at once.
    pub(crate) fn peak(&self) -> Result<u64> {
        number(&self.read("memory.peak")?)
    }

    /// Bytes that the kernel uses for itself.
    pub(crate) fn kernel(&self) -> Result<u64> {
        let text = self.read("memory.stat")?;
        let value = text.lines().find_map(|line| line.strip_prefix("kernel "));
        number(value.context("memory.stat has no line 'kernel'")?)
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.0.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Left behind it does no harm but that its name is taken.
        let _ = move_to(Path::new(ROOT));
        let _ = fs::remove_dir(&self.0);
    }
}

fn move_to(group: &Path) -> Result<()> {
    let path = group.join("cgroup.procs");
    fs::write(&path, std::process::id().to_string())
        .with_context(|| format!("cannot write to {}", path.display()))
}

fn number(text: &str) -> Result<u64> {
    let text = text.trim();
    text.parse()
        .with_context(|| format!("{text:?} is no number"))
}
