// SPDX-License-Identifier: GPL-2.0-or-later
//! The system packages that a purpose needs: installed where that is possible
//! without asking, else named.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::context::Context;
use crate::process::{Job, command, output};
use crate::progress::Step;

/// What a package is needed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Qemu,
    Kernel,
    Image,
    /// Images with a Debian userland.
    Debian,
    Test,
    Bench,
}

/// How to see without dpkg that something is there.
#[derive(Clone, Copy, Debug)]
enum Sign {
    Tool(&'static str),
    Library(&'static str),
    File(&'static str),
}

use Purpose::{Bench, Debian, Image, Kernel, Qemu, Test};
use Sign::{File, Library, Tool};

const PACKAGES: &[(&str, &[Purpose], Sign)] = &[
    ("gcc", &[Qemu, Kernel, Test], Tool("gcc")),
    ("g++", &[Test], Tool("g++")),
    (
        "libc6-dev",
        &[Qemu, Kernel, Test],
        File("/usr/include/stdio.h"),
    ),
    ("make", &[Qemu, Kernel], Tool("make")),
    ("xz-utils", &[Qemu, Kernel], Tool("xz")),
    ("patch", &[Qemu, Kernel], Tool("patch")),
    ("git", &[Qemu], Tool("git")),
    ("ninja-build", &[Qemu, Test], Tool("ninja")),
    ("pkgconf", &[Qemu, Test], Tool("pkg-config")),
    ("python3", &[Qemu, Test], Tool("python3")),
    ("python3-venv", &[Qemu, Test], Tool("python3")),
    ("libglib2.0-dev", &[Qemu], Library("glib-2.0")),
    ("zlib1g-dev", &[Qemu], Library("zlib")),
    ("libattr1-dev", &[Qemu], Library("libattr")),
    ("libnuma-dev", &[Qemu], File("/usr/include/numa.h")),
    ("ccache", &[Test], Tool("ccache")),
    ("flex", &[Kernel], Tool("flex")),
    ("bison", &[Kernel], Tool("bison")),
    ("bc", &[Kernel], Tool("bc")),
    ("libelf-dev", &[Kernel], Library("libelf")),
    (
        "seabios",
        &[Image],
        File("/usr/share/seabios/bios-256k.bin"),
    ),
    (
        "qemu-system-data",
        &[Image],
        File("/usr/share/qemu/pvh.bin"),
    ),
    ("busybox-static", &[Image], Tool("busybox")),
    ("dpkg", &[Debian, Kernel], Tool("dpkg-deb")),
    ("apt", &[Debian], Tool("apt-get")),
    (
        "debian-archive-keyring",
        &[Debian],
        File("/usr/share/keyrings/debian-archive-keyring.gpg"),
    ),
    ("e2fsprogs", &[Debian], File("/usr/sbin/mkfs.ext4")),
    ("libc-bin", &[Debian], File("/usr/sbin/ldconfig")),
    (
        "ipxe-qemu",
        &[Test],
        File("/usr/lib/ipxe/qemu/efi-e1000.rom"),
    ),
    ("perl", &[Test], Tool("perl")),
    ("valgrind", &[Test, Bench], Tool("valgrind")),
];

/// Makes sure that everything for `purposes` is there.
pub(crate) fn ensure(ctx: &Context, step: &Step, purposes: &[Purpose]) -> Result<()> {
    let wanted: Vec<_> = PACKAGES
        .iter()
        .filter(|(_, needed_for, _)| needed_for.iter().any(|purpose| purposes.contains(purpose)))
        .collect();
    if find_tool("dpkg-query").is_none() {
        let missing: Vec<&str> = wanted
            .iter()
            .filter(|(.., sign)| !is_there(*sign))
            .map(|(package, ..)| *package)
            .collect();
        if !missing.is_empty() {
            bail!(
                "install what this system calls the following Debian packages, and try again: {}",
                missing.join(" ")
            );
        }
        return Ok(());
    }
    let names: Vec<&str> = wanted.iter().map(|(package, ..)| *package).collect();
    let missing = missing(&names)?;
    if !missing.is_empty() {
        install(ctx, step, &missing)?;
    }
    Ok(())
}

/// Those of `names` that dpkg does not know as installed.
fn missing<'a>(names: &[&'a str]) -> Result<Vec<&'a str>> {
    let mut query = command("dpkg-query", ["-W", "-f=${db:Status-Status} ${Package}\\n"]);
    query.args(names);
    // It fails when it has never heard of one of them; what it prints counts.
    let result = query.output().context("cannot run dpkg-query")?;
    let installed = installed(&String::from_utf8_lossy(&result.stdout));
    Ok(names
        .iter()
        .filter(|name| !installed.contains(**name))
        .copied()
        .collect())
}

fn installed(printed: &str) -> HashSet<String> {
    printed
        .lines()
        .filter_map(|line| line.strip_prefix("installed "))
        .map(str::to_owned)
        .collect()
}

fn install(ctx: &Context, step: &Step, names: &[&str]) -> Result<()> {
    let list = names.join(" ");
    let by_hand = format!("apt-get install --no-install-recommends {list}");
    let Some(prefix) = privilege() else {
        bail!(
            "system packages are missing, and neither root nor sudo without a password can install them; run: sudo {by_hand}"
        );
    };
    let apt_get = |args: &[&str]| {
        let mut command = command(prefix[0], &prefix[1..]);
        command
            .args(["apt-get", "-o", "DPkg::Lock::Timeout=300"])
            .args(args);
        command
    };
    step.say("updating the package lists");
    // Some other source of the machine may be out of order.
    let updated = Job::new("apt-get update", apt_get(&["update"]))
        .log(&ctx.log("apt-update"))
        .outcome()?;
    step.say(format_args!("installing {list}"));
    let mut args = vec!["install", "-y", "--no-install-recommends"];
    args.extend(names);
    let context = || format!("cannot install system packages; by hand: {by_hand}");
    let installed = Job::new("apt-get install", apt_get(&args))
        .log(&ctx.log("apt-install"))
        .run();
    if installed.is_err() {
        updated.check().with_context(context)?;
    }
    installed.with_context(context)?;
    let missing = missing(names)?;
    if !missing.is_empty() {
        bail!(
            "apt-get installed no {}; by hand: {by_hand}",
            missing.join(" ")
        );
    }
    Ok(())
}

/// The words before an apt-get that runs as root and asks nothing, if any serve.
fn privilege() -> Option<&'static [&'static str]> {
    const AS_ROOT: &[&str] = &["env", "DEBIAN_FRONTEND=noninteractive"];
    const BY_SUDO: &[&str] = &["sudo", "-n", "env", "DEBIAN_FRONTEND=noninteractive"];
    if rustix::process::geteuid().is_root() {
        return Some(AS_ROOT);
    }
    output(command("sudo", ["-n", "true"]))
        .ok()
        .map(|_| BY_SUDO)
}

fn is_there(sign: Sign) -> bool {
    match sign {
        Tool(name) => find_tool(name).is_some(),
        Library(name) => output(command("pkg-config", ["--exists", name])).is_ok(),
        File(path) => Path::new(path).exists(),
    }
}

/// A program in `PATH`.
pub(crate) fn find_tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_installed_now_counts() {
        let printed = "installed gcc\nconfig-files bc\nnot-installed flex\n";
        assert_eq!(installed(printed), HashSet::from(["gcc".to_owned()]));
    }

    #[test]
    fn every_purpose_needs_something() {
        for purpose in [Qemu, Kernel, Image, Debian, Test] {
            assert!(
                PACKAGES
                    .iter()
                    .any(|(_, purposes, _)| purposes.contains(&purpose))
            );
        }
    }
}
