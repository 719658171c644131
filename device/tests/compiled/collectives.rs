//! Every entry point of every collective, for every kind of GPU.

use std::{env, sync::Arc, thread, time::Duration};

use fused_collective_core::dtype::{Element, bf16, f16};
use fused_collective_device::simt::host::Launch;

use fused_collective_device_tests::{
    Case, EVERYTHING, Kernel, Random, Rows, Tensors, What, World, check_all, every_encoded_version,
    every_version, geometry, missing_rank, run_case, run_cut, run_rank,
};

use crate::{Compiled, KERNELS, ROWS, gpus_of, has_clusters};

/// A group whose kernels are those of `compiled`.
pub(crate) fn world(size: u32, compiled: &Arc<Compiled>) -> World {
    let mut world = World::new(size, 1 << 17);
    let compiled = Arc::clone(compiled);
    world.runner = Some(Box::new(move |rank, launch, kernel, ranges| {
        // Where there are clusters some kernels keep one pack a thread alone, in twice as many threads.
        let (entry, launch) = match kernel.entry.strip_suffix("_p2") {
            Some(name) if !compiled.has(&kernel.entry) => {
                (format!("{name}_p1"), Launch { threads: 2 * launch.threads, ..launch })
            }
            _ => (kernel.entry.clone(), launch),
        };
        compiled.run(rank, launch, &entry, &kernel.parameter, ranges);
    }));
    world
}

/// Runs every entry point as often as `EMULATED_ROUNDS` says, once by default, each time with other operations.
fn every_collective_is_right<E: Element>(seed: u64, dtype: &str) {
    let rounds = env::var("EMULATED_ROUNDS").map_or(1, |rounds| rounds.parse().expect("a number of rounds"));
    for round in 0..rounds {
        every_collective_is_right_once::<E>(seed + 3 * round, dtype);
    }
}

fn every_collective_is_right_once<E: Element>(seed: u64, dtype: &str) {
    // A group for each set of kernels: those for at most 2, 4 and 8 ranks.
    for (ranks, most) in [(2, 2), (3, 4), (5, 8)] {
        let module = format!("{dtype}_w{most}");
        for gpu in gpus_of(&module) {
            let compiled = Arc::new(Compiled::read(gpu, &module, seed));
            every_version::<E>(&mut Random(seed), &world(ranks, &compiled), 2);
            compiled.assert_all_ran(|name| name.starts_with("local_") || name.contains("_wire_"));
        }
    }
    for (ranks, set) in [(2, "wire2"), (3, "any8")] {
        let module = format!("{dtype}_{set}");
        for gpu in gpus_of(&module) {
            let compiled = Arc::new(Compiled::read(gpu, &module, seed));
            every_encoded_version::<E>(&mut Random(seed), &world(ranks, &compiled), 2);
            compiled.assert_all_ran(|name| !name.contains("_wire_"));
        }
    }
}

#[test]
fn every_collective_is_right_in_f32() {
    every_collective_is_right::<f32>(1, "f32");
}

#[test]
fn every_collective_is_right_in_f16() {
    every_collective_is_right::<f16>(2, "f16");
}

#[test]
fn every_collective_is_right_in_bf16() {
    every_collective_is_right::<bf16>(3, "bf16");
}

/// Blocks of a cluster, each of one warp or several, share a row of real length.
#[test]
fn blocks_of_a_cluster_share_a_row() {
    let mut random = Random(5);
    for gpu in gpus_of("bf16_w2").into_iter().filter(|gpu| has_clusters(gpu)) {
        let compiled = Arc::new(Compiled::read(gpu, "bf16_w2", 4));
        let world = world(2, &compiled);
        for (cluster, rows) in [(2, Rows::P1), (4, Rows::P2), (8, Rows::P1), (4, Rows::Streamed)] {
            for (kernel, what) in
                KERNELS.into_iter().flat_map(|kernel| [(kernel, EVERYTHING[4]), (kernel, What::Fp8PerToken)])
            {
                let case = Case::<bf16>::new(&mut random, 2, 3, 4112, true, what).of_rows(rows);
                let case = if kernel == Kernel::Sharded { case.sharded() } else { case };
                let launch = geometry(&case.operation, rows, cluster, 2);
                run_case(&mut random, &world, &case, kernel, rows, |_| launch);
            }
        }
        world.assert_clean();
    }
}

/// The bits of a row do not depend on the rows beside it: every kernel for Hopper, of two ranks and of three.
#[test]
fn rows_cut_into_calls_have_the_bits_of_one_call() {
    fn cut<E: Element>(dtype: &str, seed: u64) {
        let mut random = Random(seed);
        for (ranks, most) in [(2, 2), (3, 4)] {
            let compiled = Arc::new(Compiled::read("sm_90", &format!("{dtype}_w{most}"), seed));
            let world = world(ranks, &compiled);
            for (index, what) in EVERYTHING.into_iter().enumerate() {
                let rows = ROWS[index % ROWS.len()];
                let case = Case::<E>::new(&mut random, ranks, 13, 208, true, what).of_rows(rows);
                run_cut(&mut random, &world, &case, Kernel::OneShot, rows);
                run_cut(&mut random, &world, &case, Kernel::TwoShot, rows);
                if what != What::Sum {
                    run_cut(&mut random, &world, &case.sharded(), Kernel::Sharded, rows);
                }
            }
            world.assert_clean();
        }
    }
    cut::<f32>("f32", 11);
    cut::<f16>("f16", 12);
    cut::<bf16>("bf16", 13);
}

/// Many tokens for few teams, whose number is each rank's own: rows are pushed ahead, and got a turn late.
#[test]
fn ranks_may_use_different_grids() {
    let mut random = Random(6);
    for (ranks, most) in [(2, 2), (3, 4)] {
        let module = format!("bf16_w{most}");
        for gpu in gpus_of(&module) {
            let compiled = Arc::new(Compiled::read(gpu, &module, 5));
            let world = world(ranks, &compiled);
            for (tokens, rows) in [(23, Rows::P2), (12, Rows::P1), (13, Rows::Streamed)] {
                for kernel in KERNELS {
                    let case = Case::<bf16>::new(&mut random, ranks, tokens, 304, true, EVERYTHING[3]);
                    let case = case.of_rows(rows);
                    let case = if kernel == Kernel::Sharded { case.sharded() } else { case };
                    run_case(&mut random, &world, &case, kernel, rows, |rank| {
                        geometry(&case.operation, rows, 1, 1 + rank * 2)
                    });
                }
            }
            world.assert_clean();
        }
    }
}

/// Operations follow each other in each rank, whether the others have ended theirs or not, in grids of its own.
#[test]
fn ranks_may_run_ahead_of_each_other() {
    for (ranks, most) in [(2, 2), (3, 4)] {
        let module = format!("bf16_w{most}");
        for gpu in gpus_of(&module) {
            let mut random = Random(7 + u64::from(ranks));
            let compiled = Arc::new(Compiled::read(gpu, &module, 10));
            let world = world(ranks, &compiled);
            let operations: Vec<_> = (0..20)
                .map(|index| {
                    let (kernel, rows) = (KERNELS[random.below(3) as usize], ROWS[random.below(3) as usize]);
                    let what = EVERYTHING[1 + random.below(EVERYTHING.len() as u64 - 1) as usize];
                    let (tokens, hidden) = (1 + random.below(6), 16 * (1 + random.below(30)));
                    let case =
                        Case::<bf16>::new(&mut random, ranks, tokens, hidden, true, what).of_rows(rows);
                    let case = if kernel == Kernel::Sharded { case.sharded() } else { case };
                    let tensors: Vec<Tensors> = (0..ranks).map(|rank| Tensors::new(&case, rank)).collect();
                    let launches: Vec<Launch> = (0..ranks)
                        .map(|_| geometry(&case.operation, rows, 1, 1 + random.below(tokens) as u32))
                        .collect();
                    // One of them is late, and not always the same.
                    (case, tensors, kernel, rows, launches, index % (ranks + 1))
                })
                .collect();
            world.run(|rank| {
                for (case, tensors, kernel, rows, launches, late) in &operations {
                    if rank == *late {
                        thread::sleep(Duration::from_millis(3));
                    }
                    let rank_index = rank as usize;
                    run_rank(&world, rank, case, &tensors[rank_index], *kernel, *rows, launches[rank_index]);
                }
            });
            for (case, tensors, ..) in &operations {
                check_all(case, tensors);
            }
            world.assert_clean();
        }
    }
}

fn a_missing_rank_ends_the_wait<E: Element>(module: &str) {
    let mut random = Random(7);
    for gpu in gpus_of(module) {
        let compiled = Arc::new(Compiled::read(gpu, module, 6));
        for (kernel, rows) in KERNELS.into_iter().flat_map(|kernel| ROWS.map(|rows| (kernel, rows))) {
            missing_rank::<E>(&mut random, world(2, &compiled), 2, kernel, rows);
        }
    }
}

#[test]
fn a_missing_rank_ends_the_wait_with_a_record() {
    a_missing_rank_ends_the_wait::<bf16>("bf16_w2");
    a_missing_rank_ends_the_wait::<f32>("f32_w2");
}
