// SPDX-License-Identifier: GPL-2.0-or-later
//! Debian's Rust, which is older than that of this checkout, unpacked into the cache. It runs with the
//! C library that it was made for, through that library's own loader, and links with this machine's.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::cache::{self, Key};
use crate::context::Context;
use crate::debian;
use crate::process::{command, output};
use crate::progress::Step;

/// The packages.
const LIST: &str = "lab/rust.txt";

/// A number to be raised when this file makes something else of the same packages.
const FORMAT: &str = "1";

/// Programs, below the result.
const CARGO: &str = "bin/cargo";
const RUSTC: &str = "bin/rustc";

/// A compiler with its cargo.
#[derive(Debug)]
pub(crate) struct Toolchain {
    pub(crate) cargo: PathBuf,
    /// Of the compiler, such as `1.85.1`.
    pub(crate) version: String,
}

/// Fetches and unpacks it unless it is there.
pub(crate) fn debian(ctx: &Context, step: &Step) -> Result<Toolchain> {
    let list = debian::List::read(&ctx.root.join(LIST))?;
    let key = list.add_to(Key::default().add("format", FORMAT)).finish();
    let folder = ctx.cache.join("rust");
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let result = folder.join(key);
    let _lock = cache::lock(&ctx.cache, "rust", step)?;
    if !result.exists() {
        cache::remove_partial(&folder)?;
        cache::make_folder(&result, |partial| make(ctx, step, &list, partial, &result))?;
    }
    cache::touch(&result);
    cache::keep_newest(&folder, 1)?;
    let says = output(command(result.join(RUSTC), ["--version"]))?;
    Ok(Toolchain {
        cargo: result.join(CARGO),
        version: version_in(&says)?.to_owned(),
    })
}

/// `rustc 1.85.1 (4eb161250 2025-03-15)`
fn version_in(says: &str) -> Result<&str> {
    let version = says.split(' ').nth(1);
    version.with_context(|| format!("Debian's rustc says of its version: {says}"))
}

/// Makes it in the folder `partial`, which will be called `result`.
fn make(
    ctx: &Context,
    step: &Step,
    list: &debian::List,
    partial: &Path,
    result: &Path,
) -> Result<()> {
    let (packages, root) = (partial.join("packages"), partial.join("root"));
    debian::fetch(ctx, step, list, &packages)?;
    debian::make_skeleton(&root)?;
    debian::unpack(step, &packages, &root, &partial.join("versions"))?;
    cache::remove(&packages)?;
    let root = result.join("root");
    let rustc = result.join(RUSTC);
    // The compiler would look for its libraries beside the loader.
    let sysroot = format!(" --sysroot={}", root.join("usr").display());
    fs::create_dir_all(partial.join("bin"))?;
    write_program(&partial.join(RUSTC), &starter(&root, "rustc", &sysroot))?;
    let cargo = format!("export RUSTC={}\n", rustc.display()) + &starter(&root, "cargo", "");
    write_program(&partial.join(CARGO), &cargo)
}

/// Shell that becomes a program of the folder `root`.
fn starter(root: &Path, program: &str, options: &str) -> String {
    format!(
        "exec {} --library-path {} {}{options} \"$@\"\n",
        root.join("lib64/ld-linux-x86-64.so.2").display(),
        root.join("usr/lib/x86_64-linux-gnu").display(),
        root.join("usr/bin").join(program).display(),
    )
}

fn write_program(path: &Path, script: &str) -> Result<()> {
    fs::write(path, format!("#!/bin/sh\n{script}"))
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_what_rustc_says() {
        let says = "rustc 1.85.1 (4eb161250 2025-03-15)\n";
        assert_eq!(version_in(says).expect("a version"), "1.85.1");
        assert!(version_in("").is_err());
    }

    #[test]
    fn programs_are_started_with_their_own_libraries() {
        let script = starter(Path::new("/r"), "rustc", " -x");
        let expected = "exec /r/lib64/ld-linux-x86-64.so.2 --library-path /r/usr/lib/x86_64-linux-gnu \
                        /r/usr/bin/rustc -x \"$@\"\n";
        assert_eq!(script, expected);
    }
}
