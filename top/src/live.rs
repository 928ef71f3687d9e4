// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshots that arrive, from a QEMU or a record, and the terminal that shows them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow};
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyEventKind};

use crate::record::{Reader, Writer};
use crate::snapshot::Snapshot;
use crate::source::Source;
use crate::view::View;

/// How soon keys, signals and snapshots are noticed.
const POLL: Duration = Duration::from_millis(50);

/// What a thread that gets snapshots has got.
#[derive(Debug)]
pub(crate) enum Update {
    Snapshot(Box<Snapshot>),
    /// No more come, and that is in order.
    End(String),
    Failed(Error),
}

/// Asks a QEMU again and again, in a thread of its own: whoever shows it must not wait for QEMU.
pub(crate) fn ask(mut source: Source, interval: Duration) -> Receiver<Update> {
    spawn(move |sender| {
        loop {
            let next = Instant::now() + interval;
            let asked = source.sample();
            let idle = |snapshot| {
                // Nobody listens any more: this program ends.
                let _ = sender.send(Update::Snapshot(Box::new(snapshot)));
                source.idle(next.saturating_duration_since(Instant::now()))
            };
            if let Err(error) = asked.and_then(idle) {
                return match source.ended.take() {
                    Some(reason) => Update::End(format!("QEMU has ended ({reason})")),
                    None => Update::Failed(error),
                };
            }
        }
    })
}

/// Plays a record as fast as it was made, or with a snapshot every `interval`.
pub(crate) fn play(mut reader: Reader, interval: Option<Duration>) -> Receiver<Update> {
    spawn(move |sender| {
        let mut before = None;
        for snapshot in reader.by_ref() {
            let elapsed = before.map_or(0, |before| snapshot.elapsed - before);
            before = Some(snapshot.elapsed);
            thread::sleep(interval.unwrap_or(Duration::from_millis(elapsed)));
            if sender.send(Update::Snapshot(Box::new(snapshot))).is_err() {
                break;
            }
        }
        match (reader.cut, before) {
            (Some(cut), None) => Update::Failed(anyhow!(cut)),
            (Some(cut), _) => Update::End(cut),
            (None, None) => Update::Failed(anyhow!("the record has no snapshot")),
            (None, _) => Update::End("end of the record".to_owned()),
        }
    })
}

fn spawn(get: impl FnOnce(&SyncSender<Update>) -> Update + Send + 'static) -> Receiver<Update> {
    let (sender, updates) = sync_channel(1);
    thread::spawn(move || {
        let last = get(&sender);
        let _ = sender.send(last);
    });
    updates
}

/// Set once this program has been told to end.
pub(crate) fn stop_signals() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed))
        .context("cannot listen for signals")?;
    Ok(stop)
}

/// Writes snapshots until QEMU or this program ends; returns why, and how many.
pub(crate) fn write(
    updates: &Receiver<Update>,
    writer: &mut Writer,
    stop: &AtomicBool,
) -> Result<(String, u64)> {
    let mut count = 0;
    while !stop.load(Ordering::Relaxed) {
        match updates.recv_timeout(POLL) {
            Ok(Update::Snapshot(snapshot)) => {
                writer.write(&snapshot)?;
                count += 1;
            }
            Ok(Update::End(reason)) => return Ok((reason, count)),
            Ok(Update::Failed(error)) => {
                return Err(error.context(format!("after {count} snapshots")));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(gone()),
        }
    }
    Ok(("stopped".to_owned(), count))
}

fn gone() -> Error {
    anyhow!("the thread that gets snapshots has failed")
}

/// Shows what arrives until somebody quits or a failure arrives. The terminal is as it was
/// afterwards, after a panic too.
pub(crate) fn show(
    updates: &Receiver<Update>,
    writer: Option<&mut Writer>,
    view: &mut View,
    stop: &AtomicBool,
) -> Result<()> {
    let shown = ratatui::try_init()
        .context("cannot use this terminal")
        .and_then(|mut terminal| run(&mut terminal, updates, writer, view, stop));
    ratatui::restore();
    shown
}

fn run(
    terminal: &mut DefaultTerminal,
    updates: &Receiver<Update>,
    mut writer: Option<&mut Writer>,
    view: &mut View,
    stop: &AtomicBool,
) -> Result<()> {
    let mut changed = true;
    while !stop.load(Ordering::Relaxed) {
        if changed {
            terminal.draw(|frame| view.draw(frame))?;
        }
        changed = event::poll(POLL)?;
        if changed
            && let Event::Key(key) = event::read()?
            && key.kind == KeyEventKind::Press
            && view.key(key)
        {
            break;
        }
        if view.end.is_some() {
            continue;
        }
        match updates.try_recv() {
            Ok(Update::Snapshot(snapshot)) => {
                if let Some(writer) = &mut writer {
                    writer.write(&snapshot)?;
                }
                view.update(*snapshot)?;
            }
            Ok(Update::End(reason)) => view.end = Some(reason),
            Ok(Update::Failed(error)) => return Err(error),
            Err(TryRecvError::Empty) => continue,
            Err(TryRecvError::Disconnected) => return Err(gone()),
        }
        changed = true;
    }
    Ok(())
}
