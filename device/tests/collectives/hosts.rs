//! Groups of several hosts: the sum of each host, the gather, and two-shot of the hosts' sums.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::atomic::Ordering,
    time::Duration,
};

use fused_collective_core::{
    dtype::{Element, bf16, f16},
    fusion::PartialSums,
    quant::ScaleLayout,
};
use fused_collective_device::{
    launch::{ABORTED, Epoch, HOST_FAILED, RankState, Status, TIMED_OUT},
    simt::host::Stream,
};

use fused_collective_device_tests::{
    Case, EVERYTHING, POISON, Random, Rows, What, geometry,
    hosts::{Hosts, Member},
};

const SUMS: [PartialSums; 2] = [PartialSums::F32, PartialSums::Element];

/// A case for all ranks of a group of several hosts; with a sharded residual, if there is a norm.
fn random_case<E: Element>(
    random: &mut Random,
    hosts: &Hosts,
    (tokens, hidden): (u64, u64),
    what: What,
    sharded: bool,
) -> Case<E> {
    let sharded = sharded && what != What::Sum;
    let residual = sharded || random.below(2) == 1;
    let sums = SUMS[random.below(2) as usize];
    let case = Case::<E>::new(random, hosts.size(), tokens, hidden, residual, what);
    let case = case.across(hosts.hosts(), sums);
    if sharded { case.sharded() } else { case }
}

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
        for (ranks, sums) in [1, 2].into_iter().flat_map(|ranks| SUMS.map(|sums| (ranks, sums))) {
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
        let operations: Vec<(Case<bf16>, Vec<Member>, Rows, [u32; 2])> = (0..5)
            .map(|index| {
                let what = EVERYTHING[random.below(EVERYTHING.len() as u64) as usize];
                let shape = (1 + random.below(5), 128);
                let rows = if index == 3 { Rows::Streamed } else { Rows::P1 };
                let case = random_case(&mut random, &hosts, shape, what, index % 2 == 0).of_rows(rows);
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

/// One step of every rank that `takes_part`, all at the same time: the first kernel, or the second.
fn step(
    hosts: &Hosts,
    case: &Case<bf16>,
    members: &[Member],
    second: bool,
    takes_part: impl Fn(u32) -> bool + Sync,
) {
    hosts.run(|rank| {
        if !takes_part(rank) {
            return;
        }
        let (member, launch) = (&members[rank as usize], geometry(&case.operation, Rows::P1, 1, 1));
        let round = hosts.rounds_of(rank, case, member, Rows::P1, launch).swap_remove(0);
        hosts.launch(rank, member, round.geometry, if second { &round.fused } else { &round.sum });
    });
}

/// A rank's status: why it failed, the rank or host that was missing, the hop, and how many gathers have begun and ended.
fn status(hosts: &Hosts, rank: u32) -> [u32; 5] {
    let (world, place) = hosts.place(rank);
    let status = world.statuses[place as usize].get::<Status>()[0];
    [status.failed, status.missing_rank, status.hop, status.gathers_begun, status.gathers_ended]
}

/// Rank 1 of host 0 is not there. Its host's other rank waits in vain and says so to the same rank of host 1 in its rows; to
/// rank 1 of host 1 nobody says anything, until the library ends its gather.
#[test]
fn a_missing_rank_ends_the_operation_on_every_host() {
    for sharded in [false, true] {
        let mut hosts = Hosts::new(2, 2, 1 << 14);
        hosts.worlds.iter_mut().for_each(|world| world.timeout = Duration::from_millis(50));
        let case = random_case::<bf16>(&mut Random(67), &hosts, (4, 64), What::Norm, sharded);
        let members = hosts.members(&case);
        let is_there = |rank| rank != 1;
        step(&hosts, &case, &members, false, is_there);
        assert_eq!(
            [0, 2, 3].map(|rank| status(&hosts, rank)),
            [[TIMED_OUT, 1, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 0]]
        );
        for rank in [0, 2] {
            hosts.copy_sums(rank, &members, hosts.host_bytes(&case));
        }
        // The library's word for rank 1 of host 1.
        hosts.worlds[1].statuses[1].atomic(Status::ABORT).store(1, Ordering::Relaxed);
        step(&hosts, &case, &members, true, is_there);
        let [first, second, third] = [0, 2, 3].map(|rank| status(&hosts, rank));
        assert_eq!(first, [TIMED_OUT, 1, 1, 1, 1]);
        assert_eq!(second, [HOST_FAILED, 0, HOST_FAILED, 1, 1]);
        assert_eq!(third, [ABORTED, 1, HOST_FAILED, 1, 1]);
        // What follows ends at once.
        step(&hosts, &case, &members, false, is_there);
        step(&hosts, &case, &members, true, is_there);
        assert_eq!(status(&hosts, 2), [HOST_FAILED, 0, HOST_FAILED, 2, 2]);
    }
}

/// With one rank a host nothing is waited for in a kernel: the host's word ends the operation all the same, before rows that
/// nobody gathered are summed.
#[test]
fn the_host_can_end_an_operation_of_hosts_of_one_rank() {
    let hosts = Hosts::new(2, 1, 1 << 14);
    let case = Case::<bf16>::new(&mut Random(68), 2, 3, 64, true, What::Norm).across(2, PartialSums::F32);
    let members = hosts.members(&case);
    step(&hosts, &case, &members, false, |_| true);
    hosts.worlds[0].statuses[0].atomic(Status::ABORT).store(1, Ordering::Relaxed);
    step(&hosts, &case, &members, true, |_| true);
    assert_eq!(status(&hosts, 0), [ABORTED, 0, HOST_FAILED, 1, 1]);
    // A failed rank hands its peers the sentinel from then on.
    step(&hosts, &case, &members, false, |rank| rank == 0);
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
        step(&hosts, &case, &members, false, |_| true);
        let host_bytes = hosts.host_bytes(&case);
        hosts.copy_sums(0, &members, host_bytes);
        // Of the host's second token.
        let at = host as usize * host_bytes + host_bytes / 2 + word * 4;
        members[0].partials.atomic(at as u64).store(u32::MAX, Ordering::Relaxed);
        step(&hosts, &case, &members, true, |rank| rank == 0);
        assert_eq!(status(&hosts, 0), [HOST_FAILED, host, HOST_FAILED, 1, 1]);
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
