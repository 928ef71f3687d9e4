// SPDX-License-Identifier: GPL-2.0-or-later
//! What every command knows: the checkout, the cache, the user's folders.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::cache;

/// Options that all commands take.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Build this QEMU source tree, which has the patches applied, instead of fetching one
    #[arg(long, global = true, value_name = "DIR")]
    qemu_src: Option<PathBuf>,

    /// Take source archives from this folder before any download
    #[arg(long, global = true, value_name = "DIR")]
    distfiles: Option<PathBuf>,

    /// Where downloads and builds are kept [default: $GUESTMEMFD_CACHE, or guestmemfd in the
    /// user's cache folder]
    #[arg(long, global = true, value_name = "DIR")]
    cache: Option<PathBuf>,

    /// Whether level 1's kernel converts memory in place, as Linux 7.4 does, or in two files
    #[arg(
        long,
        global = true,
        action = clap::ArgAction::Set,
        value_name = "on|off",
        default_value = "on",
        value_parser = on_or_off
    )]
    in_place: bool,
}

fn on_or_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("write on or off".to_owned()),
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Context {
    /// The checkout.
    pub(crate) root: PathBuf,
    pub(crate) cache: PathBuf,
    pub(crate) distfiles: Option<PathBuf>,
    pub(crate) qemu_src: Option<PathBuf>,
    /// Level 1's kernel converts memory in place, where a task does not ask for the one or the other.
    pub(crate) in_place: bool,
    /// How many compilers run at once.
    pub(crate) jobs: usize,
    logs: PathBuf,
}

impl Context {
    pub(crate) fn new(options: Options) -> Result<Self> {
        let root = checkout();
        let logs = root.join("target/xtask");
        fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
        Ok(Self {
            root,
            cache: cache::folder(options.cache)?,
            distfiles: options.distfiles.map(existing).transpose()?,
            qemu_src: options.qemu_src.map(existing).transpose()?,
            in_place: options.in_place,
            jobs: std::thread::available_parallelism().map_or(2, usize::from),
            logs,
        })
    }

    /// A log file of this checkout.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// A folder for short-lived files of this checkout.
    pub(crate) fn scratch(&self) -> &Path {
        &self.logs
    }
}

/// Cargo says where the package is; without it, it is where it was built.
fn checkout() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    package.parent().map_or(package.clone(), Path::to_owned)
}

fn existing(folder: PathBuf) -> Result<PathBuf> {
    folder
        .canonicalize()
        .with_context(|| format!("cannot use the folder {}", folder.display()))
}
