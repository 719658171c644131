//! Parameter structs of the kernels, by the rules of
//! [`fused_collective_core::launch`], whose structs some of them hold.

use fused_collective_core::{
    fingerprint,
    fingerprint::in_ptx,
    launch::{Address, Group},
};

/// The parameters of one primitive step of an eager framework: an `eager_*` kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EagerStep {
    /// The first operand.
    pub a: Address,
    /// The second operand, where there is one.
    pub b: Address,
    /// The result.
    pub out: Address,
    /// Rows.
    pub tokens: u32,
    /// Elements of a row: a multiple of 4.
    pub hidden: u32,
    /// The number that the step's documentation names.
    pub value: f32,
    /// Keeps the struct free of padding.
    pub reserved: u32,
}

/// The parameters of the kernel `audit_outputs`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Audit {
    /// The bytes that the kernel before wrote, 16-byte aligned.
    pub actual: Address,
    /// The bytes that it should have written, 16-byte aligned.
    pub expected: Address,
    /// One `u32`, 0: where a pack differs, it gets which one, counted from 1. The first to be found stays.
    pub found: Address,
    /// 16-byte packs to compare.
    pub packs: u64,
    /// The word that is written over what was compared.
    pub poison: u32,
    /// Keeps the struct free of padding.
    pub reserved: u32,
}

/// The parameters of the kernel `digest`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Digest {
    /// The bytes to digest, 16-byte aligned.
    pub bytes: Address,
    /// A `u64` for each thread of the grid: gets the sum of the [parts](crate::digest::part) that the thread has added up.
    pub sums: Address,
    /// 16-byte packs to digest.
    pub packs: u64,
}

/// The parameters of the kernels `encode_*`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conversions {
    /// Gets the code of each `f32`.
    pub out: Address,
    /// The bits of the first `f32`.
    pub first: u32,
    /// Count of numbers to convert, a multiple of 8: the bits count up.
    pub count: u32,
}

/// The parameters of the kernel `links_meet`. In every `links_*` kernel's `group`, the regions are those of
/// [`links`](crate::links), and the operation and its epochs those of the group's workspace.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Meet {
    /// This rank's place in its group.
    pub group: Group,
    /// The count that this rank's flags get and its peers' must reach.
    pub count: u32,
    /// Keeps the struct free of padding.
    pub reserved: u32,
}

/// The parameters of the kernel `links_ping`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ping {
    /// This rank's place in its group.
    pub group: Group,
    /// One `u64`: gets the nanoseconds that all trips took but the first
    /// [`WARM_UP_TRIPS`](crate::links::WARM_UP_TRIPS).
    pub nanoseconds: Address,
    /// The other rank.
    pub peer: u32,
    /// 1: this rank sends first; 0: it answers.
    pub leads: u32,
    /// The count of the first trip; each trip counts one more.
    pub count: u32,
    /// Trips there and back.
    pub trips: u32,
}

/// The parameters of the kernel `links_push`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Push {
    /// This rank's place in its group.
    pub group: Group,
    /// Bytes of a place.
    pub place_bytes: u64,
    /// 16-byte packs for each target, less than 2^28.
    pub packs: u32,
    /// The distance of the first target: 0 is this rank itself, 1 the one after it.
    pub first: u32,
    /// Targets, one after the other, at most as many as there are ranks.
    pub targets: u32,
    /// Number of the run, for the [pattern](crate::links::pattern).
    pub run: u32,
    /// Times that everything is written.
    pub passes: u32,
    /// Keeps the struct free of padding.
    pub reserved: u32,
}

/// The parameters of the kernel `links_pull`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pull {
    /// This rank's place in its group.
    pub group: Group,
    /// Bytes of a place.
    pub place_bytes: u64,
    /// 16-byte packs to read.
    pub packs: u32,
    /// The rank whose own place in its own memory is read; its place in this rank's memory gets it.
    pub source: u32,
    /// Times that everything is read.
    pub passes: u32,
    /// Keeps the struct free of padding.
    pub reserved: u32,
}

/// To be raised when a field, or the memory that it points to, comes to mean something else in the same place.
const REVISION: u64 = 1;

/// A fingerprint of these structs. A program refuses kernels whose fingerprint differs.
///
/// Modules of these kernels carry [the library's](fused_collective_core::launch::LAYOUT) as well.
pub const LAYOUT: u32 = fingerprint! {
    [REVISION]
    EagerStep { a, b, out, tokens, hidden, value, reserved }
    Audit { actual, expected, found, packs, poison, reserved }
    Digest { bytes, sums, packs }
    Conversions { out, first, count }
    Meet { group, count, reserved }
    Ping { group, nanoseconds, peer, leads, count, trips }
    Push { group, place_bytes, packs, first, targets, run, passes, reserved }
    Pull { group, place_bytes, packs, source, passes, reserved }
};

/// The variable of a PTX module that holds its [`LAYOUT`].
pub const LAYOUT_SYMBOL: &str = "fused_collective_bench_layout";

/// The [`LAYOUT`] that a module was built with, from its PTX; `None` if the text has none.
pub fn layout_of(ptx: &str) -> Option<u32> {
    in_ptx(ptx, LAYOUT_SYMBOL)
}

// Host and device are compiled by different compilers: neither may pad what the other does not.
const _: () = {
    assert!(size_of::<EagerStep>() == 40 && size_of::<Audit>() == 40 && size_of::<Conversions>() == 16);
    assert!(size_of::<Digest>() == 24);
    assert!(size_of::<Meet>() == 104 + 8 && size_of::<Ping>() == 104 + 24);
    assert!(size_of::<Push>() == 104 + 32 && size_of::<Pull>() == 104 + 24);
};

#[cfg(test)]
mod tests {
    use std::format;

    use super::*;

    #[test]
    fn every_launch_struct_is_in_the_fingerprint() {
        let source = include_str!("launch.rs");
        let declared = source.lines().filter_map(|line| line.strip_prefix("pub struct "));
        let mut count = 0;
        for name in declared.map(|rest| rest.trim_end_matches(" {")) {
            assert!(source.contains(&format!("\n    {name} {{")), "{name} is not in `LAYOUT`");
            count += 1;
        }
        assert_eq!(count, 8);
    }

    #[test]
    fn a_module_s_fingerprint_is_not_the_library_s() {
        let library = fused_collective_core::launch::LAYOUT_SYMBOL;
        let ptx = format!(".global .u32 {library} = 7;\n.global .u32 {LAYOUT_SYMBOL} = {LAYOUT};\n");
        assert_eq!(layout_of(&ptx), Some(LAYOUT));
        assert_eq!(fused_collective_core::launch::layout_of(&ptx), Some(7));
    }
}
