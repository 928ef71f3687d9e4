// SPDX-License-Identifier: GPL-2.0-or-later
//! What can be measured.

/// What the guest measures, in place of scenarios.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bench {
    /// Nothing: says that it has started, and ends.
    Start,
    /// Conversions by hypercall.
    Request,
    /// Those for single pages in order, over 1 GiB.
    Sequential,
    /// A few of those, quickly.
    Check,
    /// Conversions by touching memory.
    Fault,
    /// Nothing: converts most of its memory twice, for whoever counts the host's memory.
    Twice,
    /// The first touch of pages, of which there is one view only.
    Touch,
    /// How long CPUs take that convert memory of their own at the same time.
    Scale,
    /// Reads from a virtio-blk disk.
    Disk,
    /// One request for 64 GiB that nobody has touched.
    Vast,
}

impl Bench {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Start,
        Self::Request,
        Self::Sequential,
        Self::Check,
        Self::Fault,
        Self::Twice,
        Self::Touch,
        Self::Scale,
        Self::Disk,
        Self::Vast,
    ];

    /// The name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Request => "request",
            Self::Sequential => "sequential",
            Self::Check => "check",
            Self::Fault => "fault",
            Self::Twice => "twice",
            Self::Touch => "touch",
            Self::Scale => "scale",
            Self::Disk => "disk",
            Self::Vast => "vast",
        }
    }
}
