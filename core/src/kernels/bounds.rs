//! The blocks that kernels are compiled for.

use super::table::{Addends, Family, Kernel, Quantizer, Set, Version};
use crate::dtype::DType;

/// The blocks that an entry point is compiled for, as PTX says it: `.maxntid` and `.minnctapersm`.
///
/// They decide how many registers a thread has. A multiprocessor has 65,536: 64 for each of 1,024 threads, 128 for each
/// of 512. Larger blocks cannot be launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bounds {
    /// The most threads of a block.
    pub threads: u32,
    /// Blocks of so many threads that must fit on a multiprocessor at once.
    pub blocks: u32,
}

impl Bounds {
    /// Blocks of any size, one of the largest at a time: 64 registers a thread.
    pub const LARGEST: Bounds = Bounds { threads: 1024, blocks: 1 };
}

/// The bounds of the entry point `entry` in the module of `dtype` and `set`, compiled for `processor`.
///
/// A kernel that is none of the table's gets the bounds of one that is like it: for as many ranks, and of the version
/// that its name ends in, `_p2` for instance.
pub fn bounds(processor: &str, dtype: DType, set: Set, entry: &str) -> Bounds {
    let kernel = Kernel::with_entry(entry);
    let version = Version::of(entry);
    let is_encoded = kernel.is_some_and(|kernel| kernel.addends == Addends::Encoded);
    let quantizer = |kernel: &Kernel| kernel.epilogue.map(|epilogue| epilogue.quantizer);
    let is_fp4 = |kernel: &Kernel| quantizer(kernel) == Some(Quantizer::Fp4);
    // Without clusters and dependent launch, addresses and indices take up more registers; and for sm_120a the assembler
    // finds fewer to share.
    let takes_more = matches!(processor, "sm_80" | "sm_120a");
    // Kernels for more than 4 ranks hold a pack of each; those for 4 quantize in blocks beside as many.
    let is_large = match set {
        Set::Group8 | Set::Any2 | Set::Any8 | Set::Streamed | Set::Hosts => true,
        Set::Group4 => kernel.is_some_and(|kernel| match (kernel.family, quantizer(kernel)) {
            (Family::OneShot, Some(Quantizer::Fp4 | Quantizer::Fp8Block)) => true,
            (Family::OneShot, Some(Quantizer::Fp8)) => dtype == DType::F32,
            (Family::Sharded, Some(Quantizer::Fp4)) => true,
            (_, Some(Quantizer::Fp4)) => dtype == DType::F32 || processor == "sm_100a",
            _ => false,
        }),
        Set::Wire2 => kernel.is_some_and(is_fp4),
        Set::Group2 | Set::Local => false,
    };
    // Decoding takes as long as the links do, and goes on in one row while another one waits.
    let is_resident_thrice = set == Set::Wire2
        && version == Some(Version::P2)
        && !takes_more
        && kernel.is_some_and(|kernel| kernel.family == Family::OneShot && !is_fp4(kernel));
    let threads = match set {
        Set::Group8 | Set::Any8 | Set::Streamed if processor == "sm_80" => 256,
        // Two packs of eight ranks, widened.
        Set::Group8 if processor == "sm_120a" && version == Some(Version::P2) => 256,
        Set::Any8 if version == Some(Version::P2) => 256,
        Set::Streamed if dtype == DType::F32 && is_encoded => 256,
        Set::Wire2 if is_resident_thrice => 256,
        Set::Group2 | Set::Wire2 | Set::Group4 if takes_more => 512,
        _ if is_large || matches!(version, Some(Version::P2 | Version::Streamed)) => 512,
        _ => 1024,
    };
    // Two rows' blocks are resident where 64 registers do for two packs; one-shot pushes a row ahead instead.
    let is_resident_twice = set == Set::Group2
        && version == Some(Version::P2)
        && !takes_more
        && kernel.is_some_and(|kernel| {
            kernel.family != Family::OneShot
                && quantizer(kernel) != Some(Quantizer::Fp8Token)
                && !(dtype == DType::F32 && is_fp4(kernel))
        });
    let blocks = if is_resident_thrice {
        3
    } else if is_resident_twice {
        2
    } else {
        1
    };
    Bounds { threads, blocks }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_as_large_as_registers_allow() {
        let of = |processor, dtype, set, entry| {
            let Bounds { threads, blocks } = bounds(processor, dtype, set, entry);
            (threads, blocks)
        };
        use DType::{Bf16, F32};
        use Set::{Any2, Any8, Group2, Group4, Group8, Hosts, Local, Streamed, Wire2};
        for (processor, dtype, set, entry, expected) in [
            ("sm_90", Bf16, Group4, "one_shot_norm_p1", (1024, 1)),
            ("sm_90", Bf16, Group4, "one_shot_norm_p2", (512, 1)),
            ("sm_90", Bf16, Streamed, "local_norm_streamed", (512, 1)),
            ("sm_80", Bf16, Streamed, "local_norm_streamed", (256, 1)),
            ("sm_80", Bf16, Local, "local_norm_p1", (1024, 1)),
            ("sm_80", Bf16, Group8, "one_shot_norm_p1", (256, 1)),
            ("sm_90", Bf16, Group8, "one_shot_norm_p1", (512, 1)),
            ("sm_120a", F32, Group8, "one_shot_norm_p2", (256, 1)),
            ("sm_120a", Bf16, Group8, "one_shot_norm_p2", (256, 1)),
            ("sm_120a", Bf16, Group4, "one_shot_norm_p1", (512, 1)),
            // FP4 beside packs of four ranks.
            ("sm_90", Bf16, Group4, "two_shot_fp4_p1", (1024, 1)),
            ("sm_90", Bf16, Group4, "one_shot_fp8_block_p1", (512, 1)),
            ("sm_90", F32, Group4, "one_shot_fp8_p1", (512, 1)),
            ("sm_100a", Bf16, Group4, "two_shot_fp4_p1", (512, 1)),
            ("sm_100a", Bf16, Group4, "sharded_fp4_p1", (512, 1)),
            ("sm_90", Bf16, Group4, "sharded_fp4_p1", (512, 1)),
            // Two packs in 64 registers.
            ("sm_90", Bf16, Group2, "sharded_norm_p2", (512, 2)),
            ("sm_90", Bf16, Group2, "one_shot_norm_p2", (512, 1)),
            ("sm_120a", Bf16, Group2, "sharded_norm_p2", (512, 1)),
            ("sm_90", F32, Group2, "sharded_fp4_p2", (512, 1)),
            // Two packs of eight ranks, decoded.
            ("sm_90", Bf16, Any8, "one_shot_wire_any_p2", (256, 1)),
            ("sm_90", Bf16, Any8, "one_shot_any_p1", (512, 1)),
            ("sm_90", F32, Any2, "one_shot_any_p2", (512, 1)),
            ("sm_90", Bf16, Wire2, "one_shot_wire_fp4_p2", (512, 1)),
            ("sm_90", F32, Streamed, "one_shot_wire_any_streamed", (256, 1)),
            ("sm_90", F32, Streamed, "one_shot_any_streamed", (512, 1)),
            ("sm_90", Bf16, Wire2, "one_shot_wire_norm_p1", (1024, 1)),
            ("sm_90", Bf16, Wire2, "one_shot_wire_norm_p2", (256, 3)),
            ("sm_90", Bf16, Wire2, "sharded_wire_norm_p2", (512, 1)),
            ("sm_80", Bf16, Wire2, "one_shot_wire_norm_p1", (512, 1)),
            // Sums of hosts, one after the other.
            ("sm_80", Bf16, Hosts, "two_shot_hosts_p1", (512, 1)),
            ("sm_120a", F32, Hosts, "host_sum_streamed", (512, 1)),
            // None of the table's.
            ("sm_90", Bf16, Group4, "all_reduce_gelu", (1024, 1)),
            ("sm_80", Bf16, Group4, "all_reduce_gelu", (512, 1)),
            ("sm_90", Bf16, Group2, "gelu_p2", (512, 1)),
        ] {
            assert_eq!(of(processor, dtype, set, entry), expected, "{processor} {dtype} {set:?} {entry}");
        }
    }
}
