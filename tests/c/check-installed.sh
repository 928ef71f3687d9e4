#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# Programs are built with nothing but what `meson install` leaves, found by pkg-config, and run:
# check-installed.sh MESON BUILD SOURCE static|shared|both
set -eu
meson=$1 build=$2 source=$3 kinds=$4
cc=${CC:-cc} pkg_config=${PKG_CONFIG:-pkg-config}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$meson" install -C "$build" --no-rebuild --quiet --destdir "$work/root"
folder=$(dirname "$(find "$work/root" -name guestmemfd.pc)")
export PKG_CONFIG_PATH="$folder" PKG_CONFIG_SYSROOT_DIR="$work/root"
library=$(dirname "$folder")

# NAME OF CASE, "--static" or nothing, then more options of the compiler
try() {
    name=$1 static=$2
    shift 2
    $cc -D_GNU_SOURCE "$source/tests/c/test-panic.c" -o "$work/$name" "$@" \
        $("$pkg_config" --cflags --libs $static guestmemfd)
    LD_LIBRARY_PATH="$library" "$work/$name" > "$work/output" || {
        cat "$work/output"
        echo "$name failed" >&2
        exit 1
    }
}

needs_shared() {
    LD_LIBRARY_PATH="$library" ldd "$work/$1" | grep -qF libguestmemfd.so
}

case $kinds in
    shared | both)
        # What programs link when they do not ask for anything else, with no more than it takes.
        try shared ""
        needs_shared shared
        if "$pkg_config" --libs guestmemfd | grep -F -e -lm; then
            exit 1
        fi
        ;;
    static)
        try static ""
        if needs_shared static; then
            exit 1
        fi
        ;;
esac
case $kinds in
    static | both)
        # A program without any shared library.
        try all-static --static -static
        ;;
esac
