// SPDX-License-Identifier: GPL-2.0-or-later
//! A picture of virtio-gpu's, whose storage is the guest's memory.

use crate::virtio::{Buffer, Queue};
use guestmemfd_guest::PAGE_SIZE;

/// Pages of the storage: a picture of 64 by 64 points, four bytes each.
pub(super) const PAGES: usize = 4;
const SIDE: u32 = 64;

const CREATE_2D: u32 = 0x0101;
const UNREF: u32 = 0x0102;
const TRANSFER_TO_HOST_2D: u32 = 0x0105;
const ATTACH_BACKING: u32 = 0x0106;
const OK: u32 = 0x1100;
/// `VIRTIO_GPU_FORMAT_B8G8R8X8_UNORM`.
const FORMAT: u32 = 2;
const RESOURCE: u32 = 1;

/// Words of `struct virtio_gpu_ctrl_hdr`.
const HEADER: usize = 6;

/// Makes the picture, whose storage begins at an address. Did the device do it?
pub(super) fn attach(queue: &mut Queue, at: u64) -> Result<bool, &'static str> {
    // One of an earlier test; if there is none, that is an error.
    command(queue, UNREF, &[RESOURCE, 0])?;
    let entry = [
        at as u32,
        (at >> 32) as u32,
        PAGES as u32 * PAGE_SIZE as u32,
        0,
    ];
    let mut backing = [RESOURCE, 1, 0, 0, 0, 0];
    backing[2..].copy_from_slice(&entry);
    Ok(command(queue, CREATE_2D, &[RESOURCE, FORMAT, SIDE, SIDE])?
        && command(queue, ATTACH_BACKING, &backing)?)
}

/// Has the device read the picture. Did it do that?
pub(super) fn transfer(queue: &mut Queue) -> Result<bool, &'static str> {
    command(
        queue,
        TRANSFER_TO_HOST_2D,
        &[0, 0, SIDE, SIDE, 0, 0, RESOURCE, 0],
    )
}

fn command(queue: &mut Queue, kind: u32, rest: &[u32]) -> Result<bool, &'static str> {
    let mut request = [0_u32; HEADER + 8];
    let mut answer = [0_u32; HEADER];
    request[0] = kind;
    request[HEADER..HEADER + rest.len()].copy_from_slice(rest);
    let buffer = |address, words: usize, writable| Buffer {
        address,
        length: 4 * words as u32,
        writable,
    };
    let at = answer.as_mut_ptr();
    // SAFETY: request and answer live until the device is done.
    unsafe {
        queue.request(&[
            buffer(request.as_ptr() as u64, HEADER + rest.len(), false),
            buffer(at as u64, HEADER, true),
        ])?;
        Ok(at.read_volatile() == OK)
    }
}
