// SPDX-License-Identifier: GPL-2.0-or-later
//! A Python environment with the tools that QEMU's configure wants (`lab/python.txt`).

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::cache::{self, Key};
use crate::context::Context;
use crate::process::{Job, command};
use crate::progress::Step;

/// The environment's `bin` folder; made when it is not there yet.
pub(crate) fn environment(ctx: &Context, step: &Step) -> Result<PathBuf> {
    let requirements = ctx.root.join("lab/python.txt");
    let python = python();
    let key = Key::default()
        .add_file(&requirements)?
        .add("python", python)
        .add_identity(
            &Path::new(python)
                .canonicalize()
                .unwrap_or_else(|_| requirements.clone()),
        )?
        .finish();
    // An environment knows its own path: it cannot be made elsewhere and moved.
    let folder = ctx.cache.join(format!("python-{key}"));
    let complete = folder.join("complete");
    if complete.exists() {
        return Ok(folder.join("bin"));
    }
    let _lock = cache::lock(&ctx.cache, "python", step)?;
    if complete.exists() {
        return Ok(folder.join("bin"));
    }
    step.say("making a Python environment");
    cache::remove(&folder)?;
    let log = ctx.log("python");
    let make = command(python, [Path::new("-m"), Path::new("venv"), &folder]);
    Job::new("making a Python environment", make)
        .log(&log)
        .run()?;
    let pip = folder.join("bin/python3");
    let mut install = command(pip, ["-m", "pip", "install", "--only-binary=:all:"]);
    install
        .args(["--no-deps", "--require-hashes", "--requirement"])
        .arg(&requirements);
    Job::new("installing Python packages", install)
        .log(&log)
        .run()
        .context(
            "pip could not fetch what lab/python.txt lists: see that it reaches a package index",
        )?;
    std::fs::write(&complete, "")
        .with_context(|| format!("cannot write {}", complete.display()))?;
    Ok(folder.join("bin"))
}

/// The system's own Python, where there is one.
fn python() -> &'static str {
    const SYSTEM: &str = "/usr/bin/python3";
    if Path::new(SYSTEM).exists() {
        SYSTEM
    } else {
        "python3"
    }
}
