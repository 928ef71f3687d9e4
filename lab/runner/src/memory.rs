// SPDX-License-Identifier: GPL-2.0-or-later
//! How much memory the kernel accounts to the files behind a guest.
//!
//! `st_blocks` answers for a memfd and is always 0 for a guest_memfd. `cachestat(2)` counts the
//! pages that a file has in its page cache, which is where a guest_memfd keeps all it has. The
//! system's page counts are the second opinion: they see the pages of every process, so they also
//! tell whether a dead QEMU left any behind.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, bail};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

const PAGE: u64 = 4096;

/// The number is the same on all architectures; libc does not name it.
const SYS_CACHESTAT: libc::c_long = 451;

/// Bytes in the page cache of one file.
pub(crate) fn cached_bytes(file: BorrowedFd<'_>) -> io::Result<u64> {
    // Length 0: up to the end of the file.
    cached_bytes_of(file, 0, 0)
}

/// The same for a part of the file.
fn cached_bytes_of(file: BorrowedFd<'_>, offset: u64, length: u64) -> io::Result<u64> {
    #[repr(C)]
    struct Range {
        offset: u64,
        length: u64,
    }
    #[repr(C)]
    #[derive(Default)]
    struct Counts {
        cache: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    let range = Range { offset, length };
    let mut counts = Counts::default();
    // SAFETY: both structures have the layout that cachestat(2) documents and outlive the call,
    // which keeps neither.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            file.as_raw_fd(),
            &raw const range,
            &raw mut counts,
            0,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(counts.cache * PAGE)
}

/// Does this kernel have `cachestat`?
pub(crate) fn can_count() -> bool {
    rustix::fs::memfd_create("can-count", MemfdFlags::CLOEXEC)
        .is_ok_and(|file| cached_bytes(file.as_fd()).is_ok())
}

/// A file behind a guest's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Backing {
    pub(crate) kind: Kind,
    pub(crate) size: u64,
    /// Bytes that the kernel has allocated for it; unknown where the kernel cannot be asked.
    pub(crate) allocated: Option<u64>,
    inode: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Private view.
    GuestMemfd,
    /// Shared view.
    Memfd,
}

/// The memfds and guest_memfds that a process has open, each once, in the order of their
/// descriptors.
pub(crate) fn backings(pid: u32) -> Result<Vec<Backing>> {
    let mut found: Vec<Backing> = Vec::new();
    for fd in open_fds(pid)? {
        let link = format!("/proc/{pid}/fd/{fd}");
        // A descriptor closed since the listing is none of ours.
        let Ok(target) = fs::read_link(&link) else {
            continue;
        };
        let Some(kind) = kind_of(&target.to_string_lossy()) else {
            continue;
        };
        let meta = fs::metadata(&link).with_context(|| format!("cannot stat {link}"))?;
        if found
            .iter()
            .any(|b| b.inode == meta.ino() && b.kind == kind)
        {
            continue;
        }
        let allocated = match kind {
            Kind::Memfd => Some(meta.blocks() * 512),
            Kind::GuestMemfd => guest_memfd_bytes(pid, fd)?,
        };
        found.push(Backing {
            kind,
            size: meta.len(),
            allocated,
            inode: meta.ino(),
        });
    }
    Ok(found)
}

/// All allocated bytes of one kind, if the kernel tells.
pub(crate) fn allocated(backings: &[Backing], kind: Kind) -> Option<u64> {
    let mut of_kind = backings.iter().filter(|b| b.kind == kind);
    of_kind.try_fold(0, |sum, b| Some(sum + b.allocated?))
}

fn kind_of(target: &str) -> Option<Kind> {
    if target.contains("kvm-gmem") || target.contains("guest_memfd]") {
        Some(Kind::GuestMemfd)
    } else if target.starts_with("/memfd:") {
        Some(Kind::Memfd)
    } else {
        None
    }
}

/// Nothing where the kernel has no `cachestat`.
fn guest_memfd_bytes(pid: u32, fd: i32) -> Result<Option<u64>> {
    // Opening /proc/PID/fd/N does not work for a guest_memfd: it has to be fetched.
    let file = fetch_fd(pid, fd)
        .with_context(|| format!("cannot get descriptor {fd} of process {pid}"))?;
    match cached_bytes(file.as_fd()) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => Ok(None),
        Err(e) => Err(e).context("cachestat of a guest_memfd"),
    }
}

/// Bytes that the kernel has allocated for a part of the first guest_memfd of a process.
pub(crate) fn guest_memfd_part(pid: u32, offset: u64, length: u64) -> Result<u64> {
    cached_bytes_of(guest_memfd(pid)?.as_fd(), offset, length).context("cachestat")
}

/// The first guest_memfd of a process.
pub(crate) fn guest_memfd(pid: u32) -> Result<OwnedFd> {
    for fd in open_fds(pid)? {
        let target = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap_or_default();
        if kind_of(&target.to_string_lossy()) == Some(Kind::GuestMemfd) {
            return fetch_fd(pid, fd);
        }
    }
    bail!("process {pid} has no guest_memfd")
}

/// How many pages of guest_memfds a process has mapped from each NUMA node, by node.
pub(crate) fn guest_memfd_nodes(pid: u32) -> Result<Vec<(u32, u64)>> {
    let path = format!("/proc/{pid}/numa_maps");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(pages_by_node(&text))
}

fn pages_by_node(numa_maps: &str) -> Vec<(u32, u64)> {
    let mut nodes = BTreeMap::new();
    for line in numa_maps.lines() {
        let mut words = line.split_whitespace();
        if !words
            .clone()
            .any(|word| kind_of(word) == Some(Kind::GuestMemfd))
        {
            continue;
        }
        let counts = words.by_ref().filter_map(|word| {
            let (node, pages) = word.strip_prefix('N')?.split_once('=')?;
            Some((node.parse().ok()?, pages.parse::<u64>().ok()?))
        });
        for (node, pages) in counts {
            *nodes.entry(node).or_default() += pages;
        }
    }
    nodes.into_iter().collect()
}

/// A duplicate of another process's descriptor.
pub(crate) fn fetch_fd(pid: u32, fd: i32) -> Result<OwnedFd> {
    let process = pidfd_open(process(pid)?, PidfdFlags::empty())?;
    Ok(pidfd_getfd(&process, fd, PidfdGetfdFlags::empty())?)
}

/// A process number as rustix takes it.
pub(crate) fn process(pid: u32) -> Result<Pid> {
    let pid = i32::try_from(pid)?;
    Pid::from_raw(pid).context("0 is no process number")
}

/// The descriptors that a process has open.
pub(crate) fn open_fds(pid: u32) -> Result<Vec<i32>> {
    let dir = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&dir).with_context(|| format!("cannot list {dir}"))?;
    let mut fds: Vec<i32> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    fds.sort_unstable();
    Ok(fds)
}

/// What a process holds, for before and after.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Holdings {
    pub(crate) fds: usize,
    pub(crate) mappings: usize,
    /// Anonymous memory only: pages of program files come and go.
    pub(crate) anonymous: u64,
}

impl Holdings {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let anonymous = kilobytes(&status, "RssAnon:").context("no RssAnon in /proc/PID/status")?;
        Ok(Self {
            fds: open_fds(pid)?.len(),
            mappings: fs::read_to_string(format!("/proc/{pid}/maps"))?
                .lines()
                .count(),
            anonymous: anonymous * 1024,
        })
    }
}

/// What a line of `/proc/PID/status` or `/proc/meminfo` says.
pub(crate) fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The system's page counts.
#[derive(Debug, Clone, Copy)]
pub(crate) struct System {
    /// Page cache that is not shmem: ordinary files, and every guest_memfd.
    pub(crate) files: u64,
    /// Every memfd and tmpfs.
    pub(crate) shmem: u64,
    /// Anonymous memory.
    pub(crate) anonymous: u64,
}

impl System {
    /// Exact: per-CPU differences are folded in first, which needs root.
    pub(crate) fn read() -> Result<Self> {
        fs::write("/proc/sys/vm/stat_refresh", "1")
            .context("cannot write /proc/sys/vm/stat_refresh")?;
        let text = fs::read_to_string("/proc/vmstat").context("cannot read /proc/vmstat")?;
        let pages = |name: &str| match vmstat(&text, name) {
            Some(pages) => Ok(pages * PAGE),
            None => bail!("/proc/vmstat has no {name}"),
        };
        let shmem = pages("nr_shmem")?;
        Ok(Self {
            files: pages("nr_file_pages")?.saturating_sub(shmem),
            shmem,
            anonymous: pages("nr_anon_pages")?,
        })
    }
}

/// What the kernel uses for itself in the whole system: page tables of guests and processes, and
/// everything small.
pub(crate) fn kernel_bytes() -> Result<u64> {
    meminfo(&["Slab:", "VmallocUsed:", "PageTables:", "SecPageTables:"])
}

/// The part of it that is everything small.
pub(crate) fn slab_bytes() -> Result<u64> {
    meminfo(&["Slab:"])
}

fn meminfo(names: &[&str]) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let parts = names.iter().map(|name| kilobytes(&text, name).unwrap_or(0));
    Ok(parts.sum::<u64>() * 1024)
}

fn vmstat(text: &str, name: &str) -> Option<u64> {
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok();
    text.lines().find_map(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::FallocateFlags;

    #[test]
    fn numbers_from_proc() {
        let text = "nr_file_pages_x 1\nnr_file_pages 77\nnr_shmem 5\n";
        assert_eq!(vmstat(text, "nr_file_pages"), Some(77));
        assert_eq!(vmstat(text, "nr_anon_pages"), None);
        assert_eq!(
            kilobytes("VmRSS:\t 12 kB\nRssAnon:\t  40 kB\n", "RssAnon:"),
            Some(40)
        );
    }

    #[test]
    fn names_of_files() {
        assert_eq!(kind_of("anon_inode:[kvm-gmem]"), Some(Kind::GuestMemfd));
        assert_eq!(kind_of("/[kvm-gmem]"), Some(Kind::GuestMemfd));
        assert_eq!(kind_of("/memfd:ram0 (deleted)"), Some(Kind::Memfd));
        assert_eq!(kind_of("socket:[33]"), None);
        assert_eq!(kind_of("anon_inode:kvm-vm"), None);
    }

    #[test]
    fn pages_of_guest_memfds_by_node() {
        let maps = "7f0 bind:1 file=/[kvm-gmem] dirty=3 N1=2 N0=1 kernelpagesize_kB=4\n\
                    7f1 default file=/memfd:x dirty=9 N0=9\n\
                    7f2 default file=/[kvm-gmem] N1=4\n";
        assert_eq!(pages_by_node(maps), [(0, 1), (1, 6)]);
    }

    #[test]
    fn own_memfd_is_found_and_counted() {
        let memfd = rustix::fs::memfd_create("lab-accounting", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memfd, 1 << 20).unwrap();
        rustix::fs::fallocate(&memfd, FallocateFlags::empty(), 0, 64 << 10).unwrap();
        let _twice = memfd.try_clone().unwrap();
        let inode = rustix::fs::fstat(&memfd).unwrap().st_ino;
        let all = backings(std::process::id()).unwrap();
        let ours: Vec<_> = all.iter().filter(|b| b.inode == inode).collect();
        assert_eq!(ours.len(), 1, "a duplicated descriptor counts once");
        assert_eq!((ours[0].size, ours[0].allocated), (1 << 20, Some(64 << 10)));
        if let Ok(bytes) = cached_bytes(memfd.as_fd()) {
            assert_eq!(bytes, 64 << 10);
        }
    }
}
