// SPDX-License-Identifier: GPL-2.0-or-later
//! The command line: words of the form `key=value`.

pub use crate::measure::Bench;
use core::fmt;
use core::num::ParseIntError;

/// What the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scenario {
    /// Starts every CPU, and ends.
    Idle,
    /// Conversions by hypercall.
    Hypercall,
    /// Conversions by touching memory.
    Fault,
    /// Requests that must be refused.
    Bad,
    /// Random ranges, each CPU's across its neighbours'.
    Storm,
    /// Random numbers in every register of the hypercall, and random touches.
    Hostile,
    /// The same pages back and forth.
    Flip,
    /// What a guest before this one has left.
    Reset,
    /// Few touches of much memory.
    Large,
    /// Shared and private touches side by side, of memory that nobody has decided.
    Race,
    /// Much memory converted and never touched, also while the host has none.
    Sweep,
    /// Writes to memory until the host says stop.
    Dirty,
    /// Gives pages back by virtio-balloon.
    Balloon,
    /// Reports free pages by virtio-balloon.
    Reporting,
    /// Uses a virtio-blk disk.
    Disk,
    /// Gives devices private memory.
    Device,
    /// Gives KVM's clock private memory.
    Clock,
    /// Gives a disk in another process private memory.
    Vhost,
    /// Uses an edu device, which goes its own way to memory if VFIO has handed it to the guest.
    Dma,
    /// Has its page tables in private memory.
    Tables,
    /// Takes away what devices keep mapped as long as they run.
    Kept,
    /// Interrupts while a request waits.
    Waiting,
}

impl Scenario {
    /// All of them, in the order in which they run.
    pub const ALL: [Self; 22] = [
        Self::Idle,
        Self::Hypercall,
        Self::Fault,
        Self::Bad,
        Self::Storm,
        Self::Hostile,
        Self::Flip,
        Self::Reset,
        Self::Large,
        Self::Race,
        Self::Sweep,
        Self::Dirty,
        Self::Balloon,
        Self::Reporting,
        Self::Disk,
        Self::Device,
        Self::Clock,
        Self::Vhost,
        Self::Dma,
        Self::Tables,
        Self::Kept,
        Self::Waiting,
    ];

    /// Does it have to convert memory? If not, ordinary guests can run it.
    #[must_use]
    pub fn converts(self) -> bool {
        !matches!(
            self,
            Self::Idle | Self::Dirty | Self::Balloon | Self::Reporting | Self::Disk | Self::Dma
        )
    }

    /// Is it part of `scenario=all`: does the guest know exactly what the hypervisor then counts?
    fn in_all(self) -> bool {
        matches!(self, Self::Idle | Self::Hypercall | Self::Fault | Self::Bad)
    }

    /// Does it consist of memory faults?
    fn needs_shared_bit(self) -> bool {
        matches!(self, Self::Fault | Self::Race)
    }

    /// The name on the command line and in the report.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Hypercall => "hypercall",
            Self::Fault => "fault",
            Self::Bad => "bad",
            Self::Storm => "storm",
            Self::Hostile => "hostile",
            Self::Flip => "flip",
            Self::Reset => "reset",
            Self::Large => "large",
            Self::Race => "race",
            Self::Sweep => "sweep",
            Self::Dirty => "dirty",
            Self::Balloon => "balloon",
            Self::Reporting => "reporting",
            Self::Disk => "disk",
            Self::Device => "device",
            Self::Clock => "clock",
            Self::Vhost => "vhost",
            Self::Dma => "dma",
            Self::Tables => "tables",
            Self::Kept => "kept",
            Self::Waiting => "waiting",
        }
    }
}

/// What the command line asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// What to measure; then no scenario runs.
    pub bench: Option<Bench>,
    selected: [bool; Scenario::ALL.len()],
    /// How many CPUs take part; all if absent.
    pub smp: Option<usize>,
    /// The guest physical address bit that selects the shared view.
    pub shared_bit: Option<u32>,
    /// The first guest physical address of strict mode. By default it spares all that firmware uses.
    pub strict_from: u64,
    /// Start of the pseudo-random sequences.
    pub seed: u64,
    /// How often a scenario does what it does, if it should not decide that.
    pub count: Option<u64>,
    /// Seconds after which the guest gives up.
    pub timeout: u64,
    /// What a page holds after a conversion.
    pub contents: Contents,
    /// Where a DIMM is that the firmware knows nothing of, and its size; in place of memory above
    /// 4 GiB.
    pub dimm: Option<(u64, u64)>,
}

/// What a page holds after a conversion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contents {
    /// Zeros: the hypervisor frees the view that a page leaves.
    Empty,
    /// What it held before: both views are of the same memory.
    Kept,
    /// Anything: there are two views, and nothing is freed.
    Unknown,
}

/// Why a command line cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error<'a> {
    /// No scenario was named.
    NoScenario,
    /// A scenario that does not exist.
    UnknownScenario(&'a str),
    /// A word whose key means nothing here.
    UnknownWord(&'a str),
    /// A value that is no number, or not a sensible one.
    Value {
        /// The word that holds the value.
        word: &'a str,
        /// What would work.
        wanted: &'static str,
    },
    /// A scenario or `bench=fault` without a shared bit.
    NeedsSharedBit(&'static str),
    /// `bench=` beside `scenario=`.
    BenchAndScenario,
}

impl fmt::Display for Error<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoScenario => write!(f, "the command line names no scenario: add scenario=")?,
            Self::UnknownScenario(name) => {
                write!(f, "there is no scenario '{name}': use scenario=")?
            }
            Self::UnknownWord(word) => {
                return write!(
                    f,
                    "'{word}' is unknown: use scenario=, smp=, shared-bit=, strict-from=, seed=, \
                     count=, timeout=, contents=, dimm= or bench="
                );
            }
            Self::Value { word, wanted } => {
                return write!(f, "'{word}' does not work: use {wanted}");
            }
            Self::NeedsSharedBit(word) => {
                return write!(
                    f,
                    "{word} needs shared-bit=N, as given to sw-protected-guest"
                );
            }
            Self::BenchAndScenario => {
                return write!(
                    f,
                    "bench= and scenario= exclude each other: use one of them"
                );
            }
        }
        for scenario in Scenario::ALL {
            write!(f, "{},", scenario.name())?;
        }
        write!(f, "all")
    }
}

impl core::error::Error for Error<'_> {}

impl Options {
    /// Reads a command line.
    ///
    /// # Errors
    ///
    /// Every word must be understood, and a scenario must be named.
    pub fn parse(line: &str) -> Result<Self, Error<'_>> {
        let mut options = Self {
            bench: None,
            selected: [false; Scenario::ALL.len()],
            smp: None,
            shared_bit: None,
            strict_from: 4 << 30,
            seed: 1,
            count: None,
            timeout: 120,
            contents: Contents::Empty,
            dimm: None,
        };
        let mut all = false;
        for word in line.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').ok_or(Error::UnknownWord(word))?;
            match key {
                "scenario" => all |= options.select(value)?,
                "smp" => {
                    options.smp =
                        Some(number(word, value, 1..=256, "a number from 1 to 256")? as usize)
                }
                "shared-bit" => {
                    options.shared_bit =
                        Some(number(word, value, 32..=38, "a number from 32 to 38")? as u32);
                }
                "strict-from" => {
                    options.strict_from = number(word, value, 0..=u64::MAX, "an address")?;
                }
                "seed" => options.seed = number(word, value, 0..=u64::MAX, "a number")?,
                "count" => {
                    options.count =
                        Some(number(word, value, 1..=1 << 32, "a number from 1 to 2^32")?);
                }
                "timeout" => {
                    options.timeout = number(word, value, 1..=86_400, "seconds, up to 86400")?
                }
                "contents" => options.contents = contents(word, value)?,
                "bench" => options.bench = Some(bench(word, value)?),
                "dimm" => options.dimm = Some(dimm(word, value)?),
                _ => return Err(Error::UnknownWord(word)),
            }
        }
        for scenario in Scenario::ALL {
            let possible = options.shared_bit.is_some() || !scenario.needs_shared_bit();
            options.selected[scenario as usize] |= all && scenario.in_all() && possible;
        }
        let nothing = options.selected == [false; Scenario::ALL.len()];
        match (options.bench, nothing) {
            (None, true) => return Err(Error::NoScenario),
            (Some(_), false) => return Err(Error::BenchAndScenario),
            _ => {}
        }
        if options.shared_bit.is_none()
            && let Some(word) = options.word_that_needs_shared_bit()
        {
            return Err(Error::NeedsSharedBit(word));
        }
        Ok(options)
    }

    fn word_that_needs_shared_bit(&self) -> Option<&'static str> {
        if self.runs(Scenario::Fault) {
            Some("scenario=fault")
        } else if self.runs(Scenario::Race) {
            Some("scenario=race")
        } else {
            (self.bench == Some(Bench::Fault)).then_some("bench=fault")
        }
    }

    /// Was this scenario asked for?
    #[must_use]
    pub fn runs(&self, scenario: Scenario) -> bool {
        self.selected[scenario as usize]
    }

    /// Returns whether `all` was among the names.
    fn select<'a>(&mut self, names: &'a str) -> Result<bool, Error<'a>> {
        let mut all = false;
        for name in names.split(',') {
            if name == "all" {
                all = true;
                continue;
            }
            let scenario = Scenario::ALL.into_iter().find(|each| each.name() == name);
            let scenario = scenario.ok_or(Error::UnknownScenario(name))?;
            self.selected[scenario as usize] = true;
        }
        Ok(all)
    }
}

fn number<'a>(
    word: &'a str,
    value: &str,
    allowed: core::ops::RangeInclusive<u64>,
    wanted: &'static str,
) -> Result<u64, Error<'a>> {
    let parsed: Result<u64, ParseIntError> = match value.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => value.parse(),
    };
    match parsed {
        Ok(number) if allowed.contains(&number) => Ok(number),
        _ => Err(Error::Value { word, wanted }),
    }
}

fn bench<'a>(word: &'a str, value: &str) -> Result<Bench, Error<'a>> {
    let found = Bench::ALL.into_iter().find(|each| each.name() == value);
    found.ok_or(Error::Value {
        word,
        wanted: "start, request, check, fault, twice, touch, scale or disk",
    })
}

/// `ADDRESS+SIZE`.
fn dimm<'a>(word: &'a str, value: &'a str) -> Result<(u64, u64), Error<'a>> {
    let wanted = "ADDRESS+SIZE, above 4 GiB and below 256 GiB";
    let (address, size) = value.split_once('+').ok_or(Error::Value { word, wanted })?;
    let address = number(word, address, 4 << 30..=255 << 30, wanted)?;
    Ok((address, number(word, size, 1 << 20..=1 << 30, wanted)?))
}

fn contents<'a>(word: &'a str, value: &str) -> Result<Contents, Error<'a>> {
    match value {
        "empty" => Ok(Contents::Empty),
        "kept" => Ok(Contents::Kept),
        "unknown" => Ok(Contents::Unknown),
        _ => Err(Error::Value {
            word,
            wanted: "empty, kept or unknown",
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selected(line: &str) -> Vec<&'static str> {
        let options = Options::parse(line).unwrap();
        Scenario::ALL
            .into_iter()
            .filter(|&scenario| options.runs(scenario))
            .map(Scenario::name)
            .collect()
    }

    #[test]
    fn scenarios() {
        assert_eq!(selected("scenario=idle"), ["idle"]);
        assert_eq!(
            selected(" scenario=bad,hypercall  smp=2"),
            ["hypercall", "bad"]
        );
        assert_eq!(selected("scenario=all"), ["idle", "hypercall", "bad"]);
        assert_eq!(
            selected("scenario=all shared-bit=38"),
            ["idle", "hypercall", "fault", "bad"]
        );
        assert_eq!(
            selected("scenario=sweep,storm,race shared-bit=38"),
            ["storm", "race", "sweep"]
        );
    }

    #[test]
    fn measuring_takes_the_place_of_scenarios() {
        fn bench(line: &str) -> Result<Option<Bench>, Error<'_>> {
            Options::parse(line).map(|options| options.bench)
        }
        for each in Bench::ALL {
            let line = format!("bench={} shared-bit=38", each.name());
            assert_eq!(bench(&line), Ok(Some(each)));
        }
        assert_eq!(bench("scenario=idle"), Ok(None));
        assert_eq!(
            bench("scenario=idle bench=start"),
            Err(Error::BenchAndScenario)
        );
        assert_eq!(
            bench("bench=fault"),
            Err(Error::NeedsSharedBit("bench=fault"))
        );
        assert!(matches!(bench("bench=x"), Err(Error::Value { .. })));
    }

    #[test]
    fn values() {
        let options = Options::parse(
            "scenario=fault smp=4 shared-bit=38 seed=0xff count=7 timeout=9 contents=unknown",
        )
        .unwrap();
        assert_eq!(options.count, Some(7));
        assert_eq!(options.smp, Some(4));
        assert_eq!(options.shared_bit, Some(38));
        assert_eq!(options.strict_from, 4 << 30);
        assert_eq!(options.seed, 255);
        assert_eq!(options.timeout, 9);
        assert_eq!(options.contents, Contents::Unknown);
        assert_eq!(options.dimm, None);
        let options = Options::parse("scenario=idle dimm=0x200000000+67108864").unwrap();
        assert_eq!(options.dimm, Some((8 << 30, 64 << 20)));
        let contents = |line| Options::parse(line).unwrap().contents;
        assert_eq!(contents("scenario=idle"), Contents::Empty);
        assert_eq!(contents("scenario=idle contents=kept"), Contents::Kept);
    }

    #[test]
    fn refused() {
        assert_eq!(Options::parse(""), Err(Error::NoScenario));
        assert_eq!(
            Options::parse("scenario=x"),
            Err(Error::UnknownScenario("x"))
        );
        assert_eq!(Options::parse("scenario="), Err(Error::UnknownScenario("")));
        assert_eq!(
            Options::parse("scenario=idle quiet"),
            Err(Error::UnknownWord("quiet"))
        );
        assert_eq!(
            Options::parse("scenario=idle x=1"),
            Err(Error::UnknownWord("x=1"))
        );
        assert_eq!(
            Options::parse("scenario=fault"),
            Err(Error::NeedsSharedBit("scenario=fault"))
        );
        assert_eq!(
            Options::parse("scenario=race"),
            Err(Error::NeedsSharedBit("scenario=race"))
        );
        for word in [
            "smp=0",
            "smp=x",
            "shared-bit=50",
            "shared-bit=3",
            "timeout=0",
            "count=0",
            "seed=-1",
            "contents=now",
            "dimm=0+0",
            "dimm=0x200000000",
        ] {
            let line = format!("scenario=idle {word}");
            assert!(
                matches!(Options::parse(&line), Err(Error::Value { .. })),
                "{word}"
            );
        }
    }

    #[test]
    fn messages_say_what_would_work() {
        assert_eq!(
            Options::parse("scenario=x").unwrap_err().to_string(),
            "there is no scenario 'x': use scenario=idle,hypercall,fault,bad,storm,hostile,flip,\
             reset,large,race,sweep,dirty,balloon,reporting,disk,device,clock,vhost,dma,tables,kept,\
             waiting,all"
        );
    }
}
