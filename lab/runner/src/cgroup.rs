// SPDX-License-Identifier: GPL-2.0-or-later
//! A control group around a process, to see and to limit what memory the kernel gives it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::setting;

const ROOT: &str = "/sys/fs/cgroup";

/// A cgroup with the memory controller; removed when its owner is gone and its processes are.
#[derive(Debug)]
pub(crate) struct Group(PathBuf);

/// This process and its children are in a cgroup while this lives.
#[derive(Debug)]
#[must_use]
pub(crate) struct Inside;

/// A cgroup gets no more memory while this lives.
#[derive(Debug)]
#[must_use]
pub(crate) struct Limit<'a>(&'a Group);

impl Group {
    /// Makes one.
    pub(crate) fn new(name: &str) -> Result<Self> {
        let path = Path::new(ROOT).join(format!("guestmemfd-lab-{name}"));
        match fs::create_dir(&path) {
            Err(why) if why.kind() != std::io::ErrorKind::AlreadyExists => {
                Err(why).with_context(|| format!("cannot create {}", path.display()))
            }
            _ => Ok(Self(path)),
        }
    }

    /// Enters it: whoever is started now begins its life in it, so that all its memory is counted.
    pub(crate) fn enter(&self) -> Result<Inside> {
        move_to(&self.0)?;
        Ok(Inside)
    }

    /// Bytes in use.
    pub(crate) fn current(&self) -> Result<u64> {
        number(&self.read("memory.current")?)
    }

    /// The most bytes that were in use at once.
    pub(crate) fn peak(&self) -> Result<u64> {
        number(&self.read("memory.peak")?)
    }

    /// Bytes of files that it has on a NUMA node.
    pub(crate) fn file_bytes_of_node(&self, node: u32) -> Result<u64> {
        let text = self.read("memory.numa_stat")?;
        let line = text.lines().find_map(|line| line.strip_prefix("file "));
        let mut words = line.context("memory.numa_stat has no files")?.split(' ');
        let bytes = words.find_map(|word| word.strip_prefix(&format!("N{node}=")));
        number(bytes.with_context(|| format!("memory.numa_stat has no node {node}"))?)
    }

    /// No more than so many bytes from now on.
    pub(crate) fn limit(&self, bytes: u64) -> Result<Limit<'_>> {
        self.write_limit(&bytes.to_string())?;
        Ok(Limit(self))
    }

    fn write_limit(&self, limit: &str) -> Result<()> {
        setting::write(&self.0.join("memory.max"), limit)
    }

    /// A line of memory.events or memory.stat.
    pub(crate) fn value(&self, file: &str, name: &str) -> Result<u64> {
        let text = self.read(file)?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        number(line.with_context(|| format!("{file} has no {name}"))?)
    }

    fn read(&self, file: &str) -> Result<String> {
        let path = self.0.join(file);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }
}

impl Limit<'_> {
    /// So many bytes instead.
    pub(crate) fn raise(&self, bytes: u64) -> Result<()> {
        self.0.write_limit(&bytes.to_string())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Stays behind empty if a process still dies in it, which harms nobody.
        let _ = fs::remove_dir(&self.0);
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        if let Err(why) = move_to(Path::new(ROOT)) {
            eprintln!("this process stays in its cgroup: {why:#}");
        }
    }
}

impl Drop for Limit<'_> {
    fn drop(&mut self) {
        if let Err(why) = self.0.write_limit("max") {
            eprintln!("the cgroup stays limited: {why:#}");
        }
    }
}

fn move_to(group: &Path) -> Result<()> {
    setting::write(&group.join("cgroup.procs"), &std::process::id().to_string())
}

fn number(text: &str) -> Result<u64> {
    let text = text.trim();
    text.parse()
        .with_context(|| format!("{text:?} is no number"))
}
