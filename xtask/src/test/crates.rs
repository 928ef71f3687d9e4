// SPDX-License-Identifier: GPL-2.0-or-later
//! The crates of others: under which licences they come, from where, and whether they have flaws that
//! are known. `deny.toml` has the rules.

use std::fs;

use anyhow::{Context as _, Result};
use serde::Deserialize;
use spdx::{Expression, ParseMode};

use crate::cargo::cargo;
use crate::process::{Job, output};
use crate::progress::Step;

use super::report::Tally;
use super::steps::{Bench, TEST_LIMIT};

const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// What we need of `deny.toml`.
#[derive(Debug, Deserialize)]
struct Rules {
    licenses: Licences,
}

#[derive(Debug, Deserialize)]
struct Licences {
    allow: Vec<String>,
    #[serde(default)]
    exceptions: Vec<Exception>,
}

#[derive(Debug, Deserialize)]
struct Exception {
    name: String,
    allow: Vec<String>,
}

/// What we need of cargo's metadata.
#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
    /// None for packages of this repository.
    source: Option<String>,
}

impl Licences {
    /// What is wrong with a package, if anything is.
    fn complaint(&self, package: &Package) -> Option<String> {
        let Package { name, version, .. } = package;
        let source = package.source.as_deref()?;
        if source != CRATES_IO {
            return Some(format!("{name} {version} comes from {source}"));
        }
        let licence = package.license.as_deref().unwrap_or("no licence");
        let exceptions = self.exceptions.iter().filter(|e| e.name == *name);
        let allowed: Vec<_> = exceptions
            .flat_map(|e| &e.allow)
            .chain(&self.allow)
            .collect();
        let terms = Expression::parse_mode(licence, ParseMode::LAX);
        let is_allowed = terms.is_ok_and(|terms| {
            terms.evaluate(|asked| allowed.iter().any(|name| **name == asked.to_string()))
        });
        (!is_allowed).then(|| format!("{name} {version} comes under {licence}"))
    }
}

/// Licences and sources of all that `Cargo.lock` names.
pub(super) fn crates(bench: &Bench, step: &Step) -> Result<Tally> {
    let path = bench.ctx.root.join("deny.toml");
    let rules = fs::read_to_string(&path).context("cannot read deny.toml")?;
    let rules: Rules = toml::from_str(&rules).context("cannot parse deny.toml")?;
    let mut metadata = cargo(bench.ctx);
    metadata.args([
        "metadata",
        "--format-version=1",
        "--locked",
        "--all-features",
    ]);
    let metadata: Metadata = serde_json::from_str(&output(metadata)?)?;
    let packages = &metadata.packages;
    let complaints = packages.iter().filter_map(|p| rules.licenses.complaint(p));
    let mut tally = match complaints.map(Tally::fail).reduce(Tally::and) {
        None => Tally::pass(""),
        Some(failed) => failed,
    };
    tally.add(cargo_deny(bench, step)?);
    Ok(tally)
}

/// What is published about their flaws. Cargo-deny is too much to be built for that.
fn cargo_deny(bench: &Bench, step: &Step) -> Result<Tally> {
    let mut version = cargo(bench.ctx);
    version.args(["deny", "--version"]);
    if output(version).is_err() {
        let why = "known flaws: cargo-deny is not installed (cargo install --locked cargo-deny)";
        return Ok(Tally::skip(why));
    }
    step.say("asking cargo-deny");
    let mut check = cargo(bench.ctx);
    check.args(["deny", "check"]);
    let job = Job::new("cargo deny", check).log(&bench.ctx.log("deny"));
    let outcome = job.limit(TEST_LIMIT).outcome()?;
    Ok(match outcome.check() {
        Ok(()) => Tally::pass(""),
        Err(error) => {
            step.note(error);
            Tally::fail("cargo deny")
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_allowed_is_named() {
        let exception = Exception {
            name: "tool".into(),
            allow: vec!["MPL-2.0".into()],
        };
        let licences = Licences {
            allow: vec!["MIT".into(), "Unicode-3.0".into()],
            exceptions: vec![exception],
        };
        let complaint = |name: &str, licence: Option<&str>, source: Option<&str>| {
            licences.complaint(&Package {
                name: name.into(),
                version: "1.0.0".into(),
                license: licence.map(str::to_owned),
                source: source.map(str::to_owned),
            })
        };
        let from_crates_io = |name, licence| complaint(name, licence, Some(CRATES_IO));
        for licence in [
            "MIT",
            "MIT/Apache-2.0",
            "(GPL-2.0-only OR MIT) AND Unicode-3.0",
        ] {
            assert_eq!(from_crates_io("a", Some(licence)), None, "{licence}");
        }
        assert_eq!(from_crates_io("tool", Some("MPL-2.0")), None);
        assert_eq!(complaint("ours", Some("GPL-2.0-or-later"), None), None);
        let bad = from_crates_io("a", Some("MIT AND MPL-2.0")).unwrap();
        assert_eq!(bad, "a 1.0.0 comes under MIT AND MPL-2.0");
        assert!(from_crates_io("a", None).unwrap().ends_with("no licence"));
        assert!(complaint("a", Some("MIT"), Some("git+https://x")).is_some());
    }
}
