// SPDX-License-Identifier: GPL-2.0-or-later
//! Which measurements there are.

use crate::level1::{RUNNER, quote, runner_paths};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Memory of a guest that converts.
const SIZE: u64 = 256 * MIB;

/// Sizes of guests that are started.
const START_SIZES: [u64; 4] = [GIB, 16 * GIB, 64 * GIB, 256 * GIB];

/// Who is measured, and how it is set up. `report.json` calls the second part the variant.
pub(crate) const SUBJECTS: [(&str, &str); 8] = [
    ("floor", ""),
    ("floor", "prefault"),
    ("upstream", ""),
    ("ours", "discard=now"),
    ("ours", "discard=coalesced"),
    ("ours", "discard=keep"),
    ("ours", "prefault=on"),
    ("ours", "lazy-attributes=off"),
];

/// What is compared with the baseline: the row that all ours are measured by.
pub(crate) const MAIN: (&str, &str) = ("ours", "discard=now");

/// One guest on one subject.
#[derive(Clone, Debug)]
pub(crate) struct Measurement {
    pub(crate) subject: &'static str,
    pub(crate) variant: &'static str,
    bench: &'static str,
    size: u64,
}

/// All of them.
pub(crate) fn all() -> Vec<Measurement> {
    let of = |bench, size| {
        SUBJECTS
            .into_iter()
            .map(move |(subject, variant)| Measurement {
                subject,
                variant,
                bench,
                size,
            })
    };
    // Prefaulting is for requests; lazy attributes, which are on otherwise, are for touches.
    let mut all: Vec<Measurement> = of("request", SIZE)
        .filter(|m| m.variant != "lazy-attributes=off")
        .collect();
    // Upstream's path sets the attribute at one address of a page only: a touch at the other does
    // not convert it.
    let by_fault = |m: &Measurement| m.subject != "upstream" && !m.variant.starts_with("prefault");
    all.extend(of("fault", SIZE).filter(by_fault));
    all.extend(of("twice", SIZE).filter(|m| m.variant != "lazy-attributes=off"));
    for size in START_SIZES {
        all.extend(of("start", size).filter(|m| matches!(m.variant, "" | "discard=now")));
    }
    all
}

/// What CI looks at.
pub(crate) fn check() -> Measurement {
    Measurement {
        subject: MAIN.0,
        variant: MAIN.1,
        bench: "check",
        size: SIZE,
    }
}

impl Measurement {
    /// For people and for `--list`.
    pub(crate) fn name(&self) -> String {
        let mut name = format!("{} {}", self.bench, self.subject);
        if !self.variant.is_empty() {
            name += &format!(" {}", self.variant);
        }
        if let Some(size) = self.suffix() {
            name += &format!(" {size}");
        }
        name
    }

    /// What the names of rows end in: the guest's size, where that makes the difference.
    pub(crate) fn suffix(&self) -> Option<String> {
        (self.bench == "start").then(|| format!("{}g", self.size / GIB))
    }

    /// Was it asked for?
    pub(crate) fn wanted(&self, only: &[String]) -> bool {
        let name = self.name();
        only.is_empty() || only.iter().any(|text| name.contains(text))
    }

    /// What level 1 is to do.
    pub(crate) fn script(&self) -> String {
        let mut words = vec![RUNNER.to_owned(), "bench".to_owned()];
        words.extend(runner_paths());
        words.extend(["--floor".to_owned(), "/run/lab/guestmemfd-floor".to_owned()]);
        words.extend(["--subject".to_owned(), self.subject.to_owned()]);
        words.extend(["--bench".to_owned(), self.bench.to_owned()]);
        words.extend(["--size".to_owned(), format!("{}M", self.size / MIB)]);
        if !self.variant.is_empty() {
            words.extend(["--with".to_owned(), self.variant.to_owned()]);
        }
        quote(words)
    }
}
