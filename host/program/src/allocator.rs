//! The allocator of the program. Where the system has no memory left, Rust aborts the process, which launchers report as a crash.
//! This allocator ends it like any other failure: one line that names the rank and the cause, and exit status 1.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    ffi::c_int,
    io::{self, Write as _},
    sync::atomic::{AtomicU32, Ordering},
};

use crate::{exit::FAILURE, usage::PROGRAM};

/// The system's allocator, which ends the process where there is no memory, except within `fallibly`.
#[derive(Debug)]
pub struct Allocator;

/// This process's rank, for the line; none is `u32::MAX`.
static RANK: AtomicU32 = AtomicU32::new(u32::MAX);

thread_local! {
    static FALLIBLE: Cell<bool> = const { Cell::new(false) };
}

/// Names the process for the line.
pub(crate) fn set_rank(rank: u32) {
    RANK.store(rank, Ordering::Relaxed);
}

/// Calls `allocate`, which handles an allocation that fails.
pub(crate) fn fallibly<T>(allocate: impl FnOnce() -> T) -> T {
    let before = FALLIBLE.replace(true);
    let result = allocate();
    FALLIBLE.set(before);
    result
}

unsafe extern "C" {
    /// Ends the process without the handlers of `exit`, which may allocate.
    fn _exit(status: c_int) -> !;
}

/// Passes `address` on, unless it is null.
fn checked(address: *mut u8, layout: Layout) -> *mut u8 {
    // A thread that is ending has no such variable any more.
    if address.is_null() && !FALLIBLE.try_with(Cell::get).unwrap_or(false) {
        end(layout.size())
    }
    address
}

/// Writes the line, and ends the process. Allocates nothing.
#[cold]
fn end(bytes: usize) -> ! {
    let mut line = [0u8; 256];
    let mut rest = &mut line[..];
    let rank = RANK.load(Ordering::Relaxed);
    let _ = write!(rest, "{PROGRAM}: ");
    if rank != u32::MAX {
        let _ = write!(rest, "rank {rank}: ");
    }
    let _ = writeln!(
        rest,
        "out of memory: no {bytes} bytes more. The likely cause is a limit (ulimit -v, a job's) or a full machine: \
         raise it, or use fewer tokens"
    );
    let left = rest.len();
    // Nobody is left to tell of a failure to write.
    let _ = rustix::io::write(io::stderr(), &line[..line.len() - left]);
    // SAFETY: a function of the C library that takes a number and does not return.
    unsafe { _exit(FAILURE.into()) }
}

// SAFETY: every call goes to the system's allocator, and what it returns is passed on unchanged.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise about the layout is the one that is asked for.
        checked(unsafe { System.alloc(layout) }, layout)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        checked(unsafe { System.alloc_zeroed(layout) }, layout)
    }

    unsafe fn realloc(&self, address: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // SAFETY: the address came from this allocator, and so from the system's, with this layout.
        let moved = unsafe { System.realloc(address, layout, bytes) };
        // SAFETY: `bytes` is valid with this alignment, as the caller promises.
        checked(moved, unsafe { Layout::from_size_align_unchecked(bytes, layout.align()) })
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        // SAFETY: as in `realloc`.
        unsafe { System.dealloc(address, layout) }
    }
}
