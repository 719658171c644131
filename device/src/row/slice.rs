//! The packs of a row that are a thread's.

use crate::{epilogue::PackIndex, launch::Shape};

use super::team::Team;

/// This thread's packs of every row.
#[derive(Clone, Copy, Debug)]
pub struct ThreadSlice<const P: usize, const RESIDENT: bool> {
    thread: u32,
    threads: u32,
    pub(super) row_packs: u32,
}

impl<const P: usize, const RESIDENT: bool> ThreadSlice<P, RESIDENT> {
    /// The share of this thread.
    #[inline(always)]
    pub fn new(team: &Team, shape: &Shape) -> Self {
        ThreadSlice { thread: team.thread, threads: team.threads, row_packs: shape.row_packs }
    }

    /// Packs of a row.
    #[inline(always)]
    pub fn row_packs(&self) -> u32 {
        self.row_packs
    }

    /// Lines of a row that each warp has.
    #[inline(always)]
    pub(super) fn lines(&self) -> u32 {
        if RESIDENT { P as u32 } else { self.row_packs.div_ceil((P as u32 * self.threads).max(1)) * P as u32 }
    }

    /// Calls `each` for the chunks of `P` packs that a thread takes a row in. As many for
    /// every thread; one where the row is resident.
    #[inline(always)]
    pub fn for_chunks(&self, mut each: impl FnMut(u32)) {
        if RESIDENT {
            return each(0);
        }
        let mut chunk = 0;
        while chunk * P as u32 * self.threads < self.row_packs {
            each(chunk);
            chunk += 1;
        }
    }

    /// The `p`-th pack of chunk `chunk`, unless the row has ended before it.
    #[inline(always)]
    pub fn pack(&self, chunk: u32, p: usize) -> Option<u32> {
        let pack = self.thread + (chunk * P as u32 + p as u32) * self.threads;
        (pack < self.row_packs).then_some(pack)
    }

    /// Calls `each` for all packs of a row that are this thread's.
    #[inline(always)]
    pub fn for_packs(&self, mut each: impl FnMut(u32)) {
        let mut pack = self.thread;
        while pack < self.row_packs {
            each(pack);
            pack += self.threads;
        }
    }

    /// The indices of this thread's packs of chunk `chunk` of token `token`; those past the row's end are not to be used.
    #[inline(always)]
    pub fn indices(&self, token: u64, chunk: u32) -> [PackIndex; P] {
        let pack = |p: usize| self.thread + (chunk * P as u32 + p as u32) * self.threads;
        core::array::from_fn(|p| PackIndex::new(token, pack(p), self.row_packs))
    }

    /// Calls `each` for this thread's packs of chunk `chunk`: `p` and the pack.
    #[inline(always)]
    pub fn for_each(&self, chunk: u32, mut each: impl FnMut(usize, u32)) {
        const { assert!(P == 1 || P == 2) };
        let mut each = |p| {
            if let Some(pack) = self.pack(chunk, p) {
                each(p, pack);
            }
        };
        // Written out: an array of registers needs constant indices, and a compiler may leave a loop a loop.
        each(0);
        if P > 1 {
            each(1);
        }
    }

    /// Calls `each` for this thread's packs of chunk `chunk` as [`for_each`](Self::for_each), and for what is past the
    /// row's end: all lanes of a warp call it together.
    #[inline(always)]
    pub fn for_lanes(&self, chunk: u32, mut each: impl FnMut(usize, u32)) {
        const { assert!(P == 1 || P == 2) };
        let mut each = |p| each(p, self.thread + (chunk * P as u32 + p as u32) * self.threads);
        each(0);
        if P > 1 {
            each(1);
        }
    }
}
