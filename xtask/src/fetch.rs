// SPDX-License-Identifier: GPL-2.0-or-later
//! Source archives: from the user's folder, from the cache, or from the Debian
//! archive that this machine uses. Each is pinned by its SHA256.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::apt::Apt;
use crate::cache::{self, megabytes};
use crate::context::Context;
use crate::progress::Step;

/// A file of a source package, or one that the archive has beside it.
#[derive(Debug)]
pub(crate) struct Distfile {
    pub(crate) name: &'static str,
    pub(crate) size: u64,
    pub(crate) sha256: &'static str,
}

/// A version of a source package that serves.
#[derive(Debug)]
pub(crate) struct Release {
    pub(crate) package: &'static str,
    pub(crate) version: &'static str,
    pub(crate) files: &'static [Distfile],
}

/// QEMU, newest first.
pub(crate) const QEMU: &[Release] = &[Release {
    package: "qemu",
    version: "11.1.1",
    files: &[
        Distfile {
            name: "qemu_11.1.1+ds.orig.tar.xz",
            size: 39_217_980,
            sha256: "0b1376e75dbe3e2fea4e408f8669f88a723f419f36a5b7d74cc6a4cfe07e4f5e",
        },
        Distfile {
            name: "qemu_11.1.1+ds-1.debian.tar.xz",
            size: 133_932,
            sha256: "870a1193f28ce522ac91f68100d75dce5527e08d8958344b389c9fa24b44968f",
        },
    ],
}];

/// Linux for the lab, newest first. A binary package with the source is there when the source
/// package itself is not.
pub(crate) const LINUX: &[Release] = &[
    Release {
        package: "linux",
        version: "7.3.4",
        files: &[Distfile {
            name: "linux-source-7.3_7.3.4-1~bpo13+1_all.deb",
            size: 166_780_612,
            sha256: "703e369ddd4cce971452f5a593ee55df3a5c10c83caf0fa0df039633ed181ee3",
        }],
    },
    Release {
        package: "linux",
        version: "7.2.8",
        files: &[Distfile {
            name: "linux_7.2.8.orig.tar.xz",
            size: 163_638_868,
            sha256: "08f058f9de8d487e32a5c9e2855ee7e35bee1a047e77d37ba797d734c0cc07b3",
        }],
    },
];

impl Release {
    /// Adds what identifies the release to a key.
    pub(crate) fn key(&self) -> cache::Key {
        self.files.iter().fold(cache::Key::default(), |key, file| {
            key.add(file.name, file.sha256)
        })
    }
}

/// A release and where its files lie, in the order of [`Release::files`].
#[derive(Debug)]
pub(crate) struct Obtained {
    pub(crate) release: &'static Release,
    pub(crate) files: Vec<PathBuf>,
}

/// Obtains the newest release that can be had. An older one that is at hand as a whole serves where
/// the newest cannot be fetched.
pub(crate) fn obtain(ctx: &Context, step: &Step, releases: &'static [Release]) -> Result<Obtained> {
    let downloads = ctx.cache.join("downloads");
    fs::create_dir_all(&downloads)
        .with_context(|| format!("cannot make {}", downloads.display()))?;
    let _lock = cache::lock(&ctx.cache, "downloads", step)?;
    let (newest, older) = releases.split_at(1.min(releases.len()));
    if let Some(obtained) = first_at_hand(ctx, step, &downloads, newest)? {
        return Ok(obtained);
    }
    let error = match from_network(ctx, step, &downloads, releases) {
        Ok(obtained) => return Ok(obtained),
        Err(error) => error,
    };
    match first_at_hand(ctx, step, &downloads, older)? {
        Some(obtained) => {
            step.note(format_args!("{error:#}"));
            Ok(obtained)
        }
        None => Err(error),
    }
}

/// The first release whose files are all in the folders at hand.
fn first_at_hand(
    ctx: &Context,
    step: &Step,
    downloads: &Path,
    releases: &'static [Release],
) -> Result<Option<Obtained>> {
    for release in releases {
        let mut files = Vec::new();
        for file in release.files {
            files.extend(at_hand(ctx, step, downloads, file)?);
        }
        if files.len() == release.files.len() {
            return Ok(Some(Obtained { release, files }));
        }
    }
    Ok(None)
}

/// A file that need not be fetched. One in the user's folder must be right; one
/// in the cache that was altered is dropped.
fn at_hand(
    ctx: &Context,
    step: &Step,
    downloads: &Path,
    file: &Distfile,
) -> Result<Option<PathBuf>> {
    if let Some(folder) = &ctx.distfiles
        && let Some(path) = names(file.name)
            .map(|name| folder.join(name))
            .find(|p| p.exists())
    {
        step.say(format_args!("verifying {}", path.display()));
        verify(&path, file).map_err(|error| {
            anyhow!("{error:#}; take the file out of this folder, or put a good one there")
        })?;
        return Ok(Some(path));
    }
    let path = downloads.join(file.name);
    if !path.exists() {
        return Ok(None);
    }
    step.say(format_args!("verifying {}", path.display()));
    match verify(&path, file) {
        Ok(()) => Ok(Some(path)),
        Err(error) => {
            step.note(format_args!("{error:#}: dropping it"));
            cache::remove(&path)?;
            Ok(None)
        }
    }
}

/// The names under which clients store a file: `+` may be escaped.
fn names(name: &str) -> impl Iterator<Item = String> {
    [
        name.to_owned(),
        name.replace('+', "%2b"),
        name.replace('+', "%2B"),
    ]
    .into_iter()
}

fn verify(path: &Path, file: &Distfile) -> Result<()> {
    let size = fs::metadata(path)
        .with_context(|| format!("cannot read {}", path.display()))?
        .len();
    if size < file.size {
        bail!(
            "{} is truncated: {size} bytes of {}",
            path.display(),
            file.size
        );
    }
    let found = cache::sha256(path)?;
    if found != file.sha256 {
        bail!(
            "{} is altered: its SHA256 is {found}, not {}",
            path.display(),
            file.sha256
        );
    }
    Ok(())
}

/// Tries one release after the other until all files of one have arrived.
fn from_network(
    ctx: &Context,
    step: &Step,
    downloads: &Path,
    releases: &'static [Release],
) -> Result<Obtained> {
    step.say("looking for the source package in the Debian archive");
    let apt = Apt::new(&ctx.cache).with_context(|| advice(releases))?;
    // The archive holds versions beside those that its index lists, so the
    // folder of a listed one is all that is asked for.
    let package = releases.first().map_or("", |release| release.package);
    let folder = apt.folder_of(package).with_context(|| advice(releases))?;
    let mut tried = String::new();
    for release in releases {
        match fetch_release(ctx, step, &apt, &folder, downloads, release) {
            Ok(files) => return Ok(Obtained { release, files }),
            Err(error) => {
                // Writing to a String cannot fail.
                let _ = write!(
                    tried,
                    "\n  {} {}: {error:#}",
                    release.package, release.version
                );
            }
        }
    }
    bail!("{}; tried:{tried}", advice(releases))
}

fn fetch_release(
    ctx: &Context,
    step: &Step,
    apt: &Apt,
    folder: &str,
    downloads: &Path,
    release: &Release,
) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for file in release.files {
        files.push(match at_hand(ctx, step, downloads, file)? {
            Some(path) => path,
            None => fetch(step, apt, folder, downloads, file)?,
        });
    }
    Ok(files)
}

fn fetch(
    step: &Step,
    apt: &Apt,
    folder: &str,
    downloads: &Path,
    file: &Distfile,
) -> Result<PathBuf> {
    let path = downloads.join(file.name);
    let partial = cache::partial_name(&path);
    cache::remove(&partial)?;
    step.say(format_args!(
        "fetching {} ({})",
        file.name,
        megabytes(file.size)
    ));
    let uri = format!("{folder}{}", file.name);
    apt.download(&uri, &partial, |bytes| step.amount(bytes, file.size))?;
    verify(&partial, file).with_context(|| format!("what arrived from {uri} is not right"))?;
    fs::rename(&partial, &path)
        .with_context(|| format!("cannot move {} into place", path.display()))?;
    Ok(path)
}

/// What to do by hand.
fn advice(releases: &[Release]) -> String {
    let sets: Vec<String> = releases
        .iter()
        .map(|release| {
            release
                .files
                .iter()
                .map(|f| f.name)
                .collect::<Vec<_>>()
                .join(" and ")
        })
        .collect();
    format!(
        "no source archive could be had: try again later, or put {} into a folder and name it \
         with --distfiles DIR",
        sets.join(", or ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const ABC: Distfile = Distfile {
        name: "a+b.tar",
        size: 3,
        sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    };

    fn verify_content(content: &str) -> Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join(ABC.name);
        fs::write(&path, content)?;
        verify(&path, &ABC)
    }

    #[test]
    fn a_truncated_or_altered_file_is_named() {
        verify_content("abc").expect("the right content");
        let truncated = verify_content("ab").expect_err("too short").to_string();
        assert!(
            truncated.contains("a+b.tar is truncated: 2 bytes of 3"),
            "{truncated}"
        );
        let altered = verify_content("abd")
            .expect_err("other content")
            .to_string();
        assert!(altered.contains("a+b.tar is altered"), "{altered}");
    }

    #[test]
    fn escaped_names_are_known() {
        assert!(names("a+b").any(|name| name == "a%2bb"));
    }

    #[test]
    fn advice_names_the_files_and_the_option() {
        let advice = advice(LINUX);
        assert!(advice.contains("linux_7.2.8.orig.tar.xz") && advice.contains("--distfiles"));
    }

    #[test]
    fn pins_are_complete() {
        for file in QEMU.iter().chain(LINUX).flat_map(|release| release.files) {
            assert_eq!(file.sha256.len(), 64, "{}", file.name);
            assert!(file.size > 0, "{}", file.name);
        }
    }
}
