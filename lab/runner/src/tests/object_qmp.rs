// SPDX-License-Identifier: GPL-2.0-or-later
//! Objects made, refused, changed and removed while QEMU runs: it stays alive and keeps nothing.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, prlimit};
use serde_json::{Value, json};

use super::{Context, GUEST_LIMIT, SIZE, Test};
use crate::guest;
use crate::memory::{Holdings, open_fds, process};
use crate::probe::Need;
use crate::qemu::Qemu;
use crate::query;
use crate::vm::{BACKEND, Scenario, Vm};

/// Times that objects are made in a loop: blocks of rounds.
const BLOCKS: usize = 5;
const ROUNDS: usize = 100;

/// How long nothing is freed before all is: QEMU collects for a while what RCU is to free.
const SETTLE: Duration = Duration::from_millis(200);

/// Bytes that a block of rounds may leave.
const LEAK: u64 = 32 << 10;

pub(super) fn tests() -> Vec<Test> {
    vec![
        Test::new("object/qmp-refusals", &[Need::PrivateMemory], refusals),
        Test::new("object/qmp-loop", &[Need::PrivateMemory], add_and_delete),
        Test::new(
            "object/qmp-loop-ordinary-vm",
            &[Need::Kvm],
            add_to_ordinary_vm,
        ),
        Test::new(
            "object/qmp-loop-mapped",
            &[Need::MappedMemory],
            add_and_delete_mapped,
        ),
        Test::new(
            "object/out-of-descriptors",
            &[Need::PrivateMemory, Need::Root],
            out_of_descriptors,
        ),
        Test::new(
            "object/property-after-creation",
            &[Need::PrivateMemory],
            property_after_creation,
        ),
        Test::new(
            "object/delete-in-use",
            &[Need::PrivateMemory],
            delete_in_use,
        ),
        Test::new("object/use-twice", &[Need::PrivateMemory], use_twice),
    ]
}

/// Properties that must be refused, with a word that the message must contain.
fn bad_objects() -> [(Value, &'static str); 12] {
    [
        (json!({"size": 0}), "size"),
        (json!({}), "size"),
        (json!({"size": 1_000_000}), "multiple"),
        (json!({"size": 1_u64 << 60}), "large"),
        (json!({"size": 1_u64 << 63}), "large"),
        (json!({"size": 1 << 20, "share": false}), "share"),
        (json!({"size": 1 << 20, "mode": "sideways"}), "sideways"),
        (
            json!({"size": 1 << 20, "mode": "mapped"}),
            "the guest is confidential",
        ),
        (json!({"size": 1 << 20, "discard": "never"}), "never"),
        (
            json!({"size": 1 << 20, "lazy-attributes": "maybe"}),
            "maybe",
        ),
        (json!({"size": 1 << 20, "lazy-chunk": 2048}), "power of two"),
        (json!({"size": 1 << 20, "prefault": "medium"}), "medium"),
    ]
}

/// Tries to make the object `extra`; the message if that is refused.
fn add(qemu: &mut Qemu, properties: &Value) -> Result<Option<String>> {
    let mut arguments = json!({"qom-type": BACKEND, "id": "extra"});
    if let (Some(all), Some(more)) = (arguments.as_object_mut(), properties.as_object()) {
        all.extend(more.clone());
    }
    Ok(qemu
        .qmp
        .raw("object-add", arguments)?
        .err()
        .map(|refusal| refusal.desc))
}

fn delete(qemu: &mut Qemu) -> Result<()> {
    qemu.qmp.run("object-del", json!({"id": "extra"}))?;
    Ok(())
}

fn refusals(context: &Context) -> Result<()> {
    let mut qemu = context.start(&Vm::protected(SIZE))?;
    for (properties, word) in bad_objects() {
        match add(&mut qemu, &properties)? {
            None => bail!("{properties} was accepted"),
            Some(why) => ensure!(why.contains(word), "{properties}: no {word:?} in {why:?}"),
        }
        qemu.alive()?;
    }
    ensure!(
        query::backends(&mut qemu.qmp)?.len() == 1,
        "a refused object is still listed"
    );
    // The id is free again.
    let good = json!({"size": 1 << 20});
    if let Some(why) = add(&mut qemu, &good)? {
        bail!("a good object was refused after bad ones: {why}");
    }
    let why = add(&mut qemu, &good)?.context("there are two objects of one id")?;
    ensure!(why.contains("extra"), "the second is refused with {why:?}");
    let backends = query::backends(&mut qemu.qmp)?;
    ensure!(backends.len() == 2, "with the second refused: {backends:?}");
    delete(&mut qemu)
}

fn add_and_delete(context: &Context) -> Result<()> {
    let mut qemu = context.start(&Vm::protected(SIZE))?;
    let bad = bad_objects();
    leaks_nothing(&mut qemu, |qemu, round| {
        if let Some(why) = add(qemu, &json!({"size": 2_u64 << 30}))? {
            bail!("object-add was refused in round {round}: {why}");
        }
        delete(qemu)?;
        let (properties, _) = &bad[round % bad.len()];
        ensure!(
            add(qemu, properties)?.is_some(),
            "{properties} was accepted"
        );
        Ok(())
    })
}

fn add_to_ordinary_vm(context: &Context) -> Result<()> {
    let mut vm = Vm::ordinary(SIZE);
    vm.backend = None;
    let mut qemu = context.start(&vm)?;
    leaks_nothing(&mut qemu, |qemu, _| {
        let properties = json!({"size": 16 << 20, "mode": "private"});
        let why = add(qemu, &properties)?.context("object-add was accepted")?;
        ensure!(
            why.contains("private") || why.contains("confidential"),
            "the message is {why:?}"
        );
        Ok(())
    })
}

fn add_and_delete_mapped(context: &Context) -> Result<()> {
    let mut qemu = context.start(&Vm::ordinary(SIZE))?;
    leaks_nothing(&mut qemu, |qemu, round| {
        let bind = round % 2 == 1;
        if let Some(why) = add(qemu, &json!({"size": 16 << 20, "bind": bind}))? {
            bail!("object-add was refused in round {round}: {why}");
        }
        delete(qemu)?;
        ensure!(
            add(qemu, &json!({"size": 16 << 20, "share": false}))?.is_some(),
            "share=off was accepted"
        );
        Ok(())
    })
}

/// Runs `round` often; descriptors, mappings and memory must not grow with it.
fn leaks_nothing(qemu: &mut Qemu, round: impl Fn(&mut Qemu, usize) -> Result<()>) -> Result<()> {
    // The first rounds fill caches and arenas.
    (0..20).try_for_each(|n| round(qemu, n))?;
    let first = settled(qemu)?;
    let mut last = first;
    let mut growths = Vec::new();
    for _ in 0..BLOCKS {
        (0..ROUNDS).try_for_each(|n| round(qemu, n))?;
        let now = settled(qemu)?;
        growths.push(now.anonymous.saturating_sub(last.anonymous));
        last = now;
    }
    println!("# {first:?} then {last:?}; anonymous memory grew by {growths:?}");
    ensure!(
        last.fds == first.fds,
        "descriptors: {} before, {} after",
        first.fds,
        last.fds
    );
    ensure!(
        last.mappings <= first.mappings + 4,
        "mappings: {} before, {} after",
        first.mappings,
        last.mappings
    );
    // malloc takes memory in leaps now and then. A leak shows in every block of rounds: the state
    // of the smallest object or an error's text a round would be more than this.
    let least = growths.iter().min().copied().unwrap_or_default();
    ensure!(
        least <= LEAK,
        "every {ROUNDS} rounds anonymous memory grows: by {growths:?} bytes"
    );
    Ok(())
}

/// What QEMU holds once it has freed what RCU keeps for a while after its deletion.
fn settled(qemu: &Qemu) -> Result<Holdings> {
    let mut before = Holdings::of(qemu.pid())?;
    loop {
        thread::sleep(SETTLE);
        let now = Holdings::of(qemu.pid())?;
        if (now.fds, now.mappings) == (before.fds, before.mappings) {
            return Ok(now);
        }
        before = now;
    }
}

/// Lets QEMU have a few descriptors more than it has, one more each time: every call that makes one
/// fails once.
fn out_of_descriptors(context: &Context) -> Result<()> {
    let mut qemu = context.start(&Vm::protected(SIZE))?;
    let pid = Some(process(qemu.pid())?);
    let fds = open_fds(qemu.pid())?;
    let highest = fds.last().copied().context("QEMU has no descriptors")?;
    let first_free = u64::try_from(highest)? + 1;
    // Descriptors are numbered from the lowest free one: holes below the highest count as well.
    let holes = first_free - u64::try_from(fds.len())?;
    ensure!(holes < 16, "{holes} unused descriptors below the highest");
    let mut refused = Vec::new();
    let maximum = getrlimit(Resource::Nofile).maximum;
    for allowed in 0..32 {
        let before = open_fds(qemu.pid())?.len();
        let limit = u64::try_from(before)? + allowed;
        // QEMU has our hard limit, and keeps it.
        let old = prlimit(
            pid,
            Resource::Nofile,
            Rlimit {
                current: Some(limit),
                maximum,
            },
        )?;
        let answer = add(&mut qemu, &json!({"size": 16 << 20}));
        prlimit(pid, Resource::Nofile, old)?;
        match answer? {
            Some(why) => refused.push(why),
            None => {
                delete(&mut qemu)?;
                println!("# refused {} times: {:?}", refused.len(), refused);
                // One for each of the two files, at least.
                ensure!(
                    refused.len() > 1,
                    "object-add needs fewer descriptors than its files"
                );
                return Ok(());
            }
        }
        let after = settled(&qemu)?.fds;
        ensure!(
            after == before,
            "{before} descriptors before a refusal, {after} after"
        );
    }
    bail!(
        "object-add was refused with 31 descriptors free: {:?}",
        refused.last()
    )
}

fn property_after_creation(context: &Context) -> Result<()> {
    let mut qemu = context.start(&Vm::protected(SIZE))?;
    let before = query::backend(&mut qemu.qmp)?;
    let (number, accepted) = set_everything(&mut qemu, "/objects/ram0")?;
    println!("# of {number} properties {accepted:?} can be changed");
    let may_change = [
        "merge",
        "dump",
        "prealloc",
        "prealloc-threads",
        "x-use-canonical-path-for-ramblock-id",
    ];
    ensure!(
        number > 15
            && accepted
                .iter()
                .all(|name| may_change.contains(&name.as_str())),
        "of {number} properties {accepted:?} have been changed"
    );
    // The guest's type has been looked at when the machine was made.
    let (number, accepted) = set_everything(&mut qemu, "/objects/cgs0")?;
    println!("# of the guest's type {accepted:?}");
    ensure!(
        number > 1 && accepted.is_empty(),
        "of {number} properties of the guest's type {accepted:?} have been changed"
    );
    let after = query::backend(&mut qemu.qmp)?;
    ensure!(
        before == after,
        "refused changes left a mark: {before:?}, then {after:?}"
    );
    qemu.alive()
}

/// Tries to set every property of an object to something else. How many there are, and which could be
/// set.
fn set_everything(qemu: &mut Qemu, path: &str) -> Result<(usize, Vec<String>)> {
    let properties = qemu.qmp.run("qom-list", json!({"path": path}))?;
    let properties = properties.as_array().context("qom-list")?.clone();
    let mut accepted = Vec::new();
    for property in &properties {
        let (name, kind) = (&property["name"], property["type"].as_str());
        let value = match kind.unwrap_or_default() {
            "bool" => {
                let get = json!({"path": path, "property": name});
                json!(qemu.qmp.run("qom-get", get)? == false)
            }
            "string" => json!("other"),
            "int" | "size" | "uint8" | "uint32" | "uint64" | "uint16List" => json!(7),
            "MemoryBackendGuestmemfdMode" => json!("mapped"),
            "MemoryBackendGuestmemfdDiscard" => json!("keep"),
            // What others write, or a link.
            _ => json!("off"),
        };
        let arguments = json!({"path": path, "property": name, "value": value});
        if qemu.qmp.raw("qom-set", arguments)?.is_ok() {
            accepted.push(name.as_str().unwrap_or_default().to_owned());
        }
        qemu.alive()?;
    }
    Ok((properties.len(), accepted))
}

fn delete_in_use(context: &Context) -> Result<()> {
    let mut qemu = context.start(&Vm::protected(SIZE))?;
    let Err(why) = qemu.qmp.raw("object-del", json!({"id": "ram0"}))? else {
        bail!("the guest's own memory could be deleted");
    };
    ensure!(why.desc.contains("mapped"), "the message is {:?}", why.desc);
    ensure!(query::backend(&mut qemu.qmp)?.id == "ram0", "ram0 is gone");
    qemu.alive()
}

fn use_twice(context: &Context) -> Result<()> {
    let vm = Vm::conformance(&context.files, Scenario::Reset, false, SIZE, 1)
        .with_arguments("-m 256M,slots=2,maxmem=1G");
    let mut qemu = context.start(&vm)?;
    guest::run(&mut qemu, GUEST_LIMIT)?;
    let before = query::backend(&mut qemu.qmp)?.private_bytes;
    ensure!(before > 0, "the guest has no private memory to lose");
    let device = json!({"driver": "pc-dimm", "id": "dimm0", "memdev": "ram0"});
    let Err(why) = qemu.qmp.raw("device_add", device)? else {
        bail!("a DIMM took the memory that the machine already uses");
    };
    ensure!(why.desc.contains("ram0"), "the message is {:?}", why.desc);
    let after = query::backend(&mut qemu.qmp)?.private_bytes;
    ensure!(
        after == before,
        "{before} bytes were private before the refusal, {after} are after it"
    );
    guest::finish(&mut qemu)?.verdict()?;
    Ok(())
}
