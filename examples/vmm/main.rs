// SPDX-License-Identifier: MIT OR Apache-2.0

//! A small VMM on the library alone: a software-protected VM of one vCPU that runs the conformance
//! guest (`guest/`), without QEMU and without firmware. It has a serial port for output,
//! `isa-debug-exit`, and as much of fw_cfg as the guest asks for.
//!
//! `memory` is what a user of the library writes; `machine` hands on the two exits that ask for
//! conversions; `fw_cfg` is a device whose DMA goes by the states of pages.

#[cfg(not(target_arch = "x86_64"))]
compile_error!("the conformance guest is an x86-64 program");

mod fw_cfg;
mod machine;
mod memory;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Runs the conformance guest in a software-protected VM.
#[derive(Debug, Parser)]
#[command(about)]
struct Options {
    /// The conformance guest
    #[arg(long, value_name = "PATH")]
    guest: PathBuf,
    /// Its command line
    #[arg(long, default_value = "scenario=hypercall")]
    append: String,
    /// MiB of RAM from address 0 on
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=3072))]
    low: u32,
    /// MiB of RAM from 4 GiB on
    #[arg(long, default_value_t = 128)]
    high: u32,
    /// Show the memory a second time, always shared, where this address bit is set
    #[arg(long, value_parser = clap::value_parser!(u32).range(36..=51))]
    shared_bit: Option<u32>,
}

fn main() -> ExitCode {
    match machine::run(&Options::parse()) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
