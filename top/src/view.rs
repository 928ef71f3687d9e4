// SPDX-License-Identifier: MIT OR Apache-2.0
//! The live view: what it shows, and what keys do to it.

use anyhow::Result;
use ratatui::Frame;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Paragraph};

use crate::cells::{Cell, Grid, KINDS};
use crate::snapshot::{self, Snapshot};
use crate::text;

const HELP: &str = "\
q, Esc   quit
p        pause, and go on
arrows   choose a backend
?        this help

A cell of the map is a part of the backend's
memory, from left to right and down. A capital
or a point: all of it is in one state. A small
letter: it is mixed, and most of it is in this
state. Offsets are the backend's, not guest
physical addresses. Rates are those since the
snapshot before.";

/// What colours the terminal has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Colors {
    None,
    /// The sixteen that all have.
    Basic,
    /// All, so that cells can have mixed ones.
    Full,
}

impl Colors {
    /// What the environment says, which `get` reads.
    pub(crate) fn of(get: impl Fn(&str) -> Option<String>) -> Self {
        if get("NO_COLOR").is_some_and(|value| !value.is_empty()) {
            return Self::None;
        }
        match get("COLORTERM").as_deref() {
            Some("truecolor" | "24bit") => Self::Full,
            _ => Self::Basic,
        }
    }

    fn style(self, cell: &Cell) -> Style {
        match self {
            Self::None => Style::new(),
            Self::Full => {
                let (r, g, b) = cell.color();
                let light = 3 * u32::from(r) + 6 * u32::from(g) + u32::from(b) > 1280;
                let text = if light { Color::Black } else { Color::White };
                Style::new().fg(text).bg(Color::Rgb(r, g, b))
            }
            Self::Basic => {
                let style = Style::new();
                match cell.most().all {
                    'S' => style.fg(Color::Black).bg(Color::Yellow),
                    'P' => style.fg(Color::White).bg(Color::Blue),
                    'T' => style.fg(Color::White).bg(Color::Magenta),
                    _ => style,
                }
            }
        }
    }
}

/// The state of the view.
#[derive(Debug)]
pub(crate) struct View {
    /// Where the snapshots come from.
    origin: String,
    colors: Colors,
    /// The one that is shown, and the one before.
    pub(crate) shown: Option<Snapshot>,
    before: Option<Snapshot>,
    /// A backend's id.
    pub(crate) selected: Option<String>,
    pub(crate) paused: bool,
    help: bool,
    /// Why no more snapshots come.
    pub(crate) end: Option<String>,
}

impl View {
    pub(crate) fn new(origin: String, colors: Colors, selected: Option<String>) -> Self {
        Self {
            origin,
            colors,
            shown: None,
            before: None,
            selected,
            paused: false,
            help: false,
            end: None,
        }
    }

    /// Takes a snapshot to show, unless it is paused. The first one must have the backend that was
    /// asked for.
    pub(crate) fn update(&mut self, snapshot: Snapshot) -> Result<()> {
        if let (None, Some(id)) = (&self.shown, &self.selected) {
            snapshot.clone().only(id)?;
        }
        if !self.paused {
            self.before = self.shown.replace(snapshot);
        }
        Ok(())
    }

    /// Reacts to a key; true to quit.
    pub(crate) fn key(&mut self, key: KeyEvent) -> bool {
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Char('?') => self.help = !self.help,
            KeyCode::Esc if self.help => self.help = false,
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char('p') => self.paused = !self.paused,
            KeyCode::Left | KeyCode::Up => self.select(false),
            KeyCode::Right | KeyCode::Down => self.select(true),
            _ => {}
        }
        false
    }

    fn select(&mut self, next: bool) {
        let Some(snapshot) = &self.shown else { return };
        let count = snapshot.backends.len();
        let at = self.place(snapshot);
        let at = if next { at + 1 } else { at + count - 1 } % count;
        self.selected = Some(snapshot.backends[at].info.id.clone());
    }

    /// The place of the chosen backend; the first if it is gone.
    fn place(&self, snapshot: &Snapshot) -> usize {
        let id = self.selected.as_deref();
        let mut backends = snapshot.backends.iter();
        let place = backends.position(|memory| Some(memory.info.id.as_str()) == id);
        place.unwrap_or(0)
    }

    /// Draws it.
    pub(crate) fn draw(&self, frame: &mut Frame<'_>) {
        let layout = [
            Constraint::Length(1),
            Constraint::Fill(1),
            Constraint::Length(1),
        ];
        let [head, body, foot] = Layout::vertical(layout).areas(frame.area());
        let seconds = self.shown.as_ref().map_or(0, |s| s.elapsed) as f64 / 1000.0;
        let title = format!("guestmemfd-top  {}  {seconds:.1} s", self.origin);
        frame.render_widget(Line::from(title).style(Modifier::BOLD), head);
        match &self.shown {
            Some(snapshot) if !snapshot.backends.is_empty() => self.backend(frame, body, snapshot),
            _ => frame.render_widget("waiting for QEMU's answer", body),
        }
        let status = match (&self.end, self.paused) {
            (Some(end), _) => end,
            (None, true) => "paused",
            (None, false) => "live",
        };
        let keys = format!("{status}  q quit  p pause  arrows backend  ? help");
        frame.render_widget(Line::from(keys).style(Modifier::REVERSED), foot);
        if self.help {
            let area = body.centered(Constraint::Length(52), Constraint::Length(15));
            frame.render_widget(Clear, area);
            let help = Paragraph::new(HELP).block(Block::bordered().title("help"));
            frame.render_widget(help, area);
        }
    }

    fn backend(&self, frame: &mut Frame<'_>, area: Rect, snapshot: &Snapshot) {
        let place = self.place(snapshot);
        let memory = &snapshot.backends[place];
        let rates = self.before.as_ref();
        let rates = rates.and_then(|before| snapshot::rates(before, snapshot, &memory.info.id));
        let counters = text::counters(memory, rates.as_ref());
        let layout = [
            Constraint::Length(1),
            Constraint::Length(counters.len() as u16),
            Constraint::Length(1),
            Constraint::Fill(1),
            Constraint::Length(1),
            Constraint::Length(2),
        ];
        let [title, numbers, scale, map, unread, events] = Layout::vertical(layout).areas(area);

        let mut text = text::title(memory);
        if snapshot.backends.len() > 1 {
            text.push_str(&format!("  ({} of {})", place + 1, snapshot.backends.len()));
        }
        frame.render_widget(text, title);
        let tick = text::tick(0, memory.info.size).len() + 1;
        let width = usize::from(map.width).saturating_sub(tick);
        let grid = Grid::new(&memory.map, memory.info.size, width, map.height.into());
        let halves = [Constraint::Length(46), Constraint::Fill(1)];
        let [left, right] = Layout::horizontal(halves).areas(numbers);
        let states = text::states(memory, &grid);
        let states = states.into_iter().map(|line| self.legend(line));
        frame.render_widget(Paragraph::new(states.collect::<Vec<_>>()), left);
        let counters = counters.into_iter().map(Line::from);
        frame.render_widget(Paragraph::new(counters.collect::<Vec<_>>()), right);
        frame.render_widget(text::lettered_scale(&grid), scale);
        let rows = grid.rows().map(|(offset, cells)| {
            let mut line = Line::from(text::tick(offset, memory.info.size) + " ");
            let cells = cells.iter();
            line.extend(
                cells.map(|cell| Span::styled(cell.glyph().to_string(), self.colors.style(cell))),
            );
            line
        });
        frame.render_widget(Paragraph::new(rows.collect::<Vec<_>>()), map);
        frame.render_widget(text::unread(memory).unwrap_or_default(), unread);
        let lines = text::events(&snapshot.events).into_iter().map(Line::from);
        frame.render_widget(Paragraph::new(lines.collect::<Vec<_>>()), events);
    }

    /// A line of the legend, with its letters as they are in the map.
    fn legend(&self, line: String) -> Line<'static> {
        let Some(kind) = KINDS.iter().position(|kind| line.starts_with(kind.all)) else {
            return Line::from(line);
        };
        let mut cell = Cell::default();
        cell.bytes[kind] = 1;
        let (letters, rest) = line.split_at(3);
        Line::from(vec![
            Span::styled(letters.to_owned(), self.colors.style(&cell)),
            Span::from(rest.to_owned()),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::tests::snapshot;
    use guestmemfd_qmp::query::State;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::buffer::Buffer;

    fn drawn(view: &View, width: u16, height: u16) -> (Vec<String>, Buffer) {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| view.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let rows = buffer.content().chunks(width.into());
        let text = |row: &[ratatui::buffer::Cell]| {
            row.iter().map(|cell| cell.symbol()).collect::<String>()
        };
        let rows = rows.map(|row| text(row).trim_end().to_owned()).collect();
        (rows, buffer)
    }

    fn view(colors: Colors) -> View {
        let mut view = View::new("qmp".into(), colors, None);
        view.update(snapshot(0, 100)).unwrap();
        view.update(snapshot(500, 150)).unwrap();
        view
    }

    fn press(view: &mut View, code: KeyCode) -> bool {
        view.key(KeyEvent::new(code, KeyModifiers::NONE))
    }

    #[test]
    fn the_map_has_ticks_legend_scale_and_rates() {
        let (rows, _) = drawn(&view(Colors::None), 80, 24);
        assert_eq!(rows[0], "guestmemfd-top  qmp  0.5 s");
        assert_eq!(rows[1], "ram0: 1 MiB, mode private, discard now  (1 of 2)");
        assert_eq!(
            &rows[4][..46],
            "P p  private               512 KiB   50.0 %   "
        );
        assert!(rows[2].contains("conversions to private"), "{}", rows[2]);
        assert_eq!(
            rows[12],
            "a cell is 4 KiB, a row 256 KiB; small letters: mixed, mostly this"
        );
        let halves = ['.', 'P'].map(|glyph| glyph.to_string().repeat(64));
        assert_eq!(rows[13], format!("0x000000 {}", halves[0]));
        assert_eq!(rows[16], format!("0x0c0000 {}", halves[1]));
        assert_eq!(rows[21], "events, failed conversions: 0");
        assert!(rows[23].starts_with("live  q quit"));
        // The second column of numbers ends with the rate.
        let (rows, _) = drawn(&view(Colors::None), 120, 24);
        assert!(rows[2].ends_with("150        100.0/s"), "{}", rows[2]);
    }

    #[test]
    fn mixed_and_unread_cells_are_told_without_colour() {
        let mut snapshot = snapshot(0, 1);
        let memory = &mut snapshot.backends[0];
        memory.map.runs = vec![
            (State::Private, 12 << 10),
            (State::Shared, 4 << 10),
            (State::Shared, 496 << 10),
        ];
        let mut view = View::new("qmp".into(), Colors::None, None);
        view.update(snapshot).unwrap();
        // Four rows for the map: a cell of 16 KiB.
        let (rows, _) = drawn(&view, 30, 21);
        assert_eq!(rows[13], "0x000000 pSSSSSSSSSSSSSSS");
        assert_eq!(rows[15], "0x080000 ????????????????");
        assert!(
            rows[17].starts_with("? 512 KiB from 0x80000 on not"),
            "{}",
            rows[17]
        );
    }

    #[test]
    fn colours_are_mixed_where_the_terminal_can() {
        let colors = |no: &str, term: &str| {
            Colors::of(|name| match name {
                "NO_COLOR" => Some(no.to_owned()),
                _ => Some(term.to_owned()),
            })
        };
        assert_eq!(colors("1", "truecolor"), Colors::None);
        assert_eq!(colors("", "truecolor"), Colors::Full);
        assert_eq!(colors("", ""), Colors::Basic);

        let background = |colors| drawn(&view(colors), 80, 24).1[(9, 16)].bg;
        assert_eq!(background(Colors::None), Color::Reset);
        assert_eq!(background(Colors::Basic), Color::Blue);
        assert_eq!(background(Colors::Full), Color::Rgb(0, 96, 180));
    }

    #[test]
    fn keys() {
        let mut view = view(Colors::None);
        press(&mut view, KeyCode::Right);
        assert!(drawn(&view, 80, 24).0[1].starts_with("ram1"));
        press(&mut view, KeyCode::Down);
        assert!(drawn(&view, 80, 24).0[1].starts_with("ram0"));
        press(&mut view, KeyCode::Left);
        assert!(drawn(&view, 80, 24).0[1].starts_with("ram1"));
        // A backend that is gone leaves the first.
        view.update(snapshot(0, 1)).unwrap();
        assert!(drawn(&view, 80, 24).0[1].starts_with("ram0"));

        press(&mut view, KeyCode::Char('p'));
        view.update(snapshot(9000, 1)).unwrap();
        let (rows, _) = drawn(&view, 80, 24);
        assert!(rows[0].ends_with("0.0 s") && rows[23].starts_with("paused"));
        press(&mut view, KeyCode::Char('?'));
        assert!(drawn(&view, 80, 24).0.concat().contains("choose a backend"));
        assert!(!press(&mut view, KeyCode::Esc), "it closes the help only");
        assert!(press(&mut view, KeyCode::Esc));
        assert!(press(&mut view, KeyCode::Char('q')));
    }

    #[test]
    fn any_size_of_a_terminal_will_do() {
        let view = view(Colors::Full);
        for (width, height) in [(1, 1), (8, 3), (20, 15), (300, 100)] {
            drawn(&view, width, height);
        }
        drawn(&View::new("qmp".into(), Colors::None, None), 80, 24);
    }
}
