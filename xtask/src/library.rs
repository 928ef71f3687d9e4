// SPDX-License-Identifier: GPL-2.0-or-later
//! The library as `meson install` leaves it, for what is built with it here.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cache;
use crate::context::Context;
use crate::process::{Job, command, output};
use crate::progress::Step;
use crate::{meson, python};

/// An installed static library with its header and its pkg-config file. The shared one would have to
/// lie beside every program that is copied into the lab.
#[derive(Clone, Debug)]
pub(crate) struct Library {
    prefix: PathBuf,
}

/// The files of an installation, below its prefix.
const ARCHIVE: &str = "lib/libguestmemfd.a";
const HEADER: &str = "include/guestmemfd.h";
const PKG_CONFIG: &str = "lib/pkgconfig/guestmemfd.pc";

/// Builds and installs what has changed.
pub(crate) fn install(ctx: &Context, step: &Step) -> Result<Library> {
    let tools = python::environment(ctx, step, python::TOOLS)?;
    let build = meson::folder(ctx, "static");
    let prefix = meson::folder(ctx, "prefix");
    std::fs::create_dir_all(&prefix)?;
    let _lock = cache::lock(&prefix, "install", step)?;
    step.say("building the library");
    let options = [
        "--prefix=/",
        "--libdir=lib",
        "-Ddefault_library=static",
        // Its files are moved.
        "-Dpkgconfig.relocatable=true",
        &meson::cargo_target_dir(ctx),
    ];
    meson::configure(ctx, &tools, &build, &options.map(str::to_owned))?;
    let mut install = meson::command(&tools, &["install", "--only-changed", "-C"]);
    install.arg(&build).arg("--destdir").arg(&prefix);
    Job::new("meson install", install)
        .log(&ctx.log("library"))
        .run()?;
    Ok(Library { prefix })
}

impl Library {
    /// The static library.
    pub(crate) fn archive(&self) -> PathBuf {
        self.prefix.join(ARCHIVE)
    }

    /// Where pkg-config finds a copy of the library.
    pub(crate) fn pkg_config_folder(prefix: &Path) -> PathBuf {
        let file = prefix.join(PKG_CONFIG);
        file.parent().map_or(file.clone(), Path::to_owned)
    }

    /// What a compiler needs in order to build programs with it.
    pub(crate) fn flags(&self) -> Result<Vec<String>> {
        let mut ask = command("pkg-config", ["--cflags", "--libs", "guestmemfd"]);
        ask.env("PKG_CONFIG_PATH", Self::pkg_config_folder(&self.prefix));
        let printed = output(ask)?;
        Ok(printed.split_whitespace().map(str::to_owned).collect())
    }

    /// Copies it to another prefix. What has not changed is not written, so that nothing is linked or
    /// compiled again for it; that another checkout was copied there before does no harm.
    pub(crate) fn copy_to(&self, prefix: &Path) -> Result<()> {
        for name in [ARCHIVE, HEADER, PKG_CONFIG] {
            let (from, to) = (self.prefix.join(name), prefix.join(name));
            if let Some(folder) = to.parent() {
                std::fs::create_dir_all(folder)?;
            }
            cache::write_if_changed(&to, &cache::read(&from)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_copy_is_written_where_it_differs() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let library = Library {
            prefix: dir.path().join("from"),
        };
        for name in [ARCHIVE, HEADER, PKG_CONFIG] {
            let path = library.prefix.join(name);
            fs::create_dir_all(path.parent().expect("a folder")).expect("folders");
            fs::write(path, name).expect("write");
        }
        let to = dir.path().join("to");
        library.copy_to(&to).expect("a copy");
        let time = |name: &str| fs::metadata(to.join(name)).and_then(|meta| meta.modified());
        let before = time(ARCHIVE).expect("a time");
        fs::write(library.prefix.join(HEADER), "new").expect("write");
        library.copy_to(&to).expect("a copy");
        assert_eq!(time(ARCHIVE).expect("a time"), before);
        assert_eq!(fs::read_to_string(to.join(HEADER)).expect("text"), "new");
    }
}
