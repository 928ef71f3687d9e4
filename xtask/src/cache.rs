// SPDX-License-Identifier: GPL-2.0-or-later
//! The cache outside the checkout: keys, locks, and results that are either
//! whole or absent.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{FlockOperation, flock};
use sha2::{Digest, Sha256};

use crate::progress::Step;

/// The folder that `--cache` names, else `$GUESTMEMFD_CACHE`, else the user's
/// cache folder.
pub(crate) fn folder(option: Option<PathBuf>) -> Result<PathBuf> {
    let from = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
    let folder = if let Some(folder) = option {
        folder
    } else if let Some(folder) = from("GUESTMEMFD_CACHE") {
        folder.into()
    } else if let Some(folder) = from("XDG_CACHE_HOME") {
        Path::new(&folder).join("guestmemfd")
    } else if let Some(folder) = from("HOME") {
        Path::new(&folder).join(".cache/guestmemfd")
    } else {
        bail!("no place for the cache: set HOME, or name a folder with --cache DIR");
    };
    fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make the cache folder {}", folder.display()))?;
    folder
        .canonicalize()
        .with_context(|| format!("cannot use the cache folder {}", folder.display()))
}

/// Names a result by everything that goes into it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Key(Sha256);

impl Key {
    /// Adds one labelled input. Lengths go in too, so that no two lists of
    /// inputs run together.
    pub(crate) fn add(mut self, label: &str, value: impl AsRef<[u8]>) -> Self {
        for part in [label.as_bytes(), value.as_ref()] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
        self
    }

    /// Adds a file's content.
    pub(crate) fn add_file(self, path: &Path) -> Result<Self> {
        Ok(self.add(&file_name(path), read(path)?))
    }

    /// Adds a file by path, size and time of change: for files of the system,
    /// which are many and large, and which packages replace as a whole.
    pub(crate) fn add_identity(self, path: &Path) -> Result<Self> {
        let meta = fs::metadata(path).with_context(|| format!("cannot read {}", path.display()))?;
        let identity = format!("{} {}.{}", meta.len(), meta.mtime(), meta.mtime_nsec());
        Ok(self.add(&path.to_string_lossy(), identity))
    }

    /// Sixteen hexadecimal digits.
    pub(crate) fn finish(self) -> String {
        hex(&self.0.finalize()[..8])
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The last component of a path, as text.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// A file's content.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// A file's SHA256 in hexadecimal.
pub(crate) fn sha256(path: &Path) -> Result<String> {
    let context = || format!("cannot read {}", path.display());
    let mut file = File::open(path).with_context(context)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer).with_context(context)?;
        if count == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..count]);
    }
}

/// Held while something in the cache is made; other runs wait for it.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// Takes the lock `name` of a cache, and says so when it has to wait.
pub(crate) fn lock(cache: &Path, name: &str, step: &Step) -> Result<Lock> {
    let path = cache.join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| format!("cannot make {}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        step.note(format!(
            "waiting for another run that holds {}",
            path.display()
        ));
        flock(&file, FlockOperation::LockExclusive)
            .with_context(|| format!("cannot lock {}", path.display()))?;
    }
    Ok(Lock { _file: file })
}

/// Makes the folder `result` through `make`, which fills a temporary one; the
/// result appears under its name only when it is complete.
pub(crate) fn make_folder(result: &Path, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let partial = partial_name(result);
    remove(&partial)?;
    fs::create_dir_all(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
    if let Err(error) = make(&partial) {
        // It can be large; the logs say what went wrong.
        remove(&partial)?;
        return Err(error);
    }
    remove(result)?;
    fs::rename(&partial, result)
        .with_context(|| format!("cannot move {} into place", result.display()))
}

/// The name under which something is made before it is complete.
pub(crate) fn partial_name(path: &Path) -> PathBuf {
    path.with_file_name(format!("{}.part", file_name(path)))
}

/// Removes a file or a folder; it may be absent.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => return Ok(()),
    };
    match result {
        // Another run was faster.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result.with_context(|| format!("cannot remove {}", path.display())),
    }
}

/// Removes what runs have left that were ended while they made something in a folder. The caller
/// holds the lock under which all of it is made.
pub(crate) fn remove_partial(folder: &Path) -> Result<()> {
    let context = || format!("cannot list {}", folder.display());
    for entry in fs::read_dir(folder).with_context(context)? {
        let path = entry.with_context(context)?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "part")
        {
            remove(&path)?;
        }
    }
    Ok(())
}

/// Writes a file only when its content changes, and says whether it did: what
/// is built from the file is then not built again.
pub(crate) fn write_if_changed(path: &Path, content: &[u8]) -> Result<bool> {
    if fs::read(path).is_ok_and(|old| old == content) {
        return Ok(false);
    }
    let partial = partial_name(path);
    fs::write(&partial, content)
        .and_then(|()| fs::rename(&partial, path))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(true)
}

/// Marks a result as used now, for [`keep_newest`].
pub(crate) fn touch(result: &Path) {
    // Only the order of clearing away depends on it.
    let _ = fs::write(stamp(result), "");
}

fn stamp(result: &Path) -> PathBuf {
    result.with_file_name(format!("{}.used", file_name(result)))
}

/// Removes all results of a folder but the `count` used last.
pub(crate) fn keep_newest(folder: &Path, count: usize) -> Result<()> {
    let mut results = Vec::new();
    for entry in
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?
    {
        let path = entry?.path();
        if let Ok(meta) = fs::metadata(stamp(&path)) {
            results.push((meta.modified()?, path));
        }
    }
    results.sort();
    for (_, path) in results.iter().rev().skip(count) {
        remove(path)?;
        remove(&stamp(path))?;
    }
    Ok(())
}

/// A byte count for people.
pub(crate) fn megabytes(bytes: u64) -> impl Display {
    format!("{}.{} MB", bytes / 1_000_000, bytes / 100_000 % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_depends_on_every_input_and_on_where_one_ends() {
        let key = |a: &str, b: &str| Key::default().add("a", a).add("b", b).finish();
        assert_eq!(key("x", "y"), key("x", "y"));
        assert_ne!(key("x", "y"), key("x", "z"));
        assert_ne!(key("xb", "y"), key("x", "by"));
        assert_eq!(key("x", "y").len(), 16);
    }

    #[test]
    fn a_result_that_was_not_completed_does_not_exist() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let result = dir.path().join("result");
        let failed = make_folder(&result, |partial| {
            fs::write(partial.join("half"), "")?;
            bail!("stop")
        });
        assert!(failed.is_err() && !result.exists());
        assert_eq!(fs::read_dir(dir.path()).expect("a folder").count(), 0);
        make_folder(&result, |partial| Ok(fs::write(partial.join("all"), "")?)).expect("complete");
        assert!(result.join("all").exists() && !result.join("half").exists());
    }

    #[test]
    fn what_was_left_incomplete_is_removed() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir_all(dir.path().join("a.part/b")).expect("a folder");
        fs::write(dir.path().join("c"), "").expect("write");
        remove_partial(dir.path()).expect("clear away");
        assert!(!dir.path().join("a.part").exists() && dir.path().join("c").exists());
    }

    #[test]
    fn only_results_that_were_used_last_are_kept() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for name in ["a", "b", "c"] {
            fs::write(dir.path().join(name), "").expect("write");
            touch(&dir.path().join(name));
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        keep_newest(dir.path(), 2).expect("clear away");
        let left = |name| dir.path().join(name).exists();
        assert!(!left("a") && left("b") && left("c"));
    }

    #[test]
    fn the_sha256_of_a_file() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("abc");
        fs::write(&path, "abc").expect("write");
        assert_eq!(
            sha256(&path).expect("readable"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn writing_the_same_content_changes_nothing() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("file");
        assert!(write_if_changed(&path, b"1").expect("write"));
        assert!(!write_if_changed(&path, b"1").expect("write"));
        assert!(write_if_changed(&path, b"2").expect("write"));
    }
}
