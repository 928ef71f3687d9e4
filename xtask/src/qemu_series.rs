// SPDX-License-Identifier: GPL-2.0-or-later
//! Our patches for QEMU lie in folders, one a topic. Each builds on those before it, and a user may
//! stop after any. A folder has a `series` and a cover letter; the `series` above them lists all
//! patches of all folders, for tools that know nothing of topics.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::cache::file_name;
use crate::context::Context;
use crate::qemu_source::series;

/// Where the patches of the supported release lie.
const PATCHES: &str = "qemu-patches/11.1";

/// Patches that add and take away more lines are hard to review.
const MAX_CHANGES: usize = 400;

/// A folder of patches.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Topic {
    pub(crate) name: String,
    pub(crate) patches: Vec<PathBuf>,
}

/// The folder that holds all topics.
pub(crate) fn folder(ctx: &Context) -> PathBuf {
    ctx.root.join(PATCHES)
}

/// All our patches, in order.
pub(crate) fn our_patches(ctx: &Context) -> Result<Vec<PathBuf>> {
    series(&folder(ctx))
}

/// Our patches by topic, in order.
pub(crate) fn topics(folder: &Path) -> Result<Vec<Topic>> {
    let mut topics: Vec<Topic> = Vec::new();
    for patch in series(folder)? {
        let name = patch.parent().map(file_name).unwrap_or_default();
        match topics.last_mut() {
            Some(topic) if topic.name == name => topic.patches.push(patch),
            _ => topics.push(Topic {
                name,
                patches: vec![patch],
            }),
        }
    }
    Ok(topics)
}

/// What is wrong with the folders, a line each.
pub(crate) fn problems(folder: &Path) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    let topics = topics(folder)?;
    let mut listed = BTreeSet::new();
    for topic in &topics {
        if !listed.insert(topic.name.clone()) {
            problems.push(format!("series: {} comes twice", topic.name));
        }
        topic_problems(&folder.join(&topic.name), topic, &mut problems)?;
    }
    for name in names(folder)? {
        if folder.join(&name).is_dir() && !listed.contains(&name) {
            problems.push(format!("series: nothing of {name} is listed"));
        }
    }
    Ok(problems)
}

fn topic_problems(folder: &Path, topic: &Topic, problems: &mut Vec<String>) -> Result<()> {
    let name = &topic.name;
    if series(folder)? != topic.patches {
        problems.push(format!(
            "{name}/series and the series above it differ; {} writes both",
            "qemu-patches/git-series.sh"
        ));
    }
    if !folder.join("cover-letter").exists() {
        problems.push(format!("{name} has no cover-letter"));
    }
    for patch in names(folder)?.iter().filter(|n| n.ends_with(".patch")) {
        if !topic.patches.contains(&folder.join(patch)) {
            problems.push(format!("series: {name}/{patch} is not listed"));
        }
    }
    for patch in &topic.patches {
        let text = fs::read_to_string(patch)
            .with_context(|| format!("cannot read {}", patch.display()))?;
        let changes = text.lines().filter(|line| line.starts_with(['+', '-']));
        let changes = changes.count();
        if changes > MAX_CHANGES {
            let patch = file_name(patch);
            problems.push(format!(
                "{name}/{patch} changes {changes} lines, more than {MAX_CHANGES}"
            ));
        }
    }
    Ok(())
}

/// What a folder holds, sorted.
fn names(folder: &Path) -> Result<BTreeSet<String>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    entries.map(|entry| Ok(file_name(&entry?.path()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with two topics and three patches.
    fn two_topics() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let files = [
            ("series", "0-a/1.patch\n0-a/2.patch\n1-b/1.patch\n"),
            ("0-a/series", "1.patch\n2.patch\n"),
            ("0-a/cover-letter", "a"),
            ("0-a/1.patch", "p\n"),
            ("0-a/2.patch", "p\n"),
            ("1-b/series", "1.patch\n"),
            ("1-b/cover-letter", "b"),
            ("1-b/1.patch", "p\n"),
        ];
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            fs::write(path, text).expect("write");
        }
        dir
    }

    #[test]
    fn patches_belong_to_the_folder_that_they_lie_in() {
        let dir = two_topics();
        let topics = topics(dir.path()).expect("topics");
        let names: Vec<&str> = topics.iter().map(|topic| topic.name.as_str()).collect();
        assert_eq!(names, ["0-a", "1-b"]);
        assert_eq!(topics[0].patches.len(), 2);
        assert_eq!(topics[1].patches, [dir.path().join("1-b/1.patch")]);
        assert_eq!(
            problems(dir.path()).expect("problems"),
            Vec::<String>::new()
        );
    }

    /// What is found after a file got this text, or was removed.
    fn problems_after(name: &str, text: Option<&str>) -> String {
        let dir = two_topics();
        let path = dir.path().join(name);
        match text {
            Some(text) => {
                fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
                fs::write(path, text).expect("write");
            }
            None => fs::remove_file(path).expect("remove"),
        }
        problems(dir.path()).expect("problems").join("\n")
    }

    #[test]
    fn what_is_forgotten_is_found() {
        let long = "+x\n".repeat(MAX_CHANGES + 1);
        let twice = "0-a/1.patch\n0-a/2.patch\n1-b/1.patch\n0-a/1.patch\n";
        for (name, text, word) in [
            ("0-a/series", Some("2.patch\n1.patch\n"), "differ"),
            ("1-b/cover-letter", None, "no cover-letter"),
            ("0-a/3.patch", Some("p\n"), "0-a/3.patch is not listed"),
            ("2-c/series", Some(""), "nothing of 2-c is listed"),
            ("1-b/1.patch", Some(long.as_str()), "401 lines"),
            ("series", Some(twice), "0-a comes twice"),
        ] {
            let found = problems_after(name, text);
            assert!(found.contains(word), "{name}: {found:?} lacks {word:?}");
        }
    }
}
