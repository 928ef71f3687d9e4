// SPDX-License-Identifier: GPL-2.0-or-later
//! The number of the C interface goes up whenever the interface changes. include/abi.txt has a hash of
//! the header for each number: programs that were built with one header and run with the library of
//! another then notice.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use crate::context::Context;
use crate::process::{command, output};

/// The list, below the checkout.
const LIST: &str = "include/abi.txt";

/// Where the number is defined.
const DEFINITION: &str = "GUESTMEMFD_ABI";

/// The version of all packages of the workspace, the library among them.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// An interface: its number, and the hash of the header that has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Interface {
    abi: u32,
    hash: String,
}

/// An error when the list does not have the interface of `header`, or any version is not its.
pub(crate) fn check(ctx: &Context, header: &str) -> Result<()> {
    let current = Interface::of(header)?;
    check_unchanged(&current, &history(ctx)?)?;
    let list = parse(&read_list(ctx)?)?;
    ensure!(
        list.last() == Some(&current),
        "the last line of {LIST} is not the interface of the header; run: cargo xtask header"
    );
    check_version(&current, VERSION, "Cargo.toml")?;
    let meson = fs::read_to_string(ctx.root.join("meson.build")).context("no meson.build")?;
    let (_, rest) = meson
        .split_once("version: '")
        .context("meson.build has no version")?;
    let version = rest.split('\'').next().unwrap_or_default();
    ensure!(
        version == VERSION,
        "meson.build has version {version}, Cargo.toml has {VERSION}: make them the same"
    );
    Ok(())
}

/// Adds the interface of `header` to the list. A number that has been committed keeps its hash.
pub(crate) fn record(ctx: &Context, header: &str) -> Result<()> {
    let current = Interface::of(header)?;
    check_unchanged(&current, &history(ctx)?)?;
    let text = read_list(ctx)?;
    let list = with(parse(&text)?, current)?;
    let comments = text.lines().filter(|line| line.starts_with('#'));
    let mut text: String = comments.map(|line| format!("{line}\n")).collect();
    for Interface { abi, hash } in list {
        writeln!(text, "{abi} {hash}")?;
    }
    let path = path(ctx);
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn path(ctx: &Context) -> PathBuf {
    ctx.root.join(LIST)
}

fn read_list(ctx: &Context) -> Result<String> {
    let path = path(ctx);
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

impl Interface {
    fn of(header: &str) -> Result<Self> {
        let code = without_comments(header);
        let mut words = code.split(' ').skip_while(|word| *word != DEFINITION);
        let abi = words.nth(1).and_then(|number| number.parse().ok());
        Ok(Self {
            abi: abi.with_context(|| format!("the header does not define {DEFINITION}"))?,
            hash: hash(&code),
        })
    }
}

fn hash(text: &str) -> String {
    let digest = Sha256::digest(text);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a compiler sees of a header, with one space between words.
fn without_comments(header: &str) -> String {
    let mut code = String::new();
    let mut rest = header;
    while let Some((before, comment)) = rest.split_once("/*") {
        code.push_str(before);
        code.push(' ');
        rest = comment.split_once("*/").map_or("", |(_, after)| after);
    }
    code.push_str(rest);
    code.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Lines `NUMBER HASH` and comments.
fn parse(text: &str) -> Result<Vec<Interface>> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let list: Vec<_> = lines
        .map(parse_line)
        .collect::<Option<_>>()
        .unwrap_or_default();
    let ascends = list.windows(2).all(|pair| pair[0].abi < pair[1].abi);
    ensure!(
        !list.is_empty() && ascends,
        "{LIST} is no list of ascending numbers, each with a hash"
    );
    Ok(list)
}

fn parse_line(line: &str) -> Option<Interface> {
    let (abi, hash) = line.split_once(' ')?;
    Some(Interface {
        abi: abi.parse().ok()?,
        hash: hash.to_owned(),
    })
}

/// All lines that were ever committed. Without git, what the list says now has to do.
fn history(ctx: &Context) -> Result<Vec<Interface>> {
    if !ctx.root.join(".git").exists() {
        return parse(&read_list(ctx)?);
    }
    let mut log = command("git", ["log", "--format=", "--patch", "--unified=0", "--"]);
    log.arg(LIST).current_dir(&ctx.root);
    Ok(added_lines(&output(log)?))
}

fn added_lines(patch: &str) -> Vec<Interface> {
    let added = patch.lines().filter_map(|line| line.strip_prefix('+'));
    added.filter_map(parse_line).collect()
}

fn check_unchanged(current: &Interface, committed: &[Interface]) -> Result<()> {
    let Interface { abi, hash } = current;
    if committed
        .iter()
        .any(|old| old.abi == *abi && old.hash != *hash)
    {
        bail!(
            "the C interface has changed and its number is still {abi}: raise {DEFINITION} in \
             src/ffi/types.rs, make it the second number of the version in Cargo.toml and \
             meson.build, and run: cargo xtask header"
        );
    }
    Ok(())
}

/// The list with an interface that is newer than all others, or replaces one that was not committed.
fn with(mut list: Vec<Interface>, current: Interface) -> Result<Vec<Interface>> {
    list.retain(|old| old.abi != current.abi);
    if let Some(newest) = list.last() {
        ensure!(
            newest.abi < current.abi,
            "{LIST} has interface {}, {DEFINITION} is {}: numbers only go up",
            newest.abi,
            current.abi
        );
    }
    list.push(current);
    Ok(list)
}

/// `0.ABI.PATCH`
fn check_version(current: &Interface, version: &str, place: &str) -> Result<()> {
    let abi = current.abi;
    ensure!(
        version
            .strip_prefix("0.")
            .and_then(|rest| rest.split('.').next())
            == Some(&abi.to_string()),
        "{place} has version {version}, {DEFINITION} is {abi}: the version must be 0.{abi}.PATCH"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str =
        "/* why */\n#define GUESTMEMFD_ABI 3\n\n/**\n * A size.\n */\nint a(int b);\n";

    fn interface(abi: u32, hash: &str) -> Interface {
        let hash = hash.to_owned();
        Interface { abi, hash }
    }

    #[test]
    fn comments_and_spaces_are_no_part_of_an_interface() {
        let of = |header: &str| Interface::of(header).expect("a number");
        assert_eq!(
            without_comments(HEADER),
            "#define GUESTMEMFD_ABI 3 int a(int b);"
        );
        assert_eq!(of(HEADER).abi, 3);
        assert_eq!(of(HEADER), of(&HEADER.replace("A size.", "Bytes.\n")));
        assert_ne!(of(HEADER), of(&HEADER.replace("int b", "long b")));
        assert!(Interface::of("int a;").is_err());
    }

    #[test]
    fn the_same_number_with_another_hash_is_refused() {
        let committed =
            added_lines("+++ b/include/abi.txt\n@@ -0,0 +1 @@\n+# why\n+7 aa\n-8 cc\n+8 bb\n");
        assert_eq!(committed, [interface(7, "aa"), interface(8, "bb")]);
        assert!(check_unchanged(&interface(8, "bb"), &committed).is_ok());
        assert!(check_unchanged(&interface(9, "cc"), &committed).is_ok());
        let error = check_unchanged(&interface(8, "cc"), &committed).expect_err("changed");
        assert!(error.to_string().contains("still 8"), "{error}");
    }

    #[test]
    fn numbers_go_up() {
        let list = parse("# why\n6 aa\n7 bb\n").expect("a list");
        let with = |abi| with(list.clone(), interface(abi, "cc"));
        assert_eq!(with(8).expect("newer").len(), 3);
        let replaced = with(7).expect("not committed");
        assert_eq!(replaced, [interface(6, "aa"), interface(7, "cc")]);
        assert!(with(5).is_err());
        for bad in ["", "7 aa\n7 bb\n", "8 aa\n7 bb\n", "x aa\n"] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_version_has_the_number() {
        let check = |version| check_version(&interface(7, ""), version, "x").is_ok();
        assert!(check("0.7.0") && check("0.7.12"));
        assert!(!check("0.8.0") && !check("1.7.0") && !check("0.70.0") && !check("7"));
    }
}
