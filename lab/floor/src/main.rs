// SPDX-License-Identifier: GPL-2.0-or-later
//! The cheapest possible user of private memory in KVM, as a measure for others: a software-protected
//! VM that converts with two system calls, the attribute and the hole, in the order that
//! safety asks for, or in place with one. It keeps no state, knows no devices but a serial port, and
//! runs the conformance guest with `bench=`.

mod memory;
mod vm;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Runs the conformance guest on next to nothing.
#[derive(Debug, Parser)]
#[command(about)]
struct Options {
    /// The conformance guest
    #[arg(long, value_name = "PATH")]
    guest: PathBuf,
    /// Its command line
    #[arg(long)]
    append: String,
    /// How many vCPUs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    cpus: u8,
    /// MiB of RAM from address 0 on
    #[arg(long, default_value_t = 256)]
    low: u32,
    /// MiB of RAM from 4 GiB on
    #[arg(long, default_value_t = 0)]
    high: u32,
    /// Show the memory a second time, always shared, where this address bit is set
    #[arg(long)]
    shared_bit: Option<u32>,
    /// Have KVM map the pages of a request as soon as they are converted
    #[arg(long)]
    prefault: bool,
    /// One file for both views, which KVM converts in place
    #[arg(long)]
    in_place: bool,
}

fn main() -> ExitCode {
    match vm::run(&Options::parse()) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
