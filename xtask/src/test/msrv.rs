// SPDX-License-Identifier: GPL-2.0-or-later
//! The library with the oldest Rust that it promises to work with: it is built, and the tests in C pass.
//! The Rust library that they link besides is built with the checkout's own compiler.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use crate::cargo::cargo;
use crate::context::Context;
use crate::process::Job;
use crate::progress::Step;
use crate::toolchain::{self, Toolchain};
use crate::{meson, python};

use super::report::Tally;
use super::steps::meson_test;

/// The lists of packages are for this kind of machine.
const TARGET: &str = "x86_64-unknown-linux-gnu";

pub(crate) fn test(ctx: &Context, step: &Step) -> Result<Tally> {
    let promised = promised(ctx)?;
    let toolchain = match toolchain::debian(ctx, step) {
        Ok(toolchain) => toolchain,
        Err(error) => {
            step.note(format_args!("{error:#}"));
            let why = format!("{error:#}");
            let why = why.lines().next().unwrap_or_default();
            return Ok(Tally::skip(format!("msrv: no Rust {promised}: {why}")));
        }
    };
    let version = &toolchain.version;
    ensure!(
        version.starts_with(&format!("{promised}.")),
        "Cargo.toml promises Rust {promised}, and Debian has {version}: test what is promised, or \
         promise what is tested"
    );
    fetch_crates(ctx, step)?;
    let mut tally = with(ctx, step, &toolchain)?;
    if tally.failed == 0 {
        tally.detail = format!("rustc {version}");
    }
    Ok(tally)
}

#[derive(Deserialize)]
struct Manifest {
    package: Package,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Package {
    rust_version: String,
}

/// The `rust-version` of the library.
fn promised(ctx: &Context) -> Result<String> {
    let text = fs::read_to_string(ctx.root.join("Cargo.toml")).context("cannot read Cargo.toml")?;
    let manifest: Manifest = toml::from_str(&text).context("Cargo.toml")?;
    Ok(manifest.package.rust_version)
}

/// By the checkout's own cargo, which knows the way to a registry.
fn fetch_crates(ctx: &Context, step: &Step) -> Result<()> {
    step.say("fetching crates");
    let mut fetch = cargo(ctx);
    fetch.args(["fetch", "--locked", "--target", TARGET]);
    let log = ctx.log("msrv-fetch");
    Job::new("cargo fetch", fetch).log(&log).run()
}

fn with(ctx: &Context, step: &Step, toolchain: &Toolchain) -> Result<Tally> {
    step.say(format_args!("building with rustc {}", toolchain.version));
    let tools = python::environment(ctx, step, python::TOOLS)?;
    let build = meson::folder(ctx, "msrv");
    let machine = build.with_extension("ini");
    write_machine(&machine, &toolchain.cargo)?;
    let options = [
        format!("--native-file={}", machine.display()),
        // Its own: cargo would build all crates anew whenever the compiler changes.
        format!(
            "-Dcargo_target_dir={}",
            build.with_extension("cargo").display()
        ),
    ];
    meson::configure(ctx, &tools, &build, &options)?;
    meson_test(ctx, step, &tools, &build, "msrv", &[], &[])
}

/// Tells meson which cargo to take.
fn write_machine(path: &Path, cargo: &Path) -> Result<()> {
    let text = format!("[binaries]\ncargo = '{}'\n", cargo.display());
    fs::create_dir_all(path.parent().unwrap_or(path))?;
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}
