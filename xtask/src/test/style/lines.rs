// SPDX-License-Identifier: GPL-2.0-or-later
//! Lines of at most 100 columns. rustfmt breaks code, but neither comments nor text.

use std::path::Path;

const COLUMNS: usize = 100;

/// The lines of a file that are too long. What cannot be broken may be: tables and blocks of code in
/// Markdown, and addresses.
pub(super) fn too_long(name: &Path, text: &str) -> Vec<String> {
    let is_markdown = name.extension().is_some_and(|found| found == "md");
    let mut in_fence = false;
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if is_markdown && line.trim_start().starts_with("```") {
            in_fence = !in_fence;
        }
        let is_block = in_fence || line.starts_with('|') || line.starts_with("    ");
        let breaks = !is_markdown || !is_block;
        let columns = columns(line);
        if breaks && columns > COLUMNS {
            let name = name.display();
            found.push(format!("{name}:{number}: {columns} columns, not {COLUMNS}"));
        }
    }
    found
}

/// Those of a line without the addresses in it.
fn columns(line: &str) -> usize {
    let addresses = line.split_whitespace().filter(|word| word.contains("://"));
    let hidden: usize = addresses.map(|word| word.chars().count()).sum();
    line.chars().count() - hidden
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_too_long_by_its_columns_not_its_bytes() {
        let line = format!("// {}", "ü".repeat(98));
        let found = too_long(Path::new("a.rs"), &format!("\n{line}\n"));
        assert_eq!(found, ["a.rs:2: 101 columns, not 100"]);
        assert!(too_long(Path::new("a.rs"), &line[..line.len() - 2]).is_empty());
    }

    #[test]
    fn what_cannot_be_broken_may_be_long() {
        let long = "x ".repeat(60);
        let address = format!("see https://example.org/{}", "x".repeat(100));
        let page = format!("| {long} |\n\n    {long}\n\n```\n{long}\n```\n{address}\n");
        assert!(too_long(Path::new("a.md"), &page).is_empty());
        assert_eq!(
            too_long(Path::new("a.md"), &format!("{page}{long}")).len(),
            1
        );
        assert_eq!(too_long(Path::new("a.rs"), &page).len(), 3);
    }
}
