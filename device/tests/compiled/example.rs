//! The example of an epilogue of one's own, as it was compiled.

use std::sync::Arc;

use fused_collective_core::dtype::bf16;
use fused_collective_device::launch::{Address, Fused, Shape};

use fused_collective_device_tests::{
    Buffer, CALL, Case, Kernel, POISON, Random, Rows, Tensors, What, World, bytes_of, check_all, geometry,
};

use crate::{Compiled, examples, gpus};

/// The epilogue's parameters, as in `device/examples/custom-epilogue`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Gelu {
    out: Address,
}

#[test]
fn the_example_s_kernel_is_right() {
    let mut random = Random(9);
    for gpu in gpus() {
        for ranks in [2, 3, 4] {
            let compiled = Arc::new(Compiled::read_from(&examples(), gpu, "custom_epilogue", 7, |ptx| ptx));
            let world = World::new(ranks, 1 << 17);
            let case = Case::<bf16>::new(&mut random, ranks, 7, 528, true, What::Sum).plain();
            let tensors: Vec<Tensors> = (0..ranks).map(|rank| Tensors::new(&case, rank)).collect();
            let outputs: Vec<Buffer> =
                tensors.iter().map(|own| Buffer::new(own.input.bytes, POISON)).collect();
            let plan = Kernel::TwoShot.plan(&world, &case.operation);
            let launch = geometry(&case.operation, Rows::P1, 1, 2);
            world.run(|rank| {
                let (own, out) = (&tensors[rank as usize], &outputs[rank as usize]);
                let params = Fused {
                    group: world.group(rank),
                    shape: Shape::of_round(&plan, &plan.rounds().next().unwrap(), CALL).unwrap(),
                    activations: own.activations(),
                    epilogue: Gelu { out: out.address() },
                    extras: own.extras(),
                };
                let ranges = world.ranges(rank).chain(own.ranges()).chain([out.range()]).collect();
                compiled.run(rank, launch, "all_reduce_gelu", &bytes_of(&params), ranges);
            });
            check_all(&case, &tensors);
            for (own, out) in tensors.iter().zip(&outputs) {
                for (sum, gelu) in own.residual_out().get::<bf16>().into_iter().zip(out.get::<bf16>()) {
                    let (sum, gelu) = (sum.to_f32(), gelu.to_f32());
                    let expected = sum / (1.0 + (-1.702 * sum).exp());
                    // Half of the last digit of eight, and what the approximation adds.
                    assert!(
                        (gelu - expected).abs() <= expected.abs() / 200.0,
                        "{sum}: {gelu}, not {expected}"
                    );
                }
            }
            world.assert_clean();
            compiled.assert_all_ran(|_| false);
        }
    }
}
