// SPDX-License-Identifier: GPL-2.0-or-later
//! Says what is running and what is left: bars on a terminal, plain lines
//! elsewhere. All of it goes to stderr.

use std::cell::Cell;
use std::fmt::Display;
use std::io::IsTerminal as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// How often a long activity is reported where there is no terminal.
const PLAIN_EVERY: Duration = Duration::from_secs(20);

/// The steps of one command, numbered as they begin. Several can run at once.
#[derive(Debug)]
pub(crate) struct Steps {
    total: usize,
    begun: AtomicUsize,
    bars: MultiProgress,
}

impl Steps {
    /// For a command of `total` steps.
    pub(crate) fn new(total: usize) -> Self {
        Self {
            total,
            begun: AtomicUsize::new(0),
            bars: MultiProgress::new(),
        }
    }

    /// Begins the next step.
    pub(crate) fn begin(&self, name: impl Display) -> Step {
        let number = self.begun.fetch_add(1, Ordering::Relaxed) + 1;
        let label = match self.total {
            1 => name.to_string(),
            total => format!("[{number}/{total}] {name}"),
        };
        Step::new(label, &self.bars)
    }
}

/// One step that runs.
#[derive(Debug)]
pub(crate) struct Step {
    label: String,
    bars: MultiProgress,
    bar: Option<ProgressBar>,
    start: Instant,
    activity: Cell<Instant>,
    printed: Cell<Instant>,
}

impl Step {
    fn new(label: String, bars: &MultiProgress) -> Self {
        let now = Instant::now();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = bars.add(ProgressBar::new_spinner().with_prefix(label.clone()));
            bar.set_style(style("{prefix} {spinner} {msg} {elapsed:.dim}"));
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Self {
            label,
            bars: bars.clone(),
            bar,
            start: now,
            activity: Cell::new(now),
            printed: Cell::new(now),
        }
    }

    /// What the step does from now on.
    pub(crate) fn say(&self, what: impl Display) {
        self.activity.set(Instant::now());
        match &self.bar {
            Some(bar) => {
                bar.set_style(style("{prefix} {spinner} {msg} {elapsed:.dim}"));
                bar.set_message(what.to_string());
                bar.reset();
            }
            None => self.plain(what),
        }
    }

    /// How much of the activity is done. `total` may be an estimate.
    pub(crate) fn amount(&self, done: u64, total: u64) {
        let done = done.min(total);
        if let Some(bar) = &self.bar {
            if bar.length() != Some(total) {
                bar.set_style(style(
                    "{prefix} {spinner} {msg} [{bar:25}] {percent} % {eta} left",
                ));
                bar.set_length(total);
            }
            bar.set_position(done);
        } else if done > 0 && self.printed.get().elapsed() >= PLAIN_EVERY {
            let percent = done * 100 / total.max(1);
            let left = left(self.activity.get().elapsed(), done, total);
            self.plain(format_args!("{percent} %, about {left} left"));
        }
    }

    /// A line that stays.
    pub(crate) fn note(&self, line: impl Display) {
        match &self.bar {
            Some(_) => self.print(line),
            None => self.plain(line),
        }
    }

    fn plain(&self, line: impl Display) {
        self.printed.set(Instant::now());
        self.print(line);
    }

    /// A line beside the bars of all steps that run.
    fn print(&self, line: impl Display) {
        self.bars.suspend(|| eprintln!("{}: {line}", self.label));
    }

    /// Ends the step with a word on its result, such as `built` or `cached`.
    pub(crate) fn finish(self, result: impl Display) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let time = seconds(self.start.elapsed());
        self.print(format_args!("{result} ({time})"));
    }

    /// Takes the bar away, for an activity that writes to the terminal itself.
    pub(crate) fn yield_terminal(&self) {
        match &self.bar {
            Some(bar) => {
                bar.finish_and_clear();
                eprintln!("{}", self.label);
            }
            None => eprintln!("{} ...", self.label),
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants of this file; a bad one shows at once.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

fn left(elapsed: Duration, done: u64, total: u64) -> String {
    seconds(elapsed.mul_f64(total.saturating_sub(done) as f64 / done.max(1) as f64))
}

/// A duration for people: `0.4 s`, `12 s`, `4 min 5 s`.
pub(crate) fn seconds(time: Duration) -> String {
    match time.as_secs() {
        0..10 => format!("{:.1} s", time.as_secs_f64()),
        whole @ 10..120 => format!("{whole} s"),
        whole => format!("{} min {} s", whole / 60, whole % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_for_people() {
        assert_eq!(seconds(Duration::from_millis(420)), "0.4 s");
        assert_eq!(seconds(Duration::from_secs(119)), "119 s");
        assert_eq!(seconds(Duration::from_secs(245)), "4 min 5 s");
    }

    #[test]
    fn what_is_left_follows_from_what_took_how_long() {
        assert_eq!(left(Duration::from_secs(10), 1, 4), "30 s");
        assert_eq!(left(Duration::from_secs(10), 4, 4), "0.0 s");
    }
}
