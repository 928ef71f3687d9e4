// SPDX-License-Identifier: GPL-2.0-or-later
//! Settings of the kernel that are files.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// A setting has another value while this lives; afterwards the one from before.
#[derive(Debug)]
#[must_use]
pub(crate) struct Setting {
    path: &'static str,
    before: String,
}

impl Setting {
    /// Changes it.
    pub(crate) fn set(path: &'static str, value: &str) -> Result<Self> {
        let before = read(path)?;
        write(Path::new(path), value)?;
        Ok(Self { path, before })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(why) = write(Path::new(self.path), &self.before) {
            eprintln!("{} stays as it is: {why:#}", self.path);
        }
    }
}

/// The value as the kernel prints it.
pub(crate) fn read(path: &str) -> Result<String> {
    let value = fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    Ok(value.trim().to_owned())
}

/// Changes it for good.
pub(crate) fn write(path: &Path, value: &str) -> Result<()> {
    fs::write(path, value).with_context(|| format!("cannot write {value} to {}", path.display()))
}
