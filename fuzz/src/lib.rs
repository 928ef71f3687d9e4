// SPDX-License-Identifier: GPL-2.0-or-later

//! What a guest, a C program or a snapshot may hand to the library. Each module makes calls from
//! bytes that a fuzzer has made up, and checks what must hold after each.
//!
//! `cargo xtask fuzz TARGET` runs the fuzzer; docs/testing.md tells more.

#[allow(unsafe_code)] // calls the C interface
mod c;
pub mod config;
pub mod hypercall;
pub mod map;
pub mod states;

#[cfg(test)]
mod tests {
    use std::path::Path;

    /// Seeds, and what the fuzzer has found once.
    fn try_seeds(target: &str, try_bytes: fn(&[u8])) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("seeds")
            .join(target);
        let mut tried = 0;
        for file in folder.read_dir().unwrap() {
            try_bytes(&std::fs::read(file.unwrap().path()).unwrap());
            tried += 1;
        }
        assert!(tried > 0);
        try_bytes(&[]);
    }

    #[test]
    fn hypercall_seeds() {
        try_seeds("hypercall", crate::hypercall::try_bytes);
    }

    #[test]
    fn config_seeds() {
        try_seeds("config", crate::config::try_bytes);
    }

    #[test]
    fn map_seeds() {
        try_seeds("map", crate::map::try_bytes);
    }

    #[test]
    fn states_seeds() {
        try_seeds("states", crate::states::try_bytes);
    }
}
