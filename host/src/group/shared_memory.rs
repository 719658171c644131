//! Memory that the processes of a group share.
//!
//! An anonymous `memfd`: it vanishes with the last process that has it open or mapped. Other processes write it at any
//! time, so it is only ever touched through atomics.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::AtomicU64,
};

use rustix::{
    fs::{MemfdFlags, SealFlags},
    mm::{MapFlags, ProtFlags},
};

/// A mapping of shared memory.
#[derive(Debug)]
pub struct SharedMemory {
    base: NonNull<AtomicU64>,
    bytes: u64,
}

// SAFETY: the mapping is memory like any other, not tied to a thread, and only atomics in it are handed out.
unsafe impl Send for SharedMemory {}
// SAFETY: as above; shared access to atomics is what they are for.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// Creates `bytes` bytes of zeros that can neither shrink nor grow.
    pub fn create(bytes: u64) -> io::Result<OwnedFd> {
        let fd =
            rustix::fs::memfd_create("fused-collective", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, bytes)?;
        // A mapping of a file that shrinks is a SIGBUS waiting to happen.
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(fd)
    }

    /// Maps the memory that [`create`](Self::create) made, here or in another process of the group.
    ///
    /// # Errors
    /// The system's, or `InvalidData` for a file of another size or one that could still shrink.
    pub fn map(fd: BorrowedFd<'_>, bytes: u64) -> io::Result<Self> {
        let size = rustix::fs::fstat(fd.as_fd())?.st_size;
        let sealed = rustix::fs::fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        if u64::try_from(size) != Ok(bytes) || !sealed {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the shared memory has {size} bytes (sealed: {sealed}), not {bytes}"),
            ));
        }
        let length = usize::try_from(bytes).map_err(io::Error::other)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh shared mapping at an address of the kernel's choice aliases nothing of this process.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, protection, MapFlags::SHARED, fd, 0)? };
        let base =
            NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap returned a null address"))?;
        Ok(SharedMemory { base, bytes })
    }

    /// The words of `bytes` bytes at `offset`.
    ///
    /// # Panics
    /// If they are not in the memory or not whole words: offsets come from layouts, never from outside.
    pub fn words(&self, offset: u64, bytes: u64) -> &[AtomicU64] {
        let end = offset.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= self.bytes) && offset.is_multiple_of(8) && bytes.is_multiple_of(8),
            "{bytes} bytes at {offset} are not words of {} bytes",
            self.bytes
        );
        // SAFETY: the mapping holds `self.bytes` bytes (checked in `map`), the file cannot shrink, and the range was
        // checked to lie in it; mappings are page-aligned, so words are aligned. Every process of the group
        // accesses the memory through atomics only, and any bit pattern is an `AtomicU64`. The borrow of `self`
        // keeps the mapping alive.
        unsafe {
            std::slice::from_raw_parts(self.base.add((offset / 8) as usize).as_ptr(), (bytes / 8) as usize)
        }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: this is the whole mapping that `map` made, and no borrow of it outlives `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes as usize) };
        debug_assert!(unmapped.is_ok(), "munmap: {unmapped:?}");
    }
}
