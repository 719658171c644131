//! Global memory: allocations of the host, accessed atomically, as several grids may run at the same time.

use std::{
    ops::Range,
    ptr,
    sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering},
};

/// The allocations that a grid may access.
#[derive(Debug)]
pub struct Memory {
    /// Sorted, and apart from each other.
    allocations: Vec<Range<u64>>,
}

impl Memory {
    /// Memory that consists of `allocations`, ranges of addresses with exposed provenance.
    ///
    /// # Safety
    /// While grids run with it, the allocations live, and others access them only atomically or not at all.
    pub unsafe fn new(mut allocations: Vec<Range<u64>>) -> Memory {
        allocations.sort_by_key(|range| range.start);
        Memory { allocations }
    }

    /// Where `bytes` bytes at `address` are, if they are in one allocation and aligned.
    pub(crate) fn at(&self, address: u64, bytes: u64) -> Result<Cell, String> {
        let after = self.allocations.partition_point(|range| range.start <= address);
        let inside = self.allocations[..after]
            .last()
            .is_some_and(|range| address <= range.end && range.end - address >= bytes);
        match (inside, address.is_multiple_of(bytes)) {
            (false, _) => {
                Err(format!("{bytes} bytes at {address:#x} are in none of the tensors and workspaces"))
            }
            (_, false) => Err(format!("{bytes} bytes at {address:#x} are not aligned")),
            _ => Ok(Cell { address }),
        }
    }
}

/// Bytes that may be accessed, as many as were asked for, and aligned to that.
#[derive(Clone, Copy)]
pub(crate) struct Cell {
    address: u64,
}

impl Cell {
    /// What is `offset` bytes further, among those that were asked for.
    pub(crate) fn at(self, offset: u64) -> Cell {
        Cell { address: self.address + offset }
    }

    /// Whether `bytes` bytes here and `other_bytes` at `other` have some in common.
    pub(crate) fn overlaps(self, bytes: u64, other: Cell, other_bytes: u64) -> bool {
        self.address < other.address + other_bytes && other.address < self.address + bytes
    }

    /// A value of `bytes` bytes.
    pub(crate) fn load(self, bytes: u64) -> u64 {
        let at = self.address;
        // SAFETY: inside an allocation and aligned, as `Memory::at` found, and accessed atomically by everyone.
        unsafe {
            match bytes {
                1 => u64::from((*pointer::<AtomicU8>(at)).load(Ordering::Acquire)),
                2 => u64::from((*pointer::<AtomicU16>(at)).load(Ordering::Acquire)),
                4 => u64::from((*pointer::<AtomicU32>(at)).load(Ordering::Acquire)),
                _ => (*pointer::<AtomicU64>(at)).load(Ordering::Acquire),
            }
        }
    }

    /// Stores the low `bytes` bytes of `value`.
    pub(crate) fn store(self, bytes: u64, value: u64) {
        let at = self.address;
        // SAFETY: as in `load`.
        unsafe {
            match bytes {
                1 => (*pointer::<AtomicU8>(at)).store(value as u8, Ordering::Release),
                2 => (*pointer::<AtomicU16>(at)).store(value as u16, Ordering::Release),
                4 => (*pointer::<AtomicU32>(at)).store(value as u32, Ordering::Release),
                _ => (*pointer::<AtomicU64>(at)).store(value, Ordering::Release),
            }
        }
    }

    /// Replaces the word `expected` by `new`; returns what was there.
    pub(crate) fn compare_and_swap(self, expected: u32, new: u32) -> u32 {
        // SAFETY: as in `load`.
        let word = unsafe { &*pointer::<AtomicU32>(self.address) };
        word.compare_exchange(expected, new, Ordering::AcqRel, Ordering::Acquire).unwrap_or_else(|was| was)
    }
}

fn pointer<T>(address: u64) -> *const T {
    ptr::with_exposed_provenance(address as usize)
}
