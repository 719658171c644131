//! Every entry point that the table has for a collective: element types, fusions, groups, and ways to keep a row.

use fused_collective_core::dtype::{Element, bf16, f16};

use fused_collective_device_tests::{Random, World, every_encoded_version, every_version};

fn every_entry_point<E: Element>(seed: u64, groups: &[u32]) {
    let mut random = Random(seed);
    for &ranks in groups {
        every_version::<E>(&mut random, &World::new(ranks, 1 << 16), 1);
    }
}

/// A group for each set of kernels: those for at most 2, 4 and 8 ranks.
const GROUPS: [u32; 3] = [2, 3, 6];

#[test]
fn every_entry_point_is_right_in_f32() {
    every_entry_point::<f32>(1, &GROUPS);
}

/// What a type of 16 bits does in larger and smaller groups is `bf16`'s to show.
#[test]
fn every_entry_point_for_four_ranks_is_right_in_f16() {
    every_entry_point::<f16>(2, &[3]);
}

#[test]
fn every_entry_point_is_right_in_bf16() {
    every_entry_point::<bf16>(3, &GROUPS);
}

/// Larger groups run the same code in every type.
#[test]
fn every_entry_point_of_wire_formats_is_right() {
    let mut random = Random(4);
    every_encoded_version::<bf16>(&mut random, &World::new(3, 1 << 16), 1);
    every_encoded_version::<f32>(&mut random, &World::new(2, 1 << 16), 1);
}
