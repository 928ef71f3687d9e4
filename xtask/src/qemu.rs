// SPDX-License-Identifier: GPL-2.0-or-later
//! QEMU with our patches and the library, built and kept in the cache.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::cache::{self, Key, Lock};
use crate::context::Context;
use crate::library::{self, Library};
use crate::process::{Job, command};
use crate::progress::Step;
use crate::qemu_series::{self, our_patches};
use crate::qemu_source::{self, Source};
use crate::{fetch, header, python};

/// How QEMU is configured. Everything that the lab does not need is left out.
const CONFIGURE: &[&str] = &[
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-tcg",
    "--enable-kvm",
    "--enable-attr",
    "--enable-virtfs",
    "--enable-numa",
    "--enable-plugins",
    "--enable-trace-backends=log",
    "--disable-fdt",
    "--enable-tools",
    "--enable-vhost-user",
    "--enable-vhost-user-blk-server",
    "--disable-docs",
    "--disable-guest-agent",
    "--disable-install-blobs",
    "--disable-download",
];

/// What is built of it. The second serves disks to guests from a process of its own.
const PROGRAMS: [&str; 2] = ["qemu-system-x86_64", "storage-daemon/qemu-storage-daemon"];

/// The option that our patches bring.
const OPTION: &str = "guestmemfd";

/// How many results are kept.
const KEEP: usize = 4;

/// A QEMU that is ready to run.
#[derive(Clone, Debug)]
pub(crate) struct Qemu {
    /// `qemu-system-x86_64`.
    pub(crate) program: PathBuf,
    /// `qemu-storage-daemon`.
    pub(crate) daemon: PathBuf,
    /// For people.
    pub(crate) version: String,
}

/// Where and from what QEMU is built.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) source: PathBuf,
    /// Holds the build folders and the library's prefix.
    pub(crate) folder: PathBuf,
}

/// Builds what is not built yet.
pub(crate) fn build(ctx: &Context, step: &Step) -> Result<Qemu> {
    let library = library::install(ctx, step)?;
    if let Some(source) = &ctx.qemu_src {
        return build_users(ctx, step, source, &library);
    }
    let results = ctx.cache.join("qemu");
    fs::create_dir_all(&results)?;
    for release in fetch::QEMU {
        let result = results.join(result_key(ctx, release, &library)?);
        if result.exists() {
            cache::touch(&result);
            return Ok(Qemu::at(&result, release.version));
        }
    }
    let _lock = lock(ctx, step)?;
    let tree = prepare(ctx, step)?;
    install_library(&tree, &library)?;
    let build = tree.folder.join("build");
    compile(ctx, step, &tree, &build, true, &[])?;
    let release = fetch::QEMU
        .iter()
        .find(|release| qemu_source::folder(ctx, release) == tree.folder)
        .context("the source tree belongs to no known release")?;
    let result = results.join(result_key(ctx, release, &library)?);
    cache::make_folder(&result, |partial| copy_result(&build, partial))?;
    cache::touch(&result);
    cache::keep_newest(&results, KEEP)?;
    Ok(Qemu::at(&result, release.version))
}

impl Qemu {
    fn at(result: &Path, version: &str) -> Self {
        Self {
            program: result.join("bin/qemu-system-x86_64"),
            daemon: result.join("bin/qemu-storage-daemon"),
            version: version.to_owned(),
        }
    }
}

/// One run at a time changes source trees and build folders.
pub(crate) fn lock(ctx: &Context, step: &Step) -> Result<Lock> {
    cache::lock(&ctx.cache, "qemu", step)
}

/// The source tree with all our patches. The caller holds the lock.
pub(crate) fn prepare(ctx: &Context, step: &Step) -> Result<Tree> {
    let source = Source::prepare(ctx, step)?;
    step.say("applying patches");
    let trees = source.patched(&our_patches(ctx)?)?;
    Ok(Tree {
        source: source.check_out("source", &trees)?,
        folder: source.folder().to_owned(),
    })
}

/// What a result is made of.
fn result_key(ctx: &Context, release: &fetch::Release, library: &Library) -> Result<String> {
    let mut key = release.key().add("configure", CONFIGURE.join(" "));
    key = key.add_file(&ctx.root.join("lab/python.txt"))?;
    for patch in our_patches(ctx)? {
        key = key.add_file(&patch)?;
    }
    key = key
        .add_file(&header::path(ctx))?
        .add("library", cache::sha256(&library.archive())?);
    Ok(key.finish())
}

/// Builds a source tree of the user's, which is not written to.
fn build_users(ctx: &Context, step: &Step, source: &Path, library: &Library) -> Result<Qemu> {
    if !has_option(source)? {
        bail!(
            "{} does not have the patches; apply them with: {}/qemu-patches/git-series.sh import {} {}",
            source.display(),
            ctx.root.display(),
            qemu_series::folder(ctx).display(),
            source.display()
        );
    }
    let key = Key::default()
        .add("source", source.as_os_str().as_encoded_bytes())
        .finish();
    let folder = ctx.cache.join(format!("qemu-own-{key}"));
    fs::create_dir_all(&folder)?;
    let _lock = cache::lock(&ctx.cache, &format!("qemu-own-{key}"), step)?;
    let tree = Tree {
        source: source.to_owned(),
        folder,
    };
    install_library(&tree, library)?;
    let build = tree.folder.join("build");
    compile(ctx, step, &tree, &build, true, &[])?;
    let version = fs::read_to_string(source.join("VERSION")).unwrap_or_default();
    let [program, daemon] = PROGRAMS.map(|program| build.join(program));
    Ok(Qemu {
        program,
        daemon,
        version: format!("{} ({})", version.trim(), source.display()),
    })
}

/// Whether a source tree has the option that our patches bring.
pub(crate) fn has_option(source: &Path) -> Result<bool> {
    let path = source.join("meson_options.txt");
    let text = fs::read_to_string(&path)
        .with_context(|| format!("{} is no QEMU source tree", source.display()))?;
    Ok(text.contains(&format!("option('{OPTION}'")))
}

fn prefix(tree: &Tree) -> PathBuf {
    tree.folder.join("prefix")
}

/// Puts the library where QEMU's configure finds it.
pub(crate) fn install_library(tree: &Tree, library: &Library) -> Result<()> {
    library.copy_to(&prefix(tree))
}

/// Configures if that is needed, and builds. `with` says whether the library
/// is linked, where the tree knows the option at all.
pub(crate) fn compile(
    ctx: &Context,
    step: &Step,
    tree: &Tree,
    build: &Path,
    with: bool,
    more: &[&str],
) -> Result<()> {
    let python = python::environment(ctx, step, python::TOOLS)?;
    let mut args: Vec<String> = CONFIGURE
        .iter()
        .chain(more)
        .map(|arg| (*arg).to_owned())
        .collect();
    args.push(format!("--python={}", python.join("python3").display()));
    if has_option(&tree.source)? {
        args.push(format!(
            "--{}-{OPTION}",
            if with { "enable" } else { "disable" }
        ));
    }
    configure(ctx, step, tree, build, &args)?;
    step.say("compiling");
    let mut ninja = command("ninja", ["-j", &ctx.jobs.to_string()]);
    ninja
        .args(PROGRAMS)
        .current_dir(build)
        .env("CCACHE_DIR", tree.folder.join("ccache"))
        .env("CCACHE_MAXSIZE", "2G")
        .env("PKG_CONFIG_PATH", Library::pkg_config_folder(&prefix(tree)));
    Job::new("compiling QEMU", ninja)
        .log(&ctx.log("qemu-build"))
        .follow(|line| {
            if let Some((done, total)) = ninja_progress(line) {
                step.amount(done, total);
            }
        })
        .run()
}

/// Runs configure when it has not been run with these arguments.
fn configure(ctx: &Context, step: &Step, tree: &Tree, build: &Path, args: &[String]) -> Result<()> {
    let stamp = build.join("configured-with");
    let wanted = args.join("\n");
    if fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        return Ok(());
    }
    step.say("configuring");
    cache::remove(build)?;
    fs::create_dir_all(build)?;
    let mut configure = command(tree.source.join("configure"), args);
    configure
        .current_dir(build)
        .env("PKG_CONFIG_PATH", Library::pkg_config_folder(&prefix(tree)));
    Job::new("configuring QEMU", configure)
        .log(&ctx.log("qemu-configure"))
        .run()?;
    fs::write(&stamp, wanted).with_context(|| format!("cannot write {}", stamp.display()))
}

/// `[12/1716] Compiling ...`
fn ninja_progress(line: &str) -> Option<(u64, u64)> {
    let (done, total) = line.strip_prefix('[')?.split_once(']')?.0.split_once('/')?;
    Some((done.parse().ok()?, total.parse().ok()?))
}

fn copy_result(build: &Path, result: &Path) -> Result<()> {
    let bin = result.join("bin");
    fs::create_dir(&bin)?;
    for program in PROGRAMS.map(Path::new) {
        let name = program.file_name().unwrap_or_default();
        fs::copy(build.join(program), bin.join(name))
            .with_context(|| format!("QEMU's build left no {}", program.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_from_ninjas_lines() {
        assert_eq!(
            ninja_progress("[12/1716] Compiling C object x.o"),
            Some((12, 1716))
        );
        assert_eq!(ninja_progress("../x.c:1: warning: [a/b]"), None);
    }
}
