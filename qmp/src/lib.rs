// SPDX-License-Identifier: MIT OR Apache-2.0
//! A QMP client with time limits, and the commands of `memory-backend-guestmemfd`.
//!
//! Messages are those of `qapi-spec`. The loop around them is our own because the one in `qapi`
//! fails on an event that its schema does not list and then takes the answer to one command for
//! that of the next; and it has no time limits.

pub mod query;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use qapi_spec::Response;
pub use qapi_spec::{Command, Error as Refusal, ErrorClass};
use serde_json::{Value, json};

/// The longest line that is read: some times the longest answer that QEMU has, a map of 65536 runs.
const LINE_LIMIT: u64 = 16 << 20;

/// An event, with the name that QEMU gave it.
#[derive(Debug, Clone)]
pub struct Event {
    /// In capitals.
    pub name: String,
    /// Null if it has none.
    pub data: Value,
}

#[derive(Debug)]
enum Message {
    Greeting,
    Event(Event),
    Answer(Value),
    /// A line that is not JSON; nothing is read after it.
    Garbage(String),
}

/// A connection in command mode.
#[derive(Debug)]
pub struct Qmp {
    socket: UnixStream,
    messages: Receiver<Message>,
    events: VecDeque<Event>,
    transcript: Transcript,
    limit: Duration,
}

/// All traffic, for whoever looks for the reason of a failure.
type Transcript = Option<Arc<Mutex<File>>>;

impl Qmp {
    /// Takes one end of a socket whose other end QEMU has (or will have). An answer may take as long
    /// as `limit`; all traffic is written to `transcript`.
    pub fn new(socket: UnixStream, limit: Duration, transcript: Option<&Path>) -> Result<Self> {
        let create = |path: &Path| {
            let file = File::create(path);
            file.with_context(|| format!("cannot create {}", path.display()))
        };
        let file = transcript.map(create).transpose()?;
        let transcript = file.map(|file| Arc::new(Mutex::new(file)));
        socket.set_write_timeout(Some(limit))?;
        let (sender, messages) = channel();
        let reader = BufReader::new(socket.try_clone()?);
        let log = transcript.clone();
        thread::spawn(move || read_messages(reader, &log, &sender));
        Ok(Self {
            socket,
            messages,
            events: VecDeque::new(),
            transcript,
            limit,
        })
    }

    /// Waits for the greeting and leaves negotiation mode.
    pub fn handshake(&mut self, limit: Duration) -> Result<()> {
        match self.messages.recv_timeout(limit) {
            Ok(Message::Greeting) => {}
            Ok(other) => bail!("QMP began with {other:?} instead of a greeting"),
            Err(RecvTimeoutError::Timeout) => bail!("QMP did not greet within {limit:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!("QEMU closed QMP before greeting"),
        }
        self.raw("qmp_capabilities", json!({}))?
            .map_err(|e| anyhow!("qmp_capabilities was refused: {}", e.desc))?;
        Ok(())
    }

    /// Runs a command; the outer error means that QMP itself no longer works.
    pub fn raw(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<std::result::Result<Value, Refusal>> {
        let text = json!({"execute": command, "arguments": arguments}).to_string();
        log_line(&self.transcript, "->", &text);
        match self.socket.write_all(format!("{text}\n").as_bytes()) {
            // What was said before it closed may still be unread.
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                return Err(error).with_context(|| format!("cannot send {command} over QMP"));
            }
            _ => {}
        }
        let deadline = Instant::now() + self.limit;
        loop {
            match self.receive(deadline) {
                Ok(Message::Answer(value)) => {
                    let response: Response<Value> = serde_json::from_value(value.clone())
                        .with_context(|| format!("{command} was answered by {value}"))?;
                    return Ok(response.result());
                }
                Ok(Message::Event(event)) => self.events.push_back(event),
                Ok(Message::Greeting) => bail!("a second QMP greeting, in answer to {command}"),
                Ok(Message::Garbage(line)) => bail!("{command} was answered by no JSON: {line:?}"),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no answer to {command} within {:?}", self.limit)
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("QEMU closed QMP instead of answering {command}")
                }
            }
        }
    }

    /// Runs a command that must succeed and whose result has no type here.
    pub fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.raw(command, arguments)?
            .map_err(|e| anyhow!("{command} was refused: {}", e.desc))
    }

    /// Runs a typed command that must succeed.
    pub fn execute<C: Command>(&mut self, command: &C) -> Result<C::Ok> {
        let answer = self.raw(C::NAME, serde_json::to_value(command)?)?;
        let value = answer.map_err(|e| match e.class {
            ErrorClass::CommandNotFound => anyhow!(
                "this QEMU has no command {}: it lacks the patches of memory-backend-guestmemfd, or \
                 the one that adds the command",
                C::NAME
            ),
            _ => anyhow!("{} was refused: {}", C::NAME, e.desc),
        })?;
        serde_json::from_value(value.clone())
            .with_context(|| format!("{} was answered by {value}", C::NAME))
    }

    /// Waits for an event with one of these names; other events before it are dropped.
    pub fn wait_event(&mut self, names: &[&str], limit: Duration) -> Result<Event> {
        self.poll_event(names, limit)?.with_context(|| {
            let name = names.join(" or ");
            format!("no event {name} within {} s", limit.as_secs())
        })
    }

    /// The same where none need come.
    pub fn poll_event(&mut self, names: &[&str], limit: Duration) -> Result<Option<Event>> {
        let name = names.join(" or ");
        let deadline = Instant::now() + limit;
        loop {
            while let Some(event) = self.events.pop_front() {
                if names.contains(&event.name.as_str()) {
                    return Ok(Some(event));
                }
            }
            match self.receive(deadline) {
                Ok(Message::Event(event)) => self.events.push_back(event),
                Ok(other) => bail!("{other:?} without a command, while waiting for {name}"),
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("QEMU closed QMP before event {name}")
                }
            }
        }
    }

    /// Lets time pass; an error means that QMP no longer works.
    pub fn idle(&mut self, time: Duration) -> Result<()> {
        let deadline = Instant::now() + time;
        loop {
            match self.receive(deadline) {
                Ok(Message::Event(event)) => self.events.push_back(event),
                Ok(other) => bail!("{other:?} without a command"),
                Err(RecvTimeoutError::Timeout) => return Ok(()),
                Err(RecvTimeoutError::Disconnected) => bail!("QEMU closed QMP"),
            }
        }
    }

    /// The events that have come since the last call, as far as commands and waits met them.
    pub fn take_events(&mut self) -> impl Iterator<Item = Event> {
        std::mem::take(&mut self.events).into_iter()
    }

    fn receive(&self, deadline: Instant) -> std::result::Result<Message, RecvTimeoutError> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.messages.recv_timeout(left)
    }
}

fn read_messages(
    mut reader: BufReader<UnixStream>,
    transcript: &Transcript,
    sender: &Sender<Message>,
) {
    let mut line = Vec::new();
    loop {
        line.clear();
        // An error is the end of the connection as well: the channel closes and whoever waits is
        // told.
        let read = (&mut reader).take(LINE_LIMIT).read_until(b'\n', &mut line);
        if !matches!(read, Ok(1..)) {
            return;
        }
        let text = || String::from_utf8_lossy(&line);
        if transcript.is_some() {
            log_line(transcript, "<-", text().trim_end());
        }
        let message = match serde_json::from_slice(&line) {
            Ok(value) => classify(value),
            Err(_) => Message::Garbage(text().trim_end().chars().take(60).collect()),
        };
        let last = matches!(message, Message::Garbage(_));
        if sender.send(message).is_err() || last {
            return;
        }
    }
}

fn classify(mut value: Value) -> Message {
    if value.get("QMP").is_some() {
        return Message::Greeting;
    }
    match value.get("event").and_then(Value::as_str) {
        Some(name) => Message::Event(Event {
            name: name.to_owned(),
            data: value.get_mut("data").map(Value::take).unwrap_or_default(),
        }),
        None => Message::Answer(value),
    }
}

fn log_line(transcript: &Transcript, direction: &str, text: &str) {
    let Some(transcript) = transcript else { return };
    let mut file = transcript.lock().unwrap_or_else(PoisonError::into_inner);
    // A transcript that cannot be written must not fail the test.
    let _ = writeln!(file, "{direction} {text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Serialize;

    #[derive(Serialize)]
    struct Answer {}
    impl Command for Answer {
        type Ok = u32;
        const NAME: &'static str = "answer";
        const ALLOW_OOB: bool = false;
    }

    /// A peer that says all of `lines` and then reads until the other side hangs up.
    fn peer(lines: &'static str) -> (Qmp, thread::JoinHandle<String>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let qmp = Qmp::new(
            ours,
            Duration::from_secs(60),
            Some(&dir.path().join("qmp.log")),
        )
        .unwrap();
        let join = thread::spawn(move || {
            theirs.write_all(lines.as_bytes()).unwrap();
            theirs.shutdown(std::net::Shutdown::Write).unwrap();
            std::io::read_to_string(theirs).unwrap()
        });
        (qmp, join, dir)
    }

    #[test]
    fn unknown_event_between_command_and_answer() {
        let (mut qmp, _join, _dir) = peer(
            "{\"QMP\":{}}\r\n{\"return\":{}}\r\n\
             {\"event\":\"GUESTMEMFD_NEVER_HEARD_OF\",\"data\":{\"id\":\"ram0\"},\"timestamp\":{}}\r\n\
             {\"return\":42}\r\n{\"error\":{\"class\":\"GenericError\",\"desc\":\"no\"}}\r\n",
        );
        qmp.handshake(Duration::from_secs(5)).unwrap();
        assert_eq!(qmp.execute(&Answer {}).unwrap(), 42);
        assert_eq!(qmp.raw("again", json!({})).unwrap().unwrap_err().desc, "no");
        let event = qmp
            .wait_event(&["GUESTMEMFD_NEVER_HEARD_OF"], Duration::from_secs(5))
            .unwrap();
        assert_eq!(event.data["id"], "ram0");
    }

    #[test]
    fn garbage_is_shown() {
        let (mut qmp, _join, _dir) = peer("{\"QMP\":{}}\r\n{\"return\":{}}\r\nSSH-2.0 \u{7}\r\n");
        qmp.handshake(Duration::from_secs(5)).unwrap();
        let error = qmp.run("query-status", json!({})).unwrap_err().to_string();
        assert!(error.contains(r#"no JSON: "SSH-2.0 \u{7}""#), "{error}");
    }

    #[test]
    fn end_of_connection_is_an_error_not_a_wait() {
        let (mut qmp, _join, _dir) = peer("{\"QMP\":{}}\r\n{\"return\":{}}\r\n");
        qmp.handshake(Duration::from_secs(5)).unwrap();
        assert!(qmp.run("query-status", json!({})).is_err());
        assert!(
            qmp.wait_event(&["SHUTDOWN"], Duration::from_secs(60))
                .is_err()
        );
    }
}
