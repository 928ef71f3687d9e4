// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a QEMU said at one time, and what happened between two such times.

use anyhow::{Context, Result, ensure};
use guestmemfd_qmp::query::{Backend, MapPart, State};
use serde::{Deserialize, Serialize};

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;

/// All backends at one time. A record has one a line.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Snapshot {
    /// Milliseconds since 1970.
    pub(crate) time: u64,
    /// Milliseconds since this program connected, by a clock that nobody sets.
    pub(crate) elapsed: u64,
    pub(crate) backends: Vec<Memory>,
    pub(crate) events: Events,
}

/// One backend.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Memory {
    pub(crate) info: Backend,
    pub(crate) map: Map,
}

/// States of a backend's memory from its start on; what is left to its size has not been read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Map {
    /// States and bytes, one after the other.
    pub(crate) runs: Vec<(State, u64)>,
}

/// Events since this program connected.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Events {
    pub(crate) conversion_failed: Seen,
    pub(crate) private_access: Seen,
}

/// How often an event came, and what the last one said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Seen {
    pub(crate) count: u64,
    pub(crate) last: Option<String>,
}

impl Snapshot {
    /// Can it be shown? A record, and what calls itself QEMU, may hold anything.
    pub(crate) fn check(&self) -> Result<()> {
        for memory in &self.backends {
            let info = &memory.info;
            ensure!(
                !info.id.is_empty() && !info.id.contains(char::is_control),
                "{:?} is no id of a backend",
                info.id
            );
            info.check()?;
            ensure!(
                info.size > 0 && info.size.is_multiple_of(PAGE),
                "{}: its size {} is not a number of pages",
                info.id,
                info.size
            );
            memory
                .map
                .check(info.size)
                .with_context(|| info.id.clone())?;
        }
        Ok(())
    }

    /// The backend with this id.
    pub(crate) fn find(&self, id: &str) -> Option<&Memory> {
        self.backends.iter().find(|memory| memory.info.id == id)
    }

    /// Keeps only the backend with this id.
    pub(crate) fn only(&mut self, id: &str) -> Result<()> {
        let all: Vec<_> = self.backends.iter().map(|m| m.info.id.clone()).collect();
        self.backends.retain(|memory| memory.info.id == id);
        ensure!(
            !self.backends.is_empty(),
            "there is no backend {id:?}, only {}",
            all.join(", ")
        );
        Ok(())
    }
}

impl Map {
    /// Bytes that have been read.
    pub(crate) fn read(&self) -> u64 {
        self.runs.iter().map(|(_, size)| size).sum()
    }

    /// Appends the answer to a question for the runs from where this one ends; returns where to go
    /// on, if there is more.
    pub(crate) fn append(&mut self, part: &MapPart, id: &str, size: u64) -> Result<Option<u64>> {
        ensure!(
            part.id == id && part.size == size,
            "asked for {id:?} of {size} bytes, the map is of {:?} of {} bytes",
            part.id,
            part.size
        );
        let from = self.read();
        let mut end = from;
        for run in &part.runs {
            ensure!(
                run.offset == end && whole_pages(run.size) && run.size <= size - end,
                "a run of {} bytes at {:#x}, where one at {end:#x} or the end at {size:#x} was expected",
                run.size,
                run.offset
            );
            end += run.size;
            match self.runs.last_mut() {
                Some((state, bytes)) if *state == run.state => *bytes += run.size,
                _ => self.runs.push((run.state, run.size)),
            }
        }
        match part.next {
            None => ensure!(end == size, "the map ends at {end:#x} of {size:#x}"),
            Some(next) => ensure!(
                next == end && from < end && end < size,
                "the runs from {from:#x} on end at {end:#x} of {size:#x}, and it goes on at {next:#x}"
            ),
        }
        Ok(part.next)
    }

    fn check(&self, size: u64) -> Result<()> {
        let mut left = size;
        for (_, bytes) in &self.runs {
            ensure!(whole_pages(*bytes), "a run of {bytes} bytes");
            left = left
                .checked_sub(*bytes)
                .with_context(|| format!("the runs of its map are longer than {size} bytes"))?;
        }
        Ok(())
    }
}

fn whole_pages(bytes: u64) -> bool {
    bytes > 0 && bytes.is_multiple_of(PAGE)
}

/// Something that only grows while a QEMU runs.
#[derive(Debug)]
pub(crate) struct Counter {
    /// As QMP calls it.
    pub(crate) key: &'static str,
    pub(crate) name: &'static str,
    pub(crate) bytes: bool,
    pub(crate) of: fn(&Backend) -> u64,
}

macro_rules! counters {
    ($($field:ident $key:literal $name:literal $bytes:literal;)*) => {
        /// In the order in which they are shown.
        pub(crate) const COUNTERS: [Counter; [$($key),*].len()] = [$(Counter {
            key: $key,
            name: $name,
            bytes: $bytes,
            of: |backend| backend.$field,
        }),*];
    };
}

counters! {
    conversions_to_private "conversions-to-private" "conversions to private" false;
    converted_to_private_bytes "converted-to-private-bytes" "  made private" true;
    converted_along_bytes "converted-along-bytes" "  along with them" true;
    conversions_to_shared "conversions-to-shared" "conversions to shared" false;
    converted_to_shared_bytes "converted-to-shared-bytes" "  made shared" true;
    hypercalls "hypercalls" "hypercalls" false;
    faults_private "faults-private" "faults, private" false;
    faults_shared "faults-shared" "faults, shared" false;
    refused "refused" "refused" false;
    waits "waits" "waits" false;
}

/// For each counter.
pub(crate) type Rates = [f64; COUNTERS.len()];

/// What each counter grew by in a second; nothing if no time passed, the backend was not there
/// before, or it is another one by now, so that counters went back.
pub(crate) fn rates(before: &Snapshot, after: &Snapshot, id: &str) -> Option<Rates> {
    let (old, new) = (before.find(id)?, after.find(id)?);
    let milliseconds = after.elapsed.checked_sub(before.elapsed)?;
    if milliseconds == 0 {
        return None;
    }
    let mut rates = [0.0; COUNTERS.len()];
    for (rate, counter) in rates.iter_mut().zip(&COUNTERS) {
        let grown = (counter.of)(&new.info).checked_sub((counter.of)(&old.info))?;
        *rate = grown as f64 * 1000.0 / milliseconds as f64;
    }
    Some(rates)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use guestmemfd_qmp::query::Run;
    use proptest::prelude::*;

    /// A backend of 1 MiB whose second half is private, and all of whose counters are `count`.
    pub(crate) fn memory(id: &str, count: u64) -> Memory {
        const HALF: u64 = 512 << 10;
        Memory {
            info: Backend {
                id: id.to_owned(),
                mode: "private".to_owned(),
                discard: "now".to_owned(),
                size: 2 * HALF,
                undecided_bytes: HALF,
                shared_bytes: 0,
                private_bytes: HALF,
                transition_bytes: 0,
                shared_allocated: 0,
                conversions_to_private: count,
                conversions_to_shared: count,
                converted_to_private_bytes: count,
                converted_to_shared_bytes: count,
                converted_along_bytes: count,
                hypercalls: count,
                faults_private: count,
                faults_shared: count,
                refused: count,
                waits: count,
                stray_accesses: 0,
                pinned_bytes: 0,
                unpunched_bytes: 0,
                lazy_chunk: None,
                latency_to_private: Vec::new(),
                latency_to_shared: Vec::new(),
            },
            map: Map {
                runs: vec![(State::Undecided, HALF), (State::Private, HALF)],
            },
        }
    }

    /// ram0 and, later than at 0 ms, ram1.
    pub(crate) fn snapshot(elapsed: u64, count: u64) -> Snapshot {
        let ids = if elapsed == 0 {
            &["ram0"][..]
        } else {
            &["ram0", "ram1"]
        };
        let backends = ids.iter().map(|id| memory(id, count)).collect();
        Snapshot {
            time: 1,
            elapsed,
            backends,
            events: Events::default(),
        }
    }

    #[test]
    fn rates_are_per_second() {
        let (before, after) = (snapshot(0, 100), snapshot(500, 150));
        assert_eq!(
            rates(&before, &after, "ram0"),
            Some([100.0; COUNTERS.len()])
        );
        assert_eq!(
            rates(&before, &after, "ram1"),
            None,
            "it was not there before"
        );
        assert_eq!(rates(&before, &before, "ram0"), None, "no time has passed");
        let restarted = snapshot(1000, 3);
        assert_eq!(
            rates(&after, &restarted, "ram0"),
            None,
            "another one has this id"
        );
    }

    #[test]
    fn what_cannot_be_shown_is_found() {
        snapshot(5, 1).check().expect("it can");
        let wrong: [fn(&mut Memory); 8] = [
            |memory| memory.info.id.push('\u{1b}'),
            |memory| memory.info.id.clear(),
            |memory| memory.info.shared_bytes = 1,
            |memory| (memory.info.shared_bytes, memory.info.private_bytes) = (u64::MAX, 1 << 20),
            |memory| {
                (
                    memory.info.size,
                    memory.info.undecided_bytes,
                    memory.info.private_bytes,
                ) = (0, 0, 0)
            },
            |memory| memory.map.runs[0].1 = 0,
            |memory| memory.map.runs[0].1 = 5000,
            |memory| memory.map.runs[0].1 = u64::MAX - 4095,
        ];
        for spoil in wrong {
            let mut snapshot = snapshot(5, 1);
            spoil(&mut snapshot.backends[1]);
            assert!(snapshot.check().is_err(), "{snapshot:?}");
        }
    }

    proptest! {
        #[test]
        fn a_map_in_parts_is_the_map(runs in prop::collection::vec((0..4usize, 1..100u64), 1..50), parts in 1..10usize) {
            let states = [State::Undecided, State::Shared, State::Private, State::Transition];
            let mut offset = 0;
            let runs: Vec<_> = runs.iter().map(|(state, pages)| {
                let run = Run { offset, size: pages * PAGE, state: states[*state] };
                offset += run.size;
                run
            }).collect();
            let size = offset;
            let mut map = Map::default();
            let mut chunks = runs.chunks(parts).peekable();
            while let Some(chunk) = chunks.next() {
                let next = chunks.peek().map(|next| next[0].offset);
                let part = MapPart { id: "ram0".into(), size, runs: chunk.to_vec(), next };
                prop_assert_eq!(map.append(&part, "ram0", size).expect("it fits"), next);
            }
            prop_assert_eq!(map.read(), size);
            prop_assert!(map.runs.windows(2).all(|pair| pair[0].0 != pair[1].0));
            map.check(size).expect("it is whole");
            for run in &runs {
                let mut end = 0;
                let found = map.runs.iter().find(|(_, bytes)| { end += bytes; run.offset < end });
                prop_assert_eq!(found.map(|run| run.0), Some(run.state));
            }
        }
    }
}
