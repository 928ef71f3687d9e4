// SPDX-License-Identifier: GPL-2.0-or-later
//! A QEMU process: started, watched, and gone when its owner is.
//!
//! QMP is a socket on descriptor 0 and the guest's serial port is descriptor 1, so no path has to
//! be agreed on, and both close by themselves when QEMU dies, however it dies.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::qmp::Qmp;

/// Start-up under two levels of emulation takes seconds; only a hang takes this long.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(180);
/// The same for its end.
pub(crate) const EXIT_LIMIT: Duration = Duration::from_secs(120);

/// How long an answer over QMP may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

const POLL: Duration = Duration::from_millis(20);

/// Arguments that connect a QEMU to this module; everything that is started gets them.
pub(crate) const CONNECTION: &[&str] = &[
    "-chardev",
    "socket,id=qmp0,fd=0",
    "-qmp",
    "chardev:qmp0",
    "-chardev",
    "file,id=serial0,path=/proc/self/fd/1",
];

/// A running QEMU.
#[derive(Debug)]
pub(crate) struct Qemu {
    child: Child,
    /// In command mode.
    pub(crate) qmp: Qmp,
    serial: Receiver<String>,
    log: PathBuf,
}

/// A QEMU that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) status: ExitStatus,
    pub(crate) stderr: String,
}

/// What came of starting one.
#[derive(Debug)]
pub(crate) enum Started {
    /// It answers QMP.
    Running(Box<Qemu>),
    /// It ended before it answered.
    Ended(Ended),
}

/// Starts `program` with `arguments` and [`CONNECTION`]; its command line, stderr, serial output,
/// QMP transcript, and the CPUs' registers at every reset go to the folder `log`. With `echo` the guest's lines also go to our stdout
/// as they come.
pub(crate) fn start(
    program: &Path,
    arguments: &[String],
    log: &Path,
    echo: bool,
) -> Result<Started> {
    fs::create_dir_all(log).with_context(|| format!("cannot create {}", log.display()))?;
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(program);
    command
        .args(CONNECTION)
        .args(arguments)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::piped())
        .stderr(create(log, "stderr")?);
    writeln!(create(log, "command")?, "{command:?}")?;
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run {}", program.display()))?;
    // It holds QEMU's end of the socket, which would stay open after QEMU's death.
    drop(command);

    let (sender, serial) = channel();
    let stdout = child.stdout.take().context("QEMU has no stdout")?;
    let copy = create(log, "serial")?;
    thread::spawn(move || read_serial(stdout, copy, echo, &sender));

    let mut qemu = Qemu {
        child,
        qmp: Qmp::new(ours, ANSWER_LIMIT, Some(&log.join("qmp")))?,
        serial,
        log: log.to_owned(),
    };
    match qemu.qmp.handshake(START_LIMIT) {
        Ok(()) => Ok(Started::Running(Box::new(qemu))),
        Err(why) => match qemu.wait(POLL * 50) {
            Ok(ended) => Ok(Started::Ended(ended)),
            Err(_) => Err(why),
        },
    }
}

/// Starts one that is to run.
pub(crate) fn start_running(
    program: &Path,
    arguments: &[String],
    log: &Path,
    echo: bool,
) -> Result<Box<Qemu>> {
    match start(program, arguments, log, echo)? {
        Started::Running(qemu) => Ok(qemu),
        Started::Ended(ended) => bail!(
            "QEMU ended while starting ({}): {}",
            ended.status,
            ended.stderr.trim()
        ),
    }
}

fn create(log: &Path, name: &str) -> Result<File> {
    let path = log.join(name);
    File::create(&path).with_context(|| format!("cannot create {}", path.display()))
}

impl Qemu {
    /// Its process number.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The guest's next line; nothing if none comes in time or its port has closed.
    pub(crate) fn serial_line(&self, limit: Duration) -> Option<String> {
        self.serial.recv_timeout(limit).ok()
    }

    /// What QEMU wrote to stderr, if the guest's port has closed because QEMU ended.
    pub(crate) fn last_words(&self) -> Option<String> {
        let closed = self.serial.try_recv() == Err(TryRecvError::Disconnected);
        closed.then(|| self.stderr().trim().to_owned())
    }

    /// Still there, not ended?
    pub(crate) fn alive(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("QEMU has ended ({status}): {}", self.stderr().trim()),
        }
    }

    /// Asks it to end, and waits until it has.
    pub(crate) fn quit(&mut self) -> Result<Ended> {
        self.qmp.run("quit", json!({}))?;
        self.wait(EXIT_LIMIT)
    }

    /// SIGKILL, and waits until the process is gone.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self, limit: Duration) -> Result<Ended> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                let stderr = self.stderr();
                return Ok(Ended { status, stderr });
            }
            if Instant::now() >= deadline {
                bail!("QEMU did not end within {} s", limit.as_secs());
            }
            thread::sleep(POLL);
        }
    }

    fn stderr(&self) -> String {
        let bytes = fs::read(self.log.join("stderr")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Fails if it has ended, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_serial(stdout: ChildStdout, mut copy: File, echo: bool, sender: &Sender<String>) {
    let mut reader = BufReader::new(stdout);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        if !matches!(reader.read_until(b'\n', &mut bytes), Ok(1..)) {
            return;
        }
        // The log is for people; a full disk must not fail the guest.
        let _ = copy.write_all(&bytes);
        let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        if echo {
            println!("{line}");
        }
        // Reading goes on without a listener: a full pipe would stop the guest.
        let _ = sender.send(line);
    }
}
