#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# The names of the functions that a header declares, sorted: list-functions.sh HEADER
set -eu
# A declaration begins in the first column; comments and members of structures do not.
sed -nE '/^[a-z]/s/^[^(]*\b(guestmemfd_[a-z0-9_]+)\(.*/\1/p' "$1" | LC_ALL=C sort
