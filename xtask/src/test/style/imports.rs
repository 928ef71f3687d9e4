// SPDX-License-Identifier: GPL-2.0-or-later
//! Imports of the library run one way: docs/architecture.md has the order of its rooms.
//!
//! A room is a file or a folder of `src/`. It may name what rooms before it have. Inside a room the
//! files import each other without a circle; its `mod.rs` is left out, because a type that is spread
//! over files has its fields there. So are tests, which look at a room from outside.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// Each may import those before it. `lib.rs` has the names of all.
const ROOMS: [&str; 11] = [
    "pages",
    "windows",
    "error",
    "exclusion",
    "views",
    "owner",
    "backend",
    "listener",
    "vm",
    "guard",
    "ffi",
];

/// What one file names of others: a path from the root of the crate, and the line.
type Names = Vec<(Vec<String>, usize)>;

/// Looks at all files; returns the offending lines.
pub(super) fn check(src: &Path, sources: &[PathBuf]) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for path in sources {
        let file = path.strip_prefix(src).unwrap_or(path);
        let tree = syn::parse_file(&super::read(path)?);
        let tree = tree.with_context(|| format!("cannot parse {}", path.display()))?;
        files.push(File::new(file, &tree));
    }
    Ok(offending(&files))
}

/// A file of the library.
struct File {
    /// Below `src/`.
    path: PathBuf,
    /// Where it is in the crate.
    module: Vec<String>,
    names: Names,
}

impl File {
    fn new(path: &Path, tree: &syn::File) -> Self {
        let stem = path.with_extension("");
        let words = stem.iter().map(|word| word.to_string_lossy().into_owned());
        let module: Vec<String> = words
            .filter(|word| word != "mod" && word != "lib")
            .collect();
        let mut reader = Reader {
            module: module.clone(),
            names: Vec::new(),
        };
        reader.visit_file(tree);
        Self {
            path: path.to_owned(),
            module,
            names: reader.names,
        }
    }

    /// The room that it is in; none for `lib.rs`.
    fn room(&self) -> Option<&str> {
        self.module.first().map(String::as_str)
    }
}

fn offending(files: &[File]) -> Vec<String> {
    let re_exports = re_exports(files);
    let rank = |room: &str| ROOMS.iter().position(|known| *known == room);
    let mut found = Vec::new();
    let mut inside: BTreeMap<&str, Vec<Edge<'_>>> = BTreeMap::new();
    for file in files {
        let Some(room) = file.room() else { continue };
        let Some(mine) = rank(room) else {
            found.push(format!(
                "src/{}: no room {room} in the order",
                file.path.display()
            ));
            continue;
        };
        for (name, line) in &file.names {
            let Some(first) = name.first() else { continue };
            let to = re_exports.get(first).unwrap_or(first);
            let is_later = rank(to).is_some_and(|theirs| theirs > mine);
            if is_later {
                let (path, name) = (file.path.display(), name.join("::"));
                found.push(format!(
                    "src/{path}:{line}: {room} comes before {to} and may not use crate::{name}"
                ));
            }
            if let (true, [_, from, ..], [_, to, ..]) = (to == room, &file.module[..], &name[..]) {
                let edge = Edge {
                    from,
                    to,
                    file,
                    line: *line,
                };
                inside.entry(room).or_default().push(edge);
            }
        }
    }
    for (room, edges) in inside {
        found.extend(circle(room, files, &edges));
    }
    found
}

/// A file of a room that names another.
#[derive(Clone, Copy)]
struct Edge<'a> {
    from: &'a str,
    to: &'a str,
    file: &'a File,
    line: usize,
}

/// The lines of a circle in a room, if there is one: what is left when files that import none, or
/// that none imports, are taken away again and again.
fn circle(room: &str, files: &[File], edges: &[Edge<'_>]) -> Vec<String> {
    let is_file = |name: &str| {
        let mut modules = files.iter().map(|file| &file.module);
        modules.any(|module| matches!(&module[..], [r, m, ..] if r == room && m == name))
    };
    let mut left: Vec<Edge<'_>> = edges.to_vec();
    left.retain(|edge| edge.from != edge.to && is_file(edge.to));
    loop {
        let before = left.len();
        let importing: Vec<&str> = left.iter().map(|edge| edge.from).collect();
        let imported: Vec<&str> = left.iter().map(|edge| edge.to).collect();
        left.retain(|edge| importing.contains(&edge.to) && imported.contains(&edge.from));
        if left.len() == before {
            break;
        }
    }
    let lines = left.iter().map(|edge| {
        let (path, line) = (edge.file.path.display(), edge.line);
        format!(
            "src/{path}:{line}: {room}::{} and {room}::{} are in a circle",
            edge.from, edge.to
        )
    });
    lines.collect()
}

/// The rooms of the names that `lib.rs` has for all.
fn re_exports(files: &[File]) -> BTreeMap<String, String> {
    let root = files.iter().filter(|file| file.room().is_none());
    let names = root.flat_map(|file| &file.names);
    let pairs = names.filter_map(|(name, _)| match &name[..] {
        [room, .., last] if ROOMS.contains(&room.as_str()) => Some((last.clone(), room.clone())),
        _ => None,
    });
    pairs.collect()
}

/// Collects the names in a file.
struct Reader {
    /// The module that it is in.
    module: Vec<String>,
    names: Names,
}

impl Reader {
    /// A path as it is written, if it leads to this crate.
    fn add(&mut self, words: &[String], line: usize) {
        let mut at = match words.first().map(String::as_str) {
            Some("crate") => Vec::new(),
            Some("self" | "super") => self.module.clone(),
            // `lib.rs` names its modules as they are.
            Some(_) if self.module.is_empty() => Vec::new(),
            _ => return,
        };
        for word in words {
            match word.as_str() {
                "crate" | "self" => {}
                "super" => drop(at.pop()),
                word => at.push(word.to_owned()),
            }
        }
        self.names.push((at, line));
    }

    fn add_tree(&mut self, before: &[String], tree: &syn::UseTree) {
        let with = |name: &syn::Ident| [before, &[name.to_string()]].concat();
        match tree {
            syn::UseTree::Path(path) => self.add_tree(&with(&path.ident), &path.tree),
            syn::UseTree::Name(name) => self.add(&with(&name.ident), line(name)),
            syn::UseTree::Rename(rename) => self.add(&with(&rename.ident), line(rename)),
            syn::UseTree::Glob(glob) => self.add(before, line(glob)),
            syn::UseTree::Group(group) => {
                group
                    .items
                    .iter()
                    .for_each(|tree| self.add_tree(before, tree));
            }
        }
    }
}

fn line(of: &impl Spanned) -> usize {
    of.span().start().line
}

/// Is it compiled for tests alone?
fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute
                .parse_args::<syn::Ident>()
                .is_ok_and(|name| name == "test")
    })
}

impl<'ast> Visit<'ast> for Reader {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if is_test(&item.attrs) {
            return;
        }
        self.module.push(item.ident.to_string());
        visit::visit_item_mod(self, item);
        self.module.pop();
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if !is_test(&item.attrs) {
            self.add_tree(&[], &item.tree);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let first = path.segments.first();
        let leads_here = first.is_some_and(|first| {
            ["crate", "self", "super"]
                .iter()
                .any(|word| first.ident == word)
        });
        if leads_here && path.segments.len() > 1 {
            let words: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
            self.add(&words, line(path));
        }
        visit::visit_path(self, path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(sources: &[(&str, &str)]) -> Vec<String> {
        let files = sources.iter().map(|(path, text)| {
            let tree = syn::parse_file(text).expect("source");
            File::new(Path::new(path), &tree)
        });
        offending(&files.collect::<Vec<_>>())
    }

    #[test]
    fn a_room_uses_those_before_it() {
        let sources = [
            (
                "lib.rs",
                "pub mod pages; pub use vm::moves::Moves; pub use pages::set::PageSet;",
            ),
            (
                "vm/mod.rs",
                "use crate::{PageSet, views::{Mode, Views}}; mod moves;",
            ),
            (
                "vm/moves.rs",
                "use super::Vm; use crate::vm::Vm as V; fn f(_: crate::pages::P) {}",
            ),
            (
                "pages/set.rs",
                "use std::fmt; #[cfg(test)] mod tests { use crate::vm::Vm; }",
            ),
        ];
        assert_eq!(found(&sources), [""; 0]);
    }

    #[test]
    fn a_line_that_goes_the_other_way_is_named() {
        let back = [
            ("lib.rs", "pub use vm::moves::Moves;"),
            (
                "pages/set.rs",
                "use std::fmt;\nuse crate::{\n    Moves,\n};",
            ),
            ("views/mod.rs", "fn f() { super::vm::go(); }"),
        ];
        let expected = [
            "src/pages/set.rs:3: pages comes before vm and may not use crate::Moves",
            "src/views/mod.rs:1: views comes before vm and may not use crate::vm::go",
        ];
        assert_eq!(found(&back), expected);
    }

    #[test]
    fn a_circle_inside_a_room_is_named() {
        let circle = [
            ("pages/set.rs", "use super::states::S;"),
            ("pages/states.rs", "use crate::pages::set::PageSet;"),
            ("pages/ranges.rs", "use super::set::PageSet;"),
            ("pages/zeroed.rs", "fn f() {}"),
        ];
        let found = found(&circle);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(
            found[0].starts_with("src/pages/set.rs:1: pages::set and"),
            "{found:?}"
        );
    }

    #[test]
    fn a_room_that_is_not_in_the_order_is_named() {
        assert_eq!(
            found(&[("attic.rs", "")]),
            ["src/attic.rs: no room attic in the order"]
        );
    }
}
