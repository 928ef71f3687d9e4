// SPDX-License-Identifier: GPL-2.0-or-later
//! Our patches for QEMU: each is listed, applies, has no errors for checkpatch, and leaves a tree
//! that compiles.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::cache::{self, Key, file_name};
use crate::context::Context;
use crate::header;
use crate::library::{self, Library};
use crate::process::{Job, command};
use crate::progress::Step;
use crate::qemu::{self, Tree};
use crate::qemu_series::{self, our_patches};
use crate::qemu_source::Source;

use super::report::Tally;

/// The work tree in which the steps on the way are compiled.
const WORK_TREE: &str = "steps";

/// The folders are in order, and each patch applies and passes checkpatch.
pub(crate) fn test(ctx: &Context, step: &Step) -> Result<Tally> {
    let mut tally = Tally::default();
    let folder = qemu_series::folder(ctx);
    for problem in qemu_series::problems(&folder)? {
        tally.add(Tally::fail(problem));
    }
    let topics = qemu_series::topics(&folder)?;
    let patches = our_patches(ctx)?;
    let _lock = qemu::lock(ctx, step)?;
    let source = Source::prepare(ctx, step)?;

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
        tally.detail = format!("{} patches in {} folders", patches.len(), topics.len());
    }
    Ok(tally)
}

/// QEMU compiles after each patch, with the library once the patches know it.
pub(crate) fn compile_each(ctx: &Context, step: &Step) -> Result<Tally> {
    let series = Series::new(ctx, step)?;
    let mut tally = Tally::default();
    // The last step is what the lab runs: it is compiled anyway.
    for (index, name) in series.names[..series.names.len() - 1].iter().enumerate() {
        tally.add(series.compile(index + 1, name, true)?);
    }
    Ok(tally)
}

/// QEMU compiles after each folder: without the library, and with it once the patches know it.
pub(crate) fn compile_topics(ctx: &Context, step: &Step) -> Result<Tally> {
    let series = Series::new(ctx, step)?;
    let mut tally = Tally::default();
    let mut count = 0;
    for topic in qemu_series::topics(&qemu_series::folder(ctx))? {
        count += topic.patches.len();
        tally.add(series.compile(count, &topic.name, false)?);
        if series.knows_library(count)? {
            tally.add(series.compile(count, &topic.name, true)?);
        }
    }
    Ok(tally)
}

/// A patch of the QAPI schema touches a thousand files, most of which stay as they were.
const CCACHE: &str = "--cc=ccache gcc";

/// Builds QEMU with the first folder of patches alone. Its source stays as it is as long as the lock
/// is held.
pub(super) fn build_first_topic(ctx: &Context, step: &Step) -> Result<(PathBuf, cache::Lock)> {
    let series = Series::new(ctx, step)?;
    let topics = qemu_series::topics(&qemu_series::folder(ctx))?;
    let first = topics.first().context("there are no patches")?;
    let tree = series.check_out(first.patches.len())?;
    let build = tree.folder.join("first");
    qemu::compile(ctx, step, &tree, &build, false, &[CCACHE])?;
    Ok((build, series.lock))
}

/// The steps from the release to the tree with all patches.
struct Series<'a> {
    ctx: &'a Context,
    step: &'a Step,
    names: Vec<String>,
    source: Source,
    trees: Vec<String>,
    library: Library,
    /// Builds are made in folders of their own, so that other runs need not wait.
    lock: cache::Lock,
}

impl<'a> Series<'a> {
    fn new(ctx: &'a Context, step: &'a Step) -> Result<Self> {
        let patches = our_patches(ctx)?;
        let library = library::install(ctx, step)?;
        let lock = qemu::lock(ctx, step)?;
        let source = Source::prepare(ctx, step)?;
        let trees = source.patched(&patches)?;
        drop(lock);
        Ok(Self {
            ctx,
            step,
            names: patches.iter().map(|patch| file_name(patch)).collect(),
            source,
            trees,
            library,
            lock: cache::lock(&ctx.cache, "qemu-steps", step)?,
        })
    }

    fn check_out(&self, count: usize) -> Result<Tree> {
        Ok(Tree {
            source: self.source.check_out(WORK_TREE, &self.trees[..count])?,
            folder: self.source.folder().join("steps-build"),
        })
    }

    /// Do the first `count` patches bring the option?
    fn knows_library(&self, count: usize) -> Result<bool> {
        qemu::has_option(&self.check_out(count)?.source)
    }

    /// Compiles the tree after `count` patches; `name` is for people.
    fn compile(&self, count: usize, name: &str, library: bool) -> Result<Tally> {
        let how = if library { "" } else { ", without the library" };
        self.step.say(format_args!(
            "compiling after {name}{how} ({count} of {} patches)",
            self.trees.len()
        ));
        Ok(match self.compile_tree(count, library) {
            Ok(()) => Tally {
                passed: 1,
                ..Tally::default()
            },
            Err(error) => {
                self.step.note(format_args!("after {name}{how}: {error:#}"));
                Tally::fail(format!("does not compile after {name}{how}"))
            }
        })
    }

    /// Compiles one tree, unless the same was compiled before.
    fn compile_tree(&self, count: usize, library: bool) -> Result<()> {
        let tree = self.check_out(count)?;
        // To change the options means to compile everything again, so they have folders each.
        let build = match (qemu::has_option(&tree.source)?, library) {
            (false, _) => "plain",
            (true, true) => "with",
            (true, false) => "without",
        };
        let stamp = self.stamp(&self.trees[count - 1], build)?;
        if stamp.exists() {
            return Ok(());
        }
        qemu::install_library(&tree, &self.library)?;
        let build = tree.folder.join(build);
        qemu::compile(self.ctx, self.step, &tree, &build, library, &[CCACHE])?;
        fs::write(stamp, "")?;
        Ok(())
    }

    /// Exists when a tree has compiled in this way with this header.
    fn stamp(&self, tree: &str, build: &str) -> Result<PathBuf> {
        let key = Key::default()
            .add("tree", tree)
            .add("build", build)
            .add_file(&header::path(self.ctx))?;
        let name = format!("compiled-{}", key.finish());
        Ok(self.source.folder().join(name))
    }
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
