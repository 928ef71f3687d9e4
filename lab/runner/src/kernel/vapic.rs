// SPDX-License-Identifier: GPL-2.0-or-later
//! KVM itself writes to a page that userspace has named as the vAPIC, through the host's mapping.

use anyhow::{Context as _, Result, ensure};

use super::Test;
use super::memory::File;
use super::slots::{GPA, bind};
use super::uapi::{self, PAGE, SW_PROTECTED};
use super::vcpu::{Seen, Vcpu};

const PAGES: u64 = 8;
const VAPIC: u64 = 3;
/// Nothing that KVM writes: the priority of the task in the low byte, interrupts above.
const WORD: u32 = u32::MAX;

pub(super) fn tests() -> Vec<Test> {
    vec![Test::new("kernel/vapic-in-a-private-page", vapic)]
}

/// What KVM writes shows in a shared page and never in a private one, and holds no conversion up.
fn vapic() -> Result<()> {
    let vm = uapi::vm(SW_PROTECTED)?;
    vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
    let file = File::new(&vm, PAGES)?;
    let mut vcpu = Vcpu::new(&vm)?;
    bind(&vm, 1, GPA, &file)?;
    let at = GPA + VAPIC * PAGE;
    file.map.write(VAPIC, WORD);
    vcpu.use_vapic(at)?;
    for _ in 0..2 {
        vcpu.read(GPA)?;
        let shared = file.map.read(VAPIC);
        ensure!(shared != WORD, "KVM has not written to a shared page");

        file.convert(VAPIC..VAPIC + 1, true)?;
        vcpu.write(at, WORD)?;
        for _ in 0..8 {
            vcpu.read(GPA)?;
        }
        let private = vcpu.read(at)?;
        ensure!(
            private == Seen::Value(WORD),
            "in a private page is {private:?}"
        );
        file.convert(VAPIC..VAPIC + 1, false)?;
    }
    Ok(())
}
