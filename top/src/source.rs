// SPDX-License-Identifier: MIT OR Apache-2.0
//! Snapshots of a running QEMU.

use std::io::{Error, ErrorKind};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, anyhow, ensure};
use guestmemfd_qmp::query::{self, Backend, QueryMap, human};
use guestmemfd_qmp::{Event, Qmp};
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};
use serde_json::Value;

use crate::snapshot::{Events, Map, Memory, Snapshot};

/// Runs that one answer may have: few enough that QEMU's main loop is not held up for long.
const RUNS: u32 = 4096;
/// Questions for the map of one backend. What they do not reach stays unread.
pub(crate) const QUESTIONS: usize = 16;

/// A connection to a QEMU.
#[derive(Debug)]
pub(crate) struct Source {
    qmp: Qmp,
    started: Instant,
    events: Events,
    /// Why it has ended, as far as QEMU has said.
    pub(crate) ended: Option<String>,
}

impl Source {
    /// Connects; nothing that QEMU is to say may take longer than `limit`.
    pub(crate) fn connect(path: &Path, limit: Duration) -> Result<Self> {
        let socket = open(path, limit)
            .map_err(|error| anyhow!("{}: {}", path.display(), explain(&error)))?;
        let mut qmp = Qmp::new(socket, limit, None)?;
        qmp.handshake(limit).with_context(|| {
            format!(
                "{}: no QMP there, or another client has it (QEMU serves one at a time)",
                path.display()
            )
        })?;
        Ok(Self {
            qmp,
            started: Instant::now(),
            events: Events::default(),
            ended: None,
        })
    }

    /// Asks for all there is.
    pub(crate) fn sample(&mut self) -> Result<Snapshot> {
        let result = self.try_sample();
        self.note_events();
        let mut snapshot = result?;
        snapshot.events = self.events.clone();
        snapshot.check().context("QEMU's answers make no sense")?;
        Ok(snapshot)
    }

    fn try_sample(&mut self) -> Result<Snapshot> {
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let elapsed = self.started.elapsed();
        let mut backends = Vec::new();
        for info in query::backends(&mut self.qmp)? {
            match self.map(&info) {
                Ok(map) => backends.push(Memory { info, map }),
                Err(error) => {
                    // It may have been removed since.
                    let now = query::backends(&mut self.qmp);
                    let gone = now.is_ok_and(|now| now.iter().all(|b| b.id != info.id));
                    ensure!(gone, error);
                }
            }
        }
        ensure!(
            !backends.is_empty(),
            "this QEMU has no memory-backend-guestmemfd"
        );
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        Ok(Snapshot {
            time: time.map_or(0, milliseconds),
            elapsed: milliseconds(elapsed),
            backends,
            events: Events::default(),
        })
    }

    fn map(&mut self, info: &Backend) -> Result<Map> {
        let mut map = Map::default();
        let mut offset = 0;
        for _ in 0..QUESTIONS {
            let part = self.qmp.execute(&QueryMap {
                id: &info.id,
                offset,
                max_runs: RUNS,
            })?;
            match map
                .append(&part, &info.id, info.size)
                .context("the answer to x-query-guestmemfd-map makes no sense")?
            {
                Some(next) => offset = next,
                None => break,
            }
        }
        Ok(map)
    }

    /// Waits; an error if QEMU closes the connection.
    pub(crate) fn idle(&mut self, time: Duration) -> Result<()> {
        let result = self.qmp.idle(time);
        self.note_events();
        result
    }

    fn note_events(&mut self) {
        for event in self.qmp.take_events() {
            let seen = match event.name.as_str() {
                "GUESTMEMFD_CONVERSION_FAILED" => &mut self.events.conversion_failed,
                "GUESTMEMFD_PRIVATE_ACCESS" | "GUESTMEMFD_STRAY_ACCESS" => {
                    &mut self.events.private_access
                }
                "SHUTDOWN" => {
                    self.ended = Some(text(&event.data, "reason"));
                    continue;
                }
                _ => continue,
            };
            seen.count = seen.count.saturating_add(1);
            seen.last = Some(describe(&event));
        }
    }
}

fn open(path: &Path, limit: Duration) -> rustix::io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC;
    let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Without it connecting waits for ever where a listener has stopped accepting.
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(limit))?;
    net::connect(&socket, &address)?;
    Ok(UnixStream::from(socket))
}

fn explain(error: &rustix::io::Errno) -> String {
    let error = Error::from(*error);
    let advice = match error.kind() {
        ErrorKind::NotFound => "start QEMU with -qmp unix:PATH,server=on,wait=off",
        ErrorKind::PermissionDenied => "the socket belongs to another user: run this as that user",
        ErrorKind::ConnectionRefused => "nobody listens there; QEMU may have ended",
        ErrorKind::WouldBlock => "the listener accepts no connection; another client may have it",
        _ => "this is not the path of a QMP socket",
    };
    format!("cannot connect: {error}: {advice}")
}

/// What an event says, in a line without control characters.
fn describe(event: &Event) -> String {
    let data = &event.data;
    let number = |name: &str| data.get(name).and_then(Value::as_u64);
    let mut words = vec![text(data, "id")];
    for name in ["gpa", "offset"] {
        words.extend(number(name).map(|number| format!("{name} {number:#x}")));
    }
    words.extend(number("size").map(human));
    if data.get("error").is_some() {
        words.push(format!("to {}: {}", text(data, "to"), text(data, "error")));
    }
    words.join(", ")
}

fn text(data: &Value, name: &str) -> String {
    let text = data.get(name).and_then(Value::as_str).unwrap_or("?");
    text.replace(char::is_control, " ")
}
