//! The example of an epilogue and a prologue of one's own, as it was compiled.

use std::sync::Arc;

use fused_collective_core::dtype::bf16;
use fused_collective_device::launch::{Address, Extras, Fused, Shape};

use fused_collective_device_tests::{
    Buffer, CALL, Case, Kernel, POISON, Random, Rows, Tensors, What, World, bytes_of, check_all, geometry,
};

use crate::{Compiled, examples, gpus};

/// The parameters of `all_reduce_gelu`, as in `device/examples/custom-epilogue`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Gelu {
    out: Address,
}

/// The parameters of `weighted_all_reduce_gelu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Weighted {
    gelu: Gelu,
    rows: Address,
    weights: Address,
}

/// Runs one of the example's kernels on all ranks. `epilogue` gives each rank's parameters, by the address of the output, and the
/// memory that they name besides.
fn run<'a, X: Copy>(
    (world, compiled, entry): (&World, &Compiled, &str),
    case: &Case<bf16>,
    tensors: &[Tensors],
    epilogue: impl Fn(u32, Gelu) -> (X, &'a [Buffer]) + Sync,
) {
    let outputs: Vec<Buffer> = tensors.iter().map(|own| Buffer::new(own.input.bytes, POISON)).collect();
    let plan = Kernel::TwoShot.plan(world, &case.operation);
    let launch = geometry(&case.operation, Rows::P1, 1, 2);
    world.run(|rank| {
        let (own, out) = (&tensors[rank as usize], &outputs[rank as usize]);
        let (epilogue, more) = epilogue(rank, Gelu { out: out.address() });
        let params = Fused {
            group: world.group(rank),
            shape: Shape::of_round(&plan, &plan.rounds().next().unwrap(), CALL).unwrap(),
            activations: own.activations(),
            epilogue,
            extras: Extras::NONE,
        };
        let ranges = world.ranges(rank).chain(own.ranges()).chain([out.range()]);
        let ranges = ranges.chain(more.iter().map(Buffer::range)).collect();
        compiled.run(rank, launch, entry, &bytes_of(&params), ranges);
    });
    check_all(case, tensors);
    for (own, out) in tensors.iter().zip(&outputs) {
        for (sum, gelu) in own.residual_out().get::<bf16>().into_iter().zip(out.get::<bf16>()) {
            let (sum, gelu) = (sum.to_f32(), gelu.to_f32());
            let expected = sum / (1.0 + (-1.702 * sum).exp());
            // Half of the last digit of eight, and what the approximation adds.
            assert!((gelu - expected).abs() <= expected.abs() / 200.0, "{sum}: {gelu}, not {expected}");
        }
    }
    world.assert_clean();
}

#[test]
fn the_example_s_kernels_are_right() {
    let mut random = Random(9);
    for gpu in gpus() {
        for ranks in [2, 3, 4] {
            let compiled = Arc::new(Compiled::read_from(&examples(), gpu, "custom_epilogue", 7, |ptx| ptx));
            let world = World::new(ranks, 1 << 17);
            let case = Case::<bf16>::new(&mut random, ranks, 7, 528, true, What::Sum).plain();
            let of_ranks =
                |case: &Case<bf16>| (0..ranks).map(|rank| Tensors::new(case, rank)).collect::<Vec<_>>();
            run((&world, &compiled, "all_reduce_gelu"), &case, &of_ranks(&case), |_, gelu| (gelu, &[]));

            // The same with the products in place of the inputs, which kernels make themselves.
            let weights: Vec<f32> = (0..7).map(|token| 0.3 * token as f32 - 1.0).collect();
            let rows: Vec<[Buffer; 2]> =
                case.inputs.iter().map(|input| [Buffer::of(input), Buffer::of(&weights)]).collect();
            let mut weighted = case;
            for input in &mut weighted.inputs {
                for (row, weight) in input.chunks_mut(528).zip(&weights) {
                    row.iter_mut().for_each(|value| *value = bf16::from_f32(value.to_f32() * weight));
                }
            }
            let mut tensors = of_ranks(&weighted);
            for own in &mut tensors {
                own.input = Buffer::new(own.input.bytes, POISON);
            }
            run((&world, &compiled, "weighted_all_reduce_gelu"), &weighted, &tensors, |rank, gelu| {
                let memory = &rows[rank as usize];
                let [rows, weights] = memory.each_ref().map(Buffer::address);
                (Weighted { gelu, rows, weights }, memory)
            });
            compiled.assert_all_ran(|_| false);
        }
    }
}
