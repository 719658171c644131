//! Groups of several hosts: the sum of each host, the gather, and two-shot of the hosts' sums.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::Ordering,
};

use fused_collective_core::{
    dtype::{Element, bf16, f16},
    fusion::PartialSums,
    quant::ScaleLayout,
};
use fused_collective_device::{
    launch::{ABORTED, Epoch, HOST_FAILED, RankState, Status},
    simt::host::Stream,
};

use fused_collective_device_tests::{
    Case, EVERYTHING, POISON, Random, Rows, What, geometry,
    hosts::{Hosts, missing_rank, random_case},
};

/// One of every `step` quantizations with both kinds of residual, in `E`, each with other extras.
fn every<E: Element>(step: usize, seed: u64, hosts: &Hosts, rows: Rows) {
    let mut random = Random(seed);
    let mut seen = [0; 4];
    for what in EVERYTHING.into_iter().step_by(step) {
        for sharded in [false, true].into_iter().filter(|&sharded| !sharded || what != What::Sum) {
            let shape = (1 + random.below(2 * u64::from(hosts.ranks()) + 1), 16 * (1 + random.below(8)));
            let case = random_case::<E>(&mut random, hosts, shape, what, sharded).of_rows(rows);
            let operation = &case.operation;
            let sums = operation.partial_sums == PartialSums::Element;
            let extras = [operation.bias, operation.post_norm.is_some(), operation.experts.is_some(), sums];
            seen.iter_mut().zip(extras).for_each(|(seen, is_there)| *seen += u32::from(is_there));
            let teams = [(); 2].map(|()| 1 + random.below(operation.tokens.min(2)) as u32);
            hosts.run_case(&mut random, &case, rows, |rank| {
                geometry(operation, rows, 1, teams[rank as usize % 2])
            });
        }
    }
    let least = [1, if rows == Rows::Streamed { 0 } else { 1 }, 1, 1];
    assert!(seen.iter().zip(least).all(|(&seen, least)| seen >= least), "{seen:?}");
    hosts.assert_clean();
}

#[test]
fn two_hosts_of_one_rank_are_right() {
    every::<bf16>(1, 51, &Hosts::new(2, 1, 1 << 16), Rows::P1);
    every::<f32>(2, 52, &Hosts::new(2, 1, 1 << 16), Rows::Streamed);
}

#[test]
fn two_hosts_of_two_ranks_are_right() {
    every::<f16>(1, 53, &Hosts::new(2, 2, 1 << 16), Rows::P1);
    every::<bf16>(2, 54, &Hosts::new(2, 2, 1 << 16), Rows::Streamed);
}

#[test]
fn two_hosts_of_four_ranks_are_right() {
    every::<f32>(3, 55, &Hosts::new(2, 4, 1 << 16), Rows::P1);
}

#[test]
fn three_hosts_of_one_two_and_four_ranks_are_right() {
    for ranks in [1, 2, 4] {
        let hosts = Hosts::new(3, ranks, 1 << 16);
        let mut random = Random(56 + u64::from(ranks));
        for (what, sharded) in
            [(What::Sum, false), (What::Norm, true), (EVERYTHING[4], false), (What::Fp8, true)]
        {
            let case = random_case::<bf16>(&mut random, &hosts, (5, 80), what, sharded);
            hosts.run_case(&mut random, &case, Rows::P1, |_| geometry(&case.operation, Rows::P1, 1, 2));
        }
        hosts.assert_clean();
    }
}

#[test]
fn a_host_of_eight_ranks_is_right() {
    let hosts = Hosts::new(2, 8, 1 << 16);
    let mut random = Random(61);
    for sharded in [false, true] {
        let case = random_case::<bf16>(&mut random, &hosts, (9, 48), What::Fp8PerToken, sharded);
        hosts.run_case(&mut random, &case, Rows::P1, |_| geometry(&case.operation, Rows::P1, 1, 1));
    }
    hosts.assert_clean();
}

#[test]
fn blocks_of_a_cluster_share_a_row_across_hosts() {
    let hosts = Hosts::new(2, 2, 1 << 17);
    let mut random = Random(62);
    for (rows, sharded) in [(Rows::P1, true), (Rows::Streamed, false)] {
        let case = random_case::<bf16>(&mut random, &hosts, (3, 1440), EVERYTHING[4], sharded).of_rows(rows);
        hosts.run_case(&mut random, &case, rows, |rank| geometry(&case.operation, rows, 2 << (rank % 2), 2));
    }
    hosts.assert_clean();
}

/// Operations of more tokens than a slot holds: each round has two kernels and one turn of the slots.
#[test]
fn operations_across_hosts_take_as_many_rounds_as_they_need() {
    let hosts = Hosts::new(2, 3, 4096);
    let mut random = Random(63);
    let mut rounds = 0;
    for (index, what) in EVERYTHING.into_iter().step_by(3).enumerate() {
        let sharded = index % 2 == 1;
        let shape = (7 + random.below(3), 256);
        let case = random_case::<bf16>(&mut random, &hosts, shape, what, sharded);
        let of_case = hosts.plan(&case.operation).rounds().count() as u64;
        assert!(of_case > 1, "one round holds {:?}", case.operation);
        rounds += of_case;
        hosts.run_case(&mut random, &case, Rows::P1, |_| geometry(&case.operation, Rows::P1, 1, 2));
    }
    hosts.assert_clean();
    for (state, status) in hosts.worlds.iter().flat_map(|world| world.states.iter().zip(&world.statuses)) {
        let epoch = Epoch { operation: rounds, slot: (rounds % 3) as u32, reserved: 0 };
        assert!(state.get::<RankState>()[0].epochs.iter().all(|found| *found == epoch));
        let status = status.get::<Status>()[0];
        assert_eq!([status.gathers_begun, status.gathers_ended], [rounds as u32; 2]);
    }
}

/// Sums that are the sentinel, as elements or as `f32`, and zeros of either sign.
#[test]
fn sums_of_a_host_with_the_bits_of_the_sentinel_are_no_failure() {
    fn check<E: Element>(nan: E) {
        for (ranks, sums) in [1, 2]
            .into_iter()
            .flat_map(|ranks| [PartialSums::F32, PartialSums::Element].map(|sums| (ranks, sums)))
        {
            let hosts = Hosts::new(2, ranks, 1 << 14);
            let mut random = Random(64);
            let case = Case::<E>::new(&mut random, hosts.size(), 2, 64, false, What::Sum).plain();
            let mut case = case.across(2, sums);
            for input in &mut case.inputs {
                input[..96].fill(nan);
                input[96..].fill(E::from_f32(-0.0));
            }
            let launch = geometry(&case.operation, Rows::P1, 1, 2);
            let [sum, ..] = hosts.run_case(&mut random, &case, Rows::P1, |_| launch);
            let mut zeros = sum[96 * size_of::<E>()..].chunks(size_of::<E>());
            let is_zero = zeros.all(|zero| matches!(zero, [0, 0x80] | [0, 0, 0, 0x80]));
            assert!(is_zero, "the sign of a zero is lost");
            hosts.assert_clean();
        }
    }
    check(f32::from_bits(u32::MAX));
    check(bf16::from_bits(0xffff));
    check(f16::from_bits(0xffff));
}

/// Operations of a group one after the other in each rank's stream, whose kernels start as early as a GPU may let them, the one
/// after the gather too, with threads held up anywhere.
#[test]
fn operations_across_hosts_may_follow_each_other_on_any_schedule() {
    for seed in 0..4 {
        let (count, ranks) = [(2, 2), (3, 1), (2, 3), (2, 1)][seed as usize % 4];
        let hosts = Hosts::new(count, ranks, 4096);
        let mut random = Random(65 + seed);
        let operations: Vec<_> = (0..5)
            .map(|index| {
                let what = EVERYTHING[random.below(EVERYTHING.len() as u64) as usize];
                let shape = (1 + random.below(5), 128);
                let rows = if index == 3 { Rows::Streamed } else { Rows::P1 };
                let case = random_case::<bf16>(&mut random, &hosts, shape, what, index % 2 == 0);
                let case = case.of_rows(rows);
                let members = hosts.members(&case);
                let teams = [(); 2].map(|()| 1 + random.below(case.operation.tokens.min(2)) as u32);
                (case, members, rows, teams)
            })
            .collect();
        hosts.run(|rank| {
            let mut stream = Stream::with_delays(seed << 8 | u64::from(rank));
            for (case, members, rows, teams) in &operations {
                let launch = geometry(&case.operation, *rows, 1, teams[rank as usize % 2]);
                hosts.enqueue(rank, case, members, *rows, launch, &mut stream);
            }
            stream.run();
        });
        for (case, members, ..) in operations {
            hosts.check(&case, members);
        }
        hosts.assert_clean();
    }
}

/// The second kernel sums what was gathered, and nothing else.
#[test]
fn without_the_gather_the_result_is_wrong() {
    for sharded in [false, true] {
        let hosts = Hosts::new(2, 2, 1 << 14);
        let case = random_case::<bf16>(&mut Random(66), &hosts, (4, 64), What::Norm, sharded);
        let members = hosts.members(&case);
        hosts.run(|rank| {
            let member = &members[rank as usize];
            for round in
                hosts.rounds_of(rank, &case, member, Rows::P1, geometry(&case.operation, Rows::P1, 1, 2))
            {
                hosts.launch(rank, member, round.geometry, &round.sum);
                hosts.launch(rank, member, round.geometry, &round.fused);
            }
        });
        assert!(catch_unwind(AssertUnwindSafe(|| hosts.check(&case, members))).is_err());
    }
}

#[test]
fn a_missing_rank_ends_the_operation_on_every_host() {
    for sharded in [false, true] {
        missing_rank::<bf16>(&mut Random(67), Hosts::new(2, 2, 1 << 14), Rows::P1, sharded);
    }
}

/// With one rank a host nothing is waited for in a kernel: the host's word ends the operation all the same, before rows that
/// nobody gathered are summed.
#[test]
fn the_host_can_end_an_operation_of_hosts_of_one_rank() {
    let hosts = Hosts::new(2, 1, 1 << 14);
    let case = Case::<bf16>::new(&mut Random(68), 2, 3, 64, true, What::Norm).across(2, PartialSums::F32);
    let members = hosts.members(&case);
    hosts.step(&case, &members, Rows::P1, false, |_| true);
    hosts.worlds[0].statuses[0].atomic(Status::ABORT).store(1, Ordering::Relaxed);
    hosts.step(&case, &members, Rows::P1, true, |_| true);
    assert_eq!(hosts.status(0), [ABORTED, 0, HOST_FAILED, 1, 1]);
    // A failed rank hands its peers the sentinel from then on.
    hosts.step(&case, &members, Rows::P1, false, |rank| rank == 0);
    let own = members[0].partials.get::<u32>();
    assert!(own[..own.len() / 2].iter().all(|&word| word == u32::MAX));
    assert!(own[own.len() / 2..].iter().all(|&word| word == POISON));
}

/// Rows of any host tell that it failed, in a tensor of `f32` or of elements, in any word.
#[test]
fn one_word_of_the_sentinel_among_a_host_s_sums_is_found() {
    for (sums, host, word) in
        [(PartialSums::F32, 2, 7), (PartialSums::F32, 1, 0), (PartialSums::Element, 2, 3)]
    {
        let hosts = Hosts::new(3, 1, 1 << 14);
        let case = Case::<bf16>::new(&mut Random(69), 3, 2, 64, true, What::Fp8PerToken).across(3, sums);
        let members = hosts.members(&case);
        hosts.step(&case, &members, Rows::P1, false, |_| true);
        let host_bytes = hosts.host_bytes(&case);
        hosts.copy_sums(0, &members, host_bytes);
        // Of the host's second token.
        let at = host as usize * host_bytes + host_bytes / 2 + word * 4;
        members[0].partials.atomic(at as u64).store(u32::MAX, Ordering::Relaxed);
        hosts.step(&case, &members, Rows::P1, true, |rank| rank == 0);
        assert_eq!(hosts.status(0), [HOST_FAILED, host, HOST_FAILED, 1, 1]);
        assert_eq!(hosts.worlds[0].statuses[0].get::<Status>()[0].token, 1);
    }
}

/// Rounds end within a tile of scales, and after it.
#[test]
fn scales_of_several_rounds_across_hosts_are_those_of_one_tensor() {
    let hosts = Hosts::new(2, 2, 4096);
    let mut random = Random(70);
    let what = What::NvFp4(ScaleLayout::Swizzled128x4);
    let case = random_case::<bf16>(&mut random, &hosts, (131, 16), what, true);
    hosts.run_case(&mut random, &case, Rows::P1, |_| geometry(&case.operation, Rows::P1, 1, 2));
    hosts.assert_clean();
}
