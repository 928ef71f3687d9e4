// SPDX-License-Identifier: GPL-2.0-or-later
//! Which measurements there are.

use anyhow::{Result, ensure};

use crate::level1::{RUNNER, quote, runner_paths};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Memory of a guest that converts.
const SIZE: u64 = 256 * MIB;
/// The same where it converts 1 GiB.
const LARGE_SIZE: u64 = 1280 * MIB;

/// The same of one of which 64 GiB lie above 4 GiB: 2 GiB are below.
const VAST_SIZE: u64 = 66 * GIB;

/// Sizes of guests that are started.
const START_SIZES: [u64; 4] = [GIB, 16 * GIB, 64 * GIB, 256 * GIB];

/// Who is measured, and how it is set up. `report.json` calls the second part the variant.
pub(crate) const SUBJECTS: [(&str, &str); 14] = [
    ("floor", ""),
    ("floor", "prefault"),
    (IN_PLACE, ""),
    (IN_PLACE, "prefault"),
    ("upstream", ""),
    ("ours", "discard=now"),
    ("ours", "discard=keep"),
    ("ours", "prefault=on"),
    ("ours", "lazy-attributes=off"),
    OURS_IN_PLACE,
    ("ours", "mode=in-place,prefault=on"),
    ("ours", "mode=mapped"),
    ("ours", "mode=mapped,bind=on"),
    ("ours", LIBRARY),
];

/// The subject whose memory is converted in place.
pub(super) const IN_PLACE: &str = "floor-in-place";

/// The same in QEMU.
pub(super) const OURS_IN_PLACE: (&str, &str) = ("ours", "mode=in-place");

/// The variant that is the library alone, without QEMU and without a guest.
const LIBRARY: &str = "library";

/// How long a request holds others up in the library alone, and how much memory it takes.
const BOUNDS: &str = "bounds";

/// What pins take in the library, in instructions.
const PINS: &str = "pins";

/// Single pages in order, over 1 GiB.
const SEQUENTIAL: &str = "sequential";

/// One request for much memory that nobody has touched.
const VAST: &str = "vast";

/// A page that somebody holds, without a guest.
const HELD: &str = "held";

/// Memory that starts private, without a guest.
const PRIVATE: &str = "private";

/// Several vCPUs at once.
const SCALE: &str = "scale";

/// With two files, what all ours are measured by.
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
    // The longest first, so that the others run beside it.
    let mut all: Vec<_> = of(SEQUENTIAL, LARGE_SIZE).collect();
    all.extend(of(VAST, VAST_SIZE));
    for bench in [
        "request",
        "fault",
        "twice",
        "prealloc",
        "touch",
        "disk",
        "ordinary-disk",
    ] {
        all.extend(of(bench, SIZE));
    }
    for size in START_SIZES {
        all.extend(of("start", size));
    }
    all.extend(of(HELD, SIZE));
    all.extend(of(PRIVATE, SIZE));
    all.extend(of(LIBRARY, SIZE));
    all.extend(of(BOUNDS, SIZE));
    all.extend(of(PINS, SIZE));
    all.extend(of(SCALE, SIZE));
    all.retain(Measurement::makes_sense);
    all
}

/// What can be timed on a machine's own KVM.
pub(crate) fn native(private_memory: bool) -> Vec<Measurement> {
    let benches: &[_] = match private_memory {
        true => &["prealloc", "touch", "request"],
        // A KVM without svm and vmx may emulate every instruction of a guest.
        false => &["prealloc"],
    };
    let all = benches.iter().flat_map(|bench| of(bench, SIZE));
    all.filter(|one| one.makes_sense() && !one.in_place())
        .collect()
}

/// Those whose name contains one of the texts; all if there are none.
pub(crate) fn chosen(of: Vec<Measurement>, only: &[String]) -> Result<Vec<Measurement>> {
    for text in only {
        ensure!(
            of.iter()
                .any(|measurement| measurement.name().contains(text)),
            "no measurement has {text:?} in its name; cargo xtask bench --list names all"
        );
    }
    let wanted = |measurement: &Measurement| {
        let name = measurement.name();
        only.is_empty() || only.iter().any(|text| name.contains(text))
    };
    Ok(of.into_iter().filter(wanted).collect())
}

fn of(bench: &'static str, size: u64) -> impl Iterator<Item = Measurement> {
    let subjects = SUBJECTS.into_iter();
    subjects.map(move |(subject, variant)| Measurement {
        subject,
        variant,
        bench,
        size,
    })
}

/// Does this subject convert in place?
pub(super) fn is_in_place((subject, variant): (&str, &str)) -> bool {
    subject == IN_PLACE || variant.starts_with(OURS_IN_PLACE.1)
}

/// What CI looks at: with two files, and in place.
pub(crate) fn checks() -> [Measurement; 2] {
    [MAIN, OURS_IN_PLACE].map(|(subject, variant)| Measurement {
        subject,
        variant,
        bench: "check",
        size: SIZE,
    })
}

/// The one with two files.
#[cfg(test)]
pub(super) fn check() -> Measurement {
    let [two_files, _] = checks();
    two_files
}

impl Measurement {
    fn makes_sense(&self) -> bool {
        match (self.bench, self.subject, self.variant) {
            (LIBRARY | BOUNDS | PINS, _, variant) => variant == LIBRARY,
            (_, _, LIBRARY) => false,
            // One measurement takes all subjects in turn.
            (SCALE, subject, variant) => (subject, variant) == MAIN,
            // Ordinary VMs.
            _ if self.ordinary() => {
                self.subject == "upstream" || self.variant.starts_with("mode=mapped")
            }
            (_, _, variant) if variant.starts_with("mode=mapped") => false,
            // The floor has no devices.
            ("disk", subject, variant) => subject == "upstream" || (subject, variant) == MAIN,
            // Only there does a page that somebody holds stay as it is.
            (HELD, subject, variant) => {
                subject == IN_PLACE && variant.is_empty() || (subject, variant) == OURS_IN_PLACE
            }
            (PRIVATE, subject, variant) => [MAIN, OURS_IN_PLACE].contains(&(subject, variant)),
            // Upstream's path would allocate all of it.
            (VAST, "upstream", _) => false,
            ("start" | SEQUENTIAL | VAST, _, variant) => {
                matches!(variant, "" | "discard=now" | "mode=in-place")
            }
            // Upstream's path sets the attribute at one address of a page only: a touch at the other
            // does not convert it.
            ("fault", "upstream", _) => false,
            // Prefaulting is for requests; lazy attributes, which are on otherwise, are for touches.
            ("fault", _, variant) => !variant.contains("prefault"),
            (_, _, variant) => variant != "lazy-attributes=off",
        }
    }

    /// Is it measured in VMs without private memory?
    pub(crate) fn ordinary(&self) -> bool {
        matches!(self.bench, "prealloc" | "touch" | "ordinary-disk")
    }

    /// Does it need a kernel that converts in place?
    pub(crate) fn in_place(&self) -> bool {
        is_in_place((self.subject, self.variant))
    }

    /// Is it what CI looks at?
    pub(crate) fn is_compared(&self) -> bool {
        self.bench == "check"
    }

    /// Is it measured in time, several subjects in turn?
    pub(crate) fn scale(&self) -> bool {
        self.bench == SCALE
    }

    /// The same on another subject.
    pub(crate) fn with(&self, (subject, variant): (&'static str, &'static str)) -> Self {
        Self {
            subject,
            variant,
            ..self.clone()
        }
    }

    /// For people and for `--list`.
    pub(crate) fn name(&self) -> String {
        if self.library() || self.scale() {
            return self.bench.to_owned();
        }
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

    /// Is it the library alone that is measured, on this machine?
    pub(crate) fn library(&self) -> bool {
        self.variant == LIBRARY
    }

    /// The program under `benches/` that measures the library.
    pub(crate) fn bench(&self) -> &'static str {
        self.bench
    }

    /// Is it what pins take there? That is counted.
    pub(crate) fn pins(&self) -> bool {
        self.bench == PINS
    }

    /// What level 1 is to do.
    pub(crate) fn script(&self) -> String {
        quote(self.words())
    }

    pub(crate) fn words(&self) -> Vec<String> {
        let mut words = vec![RUNNER.to_owned(), "bench".to_owned()];
        words.extend(runner_paths());
        words.extend(["--floor".to_owned(), "/run/lab/guestmemfd-floor".to_owned()]);
        words.extend(self.subject_words());
        words
    }

    /// Who is measured, and what.
    pub(crate) fn subject_words(&self) -> Vec<String> {
        let mut words = vec!["--subject".to_owned(), self.subject.to_owned()];
        words.extend(["--bench".to_owned(), self.bench.to_owned()]);
        words.extend(["--size".to_owned(), format!("{}M", self.size / MIB)]);
        if !self.variant.is_empty() {
            words.extend(["--with".to_owned(), self.variant.to_owned()]);
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(only: &[&str]) -> Result<Vec<String>> {
        let only: Vec<String> = only.iter().map(|text| (*text).to_owned()).collect();
        let chosen = chosen(all(), &only)?;
        Ok(chosen.iter().map(Measurement::name).collect())
    }

    #[test]
    fn every_measurement_has_a_name_of_its_own() {
        let mut names = names(&[]).expect("all");
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn a_text_chooses_what_contains_it() {
        let names = names(&["start upstream", "scale"]).expect("some");
        assert_eq!(names.len(), START_SIZES.len() + 1, "{names:?}");
    }

    #[test]
    fn a_text_that_chooses_nothing_is_an_error() {
        let error = names(&["request", "nonsense"]).expect_err("an error");
        assert!(error.to_string().contains("\"nonsense\""), "{error}");
    }
}
