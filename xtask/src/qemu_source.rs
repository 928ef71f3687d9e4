// SPDX-License-Identifier: GPL-2.0-or-later
//! QEMU's source tree with our patches. The tree as Debian has it is kept in a
//! git object store beside it, so that a change in the patches rewrites only
//! the files that it concerns, and the next build is a short one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::cache;
use crate::context::Context;
use crate::fetch::{self, Obtained, Release};
use crate::process::{Job, command, output};
use crate::progress::Step;

/// The patches that a `series` file lists, in order.
pub(crate) fn series(folder: &Path) -> Result<Vec<PathBuf>> {
    let path = folder.join("series");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(series_lines(&text).map(|line| folder.join(line)).collect())
}

fn series_lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|line| !line.is_empty())
}

/// Applies patches to a folder in place.
pub(crate) fn apply(folder: &Path, patches: &[PathBuf], log: &Path) -> Result<()> {
    for patch in patches {
        let mut command = command("patch", ["-p1", "--batch", "--forward"]);
        command
            .args(["--no-backup-if-mismatch", "--input"])
            .arg(patch)
            .current_dir(folder);
        let name = format!("applying {}", patch.display());
        Job::new(name, command).log(log).run()?;
    }
    Ok(())
}

/// Unpacks an archive without its top folder.
pub(crate) fn unpack(archive: &Path, into: &Path) -> Result<()> {
    let mut command = command("tar", ["--extract", "--strip-components=1", "--file"]);
    command.arg(archive).arg("--directory").arg(into);
    Job::new(format!("unpacking {}", archive.display()), command).run()
}

/// An unpacked release of QEMU.
#[derive(Debug)]
pub(crate) struct Source {
    folder: PathBuf,
    /// The git tree of the release with Debian's patches.
    pristine: String,
}

/// The folder in the cache that belongs to a release.
pub(crate) fn folder(ctx: &Context, release: &Release) -> PathBuf {
    ctx.cache.join(format!(
        "qemu-{}-{}",
        release.version,
        release.key().finish()
    ))
}

impl Source {
    /// Unpacks the newest release that can be had, unless it has been before.
    /// The caller holds the lock of QEMU's builds.
    pub(crate) fn prepare(ctx: &Context, step: &Step) -> Result<Self> {
        for release in fetch::QEMU {
            if let Some(source) = Self::unpacked(folder(ctx, release)) {
                return Ok(source);
            }
        }
        let obtained = fetch::obtain(ctx, step, fetch::QEMU)?;
        let folder = folder(ctx, obtained.release);
        cache::make_folder(&folder, |partial| import(ctx, step, &obtained, partial))?;
        Self::unpacked(folder).context("the source tree that was just unpacked is not there")
    }

    fn unpacked(folder: PathBuf) -> Option<Self> {
        let pristine = fs::read_to_string(folder.join("pristine")).ok()?;
        Some(Self { folder, pristine })
    }

    /// Where this release's builds go.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The git trees after each of `patches`; an error names the one that does
    /// not apply.
    pub(crate) fn patched(&self, patches: &[PathBuf]) -> Result<Vec<String>> {
        let git = Git {
            index: "patching",
            ..Git::new(&self.folder, "source")
        };
        git.run(&["read-tree", &self.pristine])?;
        let mut trees = Vec::new();
        for patch in patches {
            let text = patch.to_string_lossy();
            git.run(&["apply", "--cached", "--whitespace=nowarn", &text])
                .with_context(|| format!("{text} does not apply"))?;
            trees.push(git.run(&["write-tree"])?.trim().to_owned());
        }
        Ok(trees)
    }

    /// The folder `name` with the source as the last of `trees` has it, or as
    /// Debian has it. Files that are the same already are left alone.
    pub(crate) fn check_out(&self, name: &str, trees: &[String]) -> Result<PathBuf> {
        let tree = trees.last().unwrap_or(&self.pristine);
        let folder = self.folder.join(name);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Git::new(&self.folder, name).run(&["read-tree", "--reset", "-u", tree])?;
        Ok(folder)
    }
}

/// Unpacks a release, applies Debian's patches, and stores the tree in git.
fn import(ctx: &Context, step: &Step, obtained: &Obtained, folder: &Path) -> Result<()> {
    let [original, debian] = obtained.files.as_slice() else {
        bail!("QEMU {} needs two archives", obtained.release.version);
    };
    let source = folder.join("source");
    step.say("unpacking");
    fs::create_dir(&source).with_context(|| format!("cannot make {}", source.display()))?;
    unpack(original, &source)?;
    let debian_folder = source.join("debian");
    fs::create_dir_all(&debian_folder)?;
    unpack(debian, &debian_folder)?;
    step.say("applying Debian's patches");
    apply(
        &source,
        &series(&debian_folder.join("patches"))?,
        &ctx.log("qemu-debian-patches"),
    )?;
    step.say("storing the source tree");
    output(command(
        "git",
        [
            Path::new("init"),
            Path::new("--quiet"),
            Path::new("--bare"),
            &folder.join("git"),
        ],
    ))?;
    let git = Git::new(folder, "source");
    // The firmware's sources are not built here, and are most of the files.
    git.run(&["add", "--all", "--force", "--", ".", ":!roms"])?;
    let pristine = git.run(&["write-tree"])?;
    fs::write(folder.join("pristine"), pristine.trim())?;
    Ok(())
}

/// Git on the store beside the source trees, with none of the user's settings.
struct Git<'a> {
    folder: &'a Path,
    work_tree: &'a str,
    index: &'a str,
}

impl<'a> Git<'a> {
    /// For a work tree, which has an index of its own.
    fn new(folder: &'a Path, work_tree: &'a str) -> Self {
        Self {
            folder,
            work_tree,
            index: work_tree,
        }
    }

    fn run(&self, args: &[&str]) -> Result<String> {
        let work_tree = self.folder.join(self.work_tree);
        let mut command = Command::new("git");
        command
            .args(args)
            .env("GIT_DIR", self.folder.join("git"))
            .env("GIT_WORK_TREE", &work_tree)
            .env(
                "GIT_INDEX_FILE",
                self.folder.join(format!("git/index-{}", self.index)),
            )
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .current_dir(&work_tree);
        output(command)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_has_comments_and_empty_lines() {
        let lines: Vec<&str> =
            series_lines("# why\n\n0001-a.patch\n0002-b.patch # note\n").collect();
        assert_eq!(lines, ["0001-a.patch", "0002-b.patch"]);
    }

    #[test]
    fn patches_change_only_the_files_they_concern() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let source = dir.path().join("source");
        fs::create_dir(&source).expect("a folder");
        fs::write(source.join("a"), "one\n").expect("write");
        fs::write(source.join("b"), "one\n").expect("write");
        output(command(
            "git",
            [
                Path::new("init"),
                Path::new("-q"),
                Path::new("--bare"),
                &dir.path().join("git"),
            ],
        ))
        .expect("git init");
        let git = Git::new(dir.path(), "source");
        git.run(&["add", "--all", "."]).expect("add");
        let pristine = git.run(&["write-tree"]).expect("a tree").trim().to_owned();
        let source_tree = Source {
            folder: dir.path().to_owned(),
            pristine,
        };

        let patch = dir.path().join("p");
        fs::write(&patch, "--- a/a\n+++ b/a\n@@ -1 +1 @@\n-one\n+two\n").expect("write");
        let before = fs::metadata(source.join("b"))
            .and_then(|m| m.modified())
            .expect("a time");
        let trees = source_tree
            .patched(std::slice::from_ref(&patch))
            .expect("it applies");
        source_tree.check_out("source", &trees).expect("a checkout");
        assert_eq!(fs::read_to_string(source.join("a")).expect("a"), "two\n");
        let after = fs::metadata(source.join("b"))
            .and_then(|m| m.modified())
            .expect("a time");
        assert_eq!(before, after);

        source_tree.check_out("source", &[]).expect("a checkout");
        assert_eq!(fs::read_to_string(source.join("a")).expect("a"), "one\n");
        let error = source_tree
            .patched(&[patch.clone(), patch])
            .expect_err("applies once only");
        assert!(format!("{error:#}").contains("does not apply"), "{error:#}");
    }
}
