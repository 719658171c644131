//! Groups of ranks on the host: the kernel that the table of entry points has for a case, run on every rank.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of this")]

use std::{thread, time::Duration};

use fused_collective_core::{dtype::Element, fusion::Operation, quant::Quantization, reference::Rounding};
use fused_collective_device::{
    baseline, collective,
    epilogue::{Epilogue, Gathered},
    params::{Fused, Group, Local, Plain, Shape, Unquantized},
    simt::host::{Launch, launch},
};

mod cases;
mod memory;
pub mod sequence;

pub use cases::{Case, EVERYTHING, POISON, Random, Tensors, What};
pub use memory::{Buffer, World};

/// The collective to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    OneShot,
    TwoShot,
    /// Of cases with a sharded residual.
    Sharded,
}

/// How rows are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    P1,
    P2,
    Streamed,
}

/// A kernel with its parameters.
pub type Launched = Box<dyn Fn() + Send + Sync>;

/// One rank's part of a case: the kernel that the entry points' table has for it, with its parameters.
pub fn kernel_of<E: Element>(
    world: &World,
    rank: u32,
    case: &Case<E>,
    tensors: &Tensors,
    kernel: Kernel,
    rows: Rows,
) -> Launched {
    let run = Run { group: world.group(rank), operation: &case.operation, tensors, kernel, rows };
    match case.operation.quantization {
        _ if case.operation.norm.is_none() => run.epilogue::<E, _>(Plain { quantizer: Unquantized }),
        Quantization::Fp8Static if kernel == Kernel::Sharded => {
            run.gathered::<E, _>(tensors.norm(case, tensors.fp8()))
        }
        Quantization::NvFp4 { layout } if kernel == Kernel::Sharded => {
            run.gathered::<E, _>(tensors.norm(case, tensors.nvfp4(layout)))
        }
        _ if kernel == Kernel::Sharded => run.gathered::<E, _>(tensors.norm(case, Unquantized)),
        Quantization::Fp8Static => run.epilogue::<E, _>(tensors.norm(case, tensors.fp8())),
        Quantization::NvFp4 { layout } => run.epilogue::<E, _>(tensors.norm(case, tensors.nvfp4(layout))),
        _ => run.epilogue::<E, _>(tensors.norm(case, Unquantized)),
    }
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
    launch(geometry, kernel_of(world, rank, case, tensors, kernel, rows));
}

/// Runs everything after the all-reduce, as one kernel.
pub fn run_local<E: Element>(case: &Case<E>, tensors: &Tensors) {
    fn with<E: Element, X: Epilogue<E> + Sync>(operation: &Operation, tensors: &Tensors, epilogue: X) {
        let params = Local { shape: shape(operation), activations: tensors.activations(), epilogue };
        // SAFETY: the parameters are as their documentation says, and the geometry covers a row.
        launch(geometry(operation, Rows::P1, 1, 2), || unsafe { baseline::local::<E, X, 1, true>(&params) });
    }
    let operation = &case.operation;
    match operation.quantization {
        _ if operation.norm.is_none() => {
            with::<E, _>(operation, tensors, Plain { quantizer: Unquantized });
        }
        Quantization::Fp8Static => with::<E, _>(operation, tensors, tensors.norm(case, tensors.fp8())),
        Quantization::NvFp4 { layout } => {
            with::<E, _>(operation, tensors, tensors.norm(case, tensors.nvfp4(layout)));
        }
        _ => with::<E, _>(operation, tensors, tensors.norm(case, Unquantized)),
    }
}

struct Run<'a> {
    group: Group,
    operation: &'a Operation,
    tensors: &'a Tensors,
    kernel: Kernel,
    rows: Rows,
}

impl Run<'_> {
    fn epilogue<E: Element, X: Epilogue<E> + Send + Sync + 'static>(&self, epilogue: X) -> Launched {
        let params = Fused {
            group: self.group,
            shape: shape(self.operation),
            activations: self.tensors.activations(),
            epilogue,
        };
        let kernel = match self.group.world_size {
            2 => self.any_rows::<E, X, 2>(),
            3 | 4 => self.one_pack::<E, X, 4>(),
            _ => self.one_pack::<E, X, 8>(),
        };
        // SAFETY: the parameters are as their documentation says, and geometries cover a row.
        Box::new(move || unsafe { kernel(&params) })
    }

    fn gathered<E: Element, X: Gathered<E> + Send + Sync + 'static>(&self, epilogue: X) -> Launched {
        let params = Fused {
            group: self.group,
            shape: shape(self.operation),
            activations: self.tensors.activations(),
            epilogue,
        };
        let kernel = match (self.group.world_size, self.rows) {
            (2, Rows::P1) => collective::sharded::<E, X, 2, 1, true>,
            (2, Rows::P2) => collective::sharded::<E, X, 2, 2, true>,
            (2, Rows::Streamed) => collective::sharded::<E, X, 2, 1, false>,
            (3 | 4, Rows::P1) => collective::sharded::<E, X, 4, 1, true>,
            (_, Rows::P1) => collective::sharded::<E, X, 8, 1, true>,
            _ => panic!("as in `one_pack`"),
        };
        // SAFETY: the parameters are as their documentation says, and geometries cover a row.
        Box::new(move || unsafe { kernel(&params) })
    }

    fn any_rows<E: Element, X: Epilogue<E>, const N: usize>(&self) -> unsafe fn(&Fused<X>) {
        match (self.kernel, self.rows) {
            (_, Rows::P1) => self.one_pack::<E, X, N>(),
            (Kernel::OneShot, Rows::P2) => collective::one_shot::<E, X, N, 2, true>,
            (Kernel::OneShot, Rows::Streamed) => collective::one_shot::<E, X, N, 1, false>,
            (Kernel::TwoShot, Rows::P2) => collective::two_shot::<E, X, N, 2, true>,
            (Kernel::TwoShot, Rows::Streamed) => collective::two_shot::<E, X, N, 1, false>,
            (Kernel::Sharded, _) => panic!("`gathered` runs these"),
        }
    }

    fn one_pack<E: Element, X: Epilogue<E>, const N: usize>(&self) -> unsafe fn(&Fused<X>) {
        assert_eq!(self.rows, Rows::P1, "larger groups are tested with one pack a thread, to compile less");
        match self.kernel {
            Kernel::OneShot => collective::one_shot::<E, X, N, 1, true>,
            Kernel::TwoShot => collective::two_shot::<E, X, N, 1, true>,
            Kernel::Sharded => panic!("`gathered` runs these"),
        }
    }
}

/// What operations are called.
pub const CALL: u64 = 0x0123_4567_89ab_cdef;

pub fn shape(operation: &Operation) -> Shape {
    Shape {
        first_token: 0,
        total_tokens: operation.tokens,
        tokens: operation.tokens as u32,
        row_packs: (operation.row_bytes() / 16) as u32,
        call: CALL,
    }
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
    let tensors: Vec<Tensors> = (0..world.size).map(|rank| Tensors::new(case, rank)).collect();
    let delays: Vec<Duration> = (0..world.size).map(|_| Duration::from_micros(random.below(2000))).collect();
    world.run(|rank| {
        thread::sleep(delays[rank as usize]);
        run_rank(world, rank, case, &tensors[rank as usize], kernel, rows, geometry_of(rank));
    });
    for rank in 0..world.size {
        assert_eq!(world.failed(rank), 0, "rank {rank} failed ({:?})", case.operation);
    }
    tensors[0].check(case, Rounding::Once);
    let outputs = tensors[0].outputs();
    for other in &tensors[1..] {
        other.check(case, Rounding::Once);
        assert!(
            other.shared_outputs(case) == tensors[0].shared_outputs(case),
            "ranks differ ({:?})",
            case.operation
        );
    }
    outputs
}
