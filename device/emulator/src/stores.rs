//! Stores to global memory that are on their way: the thread that made them sees them, others some time later.

use crate::memory::Cell;

/// A store that others do not see yet.
struct Store {
    thread: usize,
    cell: Cell,
    bytes: u64,
    value: u64,
}

/// The oldest first. Those of one place arrive in this order, others in any.
#[derive(Default)]
pub(crate) struct Stores(Vec<Store>);

impl Stores {
    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn push(&mut self, thread: usize, cell: Cell, bytes: u64, value: u64) {
        self.0.push(Store { thread, cell, bytes, value });
    }

    /// Makes the `index`-th visible, and before it those before it that overlap it.
    pub(crate) fn complete(&mut self, mut index: usize) {
        let Store { cell, bytes, value, .. } = self.0[index];
        while let Some(older) =
            self.0[..index].iter().position(|store| store.cell.overlaps(store.bytes, cell, bytes))
        {
            let before = self.len();
            self.complete(older);
            index -= before - self.len();
        }
        self.0.remove(index);
        cell.store(bytes, value);
    }

    /// Makes those of some threads visible, and those before them to the same places.
    pub(crate) fn complete_of(&mut self, is_of: impl Fn(usize) -> bool) {
        while let Some(index) = self.0.iter().position(|store| is_of(store.thread)) {
            self.complete(index);
        }
    }

    /// Makes those visible that a thread sees when it loads `bytes` bytes: what it has stored there.
    pub(crate) fn complete_own(&mut self, thread: usize, cell: Cell, bytes: u64) {
        while let Some(index) = self
            .0
            .iter()
            .position(|store| store.thread == thread && store.cell.overlaps(store.bytes, cell, bytes))
        {
            self.complete(index);
        }
    }
}
