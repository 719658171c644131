//! Every entry point that the table has for a collective: element types, fusions, groups, and ways to keep a row.

use fused_collective_core::dtype::{Element, bf16, f16};

use crate::{
    KERNELS,
    support::{Case, EVERYTHING, Kernel, Random, Rows, What, World, geometry, run_case},
};

/// Packs of a row for a warp to keep in each way: all of a thread's share, its first pack or a chunk, and some of the
/// second.
fn packs(random: &mut Random, rows: Rows) -> u64 {
    match rows {
        Rows::P1 => 1 + random.below(32),
        Rows::P2 => 33 + random.below(32),
        Rows::Streamed => 33 + random.below(64),
    }
}

/// With and without residual; shapes and geometries vary along.
fn every_entry_point<E: Element>(seed: u64, groups: &[u32]) {
    let mut random = Random(seed);
    for &ranks in groups {
        let world = World::new(ranks, 1 << 16);
        for rows in [Rows::P1, Rows::P2, Rows::Streamed] {
            for what in EVERYTHING {
                let sharded = (what != What::Sum).then_some(Kernel::Sharded);
                for kernel in KERNELS.into_iter().chain(sharded) {
                    let tokens = 1 + random.below(4);
                    let hidden = (packs(&mut random, rows) * E::LANES as u64).next_multiple_of(16);
                    let residual = kernel == Kernel::Sharded || random.below(2) == 1;
                    let case = Case::<E>::new(&mut random, ranks, tokens, hidden, residual, what);
                    let case = if kernel == Kernel::Sharded { case.sharded() } else { case };
                    let launch = geometry(&case.operation, rows, 1, 1);
                    run_case(&mut random, &world, &case, kernel, rows, |_| launch);
                }
            }
        }
        world.assert_clean();
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
