// SPDX-License-Identifier: GPL-2.0-or-later
//! File systems with programs from Debian: the packages that a list of ours names, with what they
//! depend on, unpacked into an ext4 image. No script of a package runs, so that this takes no
//! privileges; what programs need of what those scripts do is done here.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::apt::Apt;
use crate::cache::{self, Key};
use crate::context::Context;
use crate::process::{Job, command};
use crate::progress::Step;

/// A userland.
#[derive(Debug)]
pub(crate) struct Userland {
    /// Its list is `lab/NAME.txt`, its disk's serial number is the name.
    name: &'static str,
    /// Bytes of the file system, most of which are a hole.
    size: u64,
    /// Files of the checkout and where the image has them.
    files: &'static [(&'static str, &'static str)],
}

/// For programs in level 1.
pub(crate) const DEBIAN: Userland = Userland {
    name: "debian",
    size: 2 << 30,
    files: &[],
};

/// The root file system of the Linux guest.
pub(crate) const GUEST: Userland = Userland {
    name: "guest",
    size: 512 << 20,
    files: &[("lab/guest-init", "usr/sbin/lab-init")],
};

/// The program of level 1 that runs a command in it.
pub(crate) const ENTER: &str = "in-debian";

/// A number to be raised when this file makes other images of the same lists.
const FORMAT: &str = "4";

/// How many images of a list are kept.
const KEEP: usize = 2;

/// Folders of every image, beyond those of the packages.
const FOLDERS: [&str; 15] = [
    "usr",
    "usr/bin",
    "usr/sbin",
    "usr/lib",
    "usr/lib64",
    "dev",
    "etc",
    "host",
    "lab",
    "level1",
    "proc",
    "root",
    "run",
    "sys",
    "var",
];

/// A folder of programs, and the file with their SHA256 by which the guest knows them.
const SUMMED: &str = "usr/bin";
const SUMS: &str = "lab/sums";

/// Symbolic links, made before anything is unpacked.
const LINKS: [(&str, &str); 4] = [
    ("bin", "usr/bin"),
    ("sbin", "usr/sbin"),
    ("lib", "usr/lib"),
    ("lib64", "usr/lib64"),
];

/// Symbolic links in place of folders of packages.
const REPLACED: [(&str, &str); 2] = [("var/run", "/run"), ("var/lock", "/run/lock")];

/// What nobody reads here, and takes half of the space.
const DROPPED: [&str; 8] = [
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/bash-completion",
    "usr/share/lintian",
    "usr/share/i18n",
    "usr/lib/x86_64-linux-gnu/gconv",
];

/// Users and groups that packages would add: libvirtd does not start without the user for QEMU.
const USERS: &str = "libvirt-qemu:x:64055:992::/var/lib/libvirt:/usr/sbin/nologin\n";
const GROUPS: &str = "kvm:x:992:\nlibvirt:x:991:\nlibvirt-qemu:x:64055:\n";

/// A list of packages.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct List {
    wanted: Vec<String>,
    /// What others depend on but is of no use here.
    left_out: Vec<String>,
}

/// One package a line, `-` before those to leave out; `#` begins a comment.
fn parse(text: &str) -> Result<List> {
    let mut list = List::default();
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let (name, names) = match line.strip_prefix('-') {
            Some(name) => (name.trim(), &mut list.left_out),
            None => (line, &mut list.wanted),
        };
        let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c);
        if !name.chars().all(good) || name.starts_with(['-', '+', '.']) {
            bail!("line {}: {name:?} is no name of one package", number + 1);
        }
        names.extend((!name.is_empty()).then(|| name.to_owned()));
    }
    Ok(list)
}

impl List {
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text =
            fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        parse(&text).with_context(|| path.display().to_string())
    }

    pub(crate) fn add_to(&self, key: Key) -> Key {
        key.add("wanted", self.wanted.join(" "))
            .add("left out", self.left_out.join(" "))
    }
}

impl Userland {
    /// The image as a disk of a task.
    pub(crate) fn disk(&self, ctx: &Context, step: &Step) -> Result<(&'static str, PathBuf)> {
        Ok((self.name, self.image(ctx, step)?))
    }

    /// Makes the image unless there is one of the same list. Its packages stay those that the
    /// archive had then: to ask for newer ones takes a network, and each run would have to.
    fn image(&self, ctx: &Context, step: &Step) -> Result<PathBuf> {
        let path = ctx.root.join("lab").join(format!("{}.txt", self.name));
        let list = List::read(&path)?;
        let key = Key::default()
            .add("format", FORMAT)
            .add("size", self.size.to_le_bytes());
        let mut key = list.add_to(key);
        for (from, _) in self.files {
            key = key.add_file(&ctx.root.join(from))?;
        }
        let folder = ctx.cache.join(self.name);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let result = folder.join(key.finish());
        if result.exists() {
            cache::touch(&result);
            return Ok(result.join("image"));
        }
        let _lock = cache::lock(&ctx.cache, self.name, step)?;
        if !result.exists() {
            cache::remove_partial(&folder)?;
            cache::make_folder(&result, |partial| self.make(ctx, step, &list, partial))
                .with_context(|| format!("cannot make the image of {}", path.display()))?;
        }
        cache::touch(&result);
        cache::keep_newest(&folder, KEEP)?;
        Ok(result.join("image"))
    }

    fn make(&self, ctx: &Context, step: &Step, list: &List, result: &Path) -> Result<()> {
        let (packages, root) = (result.join("packages"), result.join("root"));
        fetch(ctx, step, list, &packages)?;
        make_skeleton(&root)?;
        unpack(step, &packages, &root, &result.join("versions"))?;
        step.say("completing the file system");
        finish(&root)?;
        compile_python(&root)?;
        for (from, name) in self.files {
            fs::copy(ctx.root.join(from), root.join(name))
                .with_context(|| format!("cannot copy {from}"))?;
            set_mode(&root.join(name), 0o755)?;
        }
        write_file(&root.join(SUMS), &sums(&root.join(SUMMED))?)?;
        let mut ldconfig = system_command("ldconfig");
        ldconfig.arg("-r").arg(&root);
        Job::new("ldconfig", ldconfig).run()?;

        step.say("writing the file system");
        let image = result.join("image");
        let context = || format!("cannot write {}", image.display());
        let file = fs::File::create(&image).with_context(context)?;
        file.set_len(self.size).with_context(context)?;
        let mut mkfs = system_command("mkfs.ext4");
        // No journal, as the image is never repaired, and nothing to initialise later on: that
        // would keep the kernel busy in every run.
        mkfs.args(["-q", "-F", "-O", "^has_journal", "-m", "0"])
            .args(["-E", "root_owner=0:0,lazy_itable_init=0,nodiscard"])
            .args(["-N", "32768", "-L", self.name, "-d"])
            .arg(&root)
            .arg(&image);
        Job::new("mkfs.ext4", mkfs)
            .log(&ctx.log(&format!("{}-mkfs", self.name)))
            .run()?;
        // Before its name says that it is complete.
        file.sync_all().with_context(context)?;
        cache::remove(&root)?;
        cache::remove(&packages)
    }
}

/// Makes a folder, for everybody to read whatever the umask.
fn make_dir(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
    set_mode(path, 0o755)
}

/// Writes a file, for everybody to read whatever the umask.
fn write_file(path: &Path, content: &str) -> Result<()> {
    fs::write(path, content).with_context(|| format!("cannot write {}", path.display()))?;
    set_mode(path, 0o644)
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot change the mode of {}", path.display()))
}

fn link(target: &str, path: &Path) -> Result<()> {
    symlink(target, path).with_context(|| format!("cannot make the link {}", path.display()))
}

/// Programs for administrators are not in everybody's `PATH`.
fn system_command(program: &str) -> Command {
    let folders = ["/usr/sbin", "/sbin"].map(|folder| Path::new(folder).join(program));
    let found = folders.into_iter().find(|path| path.exists());
    command::<&str>(found.unwrap_or_else(|| program.into()), [])
}

/// Fetches the packages of a list, with what they depend on, into a folder.
pub(crate) fn fetch(ctx: &Context, step: &Step, list: &List, to: &Path) -> Result<()> {
    make_dir(&to.join("partial"))?;
    // Our apt configuration is used by one run at a time.
    let _lock = cache::lock(&ctx.cache, "downloads", step)?;
    step.say("looking for packages in the Debian archive");
    let apt = Apt::new(&ctx.cache)?;
    step.say("fetching packages");
    apt.packages(&list.wanted, &list.left_out, to, |done, total| {
        step.amount(done, total);
    })
}

/// The folders and links that packages expect.
pub(crate) fn make_skeleton(root: &Path) -> Result<()> {
    make_dir(root)?;
    for folder in FOLDERS {
        make_dir(&root.join(folder))?;
    }
    for (name, target) in LINKS {
        link(target, &root.join(name))?;
    }
    Ok(())
}

/// Unpacks all packages of a folder, and lists them in the file `versions`.
pub(crate) fn unpack(step: &Step, packages: &Path, root: &Path, versions: &Path) -> Result<()> {
    step.say("unpacking");
    let mut files = Vec::new();
    for entry in entries(packages)? {
        let path = entry?.path();
        files.extend(path.extension().is_some_and(|e| e == "deb").then_some(path));
    }
    files.sort();
    let names: Vec<String> = files.iter().map(|path| cache::file_name(path)).collect();
    write_file(versions, &(names.join("\n") + "\n"))?;
    for (index, (file, name)) in files.iter().zip(&names).enumerate() {
        let mut dpkg = command("dpkg-deb", ["-x"]);
        dpkg.arg(file).arg(root);
        Job::new(format!("unpacking {name}"), dpkg).run()?;
        step.amount(index as u64 + 1, files.len() as u64);
    }
    Ok(())
}

/// Python's module compileall as a program, whatever the umask.
const COMPILE: &str =
    "import compileall, os, sys; os.umask(0o022); sys.exit(not compileall.main())";

/// Compiles Python's library by the image's own Python, with the image's own libraries: level 1 would
/// take ten times as long, in every run.
fn compile_python(root: &Path) -> Result<()> {
    let interpreter = root.join("usr/bin/python3");
    if !interpreter.exists() {
        return Ok(());
    }
    let mut compile = command::<&str>(root.join("lib64/ld-linux-x86-64.so.2"), []);
    compile
        .arg("--library-path")
        .arg(root.join("usr/lib/x86_64-linux-gnu"))
        .arg(interpreter)
        .args(["-c", COMPILE, "-q", "-p", "/", "-s"])
        .args([root, root.join("usr/lib").as_path()])
        .env("PYTHONHOME", root.join("usr"));
    Job::new("compiling Python's library", compile).run()
}

/// What the packages' scripts would do, as far as it is needed.
fn finish(root: &Path) -> Result<()> {
    for name in DROPPED {
        cache::remove(&root.join(name))?;
    }
    for (name, target) in REPLACED {
        cache::remove(&root.join(name))?;
        link(target, &root.join(name))?;
    }
    let text = |path: &str| {
        fs::read_to_string(root.join(path)).with_context(|| format!("no {path} in the image"))
    };
    let passwd = text("usr/share/base-passwd/passwd.master")?;
    // Root has no password.
    let passwd = passwd.replace("root:*:", "root::");
    let group = text("usr/share/base-passwd/group.master")?;
    for (path, content) in [
        ("etc/passwd", passwd + USERS),
        ("etc/group", group + GROUPS),
        ("etc/hosts", "127.0.0.1 localhost\n".to_owned()),
        ("etc/hostname", "lab\n".to_owned()),
    ] {
        write_file(&root.join(path), &content)?;
    }
    for (path, mode) in [("tmp", 0o1777), ("var/tmp", 0o1777), ("root", 0o700)] {
        let path = root.join(path);
        make_dir(&path)?;
        set_mode(&path, mode)?;
    }
    Ok(())
}

fn entries(folder: &Path) -> Result<fs::ReadDir> {
    fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))
}

/// The files of a folder as `sha256sum` prints them, in the order of their names.
fn sums(folder: &Path) -> Result<String> {
    let mut lines = Vec::new();
    for entry in entries(folder)? {
        let path = entry?.path();
        if path.is_file() && !path.is_symlink() {
            let name = cache::file_name(&path);
            lines.push(format!("{}  {name}\n", cache::sha256(&path)?));
        }
    }
    lines.sort_by(|a, b| a[64..].cmp(&b[64..]));
    Ok(lines.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_comments_and_packages_to_leave_out() {
        let list = parse("# why\n\nbash # a shell\n  libstdc++6\n-mesa-libgallium\n- x # y\n");
        let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect();
        let expected = List {
            wanted: words(&["bash", "libstdc++6"]),
            left_out: words(&["mesa-libgallium", "x"]),
        };
        assert_eq!(list.expect("a list"), expected);
    }

    #[test]
    fn a_line_that_names_no_package_is_refused() {
        for bad in ["bash tar", "Bash", "a=1", "--option"] {
            let error = parse(&format!("# first\n{bad}\n")).expect_err(bad);
            assert!(error.to_string().contains("line 2"), "{error}");
        }
    }

    #[test]
    fn the_lists_of_the_checkout_can_be_read() {
        let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lab");
        for userland in [DEBIAN, GUEST] {
            let text = fs::read_to_string(lab.join(format!("{}.txt", userland.name)));
            let list = parse(&text.expect("a file")).expect("a list");
            assert!(list.wanted.iter().any(|name| name == "base-passwd"));
        }
    }

    #[test]
    fn sums_are_those_of_files_and_not_of_links() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        fs::write(dir.path().join("b"), "abc").expect("write");
        fs::write(dir.path().join("a"), "abc").expect("write");
        symlink("a", dir.path().join("c")).expect("a link");
        let sum = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(
            sums(dir.path()).expect("sums"),
            format!("{sum}  a\n{sum}  b\n")
        );
    }

    #[test]
    fn an_image_is_completed_without_the_packages_scripts() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let root = dir.path();
        make_skeleton(root).expect("folders and links");
        assert!(root.join("bin").is_dir() && root.join("bin").is_symlink());
        let error = finish(root)
            .expect_err("base-passwd is missing")
            .to_string();
        assert!(error.contains("passwd.master"), "{error}");
        let master = root.join("usr/share/base-passwd");
        fs::create_dir_all(&master).expect("a folder");
        fs::create_dir_all(root.join("usr/share/doc/bash")).expect("a folder");
        fs::write(
            master.join("passwd.master"),
            "root:*:0:0::/root:/bin/bash\n",
        )
        .expect("write");
        fs::write(master.join("group.master"), "root:*:0:\n").expect("write");
        finish(root).expect("complete");
        let passwd = fs::read_to_string(root.join("etc/passwd")).expect("users");
        assert!(passwd.starts_with("root::0:0") && passwd.contains("\nlibvirt-qemu:"));
        assert!(!root.join("usr/share/doc").exists());
    }
}
