// SPDX-License-Identifier: MIT OR Apache-2.0
//! A report as a picture: the map, the numbers, and what became of the states over time.

use anyhow::{Result, anyhow};
use guestmemfd_qmp::query::Backend;
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::cells::{Cell, Grid, KINDS, Kind};
use crate::snapshot::{Memory, Snapshot, rates};
use crate::text;

const FONT: &str = "sans-serif";
const MONO: &str = "monospace";
const GREY: RGBColor = RGBColor(96, 96, 96);
/// Of the map.
const COLUMNS: usize = 64;
const ROWS: usize = 16;
/// Pixels of a cell, of which one is the line above it, and of the space at its left for offsets.
const CELL: i32 = 13;
const INNER: i32 = CELL - 1;
const LEFT: i32 = 120;
const WIDTH: i32 = LEFT + COLUMNS as i32 * CELL + 20;
/// Pixels of a line of text, and of the part of a backend without its map.
const LINE: i32 = 18;
const NUMBERS: i32 = 18 * LINE;
const CHART: i32 = 220;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// The picture of the last of the snapshots, with those before it as history.
pub(crate) fn picture(history: &[Snapshot], last: &Snapshot) -> Result<String> {
    let grid = |memory: &Memory| Grid::new(&memory.map, memory.info.size, COLUMNS, ROWS);
    let parts: Vec<_> = last.backends.iter().map(|m| (m, grid(m))).collect();
    let chart = if history.len() > 1 { CHART } else { 0 };
    let height = |grid: &Grid| NUMBERS + grid.rows().count() as i32 * CELL + chart;
    let total: i32 = parts.iter().map(|(_, grid)| height(grid)).sum();
    let mut picture = String::new();
    {
        let size = (WIDTH as u32, total.unsigned_abs());
        let area = SVGBackend::with_string(&mut picture, size).into_drawing_area();
        let draw = || -> Drawn {
            area.fill(&WHITE)?;
            let mut rest = area.clone();
            for (memory, grid) in &parts {
                let (part, below) = rest.split_vertically(height(grid));
                rest = below;
                backend(&part, memory, grid, history, last)?;
            }
            area.present()?;
            Ok(())
        };
        draw().map_err(|error| anyhow!("cannot draw: {error}"))?;
    }
    Ok(picture)
}

fn backend(
    area: &Area<'_>,
    memory: &Memory,
    grid: &Grid,
    history: &[Snapshot],
    last: &Snapshot,
) -> Drawn {
    write(area, text::title(memory), (20, 12), (FONT, 17), BLACK)?;
    write(
        area,
        text::scale(grid) + "; a mixed one is divided",
        (LEFT, 38),
        (FONT, 13),
        GREY,
    )?;
    let top = 60;
    map(area, memory, grid, top)?;
    let bottom = top + grid.rows().count() as i32 * CELL + 8;
    if let Some(line) = text::unread(memory) {
        write(area, line, (LEFT, bottom), (FONT, 13), BLACK)?;
    }
    let first = history.first().unwrap_or(last);
    let rates = rates(first, last, &memory.info.id);
    let from = bottom + LINE + 4;
    for (at, line) in (0..).zip(text::states(memory, grid)) {
        let y = from + at * LINE;
        // The letters are those of the terminal; here each kind has its colour.
        if let Some(kind) = KINDS.iter().find(|kind| line.starts_with(kind.all)) {
            area.draw(&Rectangle::new(
                [(20, y), (34, y + 13)],
                fill(kind).filled(),
            ))?;
            area.draw(&Rectangle::new([(20, y), (34, y + 13)], GREY))?;
        }
        write(
            area,
            line.get(5..).unwrap_or_default().to_owned(),
            (44, y),
            (MONO, 13),
            BLACK,
        )?;
    }
    for (at, line) in (0..).zip(text::counters(memory, rates.as_ref())) {
        write(area, line, (480, from + at * LINE), (MONO, 13), BLACK)?;
    }
    if history.len() > 1 {
        let height = area.dim_in_pixel().1 as i32;
        let (_, below) = area.split_vertically(height - CHART);
        over_time(&below, &memory.info.id, history)?;
    }
    Ok(())
}

fn map(area: &Area<'_>, memory: &Memory, grid: &Grid, top: i32) -> Drawn {
    for (row, (offset, cells)) in (0..).zip(grid.rows()) {
        let y = top + row * CELL;
        let label = text::tick(offset, memory.info.size);
        let x = LEFT - 8 - 8 * label.len() as i32;
        write(area, label, (x, y), (MONO, 12), GREY)?;
        // Neighbours that are alike are one rectangle.
        let mut column = 0;
        for alike in cells.chunk_by(|a, b| a.shares() == b.shares()) {
            let x = [column, column + alike.len() as i32].map(|column| LEFT + column * CELL);
            column += alike.len() as i32;
            bar(area, &alike[0], x, y)?;
        }
    }
    let end = top + grid.rows().count() as i32 * CELL;
    for column in (8..COLUMNS as i32).step_by(8) {
        let x = LEFT + column * CELL;
        area.draw(&PathElement::new([(x, top), (x, end)], WHITE))?;
    }
    let right = LEFT + COLUMNS.min(grid.cells.len()) as i32 * CELL;
    area.draw(&Rectangle::new([(LEFT, top), (right, end)], GREY))?;
    Ok(())
}

/// A cell, or several alike, cut by the shares of its kinds.
fn bar(area: &Area<'_>, cell: &Cell, [left, right]: [i32; 2], top: i32) -> Drawn {
    let mut y = top + 1;
    for (kind, share) in KINDS.iter().zip(cell.shares()) {
        if share > 0 {
            let corners = [(left, y), (right, y + share)];
            area.draw(&Rectangle::new(corners, fill(kind).filled()))?;
            y += share;
        }
    }
    Ok(())
}

impl Cell {
    /// Pixels by kind: in proportion, but at least one for what is there at all.
    fn shares(&self) -> [i32; KINDS.len()] {
        let size = self.size().max(1) as f64;
        let mut shares = self.bytes.map(|bytes| {
            let share = (bytes as f64 / size * f64::from(INNER)).round() as i32;
            share.max(i32::from(bytes > 0))
        });
        // What rounding made too much or too little is the largest's.
        let sum: i32 = shares.iter().sum();
        if let Some(largest) = shares.iter_mut().max() {
            *largest += INNER - sum;
        }
        shares
    }
}

/// The decided bytes of one backend by state, one above the other.
fn over_time(area: &Area<'_>, id: &str, history: &[Snapshot]) -> Drawn {
    type Of = fn(&Backend) -> u64;
    // From the one below to the one above, by place in KINDS.
    let states: [(usize, Of); 3] = [
        (2, |b| b.private_bytes),
        (1, |b| b.shared_bytes),
        (3, |b| b.transition_bytes),
    ];
    let sizes = history.iter().filter_map(|snapshot| snapshot.find(id));
    let most = sizes.map(|m| m.info.size - m.info.undecided_bytes).max();
    let (divisor, unit) = match most.unwrap_or_default() {
        0..0x80_0000 => (1024.0, "KiB"),
        0x80_0000..0x2_0000_0000 => (1024.0 * 1024.0, "MiB"),
        _ => (1024.0 * 1024.0 * 1024.0, "GiB"),
    };
    let sum_to = |upto: usize| {
        let points = history.iter().filter_map(|snapshot| {
            let info = &snapshot.find(id)?.info;
            let sum: f64 = states[..=upto].iter().map(|(_, of)| of(info) as f64).sum();
            Some((snapshot.elapsed as f64 / 1000.0, sum / divisor))
        });
        points.collect::<Vec<_>>()
    };
    let all = sum_to(states.len() - 1);
    let from = all.first().map_or(0.0, |point| point.0);
    let to = all.last().map_or(0.0, |point| point.0).max(from + 0.001);
    let most = all
        .iter()
        .map(|point| point.1)
        .fold(4096.0 / divisor, f64::max)
        * 1.05;
    let mut chart = ChartBuilder::on(area)
        .caption("private and shared bytes over time (seconds)", (FONT, 13))
        .margin(10)
        .margin_right(20)
        .x_label_area_size(24)
        .y_label_area_size(LEFT - 10)
        .build_cartesian_2d(from..to, 0.0..most)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .y_labels(6)
        .y_label_formatter(&|amount| format!("{amount} {unit}"))
        .x_label_formatter(&|seconds| format!("{seconds:.1}"))
        .draw()?;
    for (upto, (kind, _)) in states.iter().enumerate().rev() {
        let color = fill(&KINDS[*kind]);
        chart.draw_series(AreaSeries::new(sum_to(upto), 0.0, color))?;
    }
    Ok(())
}

fn fill(kind: &Kind) -> RGBColor {
    RGBColor(kind.color.0, kind.color.1, kind.color.2)
}

/// Text whose spaces stay.
fn write(
    area: &Area<'_>,
    text: String,
    at: (i32, i32),
    font: (&'static str, i32),
    color: RGBColor,
) -> Drawn {
    let text = text.replace(' ', "\u{a0}");
    let style = font.into_font().color(&color);
    area.draw(&Text::new(text, at, style))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::tests::snapshot;

    #[test]
    fn shares_fill_a_cell_and_show_all_there_is() {
        let shares = |bytes| Cell { bytes }.shares();
        assert_eq!(shares([100, 0, 0, 0, 0]), [INNER, 0, 0, 0, 0]);
        assert_eq!(shares([0, 1000, 1, 0, 0]), [0, INNER - 1, 1, 0, 0]);
        assert_eq!(shares([1, 1, 1, 1, 1]).iter().sum::<i32>(), INNER);
    }

    #[test]
    fn a_picture_has_map_numbers_and_history() {
        let mut last = snapshot(1000, 7);
        let alone = picture(&[last.clone()], &last).unwrap();
        assert!(!alone.contains("over\u{a0}time") && !alone.contains("over time"));
        last.backends[0].info.id = "<&\"".into();
        let picture = picture(&[snapshot(0, 1), snapshot(500, 3), last.clone()], &last).unwrap();
        assert_eq!(picture.matches("bytes over time").count(), 2);
        for text in [
            "0x0c0000",
            "&lt;&amp;",
            "private",
            "a\u{a0}cell\u{a0}is\u{a0}4\u{a0}KiB",
            "#0060B4",
        ] {
            assert!(picture.contains(text), "no {text}");
        }
        assert!(!picture.contains("<&"));
    }
}
