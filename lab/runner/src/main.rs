// SPDX-License-Identifier: GPL-2.0-or-later
//! Boots and tests guests whose memory is `memory-backend-guestmemfd`, with the KVM that it finds:
//! the machine's own, or that of level 1 of the lab.

mod bench;
mod boot;
mod cgroup;
mod failslab;
mod guest;
mod intrusion;
mod kernel;
mod linux;
mod marks;
mod memory;
mod probe;
mod qemu;
mod setting;
mod show;
mod strict;
mod tap;
mod tests;
mod vfio;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use guestmemfd_qmp::{self as qmp, query};

#[derive(Debug, Parser)]
#[command(about, version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Say what this machine's KVM offers; status 0 if confidential guests can run here
    Probe,
    /// Boot the conformance guest and show its memory before and after
    Boot(boot::Options),
    /// Run all tests that need a QEMU
    Test(tests::Options),
    /// Test what the kernel's guest_memfd answers, which needs no QEMU
    Kernel(kernel::Options),
    /// Run one guest that measures
    Bench(bench::Options),
}

fn main() -> ExitCode {
    let good = match Cli::parse().command {
        Command::Probe => probe(),
        Command::Boot(options) => boot::boot(&options),
        Command::Test(options) => tests::run(&options),
        Command::Kernel(options) => kernel::run(&options),
        Command::Bench(options) => bench::bench(&options),
    };
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn probe() -> bool {
    let machine = probe::Machine::probe();
    print!("{machine}");
    match machine.lacks(probe::Need::PrivateMemory) {
        None => {
            println!("confidential guests can run here");
            true
        }
        Some(why) => {
            println!("confidential guests cannot run here: {why}");
            false
        }
    }
}
