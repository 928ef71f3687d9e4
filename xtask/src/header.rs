// SPDX-License-Identifier: GPL-2.0-or-later
//! The C header, generated from the library's source and committed.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use crate::abi;
use crate::context::Context;

/// Options of `header`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Only say whether the committed header is what would be generated
    #[arg(long)]
    check: bool,
}

/// Where the header is committed.
pub(crate) fn path(ctx: &Context) -> PathBuf {
    ctx.root.join("include/guestmemfd.h")
}

/// Runs the command.
pub(crate) fn run(ctx: &Context, options: &Options) -> Result<()> {
    if options.check {
        return check(ctx);
    }
    let (path, header) = (path(ctx), generate(ctx)?);
    // Written first, so that one sees what has changed if the number has to change too.
    fs::write(&path, &header).with_context(|| format!("cannot write {}", path.display()))?;
    abi::record(ctx, &header)
}

/// An error when the committed header is stale, which shows the first difference, or when it has changed
/// under the same number.
pub(crate) fn check(ctx: &Context) -> Result<()> {
    let path = path(ctx);
    let committed =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let generated = generate(ctx)?;
    match first_difference(&committed, &generated) {
        None => abi::check(ctx, &committed),
        Some((line, found, wanted)) => bail!(
            "include/guestmemfd.h is stale; run: cargo xtask header\n\
             line {line} is:        {found}\n\
             line {line} should be: {wanted}"
        ),
    }
}

fn generate(ctx: &Context) -> Result<String> {
    let config = cbindgen::Config::from_file(ctx.root.join("cbindgen.toml"))
        .map_err(|error| anyhow::anyhow!("cbindgen.toml: {error}"))?;
    let bindings = cbindgen::Builder::new()
        .with_crate(&ctx.root)
        .with_config(config)
        .generate()
        .context("cannot generate the header")?;
    let mut header = Vec::new();
    bindings.write(&mut header);
    String::from_utf8(header).context("the generated header is no text")
}

fn first_difference<'a>(a: &'a str, b: &'a str) -> Option<(usize, &'a str, &'a str)> {
    if a == b {
        return None;
    }
    let (mut a, mut b) = (a.lines(), b.lines());
    let mut number = 1;
    loop {
        match (a.next(), b.next()) {
            (None, None) => return Some((number, "(another end of line)", "")),
            (x, y) if x != y => return Some((number, x.unwrap_or(""), y.unwrap_or(""))),
            _ => number += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_is_found() {
        assert_eq!(first_difference("a\nb\n", "a\nb\n"), None);
        assert_eq!(first_difference("a\nb\n", "a\nc\n"), Some((2, "b", "c")));
        assert_eq!(first_difference("a\n", "a\nc\n"), Some((2, "", "c")));
        assert!(first_difference("a", "a\n").is_some());
    }
}
