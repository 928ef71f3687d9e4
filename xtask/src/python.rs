// SPDX-License-Identifier: GPL-2.0-or-later
//! Python environments with what a list of requirements names.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::cache::{self, Key};
use crate::context::Context;
use crate::process::{Job, command, output};
use crate::progress::Step;

/// The tools that QEMU's configure wants.
pub(crate) const TOOLS: &str = "lab/python.txt";

/// Avocado, and what its tests import.
pub(crate) const AVOCADO: &str = "tests/avocado/requirements.txt";

/// The archive of an environment's packages.
pub(crate) const PACKAGES: &str = "packages.tar";

/// The `bin` folder of the environment with a list; made when it is not there yet.
pub(crate) fn environment(ctx: &Context, step: &Step, list: &str) -> Result<PathBuf> {
    Ok(folder(ctx, step, list)?.join("bin"))
}

/// The packages of a list, without the environment, for a Python elsewhere: they hold no compiled code.
pub(crate) fn packages(ctx: &Context, step: &Step, list: &str) -> Result<PathBuf> {
    let folder = folder(ctx, step, list)?;
    let archive = folder.join(PACKAGES);
    if archive.exists() {
        return Ok(archive);
    }
    let _lock = cache::lock(&ctx.cache, "python", step)?;
    let mut find = command(folder.join("bin/python3"), ["-c"]);
    find.arg("import sysconfig; print(sysconfig.get_path('purelib'))");
    let installed = output(find)?;
    let partial = cache::partial_name(&archive);
    let mut tar = command("tar", ["--create", "--file"]);
    tar.arg(&partial)
        .args(["--exclude=__pycache__", "--exclude=./pip*", "--directory"])
        .args([installed.trim(), "."]);
    Job::new("packing Python packages", tar).run()?;
    fs::rename(&partial, &archive)?;
    Ok(archive)
}

fn folder(ctx: &Context, step: &Step, list: &str) -> Result<PathBuf> {
    let requirements = ctx.root.join(list);
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
        return Ok(folder);
    }
    let _lock = cache::lock(&ctx.cache, "python", step)?;
    if complete.exists() {
        return Ok(folder);
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
        .with_context(|| {
            format!("pip could not fetch what {list} lists: see that it reaches a package index")
        })?;
    fs::write(&complete, "").with_context(|| format!("cannot write {}", complete.display()))?;
    Ok(folder)
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
