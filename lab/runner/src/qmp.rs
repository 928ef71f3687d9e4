// SPDX-License-Identifier: GPL-2.0-or-later
//! A QMP client with time limits.
//!
//! Messages are those of `qapi-spec`. The loop around them is our own because the one in `qapi`
//! fails on an event that its schema does not list and then takes the answer to one command for
//! that of the next; and it has no time limits.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use qapi_spec::{Command, Response};
use serde_json::{Value, json};

/// How long an answer to a command may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// QEMU's answer to a command that it refused.
#[derive(Debug, Clone)]
pub(crate) struct Refusal(pub(crate) String);

/// An event, with the name that QEMU gave it.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) data: Value,
}

#[derive(Debug)]
enum Message {
    Greeting,
    Event(Event),
    Answer(Value),
}

/// A connection in command mode.
#[derive(Debug)]
pub(crate) struct Qmp {
    socket: UnixStream,
    messages: Receiver<Message>,
    events: VecDeque<Event>,
    transcript: Arc<Mutex<File>>,
}

impl Qmp {
    /// Takes one end of a socket whose other end QEMU has (or will have) and writes all traffic to
    /// `transcript`.
    pub(crate) fn new(socket: UnixStream, transcript: &Path) -> Result<Self> {
        let file = File::create(transcript)
            .with_context(|| format!("cannot create {}", transcript.display()))?;
        let transcript = Arc::new(Mutex::new(file));
        let (sender, messages) = channel();
        let reader = BufReader::new(socket.try_clone()?);
        let log = Arc::clone(&transcript);
        thread::spawn(move || read_messages(reader, &log, &sender));
        Ok(Self {
            socket,
            messages,
            events: VecDeque::new(),
            transcript,
        })
    }

    /// Waits for the greeting and leaves negotiation mode.
    pub(crate) fn handshake(&mut self, limit: Duration) -> Result<()> {
        match self.messages.recv_timeout(limit) {
            Ok(Message::Greeting) => {}
            Ok(other) => bail!("QMP began with {other:?} instead of a greeting"),
            Err(RecvTimeoutError::Timeout) => {
                bail!("QMP did not greet within {} s", limit.as_secs())
            }
            Err(RecvTimeoutError::Disconnected) => bail!("QEMU closed QMP before greeting"),
        }
        self.raw("qmp_capabilities", json!({}))?
            .map_err(|e| anyhow::anyhow!("qmp_capabilities was refused: {}", e.0))?;
        Ok(())
    }

    /// Runs a command; the outer error means that QMP itself no longer works.
    pub(crate) fn raw(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<std::result::Result<Value, Refusal>> {
        let text = json!({"execute": command, "arguments": arguments}).to_string();
        log_line(&self.transcript, "->", &text);
        self.socket
            .write_all(format!("{text}\n").as_bytes())
            .with_context(|| format!("cannot send {command} over QMP"))?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            match self.receive(deadline) {
                Ok(Message::Answer(value)) => {
                    let response: Response<Value> = serde_json::from_value(value.clone())
                        .with_context(|| format!("{command} was answered by {value}"))?;
                    return Ok(response.result().map_err(|e| Refusal(e.desc)));
                }
                Ok(Message::Event(event)) => self.events.push_back(event),
                Ok(Message::Greeting) => bail!("a second QMP greeting, in answer to {command}"),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no answer to {command} within {} s", ANSWER_LIMIT.as_secs())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("QEMU closed QMP instead of answering {command}")
                }
            }
        }
    }

    /// Runs a command that must succeed and whose result has no type here.
    pub(crate) fn run(&mut self, command: &str, arguments: Value) -> Result<Value> {
        self.raw(command, arguments)?
            .map_err(|e| anyhow::anyhow!("{command} was refused: {}", e.0))
    }

    /// Runs a typed command that must succeed.
    pub(crate) fn execute<C: Command>(&mut self, command: &C) -> Result<C::Ok> {
        let value = self.run(C::NAME, serde_json::to_value(command)?)?;
        serde_json::from_value(value.clone())
            .with_context(|| format!("{} was answered by {value}", C::NAME))
    }

    /// Waits for an event with one of these names; other events before it are dropped.
    pub(crate) fn wait_event(&mut self, names: &[&str], limit: Duration) -> Result<Event> {
        self.poll_event(names, limit)?.with_context(|| {
            let name = names.join(" or ");
            format!("no event {name} within {} s", limit.as_secs())
        })
    }

    /// The same where none need come.
    pub(crate) fn poll_event(&mut self, names: &[&str], limit: Duration) -> Result<Option<Event>> {
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

    fn receive(&self, deadline: Instant) -> std::result::Result<Message, RecvTimeoutError> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.messages.recv_timeout(left)
    }
}

fn read_messages(
    mut reader: BufReader<UnixStream>,
    transcript: &Mutex<File>,
    sender: &Sender<Message>,
) {
    let mut line = String::new();
    loop {
        line.clear();
        // An error is the end of the connection as well: the channel closes and whoever waits is
        // told.
        if !matches!(reader.read_line(&mut line), Ok(1..)) {
            return;
        }
        log_line(transcript, "<-", line.trim_end());
        let Ok(value) = serde_json::from_str(&line) else {
            return;
        };
        if sender.send(classify(value)).is_err() {
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

fn log_line(transcript: &Mutex<File>, direction: &str, text: &str) {
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
        let qmp = Qmp::new(ours, &dir.path().join("qmp.log")).unwrap();
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
        assert_eq!(qmp.raw("again", json!({})).unwrap().unwrap_err().0, "no");
        let event = qmp
            .wait_event(&["GUESTMEMFD_NEVER_HEARD_OF"], Duration::from_secs(5))
            .unwrap();
        assert_eq!(event.data["id"], "ram0");
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
