//! Without what orders its threads a kernel is at fault, and the emulator says so.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use fused_collective_core::dtype::bf16;

use fused_collective_device_tests::{Case, EVERYTHING, Kernel, Random, Rows, geometry, run_case};

use crate::{Compiled, KERNELS, collectives, folder, gpus_of, has_clusters};

/// The module that two ranks' kernel is in.
fn module(kernel: Kernel) -> &'static str {
    if kernel == Kernel::TwoShot { "bf16_w4" } else { "bf16_w2" }
}

/// How a run ended.
struct Outcome {
    /// Whether every result was right.
    is_right: bool,
    /// What the emulator found.
    faults: Vec<String>,
}

/// Runs `kernel`, with what `change` makes of it if there is one.
fn run(
    gpu: &str,
    kernel: Kernel,
    cluster: u32,
    seed: u64,
    change: Option<&dyn Fn(&str) -> String>,
) -> Outcome {
    let name = match kernel {
        Kernel::OneShot => "one_shot_fp4_p1",
        Kernel::TwoShot => "two_shot_fp4_p1",
        Kernel::Sharded => "sharded_fp4_p1",
    };
    let changed = |ptx: String| {
        let Some(change) = change else { return ptx };
        let start = ptx.find(&format!(".entry {name}(")).expect("the entry point");
        let end = start + ptx[start..].find("\n}").expect("its end");
        format!("{}{}{}", &ptx[..start], change(&ptx[start..end]), &ptx[end..])
    };
    let compiled = Arc::new(Compiled::read_from(&folder(), gpu, module(kernel), seed, changed));
    let mut world = collectives::world(2, &compiled);
    if change.is_some() {
        // A rank at fault leaves the other one alone.
        world.timeout = Duration::from_millis(300);
    }
    let mut random = Random(8);
    let case = Case::<bf16>::new(&mut random, 2, 6, 1440, true, EVERYTHING[4]).plain();
    let case = if kernel == Kernel::Sharded { case.sharded() } else { case };
    let launch = geometry(&case.operation, Rows::P1, cluster, 1);
    let run = || run_case(&mut random, &world, &case, kernel, Rows::P1, |_| launch);
    let is_right = catch_unwind(AssertUnwindSafe(run)).is_ok();
    let faults = compiled.faults.lock().unwrap().clone();
    Outcome { is_right, faults }
}

/// The text without the `index`-th `part` of it, if there are so many.
fn without(text: &str, part: &str, index: usize) -> Option<String> {
    let (at, _) = text.match_indices(part).nth(index)?;
    Some(format!("{}{}", &text[..at], &text[at + part.len()..]))
}

#[test]
fn barriers_between_warps_are_necessary() {
    for kernel in KERNELS {
        for gpu in gpus_of(module(kernel)) {
            assert!(run(gpu, kernel, 1, 1, None).is_right, "{gpu}: {kernel:?}");
            // The row's sum has a barrier in each of them.
            let change = |text: &str| {
                assert!(without(text, "barrier.sync 0;", 1).is_none(), "{gpu}: {kernel:?}: another barrier");
                without(text, "barrier.sync 0;", 0).expect("a barrier")
            };
            let Outcome { faults, .. } = run(gpu, kernel, 1, 1, Some(&change));
            let is_of_memory = |fault: &String| fault.contains("of shared memory");
            assert!(!faults.is_empty() && faults.iter().all(is_of_memory), "{gpu}: {kernel:?}: {faults:?}");
        }
    }
}

/// The barrier at which threads learn whether one of them has failed also keeps the first from writing the next epoch before
/// the last has read this one.
#[test]
fn the_barrier_before_the_next_epoch_is_necessary() {
    let change = |text: &str| without(text, "barrier.red.or.pred any, 0, any;", 0).expect("a barrier");
    for kernel in KERNELS {
        for gpu in gpus_of(module(kernel)) {
            let is_found = |seed| !run(gpu, kernel, 1, seed, Some(&change)).is_right;
            assert!((1..20).any(is_found), "{gpu}: {kernel:?}");
        }
    }
}

#[test]
fn waiting_for_the_cluster_s_sums_is_necessary() {
    let change = |text: &str| {
        let mut parts = text.split("mbarrier.try_wait");
        let first = parts.next().unwrap_or_default().to_owned();
        parts.fold(first, |text, part| {
            let (_, rest) = part.split_once(';').expect("the instruction's end");
            format!("{text}setp.eq.b32 done, 0, 0;{rest}")
        })
    };
    for kernel in KERNELS {
        for gpu in gpus_of(module(kernel)).into_iter().filter(|gpu| has_clusters(gpu)) {
            assert!(run(gpu, kernel, 3, 1, None).is_right, "{gpu}: {kernel:?}");
            let Outcome { faults, .. } = run(gpu, kernel, 3, 1, Some(&change));
            let is_of_memory = |fault: &String| fault.contains("of shared memory");
            assert!(!faults.is_empty() && faults.iter().all(is_of_memory), "{gpu}: {kernel:?}: {faults:?}");
        }
    }
}
