//! Groups of ranks on the host: the kernel that the table has for a case, run on every rank.

#![allow(missing_docs, reason = "for tests alone, where fields and variants are called what they are")]

use std::{
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use fused_collective_bench::{launch::EagerStep, table::EagerKernel};
use fused_collective_core::{
    dtype::Element,
    fusion::{Mode, Norm, Operation, WeightType},
    kernels as table,
    plan::{Algorithm, Plan, Round},
    reference::check_token,
    wire::WireFormat,
};
use fused_collective_device::{
    collective,
    epilogue::Epilogue,
    launch::{
        Activations, Encoding, Experts, Extras, Fused, Group, Local, Plain, Shape, Status, TIMED_OUT,
        Unquantized,
    },
    local,
    prologue::{Given, Prologue},
    simt::host::{Launch, launch},
    wire::{Elements, Wire},
};

mod cases;
pub mod hosts;
mod launched;
mod memory;
mod random;
pub mod ranks;
mod rows;
mod separate;
pub mod sequence;
mod tensors;

pub use cases::{Case, EVERYTHING, What};
use launched::PartOf;
pub use launched::{Launched, bytes_of};
pub use memory::{Buffer, Runner, World};
pub use random::Random;
pub use rows::Rows;
pub use separate::{check_separate, separate_cases};
pub use tensors::{POISON, Tensors};

/// Evaluates an expression with the quantizer of a case, and its name in entry points if there is one.
#[macro_export]
macro_rules! with_quantizer {
    ($case:expr, $tensors:expr, |$name:ident, $quantizer:ident| $body:expr) => {{
        use fused_collective_core::kernels::Quantizer;
        macro_rules! with {
            ($of:expr, $found:expr) => {{
                let ($name, $quantizer): (Option<&str>, _) = ($of, $found);
                $body
            }};
        }
        match Quantizer::from($case.operation.quantization) {
            Quantizer::None => with!(None, fused_collective_device::launch::Unquantized),
            Quantizer::Fp8 => with!(Some("fp8"), $tensors.fp8()),
            Quantizer::Fp8Token => with!(Some("fp8_token"), $tensors.fp8_per_token()),
            Quantizer::Fp8Block => with!(Some("fp8_block"), $tensors.fp8_block(&$case)),
            Quantizer::Fp4 => with!(Some("fp4"), $tensors.fp4(&$case)),
            Quantizer::MxFp4 => with!(Some("mxfp4"), $tensors.mxfp4(&$case)),
        }
    }};
}

/// The collective to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    OneShot,
    TwoShot,
    /// Of cases with a sharded residual.
    Sharded,
}

impl Kernel {
    /// The mode that it serves.
    pub fn mode(self) -> Mode {
        if self == Kernel::OneShot { Mode::OneShot } else { Mode::TwoShot }
    }

    /// The plan of an operation for this kernel, under the world's slots.
    pub fn plan(self, world: &World, operation: &Operation) -> Plan {
        let plan = Plan::new(&Operation { mode: self.mode(), ..*operation }, &world.limits()).unwrap();
        assert_eq!(plan.algorithm == Algorithm::ShardedTwoShot, self == Kernel::Sharded);
        plan
    }
}

/// One rank's part of one round of a case: the kernel that the entry points' table has for it, with its parameters.
pub fn kernel_of<E: Element>(
    world: &World,
    rank: u32,
    case: &Case<E>,
    tensors: &Tensors,
    (plan, round): (&Plan, &Round),
    kernel: Kernel,
    rows: Rows,
) -> Launched {
    let run = Run {
        group: world.group(rank),
        shape: Shape::of_round(plan, round, CALL).unwrap(),
        activations: tensors.activations().of_round(plan, round),
        extras: tensors.extras(),
        kernel,
        rows,
    };
    let operation = &case.operation;
    let (_, found) = table::Kernel::of(operation, plan.algorithm, world.size).unwrap();
    if rows == Rows::Streamed || found.epilogue.is_none() {
        let any = tensors.any_epilogue(case);
        return match operation.wire {
            Some(_) => run.either::<E, _, Encoded, WithExtras>("wire_any", any),
            None => run.either::<E, _, AsElements, WithExtras>("any", any),
        };
    }
    let is_encoded = operation.wire.is_some();
    if operation.norm.is_none() {
        let plain = Plain { quantizer: Unquantized };
        return if is_encoded {
            run.replicated::<E, _, Encoded, WithoutExtras>("wire_none", plain)
        } else {
            run.replicated::<E, _, AsElements, WithoutExtras>("none", plain)
        };
    }
    with_quantizer!(case, tensors, |name, quantizer| {
        let (name, epilogue) = (name.unwrap_or("norm"), tensors.norm(case, quantizer));
        if is_encoded {
            run.either::<E, _, Encoded, WithoutExtras>(&format!("wire_{name}"), epilogue)
        } else {
            run.either::<E, _, AsElements, WithoutExtras>(name, epilogue)
        }
    })
}

/// One rank's part of a case: its rounds, as the plan has them, each with as much of `geometry` as it has tokens for.
pub fn rounds_of<E: Element>(
    world: &World,
    rank: u32,
    case: &Case<E>,
    tensors: &Tensors,
    kernel: Kernel,
    rows: Rows,
    geometry: Launch,
) -> Vec<(Launch, Launched)> {
    let plan = kernel.plan(world, &case.operation);
    let launched = |round: Round| {
        let teams = u64::from(geometry.blocks / geometry.cluster).min(round.rows.tokens) as u32;
        let geometry = Launch { blocks: teams * geometry.cluster, ..geometry };
        (geometry, kernel_of(world, rank, case, tensors, (&plan, &round), kernel, rows))
    };
    plan.rounds().map(launched).collect()
}

/// Runs one rank's part of a case.
pub fn run_rank<E: Element>(
    world: &World,
    rank: u32,
    case: &Case<E>,
    tensors: &Tensors,
    kernel: Kernel,
    rows: Rows,
    geometry: Launch,
) {
    for (geometry, kernel) in rounds_of(world, rank, case, tensors, kernel, rows, geometry) {
        match &world.runner {
            None => launch(geometry, || kernel.run()),
            Some(run) => run(rank, geometry, &kernel, world.ranges(rank).chain(tensors.ranges()).collect()),
        }
    }
}

/// Runs everything after the all-reduce, as one kernel.
pub fn run_local<E: Element>(case: &Case<E>, tensors: &Tensors) {
    fn with<E: Element, X: Epilogue<E> + Sync>(operation: &Operation, tensors: &Tensors, epilogue: X) {
        let params = Local { shape: shape(operation), activations: tensors.activations(), epilogue };
        // SAFETY: the parameters are as their documentation says, and the geometry covers a row.
        launch(geometry(operation, Rows::P1, 1, 2), || unsafe { local::<E, X, 1, true>(&params, None) });
    }
    let operation = &case.operation;
    if operation.norm.is_none() {
        return with::<E, _>(operation, tensors, Plain { quantizer: Unquantized });
    }
    with_quantizer!(case, tensors, |_name, quantizer| with::<E, _>(
        operation,
        tensors,
        tensors.norm(case, quantizer)
    ));
}

/// Runs the primitive steps of RMSNorm and FP8 quantization, each a kernel of its own, which `run` runs, and holds what comes out of them to the reference. The buffers are those that a step reads and writes.
pub fn eager_steps<E: Element>(random: &mut Random, run: impl Fn(EagerKernel, &EagerStep, [&Buffer; 3])) {
    let mut case = Case::<E>::new(random, 1, 3, 96, true, What::Fp8);
    case.operation.keep_norm = true;
    // The steps know no gamma of another type.
    case.operation.norm = case.operation.norm.map(|norm| Norm { gamma: WeightType::Element, ..norm });
    let tensors = Tensors::new(&case, 0);
    let (tokens, hidden) = (case.operation.tokens as u32, case.operation.hidden as u32);
    let norm = case.operation.norm.unwrap();
    let wide = || Buffer::new((tokens * hidden) as usize * 4, 0);
    let [x, y, z] = [wide(), wide(), wide()];
    let factors = Buffer::new(tokens as usize * 4, 0);
    let residual = tensors.residual.as_ref().unwrap();
    let step = |kernel: EagerKernel, a: &Buffer, b: &Buffer, out: &Buffer, value: f32| {
        let [a_address, b_address, out_address] = [a, b, out].map(Buffer::address);
        let step =
            EagerStep { a: a_address, b: b_address, out: out_address, tokens, hidden, value, reserved: 0 };
        run(kernel, &step, [a, b, out]);
    };
    let unused = &factors;
    step(EagerKernel::ToF32, &tensors.input, unused, &x, 0.0);
    step(EagerKernel::ToF32, residual, unused, &y, 0.0);
    step(EagerKernel::Add, &x, &y, &z, 0.0);
    step(EagerKernel::Round, &z, unused, tensors.residual_out(), 0.0);
    step(EagerKernel::ToF32, tensors.residual_out(), unused, &x, 0.0);
    step(EagerKernel::Square, &x, unused, &y, 0.0);
    step(EagerKernel::MeanRsqrt, &y, unused, &factors, norm.epsilon);
    step(EagerKernel::ScaleRows, &x, &factors, &y, 0.0);
    step(EagerKernel::MulWeight, &y, &tensors.gamma, &z, norm.weight_bias);
    step(EagerKernel::Round, &z, unused, tensors.norm_out(), 0.0);
    step(EagerKernel::ToF32, tensors.norm_out(), unused, &x, 0.0);
    step(EagerKernel::MulInverse, &x, &tensors.scale, &y, 0.0);
    step(EagerKernel::Clamp, &y, unused, &z, 0.0);
    step(EagerKernel::ToFp8, &z, unused, &tensors.values, 0.0);
    tensors.check_by(&case, |token, observed| check_token(&case.operation, token, observed).map(drop));
}

struct Run {
    group: Group,
    shape: Shape,
    activations: Activations,
    extras: Extras,
    kernel: Kernel,
    rows: Rows,
}

/// A part of the extras that a kernel reads: its type, and its place.
trait Part {
    type Of: 'static;
    fn of(extras: &Extras) -> &Self::Of;
}

macro_rules! parts {
    ($($name:ident: $of:ty = |$extras:ident| $part:expr;)*) => {$(
        struct $name;

        impl Part for $name {
            type Of = $of;

            fn of($extras: &Extras) -> &$of {
                $part
            }
        }
    )*};
}

parts! {
    AsElements: Elements = |_extras| &Elements;
    Encoded: Encoding = |extras| &extras.encoding;
    WithExtras: Experts = |extras| &extras.experts;
    WithoutExtras: Given = |_extras| &Given;
}

/// The version of a collective that the table has for a run.
macro_rules! version {
    ($run:ident, $collective:ident, $element:ident, $epilogue:ident, $prologue:ident, $wire:ident) => {{
        let is_pair = $run.group.world_size == 2 && $run.kernel != Kernel::TwoShot;
        let (has_extras, is_encoded) =
            (<$prologue::Of as Prologue<E>>::EXTRAS, !<$wire::Of as Wire<E>>::ELEMENTS);
        match $run.group.world_size {
            _ if is_pair && !(has_extras && is_encoded) => {
                version!($run, $collective, $element, $epilogue, $prologue, $wire, 2)
            }
            2..=4 if !has_extras => version!($run, $collective, $element, $epilogue, $prologue, $wire, 4),
            _ => version!($run, $collective, $element, $epilogue, $prologue, $wire, 8),
        }
    }};
    ($run:ident, $collective:ident, $element:ident, $epilogue:ident, $prologue:ident, $wire:ident, $ranks:literal) => {
        match $run.rows {
            Rows::P1 => {
                collective::$collective::<$element, $epilogue, $prologue::Of, $wire::Of, $ranks, 1, true>
            }
            Rows::P2 => {
                collective::$collective::<$element, $epilogue, $prologue::Of, $wire::Of, $ranks, 2, true>
            }
            Rows::Streamed => {
                collective::$collective::<$element, $epilogue, $prologue::Of, $wire::Of, $ranks, 1, false>
            }
        }
    };
}

impl Run {
    fn replicated<E, X, W, I>(&self, fusion: &str, epilogue: X) -> Launched
    where
        E: Element,
        X: Epilogue<E> + Send + Sync + 'static,
        W: Part<Of: Wire<E>>,
        I: Part<Of: Prologue<E>>,
    {
        let (name, kernel) = match self.kernel {
            Kernel::OneShot => ("one_shot", version!(self, one_shot, E, X, I, W)),
            Kernel::TwoShot => ("two_shot", version!(self, two_shot, E, X, I, W)),
            Kernel::Sharded => panic!("`either` runs these"),
        };
        self.launched(name, kernel, fusion, epilogue, (I::of, W::of))
    }

    /// With a sharded residual or without.
    fn either<E, X, W, I>(&self, fusion: &str, epilogue: X) -> Launched
    where
        E: Element,
        X: Epilogue<E> + Send + Sync + 'static,
        W: Part<Of: Wire<E>>,
        I: Part<Of: Prologue<E>>,
    {
        if self.kernel != Kernel::Sharded {
            return self.replicated::<E, X, W, I>(fusion, epilogue);
        }
        self.launched("sharded", version!(self, sharded, E, X, I, W), fusion, epilogue, (I::of, W::of))
    }

    fn launched<X: Send + Sync + 'static, I: 'static, W: 'static>(
        &self,
        name: &str,
        kernel: unsafe fn(&Fused<X>, &I, &W),
        fusion: &str,
        epilogue: X,
        parts: (PartOf<I>, PartOf<W>),
    ) -> Launched {
        let Run { group, shape, activations, extras, .. } = *self;
        let params = Fused { group, shape, activations, epilogue, extras };
        Launched::new(format!("{name}_{fusion}_{}", self.rows.name()), kernel, params, parts)
    }
}

/// What operations are called.
pub const CALL: u64 = 0x0123_4567_89ab_cdef;

/// All rows of an operation.
pub fn shape(operation: &Operation) -> Shape {
    Shape::of_rows(operation.tokens, operation.row_bytes()).unwrap()
}

/// A geometry that covers a row of the operation, in blocks as small as that allows.
pub fn geometry(operation: &Operation, rows: Rows, cluster: u32, teams: u32) -> Launch {
    let packs = (operation.row_bytes() / 16) as u32;
    let threads = match rows {
        Rows::P1 => packs.div_ceil(cluster).next_multiple_of(32),
        Rows::P2 => packs.div_ceil(cluster * 2).next_multiple_of(32),
        Rows::Streamed => 32,
    };
    Launch { blocks: cluster * teams, cluster, threads }
}

/// Runs a case on every rank, each after a random delay, and checks all outputs; returns rank 0's.
pub fn run_case<E: Element>(
    random: &mut Random,
    world: &World,
    case: &Case<E>,
    kernel: Kernel,
    rows: Rows,
    geometry_of: impl Fn(u32) -> Launch + Sync,
) -> [Vec<u8>; 4] {
    let in_place = random.below(2) == 1;
    let tensors: Vec<Tensors> = (0..world.size)
        .map(|rank| Tensors::new(case, rank))
        .map(|tensors| if in_place { tensors.in_place() } else { tensors })
        .collect();
    let delays: Vec<Duration> = (0..world.size).map(|_| Duration::from_micros(random.below(2000))).collect();
    world.run(|rank| {
        thread::sleep(delays[rank as usize]);
        run_rank(world, rank, case, &tensors[rank as usize], kernel, rows, geometry_of(rank));
    });
    for rank in 0..world.size {
        assert_eq!(world.failed(rank), 0, "rank {rank} failed ({:?})", case.operation);
    }
    check_all(case, &tensors);
    tensors[0].outputs()
}

/// Runs a case in one call, then cut into calls of random sizes, each in a grid of its own on each rank: the same bits.
pub fn run_cut<E: Element>(random: &mut Random, world: &World, case: &Case<E>, kernel: Kernel, rows: Rows) {
    let operation = &case.operation;
    let whole = run_case(random, world, case, kernel, rows, |_| geometry(operation, rows, 1, 2));
    let scales = |tokens| operation.quantization.scales(tokens, operation.hidden);
    let unit = if kernel == Kernel::Sharded { u64::from(world.size) } else { 1 };
    let mut joined: [Vec<u8>; 3] = Default::default();
    let mut first = 0;
    while first < operation.tokens {
        let left = operation.tokens - first;
        let count = (1 + random.below(left.min(5))).next_multiple_of(unit).min(left);
        let (part, teams) = (case.rows(first..first + count), 1 + random.below(3) as u32);
        let [residual_out, norm_out, values, found] = run_case(random, world, &part, kernel, rows, |rank| {
            geometry(&part.operation, rows, 1, teams + rank)
        });
        for (joined, own) in joined.iter_mut().zip([residual_out, norm_out, values]) {
            joined.extend(own);
        }
        if let (Some(own), Some(all)) = (scales(count), scales(operation.tokens)) {
            for (row, col) in (0..count).flat_map(|row| (0..all.cols).map(move |col| (row, col))) {
                let (own, all) = (own.get(&found, row, col), all.get(&whole[3], first + row, col));
                assert!(own.is_some() && own == all, "scale [{row}, {col}] of {count} rows from {first}");
            }
        }
        first += count;
    }
    assert!(joined == whole[..3], "calls of some rows differ from one of all ({operation:?})");
}

/// Holds all ranks' outputs to the specification and to each other.
pub fn check_all<E: Element>(case: &Case<E>, tensors: &[Tensors]) {
    for own in tensors {
        own.check(case);
        assert!(
            own.shared_outputs(case) == tensors[0].shared_outputs(case),
            "ranks differ ({:?})",
            case.operation
        );
    }
}

/// Packs of a row for blocks of up to `warps` warps to keep: all of a thread's share, its first pack and some of the
/// second, or a chunk.
fn packs(random: &mut Random, rows: Rows, warps: u64) -> u64 {
    match rows {
        Rows::P1 => 1 + random.below(32 * warps),
        Rows::P2 => 33 + random.below(64 * warps - 32),
        Rows::Streamed => 33 + random.below(64 * warps),
    }
}

/// Runs a case for every version of every collective that there is for the group, in blocks of up to `warps` warps: plain ones
/// for each epilogue, and one that is not. Shapes and geometries vary, and so does whether there is a residual.
pub fn every_version<E: Element>(random: &mut Random, world: &World, warps: u64) {
    every_version_of::<E>(random, world, warps, false);
}

/// As [`every_version`], of addends in a wire format. Each operation is of the bits that its mode gives.
pub fn every_encoded_version<E: Element>(random: &mut Random, world: &World, warps: u64) {
    every_version_of::<E>(random, world, warps, true);
}

fn every_version_of<E: Element>(random: &mut Random, world: &World, warps: u64, is_encoded: bool) {
    for rows in [Rows::P1, Rows::P2, Rows::Streamed] {
        for kernel in [Kernel::OneShot, Kernel::TwoShot, Kernel::Sharded] {
            let is_sharded = kernel == Kernel::Sharded;
            let mut cases = What::of_each_epilogue(random);
            cases.retain(|&what| !(is_sharded && what == What::Sum));
            // The last one again, with a bias at least.
            let plain = cases.len();
            cases.extend(cases.last().copied());
            for (index, what) in cases.into_iter().enumerate() {
                let tokens = 1 + random.below(4);
                // The last block of a wire format may be half of one.
                let hidden = (packs(random, rows, warps) * E::LANES as u64).next_multiple_of(16);
                let residual = is_sharded || random.below(2) == 1;
                let case = Case::<E>::new(random, world.size, tokens, hidden, residual, what).of_rows(rows);
                let case = if index < plain { case.plain() } else { case.with_bias(random) };
                let case = if is_sharded { case.sharded() } else { case };
                let format = WireFormat::ALL[(index + random.below(2) as usize) % 2];
                let case = if is_encoded { case.encoded(format, kernel.mode()) } else { case };
                let launch = geometry(&case.operation, rows, 1, 1 + random.below(tokens.min(warps)) as u32);
                let streaming = if rows == Rows::Streamed { 1 + random.below(warps) as u32 } else { 1 };
                let launch = Launch { threads: launch.threads * streaming, ..launch };
                run_case(random, world, &case, kernel, rows, |_| launch);
            }
        }
    }
    world.assert_clean();
}

/// Holds that rank 0 of two ends its wait for rank 1, which does not come to the second operation, and says so. Each token
/// has a block.
pub fn missing_rank<E: Element>(
    random: &mut Random,
    mut world: World,
    tokens: u32,
    kernel: Kernel,
    rows: Rows,
) {
    let case = Case::<E>::new(random, 2, u64::from(tokens), 512, true, What::Fp8).of_rows(rows);
    let case = if kernel == Kernel::Sharded { case.sharded() } else { case };
    let launch = geometry(&case.operation, rows, 1, tokens);
    run_case(random, &world, &case, kernel, rows, |_| launch);

    world.timeout = Duration::from_millis(50);
    let tensors = Tensors::new(&case, 0);
    run_rank(&world, 0, &case, &tensors, kernel, rows, launch);
    assert_eq!(world.failed(0), TIMED_OUT);
    let status = &world.statuses[0];
    assert_eq!(status.atomic(Status::MISSING_RANK).load(Ordering::Relaxed), 1);
    let token = status.get::<u64>()[Status::TOKEN as usize / 8];
    assert!(token < u64::from(tokens));
    // In two hops rank 1 sums every second token.
    let hop = if kernel == Kernel::OneShot || token.is_multiple_of(2) { 1 } else { 2 };
    assert_eq!(status.atomic(Status::HOP).load(Ordering::Relaxed), hop);
    assert_eq!(status.get::<u64>()[Status::OPERATION as usize / 8], 1);
    assert_eq!(status.get::<u64>()[Status::CALL as usize / 8], CALL);

    // What follows on the poisoned rank ends at once, whatever its deadline is.
    world.timeout = Duration::from_secs(3600);
    let started = Instant::now();
    run_rank(&world, 0, &case, &tensors, kernel, rows, launch);
    assert!(started.elapsed() < Duration::from_secs(60));
}
