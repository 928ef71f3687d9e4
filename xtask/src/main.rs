// SPDX-License-Identifier: GPL-2.0-or-later
//! Fetches, builds, boots and tests everything. What has been downloaded or
//! built stays in a cache outside the checkout.

mod abi;
mod apt;
mod bench;
mod boot;
mod cache;
mod cargo;
mod context;
mod debian;
mod fetch;
mod fuzz;
mod header;
mod image;
mod kernel;
mod level1;
mod library;
mod meson;
mod packages;
mod process;
mod progress;
mod python;
mod qemu;
mod qemu_series;
mod qemu_source;
mod scratch;
mod test;
mod toolchain;
mod tsc;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use context::Context;
use packages::Purpose;
use progress::{Step, Steps};

#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask", about)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    options: context::Options,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Build whatever is missing, and boot a guest that converts its memory
    Boot(boot::Options),
    /// Run every test, and show a table
    Test(test::Options),
    /// Look for input from guests, C programs and snapshots that the library cannot take
    Fuzz(fuzz::Options),
    /// Measure what conversions cost, beside QEMU's own path and beside the least possible
    Bench(bench::Options),
    /// Build QEMU with the patches and the library, and print its path
    Qemu,
    /// Build the lab's kernel, and print its path
    Kernel,
    /// Build the conformance guest, and print its path
    Guest,
    /// Make the image with the Debian userland of level 1, and print its path
    Debian,
    /// Run a command, or a shell, in level 1 of the lab
    Lab(boot::LabOptions),
    /// Generate include/guestmemfd.h
    Header(header::Options),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> Result<ExitCode> {
    let ctx = Context::new(cli.options)?;
    process::end_children_on_interrupt()?;
    match cli.command {
        Command::Boot(options) => return Ok(boot::boot(&ctx, &options)),
        Command::Test(options) => return test::run(&ctx, &options),
        Command::Fuzz(options) => return fuzz::run(&ctx, &options),
        Command::Bench(options) => return bench::run(&ctx, &options),
        Command::Qemu => one(&ctx, "QEMU with the library", &[Purpose::Qemu], |step| {
            qemu::build(&ctx, step).map(|qemu| qemu.program)
        })?,
        Command::Kernel => one(&ctx, "kernel for the lab", &[Purpose::Kernel], |step| {
            kernel::build(&ctx, step).map(|kernel| kernel.image)
        })?,
        Command::Guest => one(&ctx, "conformance guest", &[], |step| {
            cargo::guest(&ctx, step)
        })?,
        Command::Debian => one(&ctx, "Debian userland", &[Purpose::Debian], |step| {
            debian::DEBIAN.disk(&ctx, step).map(|(_, image)| image)
        })?,
        Command::Lab(options) => return boot::lab(&ctx, options),
        Command::Header(options) => header::run(&ctx, &options)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// A command of one step, which prints the path of what it made.
fn one(
    ctx: &Context,
    name: &str,
    purposes: &[Purpose],
    make: impl FnOnce(&Step) -> Result<std::path::PathBuf>,
) -> Result<()> {
    let step = Steps::new(1).begin(name);
    packages::ensure(ctx, &step, purposes)?;
    let path = make(&step)?;
    step.finish("ready");
    println!("{}", path.display());
    Ok(())
}
