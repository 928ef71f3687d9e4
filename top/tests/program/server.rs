// SPDX-License-Identifier: MIT OR Apache-2.0
//! A QMP server that says what a test wants.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;

/// What is done about a command.
#[derive(Debug)]
pub(crate) enum Reply {
    Return(Value),
    NotFound,
    Refuse(&'static str),
    Raw(&'static str),
    Close,
    Silence,
}

/// A socket that one client is served on.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) dir: TempDir,
    pub(crate) path: PathBuf,
}

impl Server {
    /// Greets, and then replies to each command, its arguments and its number as `reply` says.
    pub(crate) fn new(
        mut reply: impl FnMut(&str, &Value, usize) -> Reply + Send + 'static,
    ) -> Self {
        Self::raw(move |mut socket| {
            let greeting = "{\"QMP\":{\"version\":{},\"capabilities\":[]}}\r\n";
            let reader = BufReader::new(socket.try_clone().unwrap());
            let mut send = |text: &str| socket.write_all(text.as_bytes());
            // The client may leave at any time.
            let _ = send(greeting);
            for (number, line) in reader.lines().map_while(Result::ok).enumerate() {
                let command: Value = serde_json::from_str(&line).unwrap();
                let name = command["execute"].as_str().unwrap();
                let answer = match name {
                    "qmp_capabilities" => Reply::Return(json!({})),
                    _ => reply(name, &command["arguments"], number),
                };
                let error = |class, desc| json!({"error": {"class": class, "desc": desc}});
                let text = match answer {
                    Reply::Return(value) => json!({"return": value}).to_string(),
                    Reply::NotFound => error("CommandNotFound", "no such command").to_string(),
                    Reply::Refuse(why) => error("GenericError", why).to_string(),
                    Reply::Raw(text) => text.to_owned(),
                    Reply::Close => return,
                    Reply::Silence => continue,
                };
                if send(&(text + "\r\n")).is_err() {
                    return;
                }
            }
        })
    }

    /// Does as it likes with the client.
    pub(crate) fn raw(serve: impl FnOnce(UnixStream) + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || {
            let (socket, _) = listener.accept().unwrap();
            socket
                .set_write_timeout(Some(Duration::from_secs(20)))
                .unwrap();
            serve(socket);
        });
        Self { dir, path }
    }
}

/// A backend as QEMU tells it, private from `private` on and undecided before.
pub(crate) fn backend(id: &str, size: u64, private: u64, conversions: u64) -> Value {
    json!({
        "id": id, "mode": "private", "discard": "now", "size": size,
        "undecided-bytes": private, "shared-bytes": 0, "private-bytes": size - private,
        "transition-bytes": 0, "shared-allocated": 8192,
        "conversions-to-private": conversions, "conversions-to-shared": 0,
        "converted-to-private-bytes": size - private, "converted-to-shared-bytes": 0,
        "converted-along-bytes": 0, "hypercalls": 7, "faults-private": 0, "faults-shared": 0,
        "refused": 1, "waits": 0, "stray-accesses": 0, "pinned-bytes": 0, "unpunched-bytes": 0,
        "lazy-chunk": 2097152, "latency-to-private": [0, 0, 5, 1], "latency-to-shared": [0, 0, 0, 0],
    })
}

/// The map of such a backend.
pub(crate) fn map(id: &str, size: u64, private: u64) -> Value {
    json!({"id": id, "size": size, "runs": [
        {"offset": 0, "size": private, "state": "undecided"},
        {"offset": private, "size": size - private, "state": "private"},
    ]})
}

/// A QEMU with ram0 of 1 MiB, half of it private.
pub(crate) fn good(name: &str, arguments: &Value, number: usize) -> Reply {
    const SIZE: u64 = 1 << 20;
    match name {
        "query-guestmemfd" => Reply::Return(json!([
            backend("ram0", SIZE, SIZE / 2, number as u64),
            backend("ram1", 2 * SIZE, SIZE, 0),
        ])),
        "x-query-guestmemfd-map" => match arguments["id"].as_str() {
            Some("ram0") => Reply::Return(map("ram0", SIZE, SIZE / 2)),
            Some("ram1") => Reply::Return(map("ram1", 2 * SIZE, SIZE)),
            _ => Reply::Refuse("there is no such backend"),
        },
        _ => Reply::NotFound,
    }
}
