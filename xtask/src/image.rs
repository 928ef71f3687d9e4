// SPDX-License-Identifier: GPL-2.0-or-later
//! Level 1's initial file system, and the firmware that every QEMU here needs.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use cpio::newc::{Builder, ModeFileType, trailer};

use crate::cache::{self, Key};
use crate::context::Context;
use crate::packages::find_tool;
use crate::process::{Job, command, output};
use crate::progress::Step;
use crate::qemu::Qemu;

/// What SeaBIOS and QEMU's own loader need: where it may be found.
const FIRMWARE: [&str; 6] = [
    "bios-256k.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "multiboot_dma.bin",
    "pvh.bin",
    "vgabios-stdvga.bin",
];
pub(crate) const FIRMWARE_FOLDERS: [&str; 5] = [
    "/usr/share/seabios",
    "/usr/share/qemu",
    "/usr/share/seavgabios",
    "/usr/share/qemu/firmware",
    "/usr/local/share/qemu",
];

/// Folders and, with a target, symbolic links of the image.
const SKELETON: [(&str, Option<&str>); 15] = [
    ("bin", None),
    ("debian", None),
    ("dev", None),
    ("etc", None),
    ("host", None),
    ("lab", None),
    ("proc", None),
    ("run", None),
    ("sys", None),
    ("tmp", None),
    ("usr", None),
    ("usr/bin", None),
    ("sbin", Some("bin")),
    ("var", None),
    ("var/tmp", Some("/tmp")),
];

/// Where level 1 has QEMU and its firmware.
pub(crate) const PROGRAM: &str = "/usr/bin/qemu-system-x86_64";
const DAEMON: &str = "/usr/bin/qemu-storage-daemon";
pub(crate) const FIRMWARE_FOLDER: &str = "/usr/share/qemu";

/// Scripts of ours, and where they come from.
const SCRIPTS: [(&str, &str); 2] = [("/init", "lab/init"), ("/bin/in-debian", "lab/in-debian")];

/// How many images and firmware folders are kept.
const KEEP: usize = 3;

/// A folder with the firmware files, for QEMU's `-L`.
pub(crate) fn firmware(ctx: &Context) -> Result<PathBuf> {
    let mut files = Vec::new();
    let mut key = Key::default();
    for name in FIRMWARE {
        let file = find_firmware(ctx, name)?;
        key = key.add_identity(&file)?;
        files.push(file);
    }
    let folder = ctx.cache.join("firmware");
    fs::create_dir_all(&folder)?;
    let result = folder.join(key.finish());
    if !result.exists() {
        let copy = |partial: &Path| -> Result<()> {
            for (name, file) in FIRMWARE.iter().zip(&files) {
                fs::copy(file, partial.join(name))?;
            }
            Ok(())
        };
        cache::make_folder(&result, copy)?;
    }
    cache::touch(&result);
    cache::keep_newest(&folder, KEEP)?;
    Ok(result)
}

fn find_firmware(ctx: &Context, name: &str) -> Result<PathBuf> {
    let users = ctx.qemu_src.iter().map(|source| source.join("pc-bios"));
    let mut folders = users.chain(FIRMWARE_FOLDERS.iter().map(PathBuf::from));
    folders
        .find_map(|folder| Some(folder.join(name)).filter(|file| file.exists()))
        .with_context(|| {
            format!(
                "no firmware file {name} in {}: install SeaBIOS and QEMU's firmware (Debian: \
                 seabios, qemu-system-data)",
                FIRMWARE_FOLDERS.join(", ")
            )
        })
}

/// Makes the image with QEMU, and the libraries that it and `runner` load.
pub(crate) fn build(ctx: &Context, step: &Step, qemu: &Qemu, runner: &Path) -> Result<PathBuf> {
    step.say("looking for what goes into the image");
    let Some(busybox) = find_tool("busybox") else {
        bail!("no busybox in PATH (Debian: busybox-static)");
    };
    let scripts = SCRIPTS.map(|(name, from)| (name, ctx.root.join(from)));
    let firmware = firmware(ctx)?;
    let libraries = libraries(&[&busybox, &qemu.program, &qemu.daemon, runner])?;

    let mut key = Key::default().add("skeleton", format!("{SKELETON:?}"));
    for (_, script) in &scripts {
        key = key.add_file(script)?;
    }
    key = key
        .add_identity(&busybox)?
        .add_identity(&qemu.program)?
        .add_identity(&qemu.daemon)?;
    for file in FIRMWARE
        .iter()
        .map(|name| firmware.join(name))
        .chain(libraries.iter().cloned())
    {
        key = key.add_identity(&file)?;
    }
    let folder = ctx.cache.join("image");
    fs::create_dir_all(&folder)?;
    let result = folder.join(key.finish());
    if !result.exists() {
        let _lock = cache::lock(&ctx.cache, "image", step)?;
        step.say("writing");
        cache::make_folder(&result, |partial| {
            let mut image = Image::create(&partial.join("initramfs"))?;
            for (name, target) in SKELETON {
                image.entry(name, target)?;
            }
            for (name, script) in &scripts {
                image.file(name, script)?;
            }
            image.file("/bin/busybox", &busybox)?;
            for (name, program) in [(PROGRAM, &qemu.program), (DAEMON, &qemu.daemon)] {
                let stripped = partial.join("stripped");
                let mut strip = command("strip", ["--strip-debug", "-o"]);
                strip.arg(&stripped).arg(program);
                Job::new("stripping QEMU", strip).run()?;
                image.file(name, &stripped)?;
                cache::remove(&stripped)?;
            }
            for name in FIRMWARE {
                image.file(&format!("{FIRMWARE_FOLDER}/{name}"), &firmware.join(name))?;
            }
            for library in &libraries {
                image.file(&library.to_string_lossy(), library)?;
            }
            image.finish()
        })?;
    }
    cache::touch(&result);
    cache::keep_newest(&folder, KEEP)?;
    Ok(result.join("initramfs"))
}

/// The shared libraries of some programs, and the cache by which the dynamic
/// linker finds them.
fn libraries(programs: &[&Path]) -> Result<BTreeSet<PathBuf>> {
    let mut all = BTreeSet::new();
    for program in programs {
        // It fails for a static program.
        if let Ok(printed) = output(command("ldd", [program])) {
            all.extend(ldd_paths(&printed)?);
        }
    }
    let cache = PathBuf::from("/etc/ld.so.cache");
    all.extend(cache.exists().then_some(cache));
    Ok(all)
}

fn ldd_paths(printed: &str) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for line in printed.lines() {
        if line.contains("not found") {
            bail!("a shared library is missing: {}", line.trim());
        }
        let path = line.split("=>").last().unwrap_or_default().trim();
        let path = path.split(" (").next().unwrap_or_default();
        if path.starts_with('/') {
            paths.push(PathBuf::from(path));
        }
    }
    Ok(paths)
}

/// A cpio archive that is being written.
struct Image {
    output: Option<BufWriter<File>>,
    entries: u32,
    folders: BTreeSet<PathBuf>,
}

impl Image {
    fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
        let output = Some(BufWriter::new(file));
        Ok(Self {
            output,
            entries: 0,
            folders: BTreeSet::new(),
        })
    }

    /// A folder, or a symbolic link to `target`.
    fn entry(&mut self, name: &str, target: Option<&str>) -> Result<()> {
        let (kind, content) = match target {
            Some(target) => (ModeFileType::Symlink, target),
            None => (ModeFileType::Directory, ""),
        };
        if target.is_none() && !self.folders.insert(PathBuf::from(name)) {
            return Ok(());
        }
        self.write(name, kind, content.as_bytes())
    }

    /// A file, with the folders that lead to it.
    fn file(&mut self, name: &str, from: &Path) -> Result<()> {
        let name = name.trim_start_matches('/');
        let parents: Vec<&Path> = Path::new(name).ancestors().skip(1).collect();
        for parent in parents
            .iter()
            .rev()
            .filter(|parent| !parent.as_os_str().is_empty())
        {
            self.entry(&parent.to_string_lossy(), None)?;
        }
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.write(name, ModeFileType::Regular, &content)
    }

    fn write(&mut self, name: &str, kind: ModeFileType, content: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len())
            .with_context(|| format!("{name} is too large for the image"))?;
        let output = self
            .output
            .take()
            .context("the image was not written to the end")?;
        let mut entry = Builder::new(name)
            .ino(self.entries)
            .mode(0o755)
            .set_mode_file_type(kind)
            .write(output, size);
        entry.write_all(content)?;
        self.output = Some(entry.finish()?);
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        let output = self
            .output
            .take()
            .context("the image was not written to the end")?;
        trailer(output)?.flush()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_from_what_ldd_prints() {
        let printed = "\tlinux-vdso.so.1 (0x7f)\n\tlibc.so.6 => /lib/libc.so.6 (0x7e)\n\
                       \t/lib64/ld-linux-x86-64.so.2 (0x7d)\n";
        let paths = ldd_paths(printed).expect("all found");
        assert_eq!(
            paths,
            [
                Path::new("/lib/libc.so.6"),
                Path::new("/lib64/ld-linux-x86-64.so.2")
            ]
        );
        let error = ldd_paths("\tlibx.so => not found\n")
            .expect_err("missing")
            .to_string();
        assert!(error.contains("libx.so"), "{error}");
    }

    #[test]
    fn an_image_holds_its_files_and_their_folders_once() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("image");
        let from = dir.path().join("from");
        fs::write(&from, "content").expect("write");
        let mut image = Image::create(&path).expect("an image");
        image.file("/a/b/one", &from).expect("a file");
        image.file("/a/b/two", &from).expect("a file");
        image.entry("link", Some("a")).expect("a link");
        image.finish().expect("the end");

        let mut names = Vec::new();
        let mut file = File::open(&path).expect("an image");
        loop {
            let reader = cpio::newc::Reader::new(file).expect("an entry");
            if reader.entry().is_trailer() {
                break;
            }
            names.push(reader.entry().name().to_owned());
            file = reader.finish().expect("the next");
        }
        assert_eq!(names, ["a", "a/b", "a/b/one", "a/b/two", "link"]);
    }
}
