#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
#
# The patches of a folder such as qemu-patches/11.1, as commits of a QEMU git tree and back.
#
#   git-series.sh import FOLDER TREE     applies them to what TREE has checked out, and lets a
#                                        branch topic/NAME end where the folder NAME ends
#   git-series.sh export FOLDER TREE BASE  writes the patches from BASE to the last topic branch
#
# git rebase --update-refs moves all of these branches together.
set -eu

usage() {
    sed -n '5,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

topics() {
    sed 's,/.*,,' "$folder/series" | uniq
}

import() {
    for topic in $(topics); do
        while read -r patch; do
            git -C "$tree" am --quiet --keep-non-patch "$folder/$topic/$patch" < /dev/null
        done < "$folder/$topic/series"
        git -C "$tree" branch --force "topic/$topic"
    done
}

export_topics() {
    start=$1
    names=$(topics)
    : > "$folder/series"
    for topic in $names; do
        rm -f "$folder/$topic"/*.patch
        git -C "$tree" format-patch --quiet --no-numbered --zero-commit --no-signature \
            --no-renames --output-directory "$folder/$topic" "$start..topic/$topic"
        (cd "$folder/$topic" && ls -- *.patch) > "$folder/$topic/series"
        sed "s,^,$topic/," "$folder/$topic/series" >> "$folder/series"
        start="topic/$topic"
    done
}

[ $# -ge 3 ] || usage
folder=$(cd "$2" && pwd)
tree=$3
case $1 in
import) import ;;
export) [ $# -eq 4 ] || usage; export_topics "$4" ;;
*) usage ;;
esac
