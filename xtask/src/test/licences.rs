// SPDX-License-Identifier: GPL-2.0-or-later
//! Every file has the licence that REUSE.toml gives its place: what a source file says in its first
//! lines, and what a package says of itself.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use globset::{GlobBuilder, GlobMatcher};
use serde::Deserialize;

use crate::context::Context;
use crate::process::{command, output};

use super::report::Tally;

/// Ends of the names of source files.
const SOURCES: [&str; 9] = [
    ".rs",
    ".c",
    ".h",
    ".s",
    ".ld",
    ".sh",
    ".py",
    "meson.build",
    "meson.options",
];

/// What a licence stands behind. In two parts, or tools would take this file's for several.
const TAG: &str = concat!("SPDX-License", "-Identifier:");

/// Has no licence of its own.
const TEXTS: &str = "LICENSES/";

/// In how many of the first lines a file says its licence.
const FIRST_LINES: usize = 3;

/// Compares all files that git knows.
pub(crate) fn check(ctx: &Context) -> Result<Tally> {
    if !ctx.root.join(".git").exists() {
        let why = "licences: git lists the files, and this is no checkout";
        return Ok(Tally::skip(why));
    }
    let places = Places::read(&ctx.root)?;
    let mut list = command("git", ["ls-files", "-z"]);
    list.current_dir(&ctx.root);
    let mut wrong = Vec::new();
    for name in output(list)?.split('\0').filter(|name| !name.is_empty()) {
        // A file that has been removed is listed until that is committed.
        let Ok(content) = fs::read(ctx.root.join(name)) else {
            continue;
        };
        if !name.starts_with(TEXTS) {
            let expected = places.licence(name)?;
            wrong.extend(mistake(name, &String::from_utf8_lossy(&content), expected)?);
        }
    }
    wrong.extend(places.lacking_texts(&ctx.root.join(TEXTS)));
    Ok(match wrong.is_empty() {
        true => Tally::pass(""),
        false => Tally::fail(wrong.join("\n")),
    })
}

/// What REUSE.toml says.
struct Places(Vec<(Vec<GlobMatcher>, String)>);

#[derive(Deserialize)]
struct File {
    annotations: Vec<Annotation>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Annotation {
    path: Paths,
    #[serde(rename = "SPDX-License-Identifier")]
    licence: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Paths {
    One(String),
    Several(Vec<String>),
}

impl Places {
    fn read(root: &Path) -> Result<Self> {
        let path = root.join("REUSE.toml");
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    fn parse(text: &str) -> Result<Self> {
        let file: File = toml::from_str(text)?;
        let entry = |annotation: Annotation| {
            let paths = match annotation.path {
                Paths::One(path) => vec![path],
                Paths::Several(paths) => paths,
            };
            let matchers: Result<Vec<_>> = paths.iter().map(|path| matcher(path)).collect();
            Ok((matchers?, annotation.licence))
        };
        let entries: Result<Vec<_>> = file.annotations.into_iter().map(entry).collect();
        Ok(Self(entries?))
    }

    /// The licence of a file; the last entry counts.
    fn licence(&self, name: &str) -> Result<&str> {
        let matching = |(matchers, _): &&(Vec<GlobMatcher>, String)| {
            matchers.iter().any(|matcher| matcher.is_match(name))
        };
        let entry = self.0.iter().rev().find(matching);
        let (_, licence) = entry.with_context(|| format!("REUSE.toml has no place for {name}"))?;
        Ok(licence)
    }

    /// Licences whose text is missing.
    fn lacking_texts(&self, folder: &Path) -> Vec<String> {
        let names = self.0.iter().flat_map(|(_, licence)| licence.split(" OR "));
        let lacking = names.filter(|name| !folder.join(format!("{name}.txt")).exists());
        lacking
            .map(|name| format!("{TEXTS}{name}.txt is missing"))
            .collect()
    }
}

fn matcher(path: &str) -> Result<GlobMatcher> {
    let glob = GlobBuilder::new(path).literal_separator(true).build()?;
    Ok(glob.compile_matcher())
}

/// What is wrong with a file, if anything is.
fn mistake(name: &str, content: &str, expected: &str) -> Result<Option<String>> {
    if name.ends_with("Cargo.toml") {
        return package_mistake(name, content, expected);
    }
    let says = content.lines().take(FIRST_LINES).find_map(licence_in);
    Ok(match says {
        Some(licence) if licence != expected => {
            Some(format!("{name} says {licence}, its place says {expected}"))
        }
        None if is_source(name, content) => Some(format!("{name} lacks the line {TAG} {expected}")),
        _ => None,
    })
}

fn is_source(name: &str, content: &str) -> bool {
    SOURCES.iter().any(|end| name.ends_with(end)) || content.starts_with("#!")
}

/// The tag, `A OR B`, and perhaps the end of a comment.
fn licence_in(line: &str) -> Option<&str> {
    let (_, licence) = line.split_once(TAG)?;
    Some(licence.trim().trim_end_matches("*/").trim_end())
}

#[derive(Deserialize)]
struct Manifest {
    package: Option<Package>,
    workspace: Option<Workspace>,
}

#[derive(Deserialize)]
struct Workspace {
    package: Package,
}

#[derive(Deserialize)]
struct Package {
    license: Licence,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Licence {
    Own(String),
    Workspace { workspace: bool },
}

/// The licence that packages have unless they say otherwise.
const OF_WORKSPACE: &str = "GPL-2.0-or-later";

fn package_mistake(name: &str, content: &str, expected: &str) -> Result<Option<String>> {
    let manifest: Manifest = toml::from_str(content).with_context(|| name.to_owned())?;
    let own = |licence: &Licence| match licence {
        Licence::Own(licence) => Ok(licence.clone()),
        Licence::Workspace { workspace: true } => Ok(OF_WORKSPACE.to_owned()),
        Licence::Workspace { .. } => bail!("{name}: license is neither here nor there"),
    };
    if let Some(workspace) = manifest.workspace
        && own(&workspace.package.license)? != OF_WORKSPACE
    {
        return Ok(Some(format!("{name}: the workspace is not {OF_WORKSPACE}")));
    }
    let Some(package) = manifest.package else {
        return Ok(None);
    };
    let licence = own(&package.license)?;
    let wrong = licence != expected;
    Ok(wrong.then(|| format!("{name}: the package is {licence}, its place says {expected}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACES: &str = r#"
        version = 1
        [[annotations]]
        path = "**"
        SPDX-License-Identifier = "A"
        [[annotations]]
        path = ["src/**", "tests/*.rs"]
        SPDX-License-Identifier = "B OR C"
    "#;

    #[test]
    fn the_last_entry_that_matches_counts() {
        let places = Places::parse(PLACES).expect("a file");
        for (name, licence) in [
            ("README.md", "A"),
            ("src/a/b.rs", "B OR C"),
            ("tests/a.rs", "B OR C"),
            ("tests/a/b.rs", "A"),
        ] {
            assert_eq!(places.licence(name).expect("a licence"), licence, "{name}");
        }
        let empty = tempfile::tempdir().expect("a folder");
        assert_eq!(places.lacking_texts(empty.path()).len(), 3);
    }

    #[test]
    fn a_source_file_says_the_licence_of_its_place() {
        let is_wrong = |name: &str, content: &str, expected: &str| {
            mistake(name, content, expected)
                .expect("readable")
                .is_some()
        };
        let c = format!("/* {TAG} A OR B */\n");
        assert!(!is_wrong("a.h", &c, "A OR B"));
        assert!(is_wrong("a.h", &c, "A"));
        assert!(is_wrong("a.h", "\n", "A"));
        assert!(!is_wrong("a.md", "\n", "A"));
        assert!(is_wrong("prepare", "#!/bin/sh\n", "A"));
        let late = format!("\n\n\n// {TAG} A\n");
        assert!(is_wrong("a.rs", &late, "A"));
    }

    #[test]
    fn a_package_has_the_licence_of_its_place() {
        let is_wrong = |content: &str, expected: &str| {
            let mistake = mistake("x/Cargo.toml", content, expected);
            mistake.expect("readable").is_some()
        };
        let inherits = "[package]\nlicense.workspace = true\n";
        assert!(!is_wrong(inherits, OF_WORKSPACE));
        assert!(is_wrong(inherits, "A"));
        assert!(!is_wrong("[package]\nlicense = \"A\"\n", "A"));
        assert!(is_wrong("[workspace.package]\nlicense = \"A\"\n", "A"));
    }
}
