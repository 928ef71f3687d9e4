// SPDX-License-Identifier: GPL-2.0-or-later
//! Meson on the library's own build description.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::cache;
use crate::context::Context;
use crate::process::{self, Job};

/// A command of the meson in a folder of tools.
pub(crate) fn command(tools: &Path, args: &[&str]) -> Command {
    let mut path = tools.as_os_str().to_owned();
    if let Some(rest) = std::env::var_os("PATH") {
        path.push(":");
        path.push(rest);
    }
    let mut meson = process::command(tools.join("meson"), args);
    meson.env("PATH", path);
    meson
}

/// Where builds of this checkout go.
pub(crate) fn folder(ctx: &Context, name: &str) -> PathBuf {
    ctx.root.join("target/meson").join(name)
}

/// Sets a build folder up with these options, unless it is already.
pub(crate) fn configure(
    ctx: &Context,
    tools: &Path,
    build: &Path,
    options: &[String],
) -> Result<()> {
    let stamp = build.join("configured-with");
    let wanted = format!("{}\n{}", tools.display(), options.join("\n"));
    if fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        // What has changed in the description, ninja sees.
        return Ok(());
    }
    cache::remove(build)?;
    let mut setup = command(tools, &["setup"]);
    setup.arg(build).arg(&ctx.root).args(options);
    Job::new("meson setup", setup)
        .log(&ctx.log(&format!("meson-setup-{}", cache::file_name(build))))
        .run()?;
    fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))
}

/// All builds with the same compiler share what cargo has built.
pub(crate) fn cargo_target_dir(ctx: &Context) -> String {
    format!("-Dcargo_target_dir={}", ctx.root.join("target").display())
}
