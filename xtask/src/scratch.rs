// SPDX-License-Identifier: GPL-2.0-or-later
//! Folders that are gone when they are no longer in use, even after Ctrl-C.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

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
        let mut folders = folders();
        let folder = tempfile::Builder::new()
            .prefix(prefix)
            .tempdir_in(within)
            .with_context(|| format!("cannot make a folder in {}", within.display()))?;
        folders.push(folder.path().to_owned());
        Ok(Self(folder))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        folders().retain(|folder| folder != self.0.path());
    }
}

fn folders() -> MutexGuard<'static, Vec<PathBuf>> {
    FOLDERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes all, for a program that ends without dropping them. From now on nobody gets one.
pub(crate) fn remove_all() {
    let folders = folders();
    remove(&folders);
    std::mem::forget(folders);
}

fn remove(folders: &[PathBuf]) {
    for folder in folders {
        // Whoever writes there is being ended, and may do it once more.
        let _ = fs::remove_dir_all(folder).or_else(|_| fs::remove_dir_all(folder));
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
        remove(&folders());
        assert!(!kept.path().exists());
    }
}
