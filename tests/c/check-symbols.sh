#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# The library exports the functions of the header and nothing else, and the shared one says which
# interface it has: check-symbols.sh static|shared LIBRARY NM READELF ABI SOURCE
set -eu
kind=$1 library=$2 nm=$3 readelf=$4 abi=$5 source=$6

work=$(mktemp -d)
trap 'rm -r "$work"' EXIT
sh "$source/scripts/list-functions.sh" "$source/include/guestmemfd.h" > "$work/declared"
[ -s "$work/declared" ]
case $kind in
    static) "$nm" --extern-only --defined-only "$library" ;;
    shared) "$nm" --dynamic --defined-only "$library" ;;
esac > "$work/symbols"
awk 'NF == 3 { print $3 }' "$work/symbols" | LC_ALL=C sort > "$work/exported"
diff -u "$work/declared" "$work/exported"

if [ "$kind" = shared ]; then
    "$readelf" --dynamic "$library" > "$work/dynamic"
    grep -F "SONAME" "$work/dynamic" | grep -F "[libguestmemfd.so.$abi]"
    # It must not depend on a Rust library that is not there.
    if grep -F "NEEDED" "$work/dynamic" | grep -i rust; then
        exit 1
    fi
fi
