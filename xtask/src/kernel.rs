// SPDX-License-Identifier: GPL-2.0-or-later
//! The lab's kernel: tinyconfig, `lab/kernel.config`, and what `lab/patches` has for its version.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::cache;
use crate::context::Context;
use crate::fetch::{self, Obtained, Release};
use crate::packages::find_tool;
use crate::process::{Job, command};
use crate::progress::Step;
use crate::qemu_source::{apply, series, unpack};

/// About how many lines make prints for this configuration.
const LINES: u64 = 2200;

/// How many kernels are kept.
const KEEP: usize = 3;

/// Where the source has tests of KVM, and those that are built with the kernel.
const SELFTESTS: &str = "tools/testing/selftests/kvm";
const SELFTEST_PROGRAMS: [&str; 3] = [
    "guest_memfd_test",
    "x86/private_mem_conversions_test",
    "x86/private_mem_kvm_exits_test",
];

/// A kernel that is ready to boot.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) image: PathBuf,
    pub(crate) version: &'static str,
    /// Its own tests of KVM.
    pub(crate) selftests: Vec<PathBuf>,
}

/// Builds what is not built yet.
pub(crate) fn build(ctx: &Context, step: &Step) -> Result<Kernel> {
    if let Some(kernel) = built(ctx)? {
        return Ok(kernel);
    }
    let _lock = cache::lock(&ctx.cache, "kernel", step)?;
    if let Some(kernel) = built(ctx)? {
        return Ok(kernel);
    }
    let obtained = fetch::obtain(ctx, step, fetch::LINUX)?;
    let result = result(ctx, obtained.release)?;
    cache::make_folder(&result, |partial| make(ctx, step, &obtained, partial))?;
    cache::touch(&result);
    cache::keep_newest(&ctx.cache.join("kernel"), KEEP)?;
    built(ctx)?.context("the kernel that was just built is not there")
}

fn built(ctx: &Context) -> Result<Option<Kernel>> {
    for release in fetch::LINUX {
        let result = result(ctx, release)?;
        if result.exists() {
            cache::touch(&result);
            return Ok(Some(Kernel {
                image: result.join("bzImage"),
                version: release.version,
                selftests: SELFTEST_PROGRAMS.map(|name| selftest(&result, name)).into(),
            }));
        }
    }
    Ok(None)
}

/// The folder with what a release needs of its own: patches, and options that others do not have.
fn folder(root: &Path, release: &Release) -> PathBuf {
    let minor = release.version.rsplit_once('.');
    let minor = minor.map_or(release.version, |(minor, _)| minor);
    root.join("lab/patches").join(minor)
}

/// Files with options, of which later ones come after earlier ones.
fn fragments(ctx: &Context, release: &Release) -> Vec<PathBuf> {
    let own = folder(&ctx.root, release).join("config");
    let all = ctx.root.join("lab/kernel.config");
    [Some(all), own.exists().then_some(own)]
        .into_iter()
        .flatten()
        .collect()
}

fn patches(ctx: &Context, release: &Release) -> Result<Vec<PathBuf>> {
    series(&folder(&ctx.root, release))
}

fn result(ctx: &Context, release: &Release) -> Result<PathBuf> {
    let mut key = release.key().add("selftests", SELFTEST_PROGRAMS.join(" "));
    for file in fragments(ctx, release)
        .iter()
        .chain(&patches(ctx, release)?)
    {
        key = key.add_file(file)?;
    }
    Ok(ctx.cache.join("kernel").join(key.finish()))
}

fn make(ctx: &Context, step: &Step, obtained: &Obtained, result: &Path) -> Result<()> {
    let source = result.join("source");
    fs::create_dir(&source)?;
    step.say("unpacking");
    unpack_source(&obtained.files[0], &source)?;
    step.say("applying patches");
    let patches = patches(ctx, obtained.release)?;
    apply(&source, &patches, &ctx.log("kernel-patches"))?;
    step.say("configuring");
    configure(ctx, obtained.release, &source)?;
    step.say("compiling");
    let mut lines = 0;
    Job::new(
        "compiling Linux",
        make_command(&source, &["-j", &ctx.jobs.to_string(), "bzImage"]),
    )
    .log(&ctx.log("kernel-build"))
    .follow(|_| {
        lines += 1;
        step.amount(lines, LINES);
    })
    .run()?;
    fs::copy(source.join("arch/x86/boot/bzImage"), result.join("bzImage"))
        .context("Linux's build left no bzImage")?;
    fs::copy(source.join(".config"), result.join("config"))?;
    step.say("compiling its tests");
    make_selftests(ctx, &source, result)?;
    step.say("clearing away");
    cache::remove(&source)
}

/// Static programs, which need nothing of level 1's.
fn make_selftests(ctx: &Context, source: &Path, result: &Path) -> Result<()> {
    let log = ctx.log("kernel-selftests");
    Job::new("Linux's headers", make_command(source, &["headers"]))
        .log(&log)
        .run()?;
    let folder = source.join(SELFTESTS);
    let mut make = make_command(&folder, &["-j", &ctx.jobs.to_string(), "LDLIBS=-static"]);
    // Libraries of other tests.
    make.args(["LIBVFIO_O=", "LIBCGROUP_O="]);
    make.arg(format!("OUTPUT={}", folder.display()));
    make.args(SELFTEST_PROGRAMS.map(|name| folder.join(name)));
    Job::new("compiling Linux's tests", make).log(&log).run()?;
    for name in SELFTEST_PROGRAMS {
        fs::copy(folder.join(name), selftest(result, name))
            .with_context(|| format!("Linux's build left no {name}"))?;
    }
    Ok(())
}

fn selftest(result: &Path, name: &str) -> PathBuf {
    result.join(cache::file_name(Path::new(name)))
}

/// Unpacks an archive of the source, or a binary package that has one in it.
fn unpack_source(archive: &Path, source: &Path) -> Result<()> {
    if archive
        .extension()
        .is_none_or(|extension| extension != "deb")
    {
        return unpack(archive, source);
    }
    let package = source.with_extension("package");
    let mut dpkg = command("dpkg-deb", ["--extract"]);
    dpkg.arg(archive).arg(&package);
    Job::new(format!("unpacking {}", archive.display()), dpkg).run()?;
    let folder = package.join("usr/src");
    let inner = fs::read_dir(&folder)
        .with_context(|| format!("{} has no source in it", archive.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "xz"))
        .with_context(|| format!("{} has no archive in it", archive.display()))?;
    unpack(&inner, source)?;
    cache::remove(&package)
}

fn make_command(source: &Path, args: &[&str]) -> Command {
    let mut make = command("make", args);
    make.current_dir(source).env("ARCH", "x86_64");
    // Another option or patch leaves most of the files as they are.
    if find_tool("ccache").is_some() {
        make.arg("CC=ccache gcc");
    }
    make
}

/// Writes the configuration, and sees that every option of ours is in it.
fn configure(ctx: &Context, release: &Release, source: &Path) -> Result<()> {
    let log = ctx.log("kernel-configure");
    Job::new("configuring Linux", make_command(source, &["tinyconfig"]))
        .log(&log)
        .run()?;
    let config = source.join(".config");
    let mut fragment = String::new();
    for path in fragments(ctx, release) {
        let text = fs::read_to_string(&path);
        fragment += &text.with_context(|| format!("cannot read {}", path.display()))?;
    }
    let tiny = fs::read_to_string(&config)?;
    fs::write(&config, format!("{tiny}{fragment}"))?;
    Job::new("configuring Linux", make_command(source, &["olddefconfig"]))
        .log(&log)
        .run()?;
    let missing = missing_options(&fragment, &fs::read_to_string(&config)?);
    if !missing.is_empty() {
        bail!(
            "Linux {} does not take these options of lab/kernel.config: {}",
            release.version,
            missing.join(" ")
        );
    }
    Ok(())
}

/// The options of a fragment that a configuration does not have.
fn missing_options<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let has = |option: &str| config.lines().any(|line| line == option);
    fragment
        .lines()
        .filter(|line| line.starts_with("CONFIG_") && !has(line))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_release_has_patches() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for release in fetch::LINUX {
            let patches = series(&folder(&root, release)).expect("a series");
            assert!(!patches.is_empty(), "{}", release.version);
            for patch in patches {
                assert!(patch.exists(), "{}", patch.display());
            }
        }
    }

    #[test]
    fn an_option_that_did_not_take_is_named() {
        let fragment = "# why\nCONFIG_A=y\nCONFIG_B=y\n";
        assert_eq!(
            missing_options(fragment, "CONFIG_A=y\n# CONFIG_B is not set\n"),
            ["CONFIG_B=y"]
        );
        assert!(missing_options(fragment, "CONFIG_B=y\nCONFIG_A=y\n").is_empty());
    }
}
