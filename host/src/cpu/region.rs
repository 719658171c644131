//! The regions of all ranks of a group, in one piece of shared memory: see [`Layout`].

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{Arc, atomic::AtomicU64},
};

use fused_collective_core::workspace::Layout;

use super::line::Mover;
use crate::group::shared_memory::SharedMemory;

/// A mapping of all ranks' regions.
#[derive(Debug)]
pub(crate) struct Regions {
    memory: Arc<SharedMemory>,
    layout: Layout,
    mover: Mover,
}

impl Regions {
    /// Maps the memory of a group, of `layout.total_bytes()` bytes.
    ///
    /// # Errors
    /// As [`SharedMemory::map`].
    pub(crate) fn map(fd: BorrowedFd<'_>, layout: Layout) -> io::Result<Self> {
        Ok(Regions {
            memory: Arc::new(SharedMemory::map(fd, layout.total_bytes())?),
            layout,
            mover: Mover::of_this_processor(),
        })
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The instructions that move its lines.
    #[inline(always)]
    pub(super) fn mover(&self) -> Mover {
        self.mover
    }

    pub(crate) fn memory(&self) -> &Arc<SharedMemory> {
        &self.memory
    }

    /// The words of `bytes` bytes at `offset` of rank `rank`'s region.
    ///
    /// # Panics
    /// If they are not in the region or not whole words: offsets come from [`Layout`] and plans, never from outside.
    pub(crate) fn words(&self, rank: u32, offset: u64, bytes: u64) -> &[AtomicU64] {
        let end = offset.checked_add(bytes);
        assert!(
            rank < self.layout.world_size() && end.is_some_and(|end| end <= self.layout.region_bytes()),
            "rank {rank}, offset {offset}, {bytes} bytes: not in a region"
        );
        self.memory.words(u64::from(rank) * self.layout.region_bytes() + offset, bytes)
    }
}
