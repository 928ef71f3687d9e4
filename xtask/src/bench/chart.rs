// SPDX-License-Identifier: GPL-2.0-or-later
//! A picture of what a page costs: the request, and the first touch after it.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::plan::SUBJECTS;
use super::rows::{Row, START_MEMORY, STARTS, value};

/// A picture: groups of bars, one bar a subject.
pub(super) struct Chart {
    /// The file's name.
    pub(super) file: &'static str,
    caption: &'static str,
    /// Names of rows.
    groups: &'static [&'static str],
    /// What the values are divided by.
    unit: f64,
}

/// All pictures there are.
pub(super) const CHARTS: [Chart; 3] = [
    Chart {
        file: "conversions.svg",
        caption: "Instructions per converted page: request (dark), first touch and later (light)",
        groups: &[
            "convert-4k-to-private",
            "convert-4k-to-shared",
            "convert-64k-to-private",
            "convert-64k-to-shared",
            "convert-2m-to-private",
            "convert-2m-to-shared",
            "sequential-4k-to-private",
            "sequential-4k-to-shared",
        ],
        unit: 1.0,
    },
    Chart {
        file: "start.svg",
        caption: "Millions of instructions until a guest's first line",
        groups: &STARTS,
        unit: 1e6,
    },
    Chart {
        file: "start-kernel-memory.svg",
        caption: "KiB that the kernel has allocated for itself by then",
        groups: &START_MEMORY,
        unit: 1024.0,
    },
];

const SIZE: (u32, u32) = (1200, 560);
/// A bar, where a group with its gap is as wide as its bars and one more.
const FONT: &str = "sans-serif";

/// Writes a chart; false if none of its groups was measured.
pub(super) fn draw(chart: &Chart, path: &Path, rows: &[Row]) -> Result<bool> {
    let measured = |row: &Row| chart.groups.contains(&row.row.as_str());
    if !rows.iter().any(measured) {
        return Ok(false);
    }
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    fill(chart, &area, rows).map_err(|error| anyhow!("cannot draw {}: {error}", path.display()))?;
    area.present()
        .map_err(|error| anyhow!("cannot write {}: {error}", path.display()))?;
    Ok(true)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn fill(chart: &Chart, area: &Area<'_>, rows: &[Row]) -> Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let (groups, unit) = (chart.groups, chart.unit);
    let most = groups.iter().flat_map(|group| {
        let of_group = rows.iter().filter(|row| row.row == *group);
        of_group.map(|row| row.value / unit)
    });
    let most = most.fold(0.0, f64::max) * 1.05;
    let width = SUBJECTS.len() as f64 + 1.0;
    let mut chart = ChartBuilder::on(area)
        .caption(chart.caption, (FONT, 20))
        .margin(10)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..width * groups.len() as f64, 0.0..most)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_label_formatter(&|value| super::report::thousands(*value))
        .draw()?;
    for (bar, subject) in SUBJECTS.into_iter().enumerate() {
        let color = Palette99::pick(bar).to_rgba();
        let mut bars = Vec::new();
        for (group, name) in groups.iter().enumerate() {
            let value = |name: &str| Some(value(rows, name, subject)? / unit);
            let Some(all) = value(name) else { continue };
            let request = value(&format!("{name}-request")).unwrap_or(all);
            let left = group as f64 * width + bar as f64 + 0.5;
            let part = |from, to, style: ShapeStyle| {
                Rectangle::new([(left, from), (left + 0.9, to)], style)
            };
            bars.push(part(0.0, request, color.filled()));
            bars.push(part(request, all, color.mix(0.4).filled()));
        }
        if bars.is_empty() {
            continue;
        }
        chart
            .draw_series(bars)?
            .label(format!("{} {}", subject.0, subject.1))
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], color.filled()));
    }
    for (group, name) in groups.iter().enumerate() {
        let at = chart.backend_coord(&((group as f64 + 0.1) * width, 0.0));
        let text = name
            .replace("-to-", " to ")
            .replace("start-kernel-memory", "start");
        area.draw(&Text::new(text, (at.0, at.1 + 8), (FONT, 13)))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 14))
        .draw()?;
    Ok(())
}
