// SPDX-License-Identifier: MIT OR Apache-2.0
//! The program as its users run it, against a QMP server of the test's own.

#![allow(clippy::unwrap_used)] // a failed unwrap is a failed test

mod server;
mod terminal;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketType};
use serde_json::{Value, json};
use server::{Reply, Server, backend, good, map};

const MIB: u64 = 1 << 20;

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_guestmemfd-top"))
}

fn run(path: &Path, options: &[&str]) -> Output {
    let output = program().arg(path).args(options).output().unwrap();
    assert!(
        !String::from_utf8_lossy(&output.stderr).contains("panicked"),
        "{output:?}"
    );
    output
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Runs it, and checks that it fails with these words on stderr, before its limit for answers.
fn fails(path: &Path, words: &[&str]) {
    fails_within(path, "60", words);
}

/// The same with a peer that says nothing until the limit is over.
fn times_out(path: &Path, words: &[&str]) {
    fails_within(path, "1", words);
}

fn fails_within(path: &Path, limit: &str, words: &[&str]) {
    let start = Instant::now();
    let output = run(path, &["--once", "--timeout", limit]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert_eq!(text(&output.stdout), "");
    let error = text(&output.stderr);
    assert!(error.starts_with("guestmemfd-top: "), "{error}");
    for word in words {
        assert!(error.contains(word), "no {word:?} in {error}");
    }
    assert!(start.elapsed() < Duration::from_secs(30), "{error}");
}

#[test]
fn once_prints_a_report() {
    let server = Server::new(good);
    let output = run(&server.path, &["--once", "--backend", "ram0"]);
    assert!(output.status.success(), "{output:?}");
    let expected = "\
ram0: 1 MiB, mode private, discard now, lazy chunks from 2 MiB

  . u  undecided             512 KiB   50.0 %
  S s  shared                    0 B    0.0 %
  P p  private               512 KiB   50.0 %
  T t  in transition             0 B    0.0 %
       shared allocated        8 KiB
       pinned                    0 B
       still to punch            0 B

  a cell is 4 KiB, a row 256 KiB; small letters: mixed, mostly this
  0x000000 ................................................................
  0x040000 ................................................................
  0x080000 PPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPP
  0x0c0000 PPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPPP

  conversions to private            1
    made private              512 KiB
    along with them               0 B
  conversions to shared             0
    made shared                   0 B
  hypercalls                        7
  faults, private                   0
  faults, shared                    0
  refused                           1
  waits                             0
  median, to private           < 4 µs

events, failed conversions: 0
events, host accesses refused: 0
";
    assert_eq!(text(&output.stdout), expected);
}

#[test]
fn json_and_svg_show_the_same() {
    let server = Server::new(good);
    let svg = server.dir.path().join("top.svg");
    let output = run(&server.path, &["--json", "--svg", svg.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["backends"][1]["info"]["id"], "ram1");
    let runs = json!([["undecided", MIB], ["private", MIB]]);
    assert_eq!(value["backends"][1]["map"]["runs"], runs);
    let picture = std::fs::read_to_string(svg).unwrap();
    assert!(picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"));
    assert!(picture.contains("ram0:") && picture.contains("ram1:"));
}

#[test]
fn sockets_that_cannot_be_used() {
    let dir = tempfile::tempdir().unwrap();
    fails(&dir.path().join("none"), &["No such file", "-qmp unix:"]);
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    fails(&file, &["refused"]);
    fails(&dir.path().join("x".repeat(200)), &["cannot connect"]);
}

#[test]
fn a_socket_of_another_user() {
    let server = Server::new(good);
    if !rustix::process::getuid().is_root() {
        std::fs::set_permissions(&server.path, PermissionsExt::from_mode(0o000)).unwrap();
        return fails(&server.path, &["Permission denied", "another user"]);
    }
    // Another user must reach the program and the socket's folder, but not the socket.
    let open = PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(server.dir.path(), open).unwrap();
    std::fs::set_permissions(&server.path, PermissionsExt::from_mode(0o600)).unwrap();
    let copy = server.dir.path().join("guestmemfd-top");
    std::fs::copy(env!("CARGO_BIN_EXE_guestmemfd-top"), &copy).unwrap();
    let mut command = Command::new(copy);
    std::os::unix::process::CommandExt::uid(&mut command, 65534);
    let output = command.arg(&server.path).arg("--once").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let error = text(&output.stderr);
    assert!(
        error.contains("Permission denied") && error.contains("another user"),
        "{error}"
    );
}

#[test]
fn a_qemu_without_the_commands() {
    let server = Server::new(|_, _, _| Reply::NotFound);
    fails(&server.path, &["no command query-guestmemfd", "patches"]);
    let server = Server::new(|name, arguments, number| match name {
        "x-query-guestmemfd-map" => Reply::NotFound,
        _ => good(name, arguments, number),
    });
    fails(
        &server.path,
        &["no command x-query-guestmemfd-map", "patches"],
    );
}

#[test]
fn a_qemu_without_backends() {
    let server = Server::new(|_, _, _| Reply::Return(json!([])));
    fails(&server.path, &["no memory-backend-guestmemfd"]);
    let server = Server::new(good);
    let output = run(&server.path, &["--once", "--backend", "ram7"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("no backend \"ram7\", only ram0, ram1"));
}

#[test]
fn a_peer_that_leaves_or_says_nothing() {
    let at = |stop: &'static str, reply: fn() -> Reply| {
        Server::new(move |name, arguments, number| match name == stop {
            true => reply(),
            false => good(name, arguments, number),
        })
    };
    for command in ["query-guestmemfd", "x-query-guestmemfd-map"] {
        fails(&at(command, || Reply::Close).path, &["closed", command]);
        times_out(
            &at(command, || Reply::Silence).path,
            &["no answer", command],
        );
        fails(
            &at(command, || Reply::Raw("SSH-2.0")).path,
            &["no JSON", "SSH-2.0"],
        );
        fails(
            &at(command, || Reply::Raw("{\"return\": 3}")).path,
            &[command, "3"],
        );
    }
    fails(&Server::raw(drop).path, &["closed", "greeting"]);
    let wait = |_socket| std::thread::sleep(Duration::from_secs(20));
    times_out(
        &Server::raw(wait).path,
        &["not greet within 1s", "one at a time"],
    );
    // It reads nothing, and its line never ends.
    let talk = |mut socket: UnixStream| {
        while socket.write_all(&[b'x'; 4096]).is_ok() {}
    };
    times_out(&Server::raw(talk).path, &["no QMP there"]);
}

#[test]
fn a_listener_that_never_accepts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("qmp");
    let _listener = UnixListener::bind(&path).unwrap();
    times_out(&path, &["not greet", "one at a time"]);

    let path = dir.path().join("full");
    let listener = net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    net::listen(&listener, 0).unwrap();
    let _first = UnixStream::connect(&path).unwrap();
    times_out(&path, &["cannot connect", "another client"]);
}

#[test]
fn maps_that_make_no_sense() {
    let run = |offset: u64, size: u64| json!({"offset": offset, "size": size, "state": "shared"});
    let part =
        |runs: Value, next: Value| json!({"id": "ram0", "size": MIB, "runs": runs, "next": next});
    let end = u64::MAX - 4095;
    let nonsense = [
        part(json!([]), Value::Null),
        part(json!([]), json!(0)),
        part(json!([run(0, 0)]), json!(0)),
        part(json!([run(0, 4097)]), json!(4097)),
        part(json!([run(4096, 4096)]), json!(8192)),
        part(json!([run(0, 2 * MIB)]), Value::Null),
        part(json!([run(0, 4096), run(4096, end)]), Value::Null),
        part(json!([run(0, 4096)]), json!(4096 * 3)),
        part(json!([run(0, MIB)]), json!(MIB)),
        map("ram1", MIB, 4096),
        map("ram0", 2 * MIB, 4096),
    ];
    for answer in nonsense {
        let server = Server::new(move |name, arguments, number| match name {
            "x-query-guestmemfd-map" => Reply::Return(answer.clone()),
            _ => good(name, arguments, number),
        });
        fails(&server.path, &["makes no sense"]);
    }
    let server = Server::new(|_, _, _| Reply::Return(json!([backend("r\u{1b}[m", MIB, 0, 0)])));
    fails(
        &server.path,
        &["no command"].map(|_| "x-query-guestmemfd-map"),
    );
}

#[test]
fn a_backend_that_is_removed_meanwhile_is_left_out() {
    let server = Server::new(|name, arguments, number| match (name, number) {
        ("query-guestmemfd", 1) => good(name, arguments, number),
        ("query-guestmemfd", _) => Reply::Return(json!([backend("ram1", 2 * MIB, MIB, 0)])),
        _ if arguments["id"] == "ram0" => Reply::Refuse("there is no backend ram0"),
        _ => good(name, arguments, number),
    });
    let output = run(&server.path, &["--json"]);
    assert!(output.status.success(), "{output:?}");
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["backends"].as_array().unwrap().len(), 1);
    assert_eq!(value["backends"][0]["info"]["id"], "ram1");
}

#[test]
fn refusals_are_told_in_qemus_words() {
    let server = Server::new(|name, arguments, number| match name {
        "x-query-guestmemfd-map" => Reply::Refuse("max-runs\u{1b} must be smaller"),
        _ => good(name, arguments, number),
    });
    fails(
        &server.path,
        &["x-query-guestmemfd-map was refused: max-runs  must"],
    );
}

/// Pages that are shared and private by turns.
fn fragmented(arguments: &Value, size: u64) -> Value {
    let offset = arguments["offset"].as_u64().unwrap();
    let runs = arguments["max-runs"].as_u64().unwrap();
    let end = size.min(offset + runs * 4096);
    let run = |at: u64| {
        let state = if (at / 4096).is_multiple_of(2) {
            "shared"
        } else {
            "private"
        };
        json!({"offset": at, "size": 4096, "state": state})
    };
    let runs: Vec<_> = (offset..end).step_by(4096).map(run).collect();
    let next = if end < size { json!(end) } else { Value::Null };
    json!({"id": "ram0", "size": size, "runs": runs, "next": next})
}

#[test]
fn what_is_too_fragmented_is_not_read() {
    const SIZE: u64 = 512 * MIB;
    let server = Server::new(|name, arguments, _| match name {
        "query-guestmemfd" => Reply::Return(json!([backend("ram0", SIZE, 0, 0)])),
        _ => Reply::Return(fragmented(arguments, SIZE)),
    });
    let output = run(&server.path, &["--once"]);
    assert!(output.status.success(), "{output:?}");
    let report = text(&output.stdout);
    // 65536 runs of a page.
    let rows = [
        "0x0e000000 pppp",
        "0x10000000 ????",
        "? ?  not read              256 MiB   50.0 %",
    ];
    for row in rows
        .into_iter()
        .chain(["? 256 MiB from 0x10000000 on not read: the map has more runs"])
    {
        assert!(report.contains(row), "no {row:?} in\n{report}");
    }
}

#[test]
fn a_record_is_written_until_qemu_ends() {
    let server = Server::new(|name, arguments, number| match number {
        0..20 => good(name, arguments, number),
        20 => Reply::Raw(
            "{\"event\":\"SHUTDOWN\",\"data\":{\"guest\":true,\"reason\":\"guest-shutdown\"}}",
        ),
        _ => Reply::Close,
    });
    let record = server.dir.path().join("record");
    let options = ["--record", record.to_str().unwrap(), "--interval", "0.05"];
    let output = run(&server.path, &options);
    let message = text(&output.stderr);
    assert!(output.status.success(), "{output:?}");
    assert!(
        message.contains("6 snapshots recorded; QEMU has ended (guest-shutdown)"),
        "{message}"
    );

    let replay = |options: &[&str]| {
        let output = program()
            .arg("--replay")
            .arg(&record)
            .args(options)
            .output()
            .unwrap();
        (
            output.status.code(),
            text(&output.stdout).to_owned(),
            text(&output.stderr).to_owned(),
        )
    };
    let (status, report, _) = replay(&["--once", "--backend", "ram0"]);
    assert_eq!(status, Some(0));
    // Of ram0 the conversions grow by the number of the command.
    let line = report
        .lines()
        .find(|line| line.contains("conversions to private"))
        .unwrap();
    assert!(line.contains("16") && line.ends_with("/s"), "{line}");
    let (_, value, _) = replay(&["--json"]);
    let value: Value = serde_json::from_str(&value).unwrap();
    assert!(
        value["backends"][0]["rates"]["conversions-to-private"]
            .as_f64()
            .unwrap()
            > 1.0
    );

    // Nothing is overwritten.
    let again = run(&server.path, &options);
    assert_eq!(again.status.code(), Some(1));

    let whole = std::fs::read(&record).unwrap();
    std::fs::write(&record, &whole[..whole.len() - 10]).unwrap();
    let (status, report, error) = replay(&["--once", "--backend", "ram0"]);
    assert_eq!(status, Some(0), "{error}");
    assert!(report.contains("conversions to private"));
    assert!(
        error.contains("line 7") && error.contains("the 5 before it are shown"),
        "{error}"
    );

    for (content, word) in [
        ("", "no record"),
        ("{\"guestmemfd-top\":1}\n", "no snapshot"),
        ("{\"guestmemfd-top\":1}\n{}\n", "no snapshot"),
    ] {
        std::fs::write(&record, content).unwrap();
        let (status, _, error) = replay(&["--once"]);
        assert_eq!(status, Some(1));
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn options_that_make_no_sense() {
    for options in [
        &[][..],
        &["socket"],
        &["socket", "--once", "--json"],
        &["socket", "--replay", "file", "--once"],
        &["--replay", "file", "--record", "other"],
        &["socket", "--once", "--interval", "0"],
        &["socket", "--once", "--timeout", "NaN"],
    ] {
        let output = program().args(options).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{options:?}: {output:?}");
    }
    let help = program().arg("--help").output().unwrap();
    for word in [
        "--replay",
        "Keys of the live view",
        "Exit status",
        "NO_COLOR",
    ] {
        assert!(text(&help.stdout).contains(word), "no {word} in the help");
    }
}
