// SPDX-License-Identifier: GPL-2.0-or-later
//! Runs other programs: output to a log file and to whoever follows it, a time
//! limit, and no process left behind, not even on Ctrl-C.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::progress::seconds;
use crate::scratch;

/// How many of the last lines an error shows.
const TAIL: usize = 30;

/// How long a process has to end after it was asked to.
const GRACE: Duration = Duration::from_secs(3);

/// The process groups that run now; each child has one of its own.
static GROUPS: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// Ends what runs when the user interrupts this program.
pub(crate) fn end_children_on_interrupt() -> Result<()> {
    ctrlc::set_handler(|| {
        // Kept until the end, so that nothing is started in place of what is ended.
        let groups = groups();
        for group in groups.iter() {
            let _ = kill_process_group(*group, Signal::TERM);
        }
        scratch::remove_all();
        eprintln!("\ninterrupted");
        std::process::exit(130);
    })
    .context("cannot set up the handling of Ctrl-C")
}

/// A program to run.
pub(crate) struct Job<'a> {
    name: String,
    command: Command,
    log: Option<PathBuf>,
    limit: Option<Duration>,
    follow: Box<dyn FnMut(&str) + 'a>,
}

/// How a program ended.
#[derive(Debug)]
pub(crate) struct Outcome {
    name: String,
    log: Option<PathBuf>,
    status: ExitStatus,
    over: Option<Duration>,
    tail: VecDeque<String>,
}

impl<'a> Job<'a> {
    /// `name` says in errors what the program was to do.
    pub(crate) fn new(name: impl Into<String>, command: Command) -> Self {
        Self {
            name: name.into(),
            command,
            log: None,
            limit: None,
            follow: Box::new(|_| {}),
        }
    }

    /// Keeps all output in a file.
    pub(crate) fn log(mut self, path: &Path) -> Self {
        self.log = Some(path.to_owned());
        self
    }

    /// Ends the program and all it started after this time.
    pub(crate) fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Hands on every line of output, of both streams, as it comes.
    pub(crate) fn follow(mut self, follow: impl FnMut(&str) + 'a) -> Self {
        self.follow = Box::new(follow);
        self
    }

    /// Runs the program; anything but success is an error with its last lines.
    pub(crate) fn run(self) -> Result<()> {
        self.outcome()?.check()
    }

    /// Runs the program, whatever its exit status.
    pub(crate) fn outcome(mut self) -> Result<Outcome> {
        let mut log = match &self.log {
            Some(path) => Some(
                File::create(path).with_context(|| format!("cannot make {}", path.display()))?,
            ),
            None => None,
        };
        let (mut child, group) = Group::spawn(|| self.spawn())?;
        let (sender, lines) = channel();
        forward(child.stdout.take(), sender.clone());
        forward(child.stderr.take(), sender);

        let mut tail = VecDeque::new();
        let mut record = |line: &str| {
            if let Some(log) = &mut log {
                // A full disk shows in what the program itself cannot write.
                let _ = writeln!(log, "{line}");
            }
            (self.follow)(line);
            if tail.len() == TAIL {
                tail.pop_front();
            }
            tail.push_back(line.to_owned());
        };
        let over = follow_lines(&mut child, &group, &lines, self.limit, &mut record)?;
        let status = child
            .wait()
            .with_context(|| format!("{}: lost it", self.name))?;
        Ok(Outcome {
            name: self.name,
            log: self.log,
            status,
            over,
            tail,
        })
    }

    fn spawn(&mut self) -> Result<Child> {
        self.command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .with_context(|| format!("{}: cannot run {}", self.name, show(&self.command)))
    }
}

/// Hands lines to `record` until the program has ended; returns the limit if
/// the program was ended for going over it.
fn follow_lines(
    child: &mut Child,
    group: &Group,
    lines: &Receiver<String>,
    limit: Option<Duration>,
    record: &mut impl FnMut(&str),
) -> Result<Option<Duration>> {
    let start = Instant::now();
    let mut over = None;
    let mut ended: Option<Instant> = None;
    loop {
        match lines.recv_timeout(Duration::from_millis(50)) {
            Ok(line) => record(&line),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if ended.is_none() && child.try_wait()?.is_some() {
            ended = Some(Instant::now());
        }
        if over.is_none() && ended.is_none() && limit.is_some_and(|l| start.elapsed() >= l) {
            over = limit;
            group.signal(Signal::TERM);
        }
        let overdue = over.is_some_and(|limit| start.elapsed() >= limit + GRACE);
        // Something that it left behind may hold the output open.
        if overdue || ended.is_some_and(|at| at.elapsed() >= GRACE) {
            group.signal(Signal::KILL);
        }
    }
    Ok(over)
}

impl Outcome {
    /// An error unless the program ended in success.
    pub(crate) fn check(&self) -> Result<()> {
        if self.success() {
            return Ok(());
        }
        let mut message = format!("{}: {}", self.name, self.ending());
        for line in &self.tail {
            message.push_str("\n    ");
            message.push_str(line);
        }
        if let Some(log) = &self.log {
            message.push_str(&format!("\n    (all of it: {})", log.display()));
        }
        bail!(message)
    }

    pub(crate) fn success(&self) -> bool {
        self.status.success() && self.over.is_none()
    }

    /// Whether the program was ended because it ran too long.
    pub(crate) fn timed_out(&self) -> bool {
        self.over.is_some()
    }

    /// How the program ended, in words.
    pub(crate) fn ending(&self) -> String {
        match (self.over, self.status.code(), self.status.signal()) {
            (Some(limit), ..) => format!("still running after {}, ended", seconds(limit)),
            (_, Some(code), _) => format!("exit status {code}"),
            (_, _, Some(signal)) => format!("ended by signal {signal}"),
            _ => "ended".to_owned(),
        }
    }
}

/// A child's process group, known to the handler of Ctrl-C.
struct Group(Pid);

impl Group {
    fn spawn(start: impl FnOnce() -> Result<Child>) -> Result<(Child, Self)> {
        let mut groups = groups();
        let child = start()?;
        let group = Pid::from_child(&child);
        groups.push(group);
        Ok((child, Self(group)))
    }

    fn signal(&self, signal: Signal) {
        // It may have ended by itself.
        let _ = kill_process_group(self.0, signal);
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        groups().retain(|group| *group != self.0);
    }
}

fn groups() -> MutexGuard<'static, Vec<Pid>> {
    GROUPS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads lines in a thread of its own; bytes that are no UTF-8 are replaced.
fn forward(stream: Option<impl Read + Send + 'static>, sender: Sender<String>) {
    let Some(stream) = stream else { return };
    std::thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(count) if count > 0) {
            let text = String::from_utf8_lossy(&line);
            if sender
                .send(text.trim_end_matches(['\n', '\r']).to_owned())
                .is_err()
            {
                return;
            }
            line.clear();
        }
    });
}

/// A command as one would type it.
fn show(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        text.push(' ');
        text.push_str(&arg.to_string_lossy());
    }
    text
}

/// A program's standard output as text, for short questions.
pub(crate) fn output(mut command: Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {}", show(&command)))?;
    if !output.status.success() {
        bail!(
            "{}: {}\n{}",
            show(&command),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
    }
    String::from_utf8(output.stdout).with_context(|| format!("output of {}", show(&command)))
}

/// A command from its program and arguments.
pub(crate) fn command<S: AsRef<std::ffi::OsStr>>(
    program: impl AsRef<std::ffi::OsStr>,
    args: impl IntoIterator<Item = S>,
) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        command("sh", ["-c", script])
    }

    #[test]
    fn lines_of_both_streams_are_followed_and_logged() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let log = dir.path().join("log");
        let mut lines = Vec::new();
        Job::new("test", shell("echo one; echo two >&2"))
            .log(&log)
            .follow(|line| lines.push(line.to_owned()))
            .run()
            .expect("success");
        lines.sort();
        assert_eq!(lines, ["one", "two"]);
        assert_eq!(
            std::fs::read_to_string(&log)
                .expect("a log")
                .lines()
                .count(),
            2
        );
    }

    #[test]
    fn a_failure_shows_status_and_last_lines() {
        let error = Job::new("making it", shell("echo why; exit 3"))
            .run()
            .expect_err("fails");
        assert_eq!(error.to_string(), "making it: exit status 3\n    why");
    }

    #[test]
    fn a_time_limit_ends_the_whole_group() {
        let start = Instant::now();
        let outcome = Job::new("waiting", shell("sleep 60 & sleep 60; wait"))
            .limit(Duration::from_millis(300))
            .outcome()
            .expect("it ran");
        assert!(outcome.timed_out() && !outcome.success());
        assert!(start.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn output_held_open_by_a_left_over_process_does_not_hang() {
        let start = Instant::now();
        Job::new("leaving", shell("sleep 60 &"))
            .run()
            .expect("success");
        assert!(start.elapsed() < Duration::from_secs(20));
    }
}
