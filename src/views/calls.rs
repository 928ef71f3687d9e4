// SPDX-License-Identifier: MIT OR Apache-2.0

//! What only the kernel can do with a file.

use std::fs::File;
use std::io;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, SeekFrom};
use rustix::io::{Errno, retry_on_intr};

use crate::pages::ranges::FilePages;

pub(super) fn memfd(name: &str, bytes: u64) -> io::Result<File> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    retry_on_intr(|| rustix::fs::ftruncate(&fd, bytes))?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(fd.into())
}

pub(super) fn punch_hole(file: &File, pages: FilePages) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let (start, bytes) = (pages.start_bytes(), pages.bytes());
    retry_on_intr(|| rustix::fs::fallocate(file, flags, start, bytes))?;
    Ok(())
}

pub(super) fn first_data(file: &File, pages: FilePages) -> io::Result<Option<FilePages>> {
    let seek = |from| retry_on_intr(|| rustix::fs::seek(file, from));
    let data = match seek(SeekFrom::Data(pages.start_bytes())) {
        // No data from here to the end of the file.
        Err(Errno::NXIO) => return Ok(None),
        data => data?,
    };
    if data >= pages.start_bytes() + pages.bytes() {
        return Ok(None);
    }
    let hole = seek(SeekFrom::Hole(data))?;
    let data = FilePages::covering_bytes(data, hole.saturating_sub(data));
    Ok(data.and_then(|data| data.intersection(pages)))
}

pub(super) fn allocated(file: &File) -> io::Result<u64> {
    // st_blocks counts units of 512 bytes and is never negative.
    Ok(rustix::fs::fstat(file)?.st_blocks.unsigned_abs() * 512)
}
