// SPDX-License-Identifier: GPL-2.0-or-later
//! Folders that are gone when they are no longer in use, even after Ctrl-C.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context as _, Result};
use tempfile::TempDir;

/// Those in use.
static FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A folder in use.
#[derive(Debug)]
pub(crate) struct Scratch(TempDir);

impl Scratch {
    /// Makes one in another folder.
    pub(crate) fn new(prefix: &str, within: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix(prefix)
            .tempdir_in(within)
            .with_context(|| format!("cannot make a folder in {}", within.display()))?;
        if let Ok(mut folders) = FOLDERS.lock() {
            folders.push(folder.path().to_owned());
        }
        Ok(Self(folder))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Ok(mut folders) = FOLDERS.lock() {
            folders.retain(|folder| folder != self.0.path());
        }
    }
}

/// Removes all, for a program that ends without dropping them.
pub(crate) fn remove_all() {
    let folders = FOLDERS.lock().map(|folders| folders.clone());
    for folder in folders.unwrap_or_default() {
        // Whoever writes there is being ended, and may do it once more.
        let _ = fs::remove_dir_all(&folder).or_else(|_| fs::remove_dir_all(&folder));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_goes_with_its_owner_or_before_it() {
        let within = tempfile::tempdir().expect("a folder");
        let dropped = Scratch::new("x-", within.path()).expect("a folder");
        let path = dropped.path().to_owned();
        drop(dropped);
        assert!(!path.exists());
        let kept = Scratch::new("x-", within.path()).expect("a folder");
        fs::write(kept.path().join("file"), "x").expect("a file");
        remove_all();
        assert!(!kept.path().exists());
    }
}
