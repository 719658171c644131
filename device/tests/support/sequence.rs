//! Operations that follow each other in each rank's stream, each perhaps with a dependent kernel that reads its outputs.

use fused_collective_bench::{kernels::audit, launch::Audit};
use fused_collective_core::{
    dtype::{Element, bf16, f16},
    pack::Pack,
};
use fused_collective_device::simt::host::{Launch, Stream};

use super::{
    Buffer, Case, EVERYTHING, Kernel, POISON, Random, Rows, Tensors, What, World, check_all, geometry,
    rounds_of,
};

/// Bytes of a slot for each rank of a group, with which every member can be planned: two rows of the longest.
pub const LARGEST_TOKEN: u64 = 2 * 16 * MOST_BLOCKS * 4;
/// Multiples of 16 elements in the longest row.
const MOST_BLOCKS: u64 = 16;

/// One operation of a sequence, whatever its element type.
pub trait Member: Sync {
    /// Adds rank `rank`'s part to its stream.
    fn enqueue(&self, world: &World, rank: u32, stream: &mut Stream<'_>);

    /// Adds kernels that hold each output to `expected`, [`outputs`](Self::outputs) of an earlier run, and write
    /// poison over it. Where one found something else, its word of `found` says in which pack, counted from 1.
    fn enqueue_audit(&self, rank: u32, expected: &[Buffer; 4], found: &Buffer, stream: &mut Stream<'_>);

    /// Holds all ranks' outputs to the reference and to each other.
    fn check(&self);

    /// Rank `rank`'s outputs.
    fn outputs(&self, rank: u32) -> [Vec<u8>; 4];
}

struct Typed<E: Element> {
    case: Case<E>,
    tensors: Vec<Tensors>,
    kernel: Kernel,
    rows: Rows,
    /// For each rank: grids may differ.
    geometries: Vec<Launch>,
}

impl<E: Element> Typed<E> {
    fn new(random: &mut Random, ranks: u32) -> Self {
        let (tokens, hidden) = (1 + random.below(6), 16 * (1 + random.below(MOST_BLOCKS)));
        let residual = random.below(2) == 1;
        let what = EVERYTHING[random.below(EVERYTHING.len() as u64) as usize];
        let case = Case::new(random, ranks, tokens, hidden, residual, what);
        let kernels = [Kernel::OneShot, Kernel::TwoShot, Kernel::Sharded];
        let has_shards = residual && what != What::Sum;
        let kernel = kernels[random.below(if has_shards { 3 } else { 2 }) as usize];
        let case = if kernel == Kernel::Sharded { case.sharded() } else { case };
        let rows = [Rows::P1, Rows::P2, Rows::Streamed][random.below(3) as usize];
        let case = case.of_rows(rows);
        let tensors = (0..ranks).map(|rank| Tensors::new(&case, rank)).collect();
        let teams = |random: &mut Random| 1 + random.below(tokens.min(2)) as u32;
        let geometries = (0..ranks).map(|_| geometry(&case.operation, rows, 1, teams(random))).collect();
        Typed { case, tensors, kernel, rows, geometries }
    }
}

impl<E: Element + Send + Sync> Member for Typed<E> {
    fn enqueue(&self, world: &World, rank: u32, stream: &mut Stream<'_>) {
        let (tensors, geometry) = (&self.tensors[rank as usize], self.geometries[rank as usize]);
        for (geometry, kernel) in
            rounds_of(world, rank, &self.case, tensors, self.kernel, self.rows, geometry)
        {
            stream.launch(geometry, move || kernel.run());
        }
    }

    fn enqueue_audit(&self, rank: u32, expected: &[Buffer; 4], found: &Buffer, stream: &mut Stream<'_>) {
        let tensors = &self.tensors[rank as usize];
        let outputs = [tensors.residual_out(), tensors.norm_out(), &tensors.values, &tensors.scales];
        for (index, (actual, expected)) in outputs.into_iter().zip(expected).enumerate() {
            let params = Audit {
                actual: actual.address(),
                expected: expected.address(),
                found: found.address().offset(index as u64 * 4),
                packs: actual.bytes as u64 / Pack::BYTES,
                poison: POISON,
                reserved: 0,
            };
            // SAFETY: the parameters are as their documentation says.
            let kernel = move || unsafe { audit(&params) };
            stream.launch(Launch { blocks: 2, cluster: 1, threads: 32 }, kernel);
        }
    }

    fn check(&self) {
        check_all(&self.case, &self.tensors);
    }

    fn outputs(&self, rank: u32) -> [Vec<u8>; 4] {
        self.tensors[rank as usize].outputs()
    }
}

/// A random operation: element type, fusion, shape, mode and grids.
pub fn random_member(random: &mut Random, ranks: u32) -> Box<dyn Member> {
    match random.below(3) {
        0 => Box::new(Typed::<f32>::new(random, ranks)),
        1 => Box::new(Typed::<f16>::new(random, ranks)),
        _ => Box::new(Typed::<bf16>::new(random, ranks)),
    }
}
