//! Without what orders its threads a kernel is at fault, and the emulator says so.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::Arc,
};

use fused_collective_core::dtype::bf16;

use crate::{
    Compiled, KERNELS, collectives, gpus, has_clusters,
    support::{Case, EVERYTHING, Kernel, Random, Rows, geometry, run_case},
};

/// The text of `ptx` with what `change` makes of the entry point `name`.
fn changed(ptx: &str, name: &str, change: impl FnOnce(&str) -> String) -> String {
    let start = ptx.find(&format!(".entry {name}(")).expect("the entry point");
    let end = start + ptx[start..].find("\n}").expect("its end");
    format!("{}{}{}", &ptx[..start], change(&ptx[start..end]), &ptx[end..])
}

/// Runs `kernel` with what `change` makes of it, and returns why that failed.
fn failure(gpu: &Path, kernel: Kernel, cluster: u32, change: impl FnOnce(&str) -> String) -> Option<String> {
    let name = match kernel {
        Kernel::OneShot => "one_shot_nvfp4_p1",
        Kernel::TwoShot => "two_shot_nvfp4_p1",
        Kernel::Sharded => "sharded_nvfp4_p1",
    };
    let compiled = Compiled::read_changed(gpu, "bf16_w2", |ptx| changed(&ptx, name, change));
    let mut random = Random(8);
    let mut world = collectives::world(2, &Arc::new(compiled));
    // The one rank that is at fault leaves the other alone.
    world.timeout = std::time::Duration::from_millis(50);
    let case = Case::<bf16>::new(&mut random, 2, 6, 1440, true, EVERYTHING[4]);
    let case = if kernel == Kernel::Sharded { case.sharded() } else { case };
    let launch = geometry(&case.operation, Rows::P1, cluster, 1);
    let run = || run_case(&mut random, &world, &case, kernel, Rows::P1, |_| launch);
    let panic = catch_unwind(AssertUnwindSafe(run)).err()?;
    Some(panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "a rank's panic".to_owned()))
}

#[test]
fn every_barrier_of_the_block_is_necessary() {
    for gpu in gpus() {
        for kernel in KERNELS {
            assert_eq!(failure(&gpu, kernel, 1, str::to_owned), None);
            let mut barriers = 0;
            loop {
                let mut found = false;
                let without = failure(&gpu, kernel, 1, |text| {
                    let place = text.match_indices("barrier.sync 0;").nth(barriers);
                    found = place.is_some();
                    place.map_or_else(
                        || text.to_owned(),
                        |(at, barrier)| format!("{}{}", &text[..at], &text[at + barrier.len()..]),
                    )
                });
                if !found {
                    break;
                }
                assert!(without.is_some(), "{}: {kernel:?} without barrier {barriers}", gpu.display());
                barriers += 1;
            }
            assert!(barriers > 0, "{}: {kernel:?}", gpu.display());
        }
    }
}

#[test]
fn waiting_for_the_cluster_s_sums_is_necessary() {
    for gpu in gpus().into_iter().filter(|gpu| has_clusters(gpu)) {
        for kernel in KERNELS {
            assert_eq!(failure(&gpu, kernel, 3, str::to_owned), None);
            let without = failure(&gpu, kernel, 3, |text| {
                let mut parts = text.split("mbarrier.try_wait");
                let first = parts.next().unwrap_or_default().to_owned();
                parts.fold(first, |text, part| {
                    let (_, rest) = part.split_once(';').expect("the instruction's end");
                    format!("{text}setp.eq.b32 done, 0, 0;{rest}")
                })
            });
            assert!(without.is_some(), "{}: {kernel:?}", gpu.display());
        }
    }
}
