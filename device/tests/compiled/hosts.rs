//! Every kernel of groups of several hosts, for every kind of GPU.

use std::sync::Arc;

use fused_collective_core::dtype::{Element, bf16, f16};
use fused_collective_device_tests::{
    Random, Rows, What, geometry,
    hosts::{Hosts, missing_rank, random_case},
};

use crate::{Compiled, gpus_of, has_clusters};

const ROWS: [Rows; 2] = [Rows::P1, Rows::Streamed];

/// A group of hosts whose kernels are those of `compiled`.
fn hosts(count: u32, ranks: u32, compiled: &Arc<Compiled>) -> Hosts {
    let mut hosts = Hosts::new(count, ranks, 1 << 17);
    for world in &mut hosts.worlds {
        let compiled = Arc::clone(compiled);
        world.runner = Some(Box::new(move |rank, launch, kernel, ranges| {
            compiled.run(rank, launch, &kernel.entry, &kernel.parameter, ranges);
        }));
    }
    hosts
}

/// Every epilogue in turn with either residual, in groups of two hosts of two ranks and of three hosts of one.
fn every_kernel_is_right<E: Element>(seed: u64, dtype: &str) {
    let module = format!("{dtype}_hosts");
    for gpu in gpus_of(&module) {
        let mut random = Random(seed);
        let compiled = Arc::new(Compiled::read(gpu, &module, seed));
        for (index, rows) in ROWS.into_iter().enumerate() {
            for (turn, what) in What::of_each_epilogue(&mut random).into_iter().enumerate() {
                let is_odd = turn % 2 == 1;
                let hosts = if is_odd { hosts(3, 1, &compiled) } else { hosts(2, 2, &compiled) };
                let hidden = 16 * (1 + random.below(40));
                for (tokens, sharded) in [(3, false), (2, true)] {
                    // One of the two with each way to keep rows, and a whole row of the table for both.
                    if what != What::Sum && (turn + index) % 2 == usize::from(sharded) {
                        continue;
                    }
                    let case = random_case::<E>(&mut random, &hosts, (tokens, hidden), what, sharded);
                    let case = case.of_rows(rows);
                    hosts.run_case(&mut random, &case, rows, |rank| {
                        geometry(&case.operation, rows, 1, 1 + rank % 2)
                    });
                }
                hosts.assert_clean();
            }
        }
        compiled.assert_all_ran(|_| false);
    }
}

#[test]
fn every_kernel_across_hosts_is_right_in_f32() {
    every_kernel_is_right::<f32>(81, "f32");
}

#[test]
fn every_kernel_across_hosts_is_right_in_f16() {
    every_kernel_is_right::<f16>(82, "f16");
}

#[test]
fn every_kernel_across_hosts_is_right_in_bf16() {
    every_kernel_is_right::<bf16>(83, "bf16");
}

/// Blocks of a cluster, each of one warp or several, share a row of real length.
#[test]
fn blocks_of_a_cluster_share_a_row_across_hosts() {
    let mut random = Random(84);
    for gpu in gpus_of("bf16_hosts").into_iter().filter(|gpu| has_clusters(gpu)) {
        let hosts = hosts(2, 2, &Arc::new(Compiled::read(gpu, "bf16_hosts", 84)));
        for (cluster, rows, sharded) in [(8, Rows::P1, false), (2, Rows::P1, true), (4, Rows::Streamed, true)]
        {
            let case = random_case::<bf16>(&mut random, &hosts, (3, 4112), What::Fp8PerToken, sharded);
            let case = case.of_rows(rows);
            hosts.run_case(&mut random, &case, rows, |_| geometry(&case.operation, rows, cluster, 1));
        }
        hosts.assert_clean();
    }
}

#[test]
fn a_missing_rank_ends_the_operation_on_every_host() {
    for gpu in gpus_of("bf16_hosts") {
        let compiled = Arc::new(Compiled::read(gpu, "bf16_hosts", 85));
        for (rows, sharded) in ROWS.into_iter().zip([true, false]) {
            missing_rank::<bf16>(&mut Random(85), hosts(2, 2, &compiled), rows, sharded);
        }
    }
}
