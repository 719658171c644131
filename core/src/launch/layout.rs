//! A number for the form of all that a kernel is launched with: host and kernels of different numbers do not fit.
//!
//! A program finds its kernels in files, and the files may be of another version. Every PTX module therefore carries
//! [`LAYOUT`] in a variable called [`LAYOUT_SYMBOL`], and who loads a module looks with [`layout_of`] first. The number
//! follows from the structs themselves, so nobody has to remember to change it; [`REVISION`] is for what they do not
//! show.

use core::mem::offset_of;

use super::{
    Activations, Audit, Conversions, Fill, Fp8Static, Fused, Group, Local, Meet, NvFp4, Ping, Plain, Pull,
    Push, RankState, RmsNorm, Shape, Status, Step, Turn, Unquantized,
};
use crate::{
    lamport::{SENTINEL, SLOTS},
    workspace::{self, SLOTS_OFFSET},
};

/// To be raised when a field, or the memory that it points to, comes to mean something else in the same place.
const REVISION: u64 = 1;

/// What a PTX module calls the variable that holds its [`LAYOUT`].
pub const LAYOUT_SYMBOL: &str = "fused_collective_layout";

/// Stands for the names, places and sizes of all fields of the launch structs, and for the form of the workspace.
/// Below 2^31, so that whatever takes it for signed writes it the same.
pub const LAYOUT: u32 = {
    let hash = structs(OFFSET_BASIS);
    let hash = number(number(number(hash, SLOTS), SLOTS_OFFSET), SENTINEL as u64);
    let hash = number(number(hash, workspace::VERSION), REVISION);
    ((hash ^ hash >> 32) & 0x7fff_ffff) as u32
};

/// The [`LAYOUT`] that a module was built with, from its PTX; `None` if the text has none.
///
/// rustc writes the variable as its bytes, `.b8 fused_collective_layout[4] = {1, 2, 3, 4};`; other compilers may write
/// one number.
pub fn layout_of(ptx: &str) -> Option<u32> {
    ptx.lines().find_map(|line| {
        let (declared, value) = line.split_once('=')?;
        let name = declared.split_whitespace().next_back()?;
        let value = value.trim().trim_end_matches(';').trim_end();
        if name == LAYOUT_SYMBOL {
            return value.parse().ok();
        }
        if name.strip_suffix("[4]")? != LAYOUT_SYMBOL {
            return None;
        }
        let mut bytes = [0; 4];
        let mut listed = value.strip_prefix('{')?.strip_suffix('}')?.split(',');
        for byte in &mut bytes {
            *byte = listed.next()?.trim().parse().ok()?;
        }
        listed.next().is_none().then_some(u32::from_le_bytes(bytes))
    })
}

/// Adds structs and their fields to a hash. A struct with a field that is not listed does not compile.
macro_rules! add_structs {
    ($hash:ident, $($name:ident { $($field:ident),* })*) => {$(
        $hash = number(text($hash, stringify!($name)), size_of::<$name>() as u64);
        $(
            $hash = number(text($hash, stringify!($field)), offset_of!($name, $field) as u64);
            $hash = number($hash, size_of_field(|whole: &$name| &whole.$field));
        )*
        let _ = |$name { $($field: _),* }: $name| ();
    )*};
}

// What epilogue or quantizer there is does not move what comes before it.
type AnyFused = Fused<Unquantized>;
type AnyLocal = Local<Unquantized>;
type AnyPlain = Plain<Unquantized>;
type AnyRmsNorm = RmsNorm<Unquantized>;

const fn structs(mut hash: u64) -> u64 {
    add_structs! { hash,
        RankState { poisoned, reserved, turns }
        Turn { operation, slot, reserved }
        Status { abort, failed, missing_rank, hop, operation, token, call }
        Group { regions, state, status, slot_bytes, timeout_ns, world_size, rank }
        Shape { first_token, total_tokens, tokens, row_packs, call }
        Step { a, b, out, tokens, hidden, value, reserved }
        Fill { out, packs, word, reserved }
        Audit { actual, expected, found, packs, poison, reserved }
        Conversions { out, first, count }
        Meet { group, count, reserved }
        Ping { group, nanoseconds, peer, leads, count, trips }
        Push { group, place_bytes, packs, first, targets, run, passes, reserved }
        Pull { group, place_bytes, packs, source, passes, reserved }
        Activations { input, residual, residual_out }
        AnyFused { group, shape, activations, epilogue }
        AnyLocal { shape, activations, epilogue }
        AnyPlain { quantizer }
        AnyRmsNorm { gamma, norm_out, inverse_hidden, epsilon, weight_bias, reserved, quantizer }
        Unquantized {}
        Fp8Static { values, scale }
        NvFp4 { values, scales, global_scale, swizzled, reserved }
    }
    hash
}

const fn size_of_field<S, F>(_: fn(&S) -> &F) -> u64 {
    size_of::<F>() as u64
}

/// Where FNV-1a (Fowler, Noll and Vo, 64 bits) starts.
const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;

const fn byte(hash: u64, byte: u8) -> u64 {
    (hash ^ byte as u64).wrapping_mul(0x0100_0000_01b3)
}

const fn text(mut hash: u64, text: &str) -> u64 {
    let bytes = text.as_bytes();
    let mut index = 0;
    while index < bytes.len() {
        hash = byte(hash, bytes[index]);
        index += 1;
    }
    hash
}

const fn number(mut hash: u64, number: u64) -> u64 {
    let bytes = number.to_le_bytes();
    let mut index = 0;
    while index < bytes.len() {
        hash = byte(hash, bytes[index]);
        index += 1;
    }
    hash
}

#[cfg(test)]
mod tests {
    use std::format;

    use super::*;

    #[test]
    fn the_layout_is_read_from_ptx_however_it_is_written() {
        let module =
            |line: &str| format!(".version 8.6\n.target sm_90\n{line}\n.visible .entry fill()\n{{\n}}\n");
        let rustc = ".visible .global .align 4 .b8 fused_collective_layout[4] = {29, 192, 58, 67};";
        assert_eq!(layout_of(&module(rustc)), Some(u32::from_le_bytes([29, 192, 58, 67])));
        let number = format!(".visible .global .align 4 .u32 {LAYOUT_SYMBOL} = {LAYOUT};");
        assert_eq!(layout_of(&module(&number)), Some(LAYOUT));
        assert_eq!(layout_of(&module(&format!(".global .u32 {LAYOUT_SYMBOL}=7 ;"))), Some(7));
    }

    #[test]
    fn a_module_without_a_layout_has_none() {
        for line in ["", "// fused_collective_layout", ".global .u32 other_fused_collective_layout = 7;"] {
            assert_eq!(layout_of(line), None, "{line}");
        }
        for value in ["1, 2", "{1, 2, 3}", "{1, 2, 3, 4, 5}", "{1, 2, 3, 256}"] {
            assert_eq!(layout_of(&format!(".global .b8 {LAYOUT_SYMBOL}[4] = {value};")), None, "{value}");
        }
    }

    #[test]
    fn every_launch_struct_is_listed() {
        let declared = include_str!("../launch.rs").lines().filter_map(|line| {
            let name = line.strip_prefix("pub struct ")?;
            name.split(|c: char| !c.is_alphanumeric()).next()
        });
        let listed = include_str!("layout.rs");
        let mut count = 0;
        for name in declared.filter(|&name| name != "Address") {
            let lists = |prefix: &str| listed.contains(&format!("        {prefix}{name} {{"));
            assert!(lists("") || lists("Any"), "{name} is not in `structs`");
            count += 1;
        }
        assert!(count >= 16, "{count}");
    }

    #[test]
    fn names_places_and_sizes_all_count() {
        #[repr(C)]
        struct Pair {
            first: u32,
            second: u32,
        }
        let mut hash = OFFSET_BASIS;
        add_structs! { hash, Pair { first, second } }
        let with = |fields: [(&str, u64, u64); 2], size| {
            let start = number(text(OFFSET_BASIS, "Pair"), size);
            fields
                .iter()
                .fold(start, |hash, &(name, offset, size)| number(number(text(hash, name), offset), size))
        };
        assert_eq!(hash, with([("first", 0, 4), ("second", 4, 4)], 8));
        for other in [
            with([("second", 0, 4), ("first", 4, 4)], 8),
            with([("first", 0, 4), ("second", 8, 4)], 8),
            with([("first", 0, 4), ("second", 4, 2)], 8),
            with([("first", 0, 4), ("second", 4, 4)], 64),
        ] {
            assert_ne!(hash, other);
        }
    }
}
