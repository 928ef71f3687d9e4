// SPDX-License-Identifier: MIT OR Apache-2.0

//! In place of those calls under Miri, which has no memfds and no holes: a page of zeroes is one.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::pages::ranges::{FilePages, PAGE_SIZE};

const ZEROES: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];

pub(super) fn memfd(name: &str, bytes: u64) -> io::Result<File> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("{name}-{}-{number}", std::process::id()));
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)?;
    fs::remove_file(path)?;
    file.set_len(bytes)?;
    Ok(file)
}

pub(super) fn punch_hole(file: &File, pages: FilePages) -> io::Result<()> {
    let mut each = pages.start()..pages.end();
    each.try_for_each(|page| file.write_all_at(&ZEROES, page * PAGE_SIZE))
}

pub(super) fn first_data(file: &File, pages: FilePages) -> io::Result<Option<FilePages>> {
    let mut found: Option<FilePages> = None;
    for page in pages.start()..pages.end() {
        let mut bytes = ZEROES;
        file.read_exact_at(&mut bytes, page * PAGE_SIZE)?;
        match (bytes == ZEROES, found) {
            (true, None) => {}
            (true, Some(_)) => break,
            (false, data) => {
                found = FilePages::new(data.map_or(page, FilePages::start), page + 1);
            }
        }
    }
    Ok(found)
}

pub(super) fn allocated(_: &File) -> io::Result<u64> {
    Ok(0)
}
