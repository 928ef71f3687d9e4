// SPDX-License-Identifier: GPL-2.0-or-later
//! Finds packages in the Debian archive that this machine uses, through an apt
//! configuration of our own, so that the machine's stays as it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::process::{Job, Outcome, output};

/// Where source packages of the last years are listed.
const SUITES: [&str; 3] = ["trixie", "sid", "trixie-backports"];

/// Where binary packages are taken from.
const BINARY_SUITE: &str = "trixie";

/// By these an entry is known to name Debian's own archive.
const DEBIAN_SUITES: [&str; 9] = [
    "oldstable",
    "stable",
    "testing",
    "unstable",
    "sid",
    "bookworm",
    "trixie",
    "forky",
    "duke",
];

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Downloads one file as apt does: with its proxies, keys and mirrors.
const HELPER: &str = "/usr/lib/apt/apt-helper";

/// An entry of the machine's apt sources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Archive {
    uri: String,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: Option<String>,
}

impl Archive {
    fn is_debian(&self) -> bool {
        let names_suite = |suite: &String| DEBIAN_SUITES.contains(&suite.as_str());
        self.suites.iter().any(names_suite) && self.components.iter().any(|c| c == "main")
    }

    fn line(&self, kind: &str, suite: &str) -> String {
        let signed_by = self.signed_by.as_deref().unwrap_or(KEYRING);
        let option = match Path::new(signed_by).exists() {
            true => format!("[signed-by={signed_by}] "),
            false => String::new(),
        };
        format!("{kind} {option}{} {suite} main\n", self.uri)
    }
}

/// Reads the one-line format (`sources.list`).
fn parse_list(text: &str) -> Vec<Archive> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Archive> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let rest = line
        .strip_prefix("deb-src")
        .or_else(|| line.strip_prefix("deb"))?;
    let rest = rest.strip_prefix([' ', '\t'])?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace().map(str::to_owned);
    Some(Archive {
        uri: words.next()?,
        suites: vec![words.next()?],
        components: words.collect(),
        signed_by: options
            .split_whitespace()
            .find_map(|option| option.strip_prefix("signed-by=").map(str::to_owned)),
    })
}

/// Reads the deb822 format (`*.sources`).
fn parse_deb822(text: &str) -> Vec<Archive> {
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines
        .split(|line| line.trim().is_empty())
        .flat_map(parse_stanza)
        .collect()
}

fn parse_stanza(lines: &[&str]) -> Vec<Archive> {
    let field = |name: &str| -> Vec<String> {
        let mut words = Vec::new();
        let mut inside = false;
        for line in lines {
            let value = if line.starts_with([' ', '\t']) {
                inside.then_some(*line)
            } else {
                let (key, value) = line.split_once(':').unwrap_or_default();
                inside = key.eq_ignore_ascii_case(name);
                inside.then_some(value)
            };
            words.extend(
                value
                    .into_iter()
                    .flat_map(str::split_whitespace)
                    .map(str::to_owned),
            );
        }
        words
    };
    if field("Enabled")
        .iter()
        .any(|value| value.eq_ignore_ascii_case("no"))
    {
        return Vec::new();
    }
    // A key may also stand in the file itself; then it is not one path.
    let signed_by = field("Signed-By");
    let signed_by = match signed_by.as_slice() {
        [path] if path.starts_with('/') => Some(path.clone()),
        _ => None,
    };
    let archive = |uri| Archive {
        uri,
        suites: field("Suites"),
        components: field("Components"),
        signed_by: signed_by.clone(),
    };
    field("URIs").into_iter().map(archive).collect()
}

/// The Debian archive among the sources in a folder like `/etc/apt`.
fn find_archive(etc: &Path) -> Option<Archive> {
    let mut files = vec![etc.join("sources.list")];
    if let Ok(entries) = fs::read_dir(etc.join("sources.list.d")) {
        let mut more: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        more.sort();
        files.extend(more);
    }
    files.iter().find_map(|path| {
        let text = fs::read_to_string(path).ok()?;
        let archives = match path.extension()?.to_str()? {
            "list" => parse_list(&text),
            "sources" => parse_deb822(&text),
            _ => return None,
        };
        archives.into_iter().find(Archive::is_debian)
    })
}

/// A folder of the archive, from one line of `apt-get source --print-uris`:
/// `'URI' name size SHA256:hash`.
fn folder_of(printed: &str) -> Option<String> {
    printed.lines().find_map(|line| {
        let uri = line.strip_prefix('\'')?.split('\'').next()?;
        Some(uri[..=uri.rfind('/')?].to_owned())
    })
}

/// Packages as dpkg's status lists those that are installed, from what the archive says of them.
fn installed(shown: &str) -> String {
    const KEPT: [&str; 5] = [
        "Package",
        "Version",
        "Architecture",
        "Multi-Arch",
        "Provides",
    ];
    let mut status = String::new();
    for line in shown.lines() {
        let field = line.split(':').next().unwrap_or_default();
        if line.is_empty() || KEPT.contains(&field) {
            status.push_str(line);
            status.push('\n');
        }
        if field == "Package" {
            status.push_str(
                "Status: install ok installed\nMaintainer: nobody\nDescription: left out\n",
            );
        }
    }
    status
}

/// The files that `apt-get install --print-uris` would fetch: `'URI' name size SHA256:hash`.
fn files_of(printed: &str) -> Vec<String> {
    let lines = printed.lines().filter(|line| line.starts_with('\''));
    let names = lines.filter_map(|line| line.split_whitespace().nth(1));
    names.map(str::to_owned).collect()
}

/// Our own apt configuration.
#[derive(Debug)]
pub(crate) struct Apt {
    folder: PathBuf,
    /// How fetching the lists went. A suite that the archive lacks must not be
    /// in the way of the others: it matters only if a package is not found.
    updated: Option<Outcome>,
}

impl Apt {
    /// Writes the configuration into `cache` and fetches the lists.
    pub(crate) fn new(cache: &Path) -> Result<Self> {
        let Some(archive) = find_archive(Path::new("/etc/apt")) else {
            bail!("the apt sources of this machine (/etc/apt) name no Debian archive");
        };
        let apt = Self {
            folder: cache.join("apt"),
            updated: None,
        };
        for folder in ["lists/partial", "archives/partial"] {
            let folder = apt.folder.join(folder);
            fs::create_dir_all(&folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let mut lines = archive.line("deb", BINARY_SUITE);
        lines.extend(SUITES.map(|suite| archive.line("deb-src", suite)));
        fs::write(apt.folder.join("sources.list"), lines).context("cannot write apt sources")?;
        let mut update = apt.command("apt-get");
        update.args(["-o", "APT::Update::Error-Mode=any", "update"]);
        let updated = Job::new("apt-get update", update)
            .log(&apt.folder.join("update.log"))
            .outcome()?;
        Ok(Self {
            updated: Some(updated),
            ..apt
        })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let option =
            |name: &str, file: &str| format!("{name}={}", self.folder.join(file).display());
        for option in [
            option("Dir::Etc::sourcelist", "sources.list"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            option("Dir::State::lists", "lists"),
            option("Dir::Cache", ""),
            "Acquire::Languages=none".to_owned(),
            // Its unprivileged user cannot look into a home folder.
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command.env("LC_ALL", "C");
        command
    }

    /// The address of the folder that holds a source package's files.
    pub(crate) fn folder_of(&self, package: &str) -> Result<String> {
        let mut command = self.command("apt-get");
        command.args(["source", "--only-source", "--print-uris", "-qq", package]);
        let printed = output(command).unwrap_or_default();
        if let (None, Some(updated)) = (folder_of(&printed), &self.updated) {
            updated.check()?;
        }
        folder_of(&printed)
            .with_context(|| format!("the archive lists no source package named {package}"))
    }

    /// Puts packages into the empty folder `to`, with what they depend on but for what hangs on
    /// `left_out` alone. They stay in the cache too, and what is there is not fetched again.
    /// `arrived` is told how many there are, and of how many.
    pub(crate) fn packages(
        &self,
        wanted: &[String],
        left_out: &[String],
        to: &Path,
        mut arrived: impl FnMut(u64, u64),
    ) -> Result<()> {
        let kept = self.folder.join("archives");
        let install = |option: &str, archives: &Path| {
            let mut command = self.for_packages("apt-get");
            command
                .args(["install", "-qq", "-y", "--no-install-recommends", option])
                .arg("-o")
                .arg(format!("Dir::Cache::archives={}", archives.display()))
                .args(wanted);
            command
        };
        let listed = self
            .pretend_installed(left_out)
            // Into the empty folder: apt does not list what it has.
            .and_then(|()| output(install("--print-uris", to)));
        let names = listed.as_deref().map(files_of).unwrap_or_default();
        if let (true, Some(updated)) = (names.is_empty(), &self.updated) {
            updated.check()?;
        }
        listed.with_context(|| {
            let list = wanted.join(" ");
            format!("the archive cannot provide these packages of {BINARY_SUITE} together: {list}")
        })?;
        if names.is_empty() {
            bail!("apt finds nothing to fetch for {}", wanted.join(" "));
        }
        let total = names.len() as u64;
        std::thread::scope(|scope| {
            let download = install("--download-only", &kept);
            let fetch = scope.spawn(|| Job::new("fetching packages", download).run());
            while !fetch.is_finished() {
                std::thread::sleep(std::time::Duration::from_millis(100));
                let here = names.iter().filter(|name| kept.join(name).exists());
                arrived(here.count() as u64, total);
            }
            fetch
                .join()
                .unwrap_or_else(|_| bail!("fetching packages: the thread panicked"))
        })?;
        for name in &names {
            fs::hard_link(kept.join(name), to.join(name))
                .with_context(|| format!("apt was to fetch {name} into {}", kept.display()))?;
        }
        // Versions that the archive has no more.
        let mut clean = self.for_packages("apt-get");
        clean.args(["autoclean", "-qq"]);
        Job::new("apt-get autoclean", clean).run()
    }

    /// Describes a system on which nothing but these packages is installed, and without what they
    /// need. They have the archive's version, so that dependencies on exactly that are met, and are
    /// pinned, so that apt does not take the archive's in their place.
    fn pretend_installed(&self, names: &[String]) -> Result<()> {
        let write = |name: &str, text: &str| {
            let path = self.folder.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write("status", "")?;
        write("preferences", "")?;
        if names.is_empty() {
            return Ok(());
        }
        let mut show = self.for_packages("apt-cache");
        show.args(["show", "--no-all-versions"]).args(names);
        write("status", &installed(&output(show)?))?;
        let pins = "Pin: release a=now\nPin-Priority: 1001\n";
        write(
            "preferences",
            &format!("Package: {}\n{pins}", names.join(" ")),
        )
    }

    /// A command for a system of its own, whose status and pins are in our folder.
    fn for_packages(&self, program: &str) -> Command {
        let mut command = self.command(program);
        let folder = self.folder.display();
        for option in [
            format!("Dir::State={folder}"),
            format!("Dir::State::status={folder}/status"),
            format!("Dir::Etc::preferences={folder}/preferences"),
            "Dir::Etc::preferencesparts=/dev/null".to_owned(),
            "APT::Architecture=amd64".to_owned(),
            "APT::Architectures=amd64".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }

    /// Fetches `uri` into the file `to`; `arrived` is told how many bytes came.
    pub(crate) fn download(&self, uri: &str, to: &Path, arrived: impl Fn(u64)) -> Result<()> {
        let mut command = self.command(HELPER);
        command.arg("download-file").arg(uri).arg(to);
        let name = format!("fetching {uri}");
        std::thread::scope(|scope| {
            let download = scope.spawn(|| Job::new(name, command).run());
            while !download.is_finished() {
                std::thread::sleep(std::time::Duration::from_millis(100));
                arrived(fs::metadata(to).map_or(0, |meta| meta.len()));
            }
            download
                .join()
                .unwrap_or_else(|_| bail!("fetching {uri}: the thread panicked"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_sources() {
        let archives = parse_list(
            "# a comment\n\
             deb https://other.example/apt tool-bookworm main\n\
             deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian trixie main contrib # x\n\
             debian nonsense\n",
        );
        assert_eq!(archives.len(), 2);
        assert!(!archives[0].is_debian());
        assert!(archives[1].is_debian());
        assert_eq!(archives[1].uri, "http://mirror.example/debian");
        assert_eq!(archives[1].signed_by.as_deref(), Some("/k.gpg"));
    }

    #[test]
    fn deb822_sources() {
        let archives = parse_deb822(
            "Types: deb\nURIs: http://off.example/debian\nSuites: sid\nComponents: main\nEnabled: no\n\
             \n\
             Types: deb\n# comment\nuris: http://a.example/debian\n http://b.example/debian\n\
             Suites: bookworm bookworm-updates\nComponents: main\n\
             Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc\n\
             \n\
             Types: deb\nURIs: http://s.example/security\nSuites: bookworm-security\nComponents: main\n",
        );
        let uris: Vec<&str> = archives.iter().map(|a| a.uri.as_str()).collect();
        let all = [
            "http://a.example/debian",
            "http://b.example/debian",
            "http://s.example/security",
        ];
        assert_eq!(uris, all);
        assert!(archives[0].is_debian() && !archives[2].is_debian());
        assert_eq!(archives[0].signed_by, None);
    }

    #[test]
    fn the_archive_is_found_among_others() {
        let etc = tempfile::tempdir().expect("a temporary folder");
        let parts = etc.path().join("sources.list.d");
        fs::create_dir(&parts).expect("a folder");
        assert_eq!(find_archive(etc.path()), None);
        fs::write(parts.join("a.list"), "deb http://x.example/u noble main\n").expect("write");
        fs::write(
            parts.join("d.sources"),
            "Types: deb\nURIs: http://d.example/debian\nSuites: trixie\nComponents: main\n",
        )
        .expect("write");
        let archive = find_archive(etc.path()).expect("an archive");
        assert_eq!(archive.uri, "http://d.example/debian");
    }

    #[test]
    fn packages_left_out_seem_installed_and_need_nothing() {
        let shown = "Package: a\nVersion: 1:2-3\nDepends: b (= 1)\nArchitecture: amd64\n\n\
                     Package: c\nDescription: long\n text\nVersion: 4\n";
        let note = "Status: install ok installed\nMaintainer: nobody\nDescription: left out\n";
        assert_eq!(
            installed(shown),
            format!(
                "Package: a\n{note}Version: 1:2-3\nArchitecture: amd64\n\nPackage: c\n{note}Version: 4\n"
            )
        );
    }

    #[test]
    fn the_folder_of_a_listed_package() {
        let printed = "'http://d.example/debian/pool/main/q/qemu/qemu_11.1.3-1.dsc' qemu_11.1.3-1.dsc 9 SHA256:0\n";
        let folder = folder_of(printed);
        assert_eq!(
            folder.as_deref(),
            Some("http://d.example/debian/pool/main/q/qemu/")
        );
        assert_eq!(folder_of("E: nothing\n"), None);
    }

    #[test]
    fn the_files_that_are_to_be_fetched() {
        let printed = "'http://d.example/pool/a_1%3a2_amd64.deb' a_1%3a2_amd64.deb 9 SHA256:0\n\
                       W: a warning\n'http://d.example/pool/b_3_all.deb' b_3_all.deb 8 SHA256:1\n";
        assert_eq!(files_of(printed), ["a_1%3a2_amd64.deb", "b_3_all.deb"]);
    }
}
