//! Which threads of a grid access which global memory, to see that something orders them.

use std::collections::HashMap;

use crate::shared::Access;

/// An access that others may conflict with.
#[derive(Clone, Copy)]
struct Touch {
    block: u32,
    access: Access,
    /// Which bytes of the word.
    bytes: u8,
    stores: bool,
    /// Not `relaxed`, `release` or atomic: those may meet others at any time.
    is_weak: bool,
}

impl Touch {
    fn conflicts_with(&self, later: &Touch) -> bool {
        let is_ordered = self.block == later.block && self.access.is_before(later.access);
        self.bytes & later.bytes != 0
            && (self.stores || later.stores)
            && (self.is_weak || later.is_weak)
            && !is_ordered
    }
}

/// What the threads of a grid have accessed.
#[derive(Default)]
pub(crate) struct Races {
    words: HashMap<u64, Vec<Touch>>,
}

impl Races {
    /// Thread `access` of block `block` accesses `bytes` bytes at `address`.
    ///
    /// # Errors
    /// If another thread has accessed them before, one of the two stores, one is weak, and nothing orders them.
    pub(crate) fn touch(
        &mut self,
        address: u64,
        bytes: u64,
        (block, access): (u32, Access),
        stores: bool,
        is_weak: bool,
    ) -> Result<(), String> {
        for word in address / 4..(address + bytes).div_ceil(4) {
            let first = address.max(word * 4) - word * 4;
            let end = (address + bytes).min(word * 4 + 4) - word * 4;
            let mask = ((1 << end) - (1 << first)) as u8;
            let touch = Touch { block, access, bytes: mask, stores, is_weak };
            let touches = self.words.entry(word).or_default();
            if let Some(other) = touches.iter().find(|other| other.conflicts_with(&touch)) {
                let what = if other.stores { "store" } else { "load" };
                return Err(format!(
                    "nothing orders the {what} of thread {} of block {} at {address:#x} before this access",
                    other.access.thread, other.block
                ));
            }
            // What conflicts with an access that this one comes after conflicts with this one too, if it does as much.
            touches.retain(|other| {
                let is_ordered = other.block == block && other.access.is_before(access);
                let does_less =
                    stores >= other.stores && is_weak >= other.is_weak && other.bytes & !mask == 0;
                !(is_ordered && does_less)
            });
            touches.push(touch);
        }
        Ok(())
    }
}
