//! Operations of more tokens than a slot holds: a launch for each round, whose first token is not the operation's. What
//! rounds are and where their rows lie is `core::plan`'s word and that of the launch parameters, as on a GPU.

use std::{sync::atomic::Ordering, time::Duration};

use fused_collective_core::{
    dtype::{Element, bf16},
    fusion::Operation,
    quant::ScaleLayout,
};
use fused_collective_device::{
    launch::{Epoch, RankState, Status, TIMED_OUT},
    simt::host::launch,
};

use fused_collective_device_tests::{
    Case, EVERYTHING, Kernel, Random, Rows, Tensors, What, World, check_all, geometry, kernel_of, rounds_of,
    run_case,
};

const KERNELS: [Kernel; 3] = [Kernel::OneShot, Kernel::TwoShot, Kernel::Sharded];

/// A case that the world's slots hold in several rounds.
fn run_in_rounds<E: Element>(
    random: &mut Random,
    world: &World,
    case: Case<E>,
    kernel: Kernel,
    rows: Rows,
    teams: u32,
) {
    let case = if kernel == Kernel::Sharded { case.sharded() } else { case };
    let rounds = kernel.plan(world, &case.operation).rounds().count() as u64;
    assert!(rounds > 1, "one round holds {:?}", case.operation);
    let operations = || world.states.iter().map(|state| state.get::<RankState>()[0].epochs[0].operation);
    let before: Vec<u64> = operations().collect();
    let launch = geometry(&case.operation, rows, 1, teams);
    run_case(random, world, &case, kernel, rows, |_| launch);
    // Each round has a turn of the slots to itself.
    assert!(operations().zip(before).all(|(after, before)| after == before + rounds));
}

/// Every fusion in all three collectives. The residual, and what becomes of it, is found from each round's first token.
fn every_fusion<E: Element>(seed: u64) {
    let mut random = Random(seed);
    let world = World::new(3, 4096);
    for what in EVERYTHING {
        for kernel in KERNELS.into_iter().filter(|kernel| *kernel != Kernel::Sharded || what != What::Sum) {
            // Rows of 512 bytes: two or three tokens fill a slot.
            let (tokens, hidden) = (7 + random.below(2), 32 * E::LANES as u64);
            let case = Case::<E>::new(&mut random, world.size, tokens, hidden, true, what);
            run_in_rounds(&mut random, &world, case, kernel, Rows::P1, 2);
        }
    }
    world.assert_clean();
}

#[test]
fn every_fusion_is_right_in_several_rounds_in_f32() {
    every_fusion::<f32>(41);
}

#[test]
fn every_fusion_is_right_in_several_rounds_in_bf16() {
    every_fusion::<bf16>(42);
}

/// Without a residual there is none in any round, and rows that are streamed are read again from where they were stored.
#[test]
fn streamed_rows_and_absent_residuals_are_right_in_several_rounds() {
    let mut random = Random(43);
    let world = World::new(2, 4096);
    for kernel in KERNELS {
        for rows in [Rows::P2, Rows::Streamed] {
            let residual = kernel == Kernel::Sharded;
            let case = Case::<bf16>::new(&mut random, 2, 7, 400, residual, What::Norm).of_rows(rows);
            run_in_rounds(&mut random, &world, case, kernel, rows, 2);
        }
    }
    world.assert_clean();
}

/// A tile of scales is 128 rows: rounds end within a tile, with it, and after it. Whatever is padding, to the right of
/// rows and below them, is zero, and nothing else: the round with the last token zeroes what is below.
#[test]
fn scales_of_several_rounds_are_those_of_one_tensor() {
    let mut random = Random(44);
    let world = World::new(2, 4096);
    let cases = [
        (Kernel::OneShot, ScaleLayout::Swizzled128x4, 131, 16),
        (Kernel::TwoShot, ScaleLayout::Swizzled128x4, 130, 80),
        (Kernel::Sharded, ScaleLayout::Swizzled128x4, 131, 16),
        (Kernel::Sharded, ScaleLayout::Swizzled128x4, 30, 80),
        (Kernel::OneShot, ScaleLayout::Linear, 30, 80),
        (Kernel::Sharded, ScaleLayout::Linear, 30, 80),
    ];
    for (kernel, layout, tokens, hidden) in cases {
        let case = Case::<bf16>::new(&mut random, 2, tokens, hidden, true, What::NvFp4(layout));
        run_in_rounds(&mut random, &world, case, kernel, Rows::P1, 2);
    }
    world.assert_clean();
}

#[test]
fn a_wait_in_a_later_round_is_recorded_with_the_operation_s_token() {
    for kernel in KERNELS {
        let mut random = Random(45);
        let mut world = World::new(2, 4096);
        let case = Case::<bf16>::new(&mut random, 2, 40, 64, true, What::Norm);
        let case = if kernel == Kernel::Sharded { case.sharded() } else { case };
        let plan = kernel.plan(&world, &case.operation);
        let second = plan.rounds().nth(1).unwrap();
        let tensors = [0, 1].map(|rank| Tensors::new(&case, rank));
        let launch_all = geometry(&case.operation, Rows::P1, 1, 1);
        // Rank 0 goes on after the first round, and rank 1 does not.
        world.run(|rank| {
            let own = &tensors[rank as usize];
            let (geometry, kernel) =
                rounds_of(&world, rank, &case, own, kernel, Rows::P1, launch_all).swap_remove(0);
            launch(geometry, || kernel.run());
        });
        assert_eq!([0, 1].map(|rank| world.failed(rank)), [0; 2]);
        world.timeout = Duration::from_millis(50);
        let (geometry, next) =
            rounds_of(&world, 0, &case, &tensors[0], kernel, Rows::P1, launch_all).swap_remove(1);
        launch(geometry, || next.run());
        assert_eq!(world.failed(0), TIMED_OUT);
        let status = &world.statuses[0];
        assert_eq!(status.atomic(Status::MISSING_RANK).load(Ordering::Relaxed), 1);
        assert_eq!(status.get::<u64>()[Status::OPERATION as usize / 8], 1);
        assert_eq!(status.get::<u64>()[Status::TOKEN as usize / 8], second.first_token);
    }
}

/// The last round of an operation whose tokens, elements and bytes are each more than 2^32: every tensor is found at its
/// 64-bit offset. All that comes before is memory that is not there.
#[test]
fn offsets_beyond_32_bits_do_not_wrap() {
    let mut random = Random(46);
    let world = World::new(2, 1 << 20);
    let whats =
        [What::Norm, What::Fp8, What::NvFp4(ScaleLayout::Linear), What::NvFp4(ScaleLayout::Swizzled128x4)];
    for what in whats {
        for kernel in KERNELS {
            let case = Case::<bf16>::new(&mut random, 2, 5, 80, true, what);
            let case = if kernel == Kernel::Sharded { case.sharded() } else { case };
            let of = |tokens| kernel.plan(&world, &Operation { tokens, ..case.operation });
            let full = of(1 << 33).tokens_per_round * 128;
            let before = (1u64 << 33).next_multiple_of(full);
            let plan = of(before + case.operation.tokens);
            let round = plan.rounds().next_back().unwrap();
            assert_eq!((round.first_token, round.rows.tokens), (before, case.operation.tokens));
            let tensors = [0, 1].map(|rank| Tensors::new(&case, rank).preceded_by(&case, before));
            let geometry = geometry(&case.operation, Rows::P1, 1, 2);
            world.run(|rank| {
                let own = &tensors[rank as usize];
                let kernel = kernel_of(&world, rank, &case, own, (&plan, &round), kernel, Rows::P1);
                launch(geometry, || kernel.run());
            });
            check_all(&case, &tensors);
        }
    }
    world.assert_clean();
    let epoch = Epoch { operation: 12, slot: 0, reserved: 0 };
    assert!(world.states.iter().all(|state| state.get::<RankState>()[0].epochs[0] == epoch));
}
