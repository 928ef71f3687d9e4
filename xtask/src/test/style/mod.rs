// SPDX-License-Identifier: GPL-2.0-or-later
//! What compilers and rustfmt do not look at: imports of the library run one way, and lines fit.

mod imports;
mod lines;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

/// Looks at the library's source and at the documentation. An error names each offending line.
pub(super) fn check(root: &Path) -> Result<()> {
    let sources = files(&root.join("src"), "rs")?;
    let pages = files(&root.join("docs"), "md")?;
    let mut found = imports::check(&root.join("src"), &sources)?;
    for path in sources.iter().chain(&pages) {
        let name = path.strip_prefix(root).unwrap_or(path);
        found.extend(lines::too_long(name, &read(path)?));
    }
    ensure!(found.is_empty(), "{}", found.join("\n"));
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// The files below a folder with this extension, in order.
fn files(folder: &Path, extension: &str) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    let entries = fs::read_dir(folder);
    for entry in entries.with_context(|| format!("cannot read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            all.extend(files(&path, extension)?);
        } else if path.extension().is_some_and(|found| found == extension) {
            all.push(path);
        }
    }
    all.sort();
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_checkout_is_in_order() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        check(&root).expect("order");
    }
}
