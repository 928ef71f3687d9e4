// SPDX-License-Identifier: GPL-2.0-or-later
//! The packages of this workspace that the lab runs.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::context::Context;
use crate::process::Job;
use crate::progress::Step;

/// The platform, to be named where what is built differs from what builds it.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Cargo, as it was started, in the checkout.
pub(crate) fn cargo(ctx: &Context) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(&ctx.root);
    command
}

/// The conformance guest.
pub(crate) fn guest(ctx: &Context, step: &Step) -> Result<PathBuf> {
    build(ctx, step, "guestmemfd-guest", "guest", "guestmemfd-guest")
}

/// The same without SSE: a KVM without svm and vmx may emulate instructions, and not have those.
pub(crate) fn plain_guest(ctx: &Context, step: &Step) -> Result<PathBuf> {
    let mut command = cargo(ctx);
    command
        .env("RUSTFLAGS", "-Ctarget-feature=-sse,-sse2,-mmx")
        .env("CARGO_TARGET_DIR", ctx.root.join("target/plain"))
        .arg("build");
    build_with(
        ctx,
        step,
        command,
        "guestmemfd-guest",
        "guest",
        "guestmemfd-guest",
    )
}

/// The program that runs guests under QEMU and judges them.
pub(crate) fn runner(ctx: &Context, step: &Step) -> Result<PathBuf> {
    build(ctx, step, "guestmemfd-lab", "release", "guestmemfd-lab")
}

/// The cheapest user of private memory, with which the benchmarks compare.
pub(crate) fn floor(ctx: &Context, step: &Step) -> Result<PathBuf> {
    build(ctx, step, "guestmemfd-floor", "release", "guestmemfd-floor")
}

/// The library's example.
pub(crate) fn example(ctx: &Context, step: &Step) -> Result<PathBuf> {
    let mut command = cargo(ctx);
    command.args(["build", "--example", "vmm"]);
    build_with(ctx, step, command, "guestmemfd", "release", "vmm")
}

/// The live view of a guest's memory.
pub(crate) fn top(ctx: &Context, step: &Step) -> Result<PathBuf> {
    build(ctx, step, "guestmemfd-top", "release", "guestmemfd-top")
}

/// The plugin that watches the emulated CPU.
pub(crate) fn plugin(ctx: &Context, step: &Step) -> Result<PathBuf> {
    build(
        ctx,
        step,
        "guestmemfd-plugin",
        "release",
        "libguestmemfd_plugin.so",
    )
}

/// The library's tests of owners.
pub(crate) fn owner_tests(ctx: &Context, step: &Step) -> Result<PathBuf> {
    let mut command = cargo(ctx);
    command.args(["test", "--no-run", "--test", "owner"]);
    build_with(ctx, step, command, "guestmemfd", "dev", "owner")
}

/// Builds a package and returns the artifact with this file name.
fn build(
    ctx: &Context,
    step: &Step,
    package: &str,
    profile: &str,
    artifact: &str,
) -> Result<PathBuf> {
    let mut command = cargo(ctx);
    command.arg("build");
    build_with(ctx, step, command, package, profile, artifact)
}

fn build_with(
    ctx: &Context,
    step: &Step,
    mut command: Command,
    package: &str,
    profile: &str,
    artifact: &str,
) -> Result<PathBuf> {
    step.say(format_args!("building {artifact}"));
    command.args(["--package", package, "--profile", profile]);
    command.arg("--message-format=json-render-diagnostics");
    let mut found = None;
    Job::new(format!("building {artifact}"), command)
        .log(&ctx.log(&format!("cargo-{artifact}")))
        .follow(|line| found = artifact_in(line, artifact).or(found.take()))
        .run()?;
    found.with_context(|| format!("cargo built no {artifact} in package {package}"))
}

/// The path of a file that a line of cargo's JSON output says was made.
fn artifact_in(line: &str, name: &str) -> Option<PathBuf> {
    if !line.starts_with('{') {
        return None;
    }
    let message: Value = serde_json::from_str(line).ok()?;
    // The file names of tests have a hash.
    if let (true, Some(test)) = (
        message["target"]["name"] == name,
        message["executable"].as_str(),
    ) {
        return Some(test.into());
    }
    message["filenames"]
        .as_array()?
        .iter()
        .filter_map(Value::as_str)
        .map(PathBuf::from)
        .find(|path| path.file_name() == Path::new(name).file_name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_artifact_is_found_in_cargos_messages() {
        let line = r#"{"reason":"compiler-artifact","filenames":["/t/libx.rlib","/t/libx.a"]}"#;
        assert_eq!(artifact_in(line, "libx.a"), Some("/t/libx.a".into()));
        assert_eq!(artifact_in(line, "x"), None);
        let test =
            r#"{"target":{"name":"owner"},"filenames":["/t/owner-0"],"executable":"/t/owner-0"}"#;
        assert_eq!(artifact_in(test, "owner"), Some("/t/owner-0".into()));
        assert_eq!(artifact_in("Compiling x", "x"), None);
    }
}
