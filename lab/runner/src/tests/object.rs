// SPDX-License-Identifier: GPL-2.0-or-later
//! Objects that cannot be: QEMU says why and ends with status 1.

use anyhow::{Result, ensure};

use super::{Context, SIZE, Test};
use crate::probe::Need;
use crate::vm::{BACKEND, Vm};

/// The backend's object with these properties besides its id.
fn backend(properties: &str) -> String {
    format!("memory-backend-guestmemfd,id=ram0,{properties}")
}

pub(super) fn tests() -> Vec<Test> {
    let mut tests = bad_properties();
    tests.push(Test::new("object/mem-lock", &[Need::TwoFiles], mem_lock));
    tests.extend(bad_machines());
    tests.extend(bad_guests());
    tests
}

/// Wrong for every VM: shown on one that has private memory, so that nothing else is wrong.
fn bad_properties() -> Vec<Test> {
    // Name, object, and words of which the message must contain one.
    let cases: [(&str, String, &[&str]); 14] = [
        ("size-zero", backend("size=0"), &["doesn't take value '0'"]),
        (
            "size-absent",
            "memory-backend-guestmemfd,id=ram0".into(),
            &["size"],
        ),
        (
            "size-unaligned",
            backend("size=1000000"),
            &["multiple", "align"],
        ),
        (
            "size-odd",
            backend("size=268435457"),
            &["multiple", "align"],
        ),
        ("size-64t", backend("size=64T"), &["too large"]),
        (
            "size-huge",
            backend("size=9223372036854771712"),
            &["too large"],
        ),
        (
            "share-off",
            backend("size=256M,share=off"),
            &["use share=on"],
        ),
        (
            "mode-unknown",
            backend("size=256M,mode=sideways"),
            &["sideways"],
        ),
        (
            "discard-unknown",
            backend("size=256M,discard=never"),
            &["never"],
        ),
        (
            "lazy-attributes-unknown",
            backend("size=256M,lazy-attributes=maybe"),
            &["maybe"],
        ),
        (
            "lazy-chunk-odd",
            backend("size=256M,lazy-chunk=3M"),
            &["lazy-chunk", "power of two"],
        ),
        (
            "convert-timeout-0",
            backend("size=256M,convert-timeout=0"),
            &["convert-timeout", "millisecond"],
        ),
        (
            "mode-mapped",
            backend("size=256M,mode=mapped"),
            &[
                "mode=mapped is not possible: memory that the host maps: the guest is confidential",
                "kvm.gmem_in_place_conversion=1",
            ],
        ),
        (
            "bind-private",
            backend("size=256M,bind=on"),
            &["mode=mapped"],
        ),
    ];
    let test = |(name, object, words): (&str, String, &'static [&str])| {
        let vm = Vm::protected(SIZE).with_backend(&object);
        refused(name, &[Need::PrivateMemory], vm, words)
    };
    cases.into_iter().map(test).collect()
}

/// Wrong because of the accelerator, the VM's type, or another user.
fn bad_machines() -> Vec<Test> {
    let mut tcg = Vm::ordinary(SIZE);
    tcg.accel = "tcg";
    let ordinary = |properties| Vm::ordinary(SIZE).with_backend(&backend(properties));
    let mut replaced = ordinary("size=256M,bind=on");
    replaced.machine.push_str(",x-change-vmfd-on-reset=on");
    let twice = Vm::protected(SIZE)
        .with_arguments("-m 256M,slots=2,maxmem=1G -device pc-dimm,id=dimm0,memdev=ram0");
    vec![
        refused("tcg", &[], tcg, &["KVM", "kvm"]),
        refused(
            "ordinary-vm-mode-private",
            &[Need::Kvm],
            ordinary("size=256M,mode=private"),
            &["mode=private is not possible"],
        ),
        refused(
            "ordinary-vm-share-off",
            &[Need::MappedMemory],
            ordinary("size=256M,share=off"),
            &["use share=on"],
        ),
        refused(
            "ordinary-vm-hugetlb",
            &[Need::MappedMemory],
            ordinary("size=256M,hugetlb=on"),
            &["Invalid parameter 'hugetlb'"],
        ),
        refused(
            "ordinary-vm-lazy-attributes",
            &[Need::MappedMemory],
            ordinary("size=256M,lazy-attributes=on"),
            &["lazy-attributes=on", "no private memory"],
        ),
        // Not at the guest's first reset.
        refused(
            "bind-with-new-vm-file",
            &[Need::MappedMemory],
            replaced,
            &["bind=on is not possible with x-change-vmfd-on-reset=on"],
        ),
        refused(
            "discard-coalesced",
            &[Need::PrivateMemory],
            Vm::protected(SIZE)
                .with_backend("memory-backend-guestmemfd,id=ram0,size=256M,discard=coalesced"),
            &["'coalesced'"],
        ),
        refused("used-twice", &[Need::PrivateMemory], twice, &["ram0"]),
    ]
}

/// Wrong confidential-guest objects.
fn bad_guests() -> Vec<Test> {
    let mut tcg = Vm::protected(SIZE).with_backend("memory-backend-memfd,id=ram0,size=256M");
    tcg.accel = "tcg";
    let mut tests = vec![
        // What the refusals below are measured against.
        Test::new("object/shared-bit-38", &[Need::PrivateMemory], |context| {
            let mut vm = Vm::protected(SIZE);
            vm.confidential = Some("sw-protected-guest,id=cgs0,shared-bit=38".into());
            context.start(&vm)?.alive()
        }),
        refused("sw-protected-tcg", &[], tcg, &["KVM", "kvm"]),
        refused(
            "sw-protected-not-offered",
            &[Need::NoPrivateMemory],
            Vm::protected(SIZE).with_backend("memory-backend-memfd,id=ram0,size=256M"),
            &["KVM", "VM type"],
        ),
    ];
    // Inside the page, inside RAM, beyond any physical address.
    for bit in [5, 20, 63, 64] {
        let mut vm = Vm::protected(SIZE).with_backend("memory-backend-memfd,id=ram0,size=256M");
        vm.confidential = Some(format!("sw-protected-guest,id=cgs0,shared-bit={bit}"));
        let name = format!("shared-bit-{bit}");
        tests.push(refused(&name, &[Need::PrivateMemory], vm, &["shared-bit"]));
    }
    tests
}

/// What locks all memory needs it twice, which QEMU says.
fn mem_lock(context: &Context) -> Result<()> {
    let vm = Vm::protected(SIZE).with_arguments("-overcommit mem-lock=on");
    let ended = context.start(&vm)?.quit()?;
    ensure!(
        ended
            .stderr
            .contains("mem-lock=on allocates the shared side"),
        "no warning: {:?}",
        ended.stderr
    );
    Ok(())
}

fn refused(name: &str, needs: &[Need], vm: Vm, words: &'static [&'static str]) -> Test {
    Test::new(format!("object/{name}"), needs, move |context| {
        check_refused(context, &vm, words)
    })
}

fn check_refused(context: &Context, vm: &Vm, words: &[&str]) -> Result<()> {
    let ended = context.start_refused(vm)?;
    // QEMU repeats the option that it complains of: those are our words, not its own.
    let ours = [
        vm.backend.as_deref(),
        vm.confidential.as_deref(),
        Some(BACKEND),
    ];
    let said = ended.stderr.trim().to_owned();
    let said = ours
        .into_iter()
        .flatten()
        .fold(said, |said, word| said.replace(word, ""));
    ensure!(
        ended.status.code() == Some(1),
        "QEMU ended with {}, not with status 1: {said}",
        ended.status
    );
    ensure!(
        words.iter().any(|word| said.contains(word)),
        "the message has none of {words:?}: {said:?}"
    );
    Ok(())
}
