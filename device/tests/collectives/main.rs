//! The kernels' own source, run by the host's threads, against `core::reference`.

mod hosts;
mod rounds;
mod versions;

use std::{array, env, sync::atomic::Ordering, thread, time::Duration};

use fused_collective_core::{
    dtype::{Element, bf16, f16},
    fusion::Norm,
    quant::{GroupScale, ScaleLayout},
    reference::Special,
};
use fused_collective_device::{
    launch::{ABORTED, Epoch, RankState, Status, TIMED_OUT},
    prologue::Given,
    simt::host::{Launch, Stream, launch},
    wire::Elements,
};
use fused_collective_device_tests::{
    Buffer, Case, EVERYTHING, Kernel, Random, Rows, Tensors, What, World, check_all, geometry, missing_rank,
    run_case, run_local, run_rank,
    sequence::{LARGEST_TOKEN, Member, random_member},
    shape,
};

const KERNELS: [Kernel; 2] = [Kernel::OneShot, Kernel::TwoShot];

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
        let case = Case::<bf16>::new(&mut random, size, u64::from(size) + 1, 48, true, What::Fp8).sharded();
        let launch = geometry(&case.operation, Rows::P1, 1, 2);
        run_case(&mut random, &world, &case, Kernel::Sharded, Rows::P1, |_| launch);
        world.assert_clean();
    }
}

#[test]
fn blocks_of_a_cluster_share_a_row() {
    let mut random = Random(5);
    let world = World::new(2, 1 << 17);
    // Other blocks on each rank: all have the same bits, as specified.
    for clusters in [[2, 4], [1, 8]] {
        for (kernel, rows) in [
            (Kernel::OneShot, Rows::P1),
            (Kernel::TwoShot, Rows::P2),
            (Kernel::OneShot, Rows::Streamed),
            (Kernel::Sharded, Rows::P1),
        ] {
            let case = Case::<bf16>::new(&mut random, 2, 4, 1440, true, EVERYTHING[4]).of_rows(rows);
            let case = if kernel == Kernel::Sharded { case.sharded() } else { case };
            let launch = |rank: u32| geometry(&case.operation, rows, clusters[rank as usize], 2);
            run_case(&mut random, &world, &case, kernel, rows, launch);
        }
    }
    world.assert_clean();
}

#[test]
fn rows_longer_than_the_registers_are_streamed() {
    let mut random = Random(6);
    let world = World::new(2, 1 << 17);
    // Three warps, or several chunks, each.
    for rows in [Rows::P2, Rows::Streamed] {
        for kernel in KERNELS {
            let case = Case::<f32>::new(&mut random, 2, 3, 720, true, What::Fp8).of_rows(rows);
            let launch = geometry(&case.operation, rows, 1, 2);
            run_case(&mut random, &world, &case, kernel, rows, |_| launch);
        }
        let case = Case::<bf16>::new(&mut random, 2, 3, 1456, true, EVERYTHING[4]).of_rows(rows).sharded();
        let launch = geometry(&case.operation, rows, 1, 2);
        run_case(&mut random, &world, &case, Kernel::Sharded, rows, |_| launch);
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

/// With a sharded residual an owner has the row of the sum that both modes give, and all ranks have the same norm and
/// codes as theirs.
#[test]
fn a_sharded_residual_gives_what_a_replicated_one_does() {
    let mut random = Random(12);
    let world = World::new(3, 1 << 16);
    for what in EVERYTHING.into_iter().filter(|what| *what != What::Sum) {
        let mut case = Case::<bf16>::new(&mut random, 3, 7, 80, true, what);
        case.operation.keep_norm = false;
        let launch = geometry(&case.operation, Rows::P1, 1, 3);
        let [sum, replicated @ ..] =
            run_case(&mut random, &world, &case, Kernel::TwoShot, Rows::P1, |_| launch);
        let case = case.sharded();
        let [held, sharded @ ..] =
            run_case(&mut random, &world, &case, Kernel::Sharded, Rows::P1, |_| launch);
        let row_bytes = case.operation.row_bytes() as usize;
        let of_rank_0: Vec<u8> = sum.chunks(row_bytes).step_by(3).flatten().copied().collect();
        assert!(held == of_rank_0, "{what:?}");
        assert!(replicated == sharded, "{what:?}");
    }
    world.assert_clean();
}

/// Norms and codes that would be the sentinel, or are what stands for it, if they were sent as they are: two NaNs, eight
/// codes of -6, and zeros of which the last of eight is -0; and blocks of NaN, whose MXFP4 scales have every bit set.
#[test]
fn results_that_are_the_sentinel_arrive() {
    let mut random = Random(13);
    let world = World::new(3, 1 << 16);
    let nan = |_| bf16::from_bits(0xffff);
    let negative = |_| bf16::NEG_ONE;
    let zero = |index: usize| if index % 8 == 7 { bf16::from_f32(-0.0) } else { bf16::ZERO };
    let fp4 = What::NvFp4(ScaleLayout::Linear);
    let mxfp4 = What::MxFp4(ScaleLayout::Swizzled128x4);
    let rows: [(What, &dyn Fn(usize) -> bf16); 9] = [
        (What::Norm, &nan),
        (What::Fp8, &nan),
        (What::Norm, &zero),
        (fp4, &negative),
        (fp4, &zero),
        (mxfp4, &negative),
        (mxfp4, &nan),
        (What::MxFp8(ScaleLayout::Linear), &nan),
        (What::Fp8PerToken, &nan),
    ];
    for (what, value) in rows {
        let mut case = Case::<bf16>::new(&mut random, 3, 4, 96, true, what).sharded().plain();
        for tensor in case.inputs.iter_mut().chain(&mut case.residual) {
            tensor.iter_mut().enumerate().for_each(|(index, element)| *element = value(index));
        }
        case.operation.norm = Some(Norm::default());
        case.gamma.fill(bf16::ONE);
        let launch = geometry(&case.operation, Rows::P1, 1, 2);
        run_case(&mut random, &world, &case, Kernel::Sharded, Rows::P1, |_| launch);
    }
    world.assert_clean();
}

#[test]
fn ranks_may_use_different_grids() {
    let mut random = Random(8);
    let world = World::new(3, 1 << 17);
    let grid = |rank| Launch { blocks: (rank + 1) * 2, cluster: rank % 2 + 1, threads: 64 };
    for kernel in KERNELS {
        let case = Case::<f16>::new(&mut random, 3, 7, 512, false, What::Sum);
        run_case(&mut random, &world, &case, kernel, Rows::P1, grid);
    }
    // A team of the smallest grid has a dozen turns, of the largest four.
    let case = Case::<f16>::new(&mut random, 3, 23, 512, true, What::Fp8).sharded();
    run_case(&mut random, &world, &case, Kernel::Sharded, Rows::P1, grid);
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
        let what = EVERYTHING[random.below(EVERYTHING.len() as u64) as usize];
        match random.below(3) {
            0 => step::<f32>(&mut random, &world, what),
            1 => step::<f16>(&mut random, &world, what),
            _ => step::<bf16>(&mut random, &world, what),
        }
    }
    world.assert_clean();
    for state in &world.states {
        let state = state.get::<RankState>()[0];
        assert_eq!(state.poisoned, 0);
        assert!(
            state.epochs.iter().all(|epoch| *epoch == Epoch { operation: 20, slot: 20 % 3, reserved: 0 })
        );
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
        first.check(case);
        assert!(first.outputs() == second.outputs());
    }
    world.assert_clean();
}

/// How many random sequences a test tries.
fn sequences() -> u64 {
    env::var("DISTURBED_SEQUENCES").map_or(10, |number| number.parse().expect("a number of sequences"))
}

fn random_sequence(seed: u64, ranks: u32, length: usize) -> Vec<Box<dyn Member>> {
    let mut random = Random(seed + 1000);
    (0..length).map(|_| random_member(&mut random, ranks)).collect()
}

/// Each round starts as a programmatic dependent of the one before, threads are held up anywhere, and ranks run ahead
/// of each other as far as the protocol lets them.
#[test]
fn operations_may_follow_each_other_on_any_schedule() {
    for seed in 0..sequences() {
        let ranks = 2 + (seed % 7) as u32;
        // The least that every member fits: many take several rounds.
        let world = World::new(ranks, u64::from(ranks) * LARGEST_TOKEN);
        let sequence = random_sequence(seed, ranks, 5);
        world.run(|rank| {
            let mut stream = Stream::with_delays(seed << 8 | u64::from(rank));
            sequence.iter().for_each(|member| member.enqueue(&world, rank, &mut stream));
            stream.run();
        });
        for rank in 0..ranks {
            assert_eq!(world.failed(rank), 0, "rank {rank} failed (sequence {seed})");
        }
        sequence.iter().for_each(|member| member.check());
        world.assert_clean();
    }
}

/// A kernel that is launched as a programmatic dependent and waits for its prerequisites reads what the one before
/// wrote, all of it, and nothing that the one after writes.
#[test]
fn a_dependent_kernel_reads_finished_outputs() {
    for seed in 0..sequences() / 2 {
        let world = World::new(2, 1 << 15);
        let sequence = random_sequence(seed + 100, 2, 3);
        world.run(|rank| {
            let mut stream = Stream::new();
            sequence.iter().for_each(|member| member.enqueue(&world, rank, &mut stream));
            stream.run();
        });
        sequence.iter().for_each(|member| member.check());
        let expected: [Vec<[Buffer; 4]>; 2] = [0, 1].map(|rank| {
            sequence.iter().map(|member| member.outputs(rank).map(|bytes| Buffer::of(&bytes))).collect()
        });
        let found: [Buffer; 2] = array::from_fn(|_| Buffer::of(&[0u32; 4]));
        world.run(|rank| {
            let mut stream = Stream::with_delays(seed << 8 | u64::from(rank));
            for _ in 0..2 {
                for (member, expected) in sequence.iter().zip(&expected[rank as usize]) {
                    member.enqueue(&world, rank, &mut stream);
                    member.enqueue_audit(rank, expected, &found[rank as usize], &mut stream);
                }
            }
            stream.run();
        });
        for (rank, found) in found.iter().enumerate() {
            assert_eq!(found.get::<u32>(), [0; 4], "rank {rank} read something unfinished (sequence {seed})");
        }
        world.assert_clean();
    }
}

/// A case with special numbers in every other row, or in none.
fn special_case<E: Element>(random: &mut Random, what: What, special: bool) -> Case<E> {
    let mut case = Case::<E>::new(random, 2, 2 * Special::ALL.len() as u64, 48, false, what);
    let hidden = case.operation.hidden;
    for (rank, input) in (0..).zip(&mut case.inputs) {
        for (token, row) in (0..).zip(input.chunks_mut(hidden as usize)) {
            let kind = if special { Special::of_token(token) } else { Special::Ordinary };
            kind.fill(rank, token, row);
        }
    }
    // Of the inputs alone, by steps that can be taken apart.
    (case.operation.experts, case.operation.post_norm) = (None, None);
    case
}

/// One-shot, two-shot, and the same in two kernels: the all-reduce, then the rest.
fn special_numbers<E: Element>(seed: u64) {
    let world = World::new(2, 1 << 14);
    let quantized = [
        What::Norm,
        What::Fp8,
        What::Fp8PerToken,
        What::Fp8PerGroup(64, GroupScale::F32, ScaleLayout::Linear),
        What::MxFp8(ScaleLayout::Linear),
        What::NvFp4(ScaleLayout::Linear),
        What::MxFp4(ScaleLayout::Linear),
    ];
    for what in quantized {
        let mut random = Random(seed);
        let case = special_case::<E>(&mut random, what, true);
        let run = |random: &mut Random, case: &Case<E>, kernel| {
            let launch = geometry(&case.operation, Rows::P1, 1, 3);
            run_case(random, &world, case, kernel, Rows::P1, |_| launch)
        };
        // The reference says what becomes of each row, and that ordinary ones hold numbers.
        let [one_shot, two_shot] = KERNELS.map(|kernel| run(&mut random, &case, kernel));
        assert!(one_shot == two_shot, "{what:?}");

        // The bias, if there is one, is the collective's.
        let [sum, ..] = run(&mut random, &case.reduced(), Kernel::OneShot);
        let mut tensors = Tensors::new(&case, 0);
        tensors.input = Buffer::of(&sum);
        run_local(&case, &tensors);
        assert!(tensors.outputs() == one_shot, "separate operations differ ({what:?})");

        let ordinary = special_case::<E>(&mut Random(seed), what, false);
        let ordinary = run(&mut random, &ordinary, Kernel::OneShot);
        for (special, ordinary) in one_shot.iter().zip(&ordinary) {
            let row_bytes = special.len() / case.operation.tokens as usize;
            for token in (0..case.operation.tokens as usize).step_by(2) {
                let range = token * row_bytes..(token + 1) * row_bytes;
                assert!(special[range.clone()] == ordinary[range], "token {token} was touched ({what:?})");
            }
        }
        assert!(one_shot != ordinary, "the special rows made no difference");
    }
    world.assert_clean();
}

#[test]
fn special_numbers_come_through_as_in_separate_kernels_and_stay_in_their_rows() {
    special_numbers::<f32>(31);
    special_numbers::<f16>(32);
    special_numbers::<bf16>(33);
}

/// Two NaNs of all bits are the sentinel, in an input and in a sum.
#[test]
fn a_sum_with_the_bits_of_the_sentinel_arrives() {
    let mut random = Random(17);
    let mut world = World::new(2, 1 << 14);
    world.timeout = Duration::from_secs(5);
    let mut case = Case::<bf16>::new(&mut random, 2, 2, 64, false, What::Sum).plain();
    for input in &mut case.inputs {
        input[..96].fill(bf16::from_bits(0xffff));
        input[96..].fill(bf16::from_f32(-0.0));
    }
    let launch = geometry(&case.operation, Rows::P1, 1, 2);
    let [one_shot, two_shot] =
        KERNELS.map(|kernel| run_case(&mut random, &world, &case, kernel, Rows::P1, |_| launch));
    assert!(one_shot == two_shot);
    let sums = one_shot[0].as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes));
    // The sign of a zero comes through.
    let right = |(index, sum): (usize, bf16)| if index < 96 { sum.is_nan() } else { sum.to_bits() == 0x8000 };
    assert!(sums.enumerate().all(right));
    world.assert_clean();
}

#[test]
fn a_missing_rank_ends_the_wait_with_a_record() {
    let mut random = Random(13);
    for kernel in [Kernel::OneShot, Kernel::TwoShot, Kernel::Sharded] {
        missing_rank::<bf16>(&mut random, World::new(2, 1 << 14), 1, kernel, Rows::P1);
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
        launch::{Extras, Fused, Plain, Unquantized},
    };
    let world = World::new(3, 1 << 14);
    let case = Case::<f32>::new(&mut Random(16), 3, 1, 64, false, What::Sum);
    let tensors = Tensors::new(&case, 0);
    let params = Fused {
        group: world.group(0),
        shape: shape(&case.operation),
        activations: tensors.activations(),
        epilogue: Plain { quantizer: Unquantized },
        extras: Extras::NONE,
    };
    // SAFETY: the parameters are as their documentation says.
    launch(geometry(&case.operation, Rows::P1, 1, 1), || unsafe {
        collective::one_shot::<f32, _, _, _, 2, 1, true>(&params, &Given, &Elements);
        collective::two_shot::<f32, _, _, _, 2, 1, true>(&params, &Given, &Elements);
    });
    world.assert_clean();
    assert_eq!(world.states[0].get::<RankState>()[0].epochs[0], Epoch::default());
}

/// A norm that takes the place of another token's input is not in place: that it is found shows that the order of accesses
/// is what makes in-place outputs right.
#[test]
#[should_panic(expected = "residual_out[1, ")]
fn a_norm_in_the_place_of_the_next_tokens_input_is_wrong() {
    let mut random = Random(41);
    let world = World::new(2, 1 << 14);
    let case = Case::<bf16>::new(&mut random, 2, 4, 64, true, What::Norm);
    let tensors: Vec<Tensors> = (0..2).map(|rank| Tensors::new(&case, rank).one_row_late(&case)).collect();
    let launch = geometry(&case.operation, Rows::P1, 1, 1);
    world.run(|rank| {
        let own = &tensors[rank as usize];
        run_rank(&world, rank, &case, own, Kernel::TwoShot, Rows::P1, launch);
    });
    check_all(&case, &tensors);
}

/// On a GPU a scale is seen by the kernel alone.
#[test]
fn under_a_scale_that_is_not_valid_codes_are_defined_and_zeros_stay_zero() {
    let mut random = Random(42);
    let world = World::new(2, 1 << 14);
    for scale in [0.0, -0.0, 1e-45, -1.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 3e38] {
        for (what, kernel) in [
            (What::Fp8, Kernel::OneShot),
            (What::Fp8, Kernel::Sharded),
            (What::NvFp4(ScaleLayout::Linear), Kernel::TwoShot),
            (What::NvFp4(ScaleLayout::Linear), Kernel::Sharded),
        ] {
            let mut case = Case::<bf16>::new(&mut random, 2, 3, 64, true, what);
            case.scale = scale;
            let row = ..64;
            case.inputs.iter_mut().chain(&mut case.residual).for_each(|tensor| tensor[row].fill(bf16::ZERO));
            let case = if kernel == Kernel::Sharded { case.sharded() } else { case };
            let launch = geometry(&case.operation, Rows::P1, 1, 2);
            let [_, _, codes, scales] = run_case(&mut random, &world, &case, kernel, Rows::P1, |_| launch);
            let of_zeros = case.operation.quantization.value_bytes_per_row(64) as usize;
            assert!(codes[..of_zeros].iter().all(|&code| code & 0x77 == 0), "{scale}: {codes:x?}");
            let valid = case.operation.quantization.check_scale(scale).is_ok();
            assert!(valid || scales.iter().all(|&scale| scale == 0), "{scale}: {scales:x?}");
        }
    }
    world.assert_clean();
}
