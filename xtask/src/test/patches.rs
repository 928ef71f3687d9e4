// SPDX-License-Identifier: GPL-2.0-or-later
//! Our patches for QEMU: each applies, has no errors for checkpatch, and leaves
//! a tree that compiles.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cache::{self, Key, file_name};
use crate::context::Context;
use crate::process::{Job, command};
use crate::progress::Step;
use crate::qemu::{self, Tree};
use crate::qemu_source::{Source, our_patches};
use crate::{cargo, header};

use super::report::Tally;

/// The work tree in which the steps on the way are compiled.
const WORK_TREE: &str = "steps";

/// Each patch applies and passes checkpatch.
pub(crate) fn test(ctx: &Context, step: &Step) -> Result<Tally> {
    let patches = our_patches(ctx)?;
    let _lock = qemu::lock(ctx, step)?;
    let source = Source::prepare(ctx, step)?;
    let mut tally = Tally::default();

    step.say("applying each patch");
    let trees = source.patched(&patches)?;
    tally.passed += trees.len() as u64;

    step.say("checkpatch");
    let checkpatch = source
        .check_out("source", &trees)?
        .join("scripts/checkpatch.pl");
    for patch in &patches {
        tally.add(check_style(ctx, &checkpatch, patch)?);
    }
    if tally.failed == 0 {
        tally.detail = format!("{} patches", patches.len());
    }
    Ok(tally)
}

/// Each step of the series compiles.
pub(crate) fn compile_each(ctx: &Context, step: &Step) -> Result<Tally> {
    let patches = our_patches(ctx)?;
    let library = cargo::library(ctx, step)?;
    let lock = qemu::lock(ctx, step)?;
    let source = Source::prepare(ctx, step)?;
    let trees = source.patched(&patches)?;
    drop(lock);
    let mut tally = Tally::default();

    // From here on in folders of its own, so that other runs need not wait.
    let _lock = cache::lock(&ctx.cache, "qemu-steps", step)?;
    // The last step is what the lab runs: it is compiled anyway.
    for count in 1..patches.len() {
        let name = file_name(&patches[count - 1]);
        step.say(format_args!(
            "compiling after {name} ({count} of {})",
            patches.len() - 1
        ));
        let result = compile(ctx, step, &source, &trees[..count], &library);
        tally.add(match result {
            Ok(()) => Tally {
                passed: 1,
                ..Tally::default()
            },
            Err(error) => {
                step.note(format_args!("after {name}: {error:#}"));
                Tally::fail(format!("does not compile after {name}"))
            }
        });
    }
    Ok(tally)
}

fn check_style(ctx: &Context, checkpatch: &Path, patch: &Path) -> Result<Tally> {
    let mut errors = Vec::new();
    let mut perl = command("perl", [checkpatch, patch]);
    perl.args(["--no-color", "--terse"]);
    let name = file_name(patch);
    let outcome = Job::new(format!("checkpatch on {name}"), perl)
        .log(&ctx.log(&format!("checkpatch-{name}")))
        .follow(|line| {
            if line.contains("ERROR:") {
                errors.push(line.to_owned());
            }
        })
        .outcome()?;
    if errors.is_empty() {
        // It may not have come so far as to find any.
        outcome.check()?;
        return Ok(Tally {
            passed: 1,
            ..Tally::default()
        });
    }
    Ok(Tally::fail(errors.join("\n")))
}

/// Compiles one tree of the series, unless the same was compiled before.
fn compile(
    ctx: &Context,
    step: &Step,
    source: &Source,
    trees: &[String],
    library: &Path,
) -> Result<()> {
    let tree = trees.last().map_or("", String::as_str);
    let stamp = stamp(ctx, source.folder(), tree)?;
    if stamp.exists() {
        return Ok(());
    }
    let work_tree = source.check_out(WORK_TREE, trees)?;
    let folder = source.folder().join("steps-build");
    let tree = Tree {
        source: work_tree,
        folder,
    };
    qemu::install_library(ctx, &tree, library)?;
    // A build folder each for the steps with and without the option: to change
    // the options means to compile everything again.
    let build = if qemu::has_option(&tree.source)? {
        "with"
    } else {
        "without"
    };
    // A patch of the QAPI schema touches a thousand files, most of which stay as they were.
    let ccache = ["--cc=ccache gcc"];
    qemu::compile(ctx, step, &tree, &tree.folder.join(build), true, &ccache)?;
    fs::write(stamp, "")?;
    Ok(())
}

/// Exists when a tree has compiled with this header.
fn stamp(ctx: &Context, folder: &Path, tree: &str) -> Result<PathBuf> {
    let key = Key::default()
        .add("tree", tree)
        .add_file(&header::path(ctx))?;
    Ok(folder.join(format!("compiled-{}", key.finish())))
}
