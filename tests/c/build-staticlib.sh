#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# Builds the static library with cargo and puts it where meson wants it.
set -eu
source=$1 target=$2 output=$3
cargo build --locked --profile library --quiet --package guestmemfd \
    --manifest-path "$source/Cargo.toml" --target-dir "$target"
cp "$target/library/libguestmemfd.a" "$output"
