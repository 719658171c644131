//! Memory that the processes of a group share.
//!
//! One anonymous `memfd` holds the regions of all ranks ([`Layout`]); it vanishes with the last process
//! that has it open or mapped. Other processes write it at any time, so it is only ever touched through
//! atomics.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::AtomicU64,
};

use fused_collective_core::workspace::Layout;
use rustix::{
    fs::{MemfdFlags, SealFlags},
    mm::{MapFlags, ProtFlags},
};

/// Creates the memory of a group: `layout.total_bytes()` of zeros that can neither shrink nor grow.
pub(crate) fn create(layout: &Layout) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("fused-collective", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&fd, layout.total_bytes())?;
    // A mapping of a file that shrinks is a SIGBUS waiting to happen.
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(fd)
}

/// A mapping of all ranks' regions.
#[derive(Debug)]
pub(crate) struct Regions {
    base: NonNull<AtomicU64>,
    layout: Layout,
}

// SAFETY: the mapping is memory like any other, not tied to a thread, and only atomics in it are handed out.
unsafe impl Send for Regions {}
// SAFETY: as above; shared access to atomics is what they are for.
unsafe impl Sync for Regions {}

impl Regions {
    /// Maps the memory that [`create`] made, here or in another process of the group.
    ///
    /// # Errors
    /// The system's, or `InvalidData` for a file of another size or one that could still shrink.
    pub(crate) fn map(fd: BorrowedFd<'_>, layout: Layout) -> io::Result<Self> {
        let size = rustix::fs::fstat(fd.as_fd())?.st_size;
        let sealed = rustix::fs::fcntl_get_seals(fd)?.contains(SealFlags::SHRINK);
        if u64::try_from(size) != Ok(layout.total_bytes()) || !sealed {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "the shared memory has {size} bytes (sealed: {sealed}), not {}",
                    layout.total_bytes()
                ),
            ));
        }
        let bytes = usize::try_from(layout.total_bytes()).map_err(io::Error::other)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh shared mapping at an address of the kernel's choice aliases nothing of this process.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), bytes, protection, MapFlags::SHARED, fd, 0)? };
        let base =
            NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap returned a null address"))?;
        Ok(Regions { base, layout })
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The words of `bytes` bytes at `offset` of rank `rank`'s region.
    ///
    /// # Panics
    /// If they are not in the region or not whole words: offsets come from [`Layout`] and plans, never from outside.
    pub(crate) fn words(&self, rank: u32, offset: u64, bytes: u64) -> &[AtomicU64] {
        let end = offset.checked_add(bytes);
        assert!(
            rank < self.layout.world_size()
                && end.is_some_and(|end| end <= self.layout.region_bytes())
                && offset.is_multiple_of(8)
                && bytes.is_multiple_of(8),
            "rank {rank}, offset {offset}, {bytes} bytes: not words of a region"
        );
        let start = (u64::from(rank) * self.layout.region_bytes() + offset) / 8;
        // SAFETY: the mapping holds `total_bytes()` bytes (checked in `map`), the file cannot shrink, and the range
        // was checked to lie in it; mappings are page-aligned, so words are aligned. Every process of the
        // group accesses the memory through atomics only, and any bit pattern is an `AtomicU64`. The borrow of
        // `self` keeps the mapping alive.
        unsafe { std::slice::from_raw_parts(self.base.add(start as usize).as_ptr(), (bytes / 8) as usize) }
    }
}

impl Drop for Regions {
    fn drop(&mut self) {
        // SAFETY: this is the whole mapping that `map` made, and no borrow of it outlives `self`.
        let unmapped =
            unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.layout.total_bytes() as usize) };
        debug_assert!(unmapped.is_ok(), "munmap: {unmapped:?}");
    }
}
