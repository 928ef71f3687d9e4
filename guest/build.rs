// SPDX-License-Identifier: GPL-2.0-or-later
//! Links the bare-metal program, which only the `guest` profile (panic=abort) makes.

use std::env;
use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=guest.ld");
    println!("cargo:rerun-if-changed=src/boot.s");
    println!("cargo:rerun-if-changed=src/interrupts.s");
    println!("cargo:rerun-if-changed=src/mem.s");
    if profile_is_guest() {
        let script =
            Path::new(&env::var("CARGO_MANIFEST_DIR").unwrap_or_default()).join("guest.ld");
        for argument in [
            "-nostartfiles",
            "-nostdlib",
            "-static",
            "-no-pie",
            "-Wl,--build-id=none",
        ] {
            println!("cargo:rustc-link-arg-bins={argument}");
        }
        println!("cargo:rustc-link-arg-bins=-Wl,-T,{}", script.display());
    }
}

/// Cargo tells a build script neither the panic strategy nor the name of a custom profile, but puts
/// the output folder into `<target>/<profile>/build/`.
fn profile_is_guest() -> bool {
    let out = env::var_os("OUT_DIR").unwrap_or_default();
    let folders: Vec<_> = Path::new(&out).iter().collect();
    folders
        .windows(2)
        .any(|pair| pair[0] == "guest" && pair[1] == "build")
}
