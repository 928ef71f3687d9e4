// SPDX-License-Identifier: MIT OR Apache-2.0
//! The map as cells of one size each, and how a cell is shown.

use guestmemfd_qmp::query::State;

use crate::snapshot::{Map, PAGE};

/// What a byte is shown as.
#[derive(Debug)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    /// A cell of nothing else.
    pub(crate) all: char,
    /// A cell that is mostly this.
    pub(crate) most: char,
    pub(crate) color: (u8, u8, u8),
}

const fn kind(name: &'static str, all: char, most: char, color: (u8, u8, u8)) -> Kind {
    Kind {
        name,
        all,
        most,
        color,
    }
}

/// Those of [`Cell::bytes`]: the states, and what has not been read. The colours differ in lightness too.
pub(crate) const KINDS: [Kind; 5] = [
    kind("undecided", '.', 'u', (222, 222, 222)),
    kind("shared", 'S', 's', (240, 160, 40)),
    kind("private", 'P', 'p', (0, 96, 180)),
    kind("in transition", 'T', 't', (200, 30, 90)),
    kind("not read", '?', '?', (255, 255, 255)),
];
/// The last of them.
pub(crate) const NOT_READ: usize = 4;

fn index(state: State) -> usize {
    match state {
        State::Undecided => 0,
        State::Shared => 1,
        State::Private => 2,
        State::Transition => 3,
    }
}

/// A part of a backend's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    /// By kind.
    pub(crate) bytes: [u64; KINDS.len()],
}

impl Cell {
    /// All its bytes.
    pub(crate) fn size(&self) -> u64 {
        self.bytes.iter().sum()
    }

    /// The kind that it has most bytes of; the later one of equals, which is the rarer one.
    pub(crate) fn most(&self) -> &'static Kind {
        let kinds = self.bytes.iter().zip(&KINDS);
        kinds
            .max_by_key(|(bytes, _)| **bytes)
            .map_or(&KINDS[NOT_READ], |(_, kind)| kind)
    }

    /// A letter: a capital (or a point) if all of it is of one kind.
    pub(crate) fn glyph(&self) -> char {
        let most = self.most();
        match self.bytes.iter().filter(|bytes| **bytes > 0).count() {
            1 => most.all,
            _ => most.most,
        }
    }

    /// The colours of its kinds, mixed by their bytes.
    pub(crate) fn color(&self) -> (u8, u8, u8) {
        let size = self.size().max(1) as f64;
        let mix = |channel: fn(&Kind) -> u8| {
            let parts = self.bytes.iter().zip(&KINDS);
            let sum: f64 = parts
                .map(|(bytes, kind)| *bytes as f64 / size * f64::from(channel(kind)))
                .sum();
            sum.round() as u8
        };
        (mix(|k| k.color.0), mix(|k| k.color.1), mix(|k| k.color.2))
    }
}

/// A map in rows of cells.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    pub(crate) columns: usize,
    /// Bytes of every cell but the last, which may have fewer: a power of two.
    pub(crate) cell_bytes: u64,
    pub(crate) cells: Vec<Cell>,
}

impl Grid {
    /// The finest one that fits into these columns (of which it uses a power of two) and rows.
    pub(crate) fn new(map: &Map, size: u64, columns: usize, rows: usize) -> Self {
        let columns = 1 << columns.max(1).ilog2();
        let most = columns as u64 * rows.max(1) as u64;
        // Sizes are below 2^63 or a single cell of 2^63 bytes would hold them as well.
        let exact = size.div_ceil(most).max(PAGE);
        let cell_bytes = exact.checked_next_power_of_two().unwrap_or(1 << 63);
        let runs = map
            .runs
            .iter()
            .map(|(state, bytes)| (index(*state), *bytes));
        let unread = (NOT_READ, size.saturating_sub(map.read()));
        let mut cells = Vec::new();
        let mut cell = Cell::default();
        let mut room = cell_bytes;
        for (kind, mut bytes) in runs.chain([unread]) {
            while bytes > 0 {
                let part = bytes.min(room);
                cell.bytes[kind] += part;
                bytes -= part;
                room -= part;
                if room == 0 {
                    cells.push(std::mem::take(&mut cell));
                    room = cell_bytes;
                }
            }
        }
        if room < cell_bytes {
            cells.push(cell);
        }
        Self {
            columns,
            cell_bytes,
            cells,
        }
    }

    /// Rows, each with the offset where it starts.
    pub(crate) fn rows(&self) -> impl Iterator<Item = (u64, &[Cell])> {
        let rows = self.cells.chunks(self.columns).enumerate();
        rows.map(|(row, cells)| (row as u64 * self.row_bytes(), cells))
    }

    /// Bytes of a whole row.
    pub(crate) fn row_bytes(&self) -> u64 {
        self.columns as u64 * self.cell_bytes
    }

    /// Bytes by kind.
    pub(crate) fn sums(&self) -> Cell {
        let mut sum = Cell::default();
        for cell in &self.cells {
            for (all, bytes) in sum.bytes.iter_mut().zip(cell.bytes) {
                *all += bytes;
            }
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn state() -> impl Strategy<Value = State> {
        prop_oneof![
            Just(State::Undecided),
            Just(State::Shared),
            Just(State::Private),
            Just(State::Transition)
        ]
    }

    prop_compose! {
        /// A map and the size of its backend, of which a part may not have been read.
        fn maps()(
            runs in prop::collection::vec((state(), 1..5000u64), 0..50),
            unread in prop_oneof![Just(0), 1..100_000u64],
        ) -> (Map, u64) {
            let runs: Vec<_> = runs.into_iter().map(|(state, pages)| (state, pages * PAGE)).collect();
            let size = runs.iter().map(|run| run.1).sum::<u64>() + unread * PAGE;
            (Map { runs }, size.max(PAGE))
        }
    }

    proptest! {
        #[test]
        fn cells_hold_every_byte_once_under_its_state((map, size) in maps(), columns in 1..200usize, rows in 1..60usize) {
            let grid = Grid::new(&map, size, columns, rows);
            let mut expected = Cell::default();
            for (state, bytes) in &map.runs {
                expected.bytes[index(*state)] += bytes;
            }
            expected.bytes[NOT_READ] = size - map.read();
            prop_assert_eq!(grid.sums(), expected);

            prop_assert!(grid.columns <= columns && grid.cells.len() <= grid.columns * rows);
            let (last, whole) = grid.cells.split_last().expect("a size is never zero");
            prop_assert!(whole.iter().all(|cell| cell.size() == grid.cell_bytes));
            prop_assert!((1..=grid.cell_bytes).contains(&last.size()));
            // The next finer scale would not fit.
            let finer = size.div_ceil(grid.cell_bytes / 2);
            prop_assert!(grid.cell_bytes == PAGE || finer > (grid.columns * rows) as u64);
        }

        #[test]
        fn a_cell_has_the_states_of_its_own_bytes((map, size) in maps(), columns in 1..64usize, at in 0.0..1.0f64) {
            let grid = Grid::new(&map, size, columns, 16);
            let offset = ((size as f64 * at) as u64).min(size - 1);
            let mut end = 0;
            let run = map.runs.iter().find(|(_, bytes)| {
                end += bytes;
                offset < end
            });
            let kind = run.map_or(NOT_READ, |(state, _)| index(*state));
            let cell = grid.cells[(offset / grid.cell_bytes) as usize];
            prop_assert!(cell.bytes[kind] > 0);
        }
    }

    #[test]
    fn letters_tell_pure_cells_from_mixed_ones() {
        let cell = |bytes| Cell { bytes };
        assert_eq!(cell([8, 0, 0, 0, 0]).glyph(), '.');
        assert_eq!(cell([0, 0, 8, 0, 0]).glyph(), 'P');
        assert_eq!(cell([0, 3, 5, 0, 0]).glyph(), 'p');
        assert_eq!(cell([7, 1, 0, 0, 0]).glyph(), 'u');
        assert_eq!(cell([0, 4, 0, 4, 0]).glyph(), 't');
        let all: std::collections::BTreeSet<_> = KINDS.iter().map(|kind| kind.all).collect();
        assert_eq!(all.len(), KINDS.len());
    }

    #[test]
    fn colours_mix_by_bytes() {
        let mixed = Cell {
            bytes: [0, 1, 3, 0, 0],
        };
        assert_eq!(mixed.color(), (60, 112, 145));
    }

    #[test]
    fn the_largest_size_has_cells_too() {
        let grid = Grid::new(&Map::default(), u64::MAX - 4095, 1, 1);
        assert_eq!(grid.cell_bytes, 1 << 63);
        assert_eq!(grid.cells.len(), 2);
    }
}
