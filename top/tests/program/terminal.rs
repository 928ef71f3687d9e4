// SPDX-License-Identifier: MIT OR Apache-2.0
//! The live view in a terminal of the test's own.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Termios, Winsize, tcgetattr, tcsetwinsize};

use crate::server::{Reply, Server, good};

/// A terminal with a program in it.
struct Terminal {
    child: Child,
    master: File,
    slave: File,
    before: Termios,
    output: Receiver<Vec<u8>>,
    screen: vt100::Parser,
}

impl Terminal {
    fn new(arguments: &[&str]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let mut options = File::options();
        let slave = options
            .read(true)
            .write(true)
            .open(name.to_str().unwrap())
            .unwrap();
        let size = Winsize {
            ws_row: 30,
            ws_col: 100,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&slave, size).unwrap();
        let before = tcgetattr(&slave).unwrap();
        let end = || Stdio::from(OwnedFd::from(slave.try_clone().unwrap()));
        let mut command = crate::program();
        command
            .args(arguments)
            .env("NO_COLOR", "1")
            .env("TERM", "xterm");
        let child = command
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .unwrap();
        let master = File::from(master);
        let (sender, output) = channel();
        let mut reader = master.try_clone().unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 65536];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            master,
            slave,
            before,
            output,
            screen: vt100::Parser::new(30, 100, 0),
        }
    }

    /// Waits until this is on the screen.
    fn shows(&mut self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.screen.screen().contents().contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.screen.process(&bytes),
                Err(_) => panic!("no {text:?} in\n{}", self.screen.screen().contents()),
            }
        }
    }

    fn press(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits for its end; the terminal must be as it was.
    fn ends(mut self, code: i32) -> String {
        let deadline = Instant::now() + Duration::from_secs(20);
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(status.code(), Some(code));
        let after = tcgetattr(&self.slave).unwrap();
        assert_eq!(after.local_modes, self.before.local_modes);
        while let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(200)) {
            self.screen.process(&bytes);
        }
        let screen = self.screen.screen();
        assert!(!screen.alternate_screen() && !screen.hide_cursor());
        screen.contents()
    }
}

#[test]
fn keys_work_and_q_quits() {
    let server = Server::new(good);
    let mut terminal = Terminal::new(&[server.path.to_str().unwrap(), "--interval", "0.05"]);
    terminal.shows("(1 of 2)");
    terminal.press("\u{1b}[C");
    terminal.shows("(2 of 2)");
    terminal.press("?");
    terminal.shows("choose a backend");
    terminal.press("?pq");
    terminal.ends(0);
}

#[test]
fn a_qemu_that_says_nothing_more_does_not_hold_it_up() {
    let server = Server::new(|name, arguments, number| match number {
        0..4 => good(name, arguments, number),
        _ => Reply::Silence,
    });
    let path = server.path.to_str().unwrap();
    let mut terminal = Terminal::new(&[path, "--interval", "0.05", "--timeout", "3600"]);
    terminal.shows("(1 of 2)");
    terminal.press("q");
    terminal.ends(0);
}

#[test]
fn the_terminal_is_restored_when_qemu_closes() {
    let server = Server::new(|name, arguments, number| match number {
        0..9 => good(name, arguments, number),
        _ => Reply::Close,
    });
    let mut terminal = Terminal::new(&[server.path.to_str().unwrap(), "--interval", "0.05"]);
    terminal.shows("(1 of 2)");
    let message = terminal.ends(1);
    assert!(message.contains("QEMU closed QMP"), "{message:?}");
}

#[test]
fn the_terminal_is_restored_by_signals() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let server = Server::new(good);
        let mut terminal = Terminal::new(&[server.path.to_str().unwrap()]);
        terminal.shows("(1 of 2)");
        kill_process(Pid::from_child(&terminal.child), signal).unwrap();
        terminal.ends(0);
    }
}

#[test]
fn a_record_is_played_to_its_end() {
    let server = Server::new(good);
    let record = server.dir.path().join("record");
    let record = record.to_str().unwrap();
    let mut terminal = Terminal::new(&[
        server.path.to_str().unwrap(),
        "--record",
        record,
        "--interval",
        "0.05",
    ]);
    terminal.shows("(1 of 2)");
    terminal.press("p");
    terminal.shows("paused");
    thread::sleep(Duration::from_millis(300));
    terminal.press("q");
    terminal.ends(0);
    let mut terminal = Terminal::new(&[
        "--replay",
        record,
        "--interval",
        "0.01",
        "--backend",
        "ram1",
    ]);
    terminal.shows("end of the record");
    terminal.press("q");
    terminal.ends(0);

    let terminal = Terminal::new(&["--replay", record, "--backend", "ram7"]);
    let message = terminal.ends(1);
    assert!(message.contains("no backend \"ram7\""), "{message:?}");
}
