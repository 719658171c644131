//! The kernels' own source, run by the host's threads, against `core::reference`.

mod support;

use std::{
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use fused_collective_core::dtype::{Element, bf16, f16};
use fused_collective_device::{
    params::{ABORTED, RankState, Status, TIMED_OUT},
    simt::host::Launch,
};
use support::{Case, EVERYTHING, Kernel, Random, Rows, Tensors, What, World, geometry, run_case, run_rank};

const KERNELS: [Kernel; 2] = [Kernel::OneShot, Kernel::TwoShot];

/// Every fusion with and without residual, both modes; the shapes and geometries vary along.
fn every_fusion<E: Element>(seed: u64) {
    let mut random = Random(seed);
    let world = World::new(3, 1 << 16);
    for what in EVERYTHING {
        for residual in [false, true] {
            for kernel in KERNELS {
                let tokens = 1 + random.below(5);
                let hidden = 16 * (1 + random.below(12));
                let case = Case::<E>::new(&mut random, world.size, tokens, hidden, residual, what);
                let teams = 1 + random.below(tokens) as u32;
                let launch = geometry(&case.operation, Rows::P1, 1, teams);
                run_case(&mut random, &world, &case, kernel, Rows::P1, |_| launch);
            }
        }
    }
    world.assert_clean();
}

#[test]
fn every_fusion_is_right_in_f32() {
    every_fusion::<f32>(1);
}

#[test]
fn every_fusion_is_right_in_f16() {
    every_fusion::<f16>(2);
}

#[test]
fn every_fusion_is_right_in_bf16() {
    every_fusion::<bf16>(3);
}

#[test]
fn groups_of_two_to_eight_ranks_work() {
    let mut random = Random(4);
    for size in 2..=8 {
        let world = World::new(size, 1 << 16);
        for kernel in KERNELS {
            for tokens in [1, u64::from(size) + 1] {
                let case = Case::<bf16>::new(&mut random, size, tokens, 48, true, What::Fp8);
                let launch = geometry(&case.operation, Rows::P1, 1, 1);
                run_case(&mut random, &world, &case, kernel, Rows::P1, |_| launch);
            }
        }
        world.assert_clean();
    }
}

#[test]
fn blocks_of_a_cluster_share_a_row() {
    let mut random = Random(5);
    let world = World::new(2, 1 << 17);
    for cluster in [2, 4] {
        for kernel in KERNELS {
            let case = Case::<bf16>::new(&mut random, 2, 4, 2880, true, EVERYTHING[4]);
            let launch = geometry(&case.operation, Rows::P1, cluster, 2);
            run_case(&mut random, &world, &case, kernel, Rows::P1, |_| launch);
        }
    }
    world.assert_clean();
}

#[test]
fn rows_longer_than_the_registers_are_streamed() {
    let mut random = Random(6);
    let world = World::new(2, 1 << 17);
    for rows in [Rows::P2, Rows::Streamed] {
        for kernel in KERNELS {
            for what in EVERYTHING {
                let case = Case::<f32>::new(&mut random, 2, 3, 720, true, what);
                let launch = geometry(&case.operation, rows, 1, 2);
                run_case(&mut random, &world, &case, kernel, rows, |_| launch);
            }
        }
    }
    world.assert_clean();
}

#[test]
fn both_modes_give_the_same_residual() {
    let mut random = Random(7);
    let world = World::new(4, 1 << 16);
    let case = Case::<bf16>::new(&mut random, 4, 6, 64, true, What::Norm);
    let launch = geometry(&case.operation, Rows::P1, 1, 3);
    let [one_shot, two_shot] =
        KERNELS.map(|kernel| run_case(&mut random, &world, &case, kernel, Rows::P1, |_| launch));
    assert!(one_shot == two_shot);
}

#[test]
fn ranks_may_use_different_grids() {
    let mut random = Random(8);
    let world = World::new(3, 1 << 16);
    for kernel in KERNELS {
        let case = Case::<f16>::new(&mut random, 3, 7, 512, false, What::Sum);
        run_case(&mut random, &world, &case, kernel, Rows::P1, |rank| Launch {
            blocks: (rank + 1) * 2,
            cluster: rank % 2 + 1,
            threads: 64,
        });
    }
    world.assert_clean();
}

/// One group, operation after operation without a word between: modes, types, shapes and grids change each time.
#[test]
fn any_operation_may_follow_any_other() {
    let mut random = Random(9);
    let world = World::new(3, 1 << 15);
    fn step<E: Element>(random: &mut Random, world: &World, what: What) {
        let tokens = 1 + random.below(6);
        let hidden = 16 * (1 + random.below(6));
        let residual = random.below(2) == 1;
        let case = Case::<E>::new(random, world.size, tokens, hidden, residual, what);
        let kernel = KERNELS[random.below(2) as usize];
        let launch = geometry(&case.operation, Rows::P1, 1, 1 + random.below(tokens) as u32);
        run_case(random, world, &case, kernel, Rows::P1, |_| launch);
    }
    for _ in 0..20 {
        let what = EVERYTHING[random.below(5) as usize];
        match random.below(3) {
            0 => step::<f32>(&mut random, &world, what),
            1 => step::<f16>(&mut random, &world, what),
            _ => step::<bf16>(&mut random, &world, what),
        }
    }
    world.assert_clean();
    for state in &world.states {
        assert_eq!(state.get::<u64>()[0], 20);
        assert_eq!(state.atomic(RankState::SLOT).load(Ordering::Relaxed), 20 % 3);
        assert_eq!(state.atomic(RankState::TICKETS).load(Ordering::Relaxed), 0);
    }
}

/// A rank may finish an operation and begin the next while its peers are still in the first.
#[test]
fn ranks_may_run_ahead_of_each_other() {
    let mut random = Random(10);
    let world = World::new(2, 1 << 14);
    let cases: Vec<Case<bf16>> =
        (0..12).map(|_| Case::new(&mut random, 2, 3, 64, true, What::Norm)).collect();
    let tensors: Vec<Vec<Tensors>> =
        (0..2).map(|rank| cases.iter().map(|case| Tensors::new(case, rank)).collect()).collect();
    world.run(|rank| {
        let mut random = Random(u64::from(rank) + 11);
        for (index, (case, tensors)) in cases.iter().zip(&tensors[rank as usize]).enumerate() {
            thread::sleep(Duration::from_micros(random.below(5000)));
            let launch = geometry(&case.operation, Rows::P1, 1, 2);
            run_rank(&world, rank, case, tensors, KERNELS[index % 3 % 2], Rows::P1, launch);
        }
    });
    for (case, (first, second)) in cases.iter().zip(tensors[0].iter().zip(&tensors[1])) {
        first.check(case, fused_collective_core::reference::Rounding::Once);
        assert!(first.outputs() == second.outputs());
    }
    world.assert_clean();
}

#[test]
fn nan_and_infinity_stay_in_their_rows() {
    let mut random = Random(12);
    let world = World::new(2, 1 << 16);
    for kernel in KERNELS {
        let mut case = Case::<f16>::new(&mut random, 2, 4, 64, true, What::Fp8);
        case.inputs[0][5] = f16::NAN;
        case.inputs[1][64 * 2 + 7] = f16::INFINITY;
        let launch = geometry(&case.operation, Rows::P1, 1, 2);
        // The reference holds rows 1 and 3 to numbers.
        run_case(&mut random, &world, &case, kernel, Rows::P1, |_| launch);
    }
    world.assert_clean();
}

/// Sums of `(1, -0)` and `(-1, -0)` are `(+0, -0)`, which is the sentinel in two-byte elements.
#[test]
fn a_sum_with_the_bits_of_the_sentinel_arrives() {
    let mut random = Random(17);
    let mut world = World::new(2, 1 << 14);
    world.timeout = Duration::from_secs(5);
    let mut case = Case::<bf16>::new(&mut random, 2, 2, 64, false, What::Sum);
    for (input, sign) in case.inputs.iter_mut().zip([1.0, -1.0]) {
        for pair in input.as_chunks_mut::<2>().0 {
            *pair = [sign, -0.0].map(bf16::from_f32);
        }
    }
    let launch = geometry(&case.operation, Rows::P1, 1, 2);
    let [one_shot, two_shot] =
        KERNELS.map(|kernel| run_case(&mut random, &world, &case, kernel, Rows::P1, |_| launch));
    assert!(one_shot == two_shot);
    assert!(one_shot[0].iter().all(|byte| *byte == 0));
    world.assert_clean();
}

#[test]
fn a_missing_rank_ends_the_wait_with_a_record() {
    let mut random = Random(13);
    for kernel in KERNELS {
        let mut world = World::new(2, 1 << 14);
        let case = Case::<bf16>::new(&mut random, 2, 1, 64, true, What::Norm);
        let launch = geometry(&case.operation, Rows::P1, 1, 1);
        run_case(&mut random, &world, &case, kernel, Rows::P1, |_| launch);

        world.timeout = Duration::from_millis(50);
        let tensors = Tensors::new(&case, 0);
        run_rank(&world, 0, &case, &tensors, kernel, Rows::P1, launch);
        assert_eq!(world.failed(0), TIMED_OUT);
        let status = &world.statuses[0];
        assert_eq!(status.atomic(Status::MISSING_RANK).load(Ordering::Relaxed), 1);
        assert_eq!(status.atomic(Status::HOP).load(Ordering::Relaxed), 1);
        assert_eq!(status.get::<u64>()[Status::OPERATION as usize / 8], 1);
        assert_eq!(status.get::<u64>()[Status::TOKEN as usize / 8], 0);

        // What follows on the poisoned rank ends at once, whatever its deadline is.
        world.timeout = Duration::from_secs(3600);
        let started = Instant::now();
        run_rank(&world, 0, &case, &tensors, kernel, Rows::P1, launch);
        assert!(started.elapsed() < Duration::from_secs(60));
    }
}

#[test]
fn the_record_names_the_owner_whose_sum_is_missing() {
    let mut random = Random(14);
    let mut world = World::new(2, 1 << 14);
    world.timeout = Duration::from_millis(50);
    // Rank 1 waits for token 0, which rank 0 owns.
    let case = Case::<bf16>::new(&mut random, 2, 1, 64, false, What::Sum);
    let tensors = Tensors::new(&case, 1);
    run_rank(
        &world,
        1,
        &case,
        &tensors,
        Kernel::TwoShot,
        Rows::P1,
        geometry(&case.operation, Rows::P1, 1, 1),
    );
    assert_eq!(world.failed(1), TIMED_OUT);
    assert_eq!(world.statuses[1].atomic(Status::MISSING_RANK).load(Ordering::Relaxed), 0);
    assert_eq!(world.statuses[1].atomic(Status::HOP).load(Ordering::Relaxed), 2);
}

#[test]
fn the_host_can_end_every_wait() {
    let mut random = Random(15);
    for kernel in KERNELS {
        let world = World::new(2, 1 << 14);
        let case = Case::<f32>::new(&mut random, 2, 4, 64, true, What::Norm);
        let tensors = Tensors::new(&case, 0);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(20));
                world.statuses[0].atomic(Status::ABORT).store(1, Ordering::Relaxed);
            });
            run_rank(&world, 0, &case, &tensors, kernel, Rows::P1, geometry(&case.operation, Rows::P1, 1, 2));
        });
        assert_eq!(world.failed(0), ABORTED);
    }
}

#[test]
fn a_kernel_for_too_few_ranks_ends_at_once() {
    use fused_collective_device::{
        collective,
        params::{Fused, Plain, Unquantized},
        simt::host::launch,
    };
    let world = World::new(3, 1 << 14);
    let case = Case::<f32>::new(&mut Random(16), 3, 1, 64, false, What::Sum);
    let tensors = Tensors::new(&case, 0);
    let params = Fused {
        group: world.group(0),
        shape: support::shape(&case.operation),
        activations: tensors.activations(),
        epilogue: Plain { quantizer: Unquantized },
    };
    // SAFETY: the parameters are as their documentation says.
    launch(geometry(&case.operation, Rows::P1, 1, 1), || unsafe {
        collective::one_shot::<f32, _, 2, 1, true>(&params);
        collective::two_shot::<f32, _, 2, 1, true>(&params);
    });
    world.assert_clean();
    assert_eq!(world.states[0].get::<u64>()[0], 0);
}
