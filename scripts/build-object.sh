#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# Builds the library, with the parts of Rust's standard library that it uses, as one object file:
# build-object.sh CARGO LD OBJCOPY SOURCE TARGET-DIR OUTPUT
#
# Only the functions of the header are global in it. Rust's own symbols (rust_eh_personality and
# others) are the same in every Rust library, so a program could link no second one.
set -eu
cargo=$1 ld=$2 objcopy=$3 source=$4 target=$5 output=$6

# With other crate types beside it, cargo would leave out link-time optimisation.
"$cargo" rustc --locked --quiet --profile library --package guestmemfd --lib \
    --crate-type staticlib --manifest-path "$source/Cargo.toml" --target-dir "$target"
archive=$target/${CARGO_BUILD_TARGET:+$CARGO_BUILD_TARGET/}library/libguestmemfd.a

functions=$output.functions
sh "$source/scripts/list-functions.sh" "$source/include/guestmemfd.h" > "$functions"

# Symbols in groups stay global, because the linker keeps one group of several with the same name.
"$ld" -r --force-group-allocation $(sed 's/^/--require-defined=/' "$functions") \
    -o "$output.all" "$archive"
"$objcopy" --keep-global-symbols="$functions" "$output.all" "$output.new"

# What has not changed is not linked again.
if cmp -s "$output.new" "$output"; then
    rm "$output.new"
else
    mv "$output.new" "$output"
fi
rm "$output.all"
