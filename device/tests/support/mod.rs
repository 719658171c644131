//! Groups of ranks on the host: buffers with guards round them, operations with random tensors, and the judgement of
//! `core::reference`.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of this")]

use std::{
    array,
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::Duration,
};

use fused_collective_core::{
    dtype::Element,
    fusion::{Mode, Norm, Operation, Residual},
    lamport,
    norm::Gamma,
    pack::Pack,
    plan::{owned_index, owner},
    quant::{Quantization, ScaleLayout},
    reference::{self, Observed, Rounding, Token},
    workspace::{Layout, SLOTS_OFFSET},
};
use fused_collective_device::{
    baseline, collective,
    epilogue::{Epilogue, Gathered},
    params::{
        Activations, Address, Fp8Static, Fused, Group, Local, NvFp4, Plain, RankState, RmsNorm, Shape,
        Status, Unquantized,
    },
    simt::host::{Launch, launch},
};

pub mod sequence;

/// Packs before and after each buffer that nobody may touch.
const GUARD: usize = 4;
const GUARD_WORD: u32 = 0xdead_beef;

/// Memory that kernels reach by address, filled with one word, with guards on both sides.
pub struct Buffer {
    memory: *mut [Pack],
    bytes: usize,
}

// SAFETY: plain memory; kernels and tests take turns with it.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    pub fn new(bytes: usize, fill: u32) -> Buffer {
        let mut packs = vec![Pack([GUARD_WORD; 4]); bytes.div_ceil(16) + 2 * GUARD];
        let inside = GUARD..packs.len() - GUARD;
        packs[inside].fill(Pack([fill; 4]));
        Buffer { memory: Box::into_raw(packs.into_boxed_slice()), bytes }
    }

    pub fn of<T: Copy>(values: &[T]) -> Buffer {
        let buffer = Buffer::new(size_of_val(values), GUARD_WORD);
        let start = buffer.start().cast::<T>();
        for (index, value) in values.iter().enumerate() {
            // SAFETY: inside the buffer, and aligned, as the buffer starts at a multiple of 16.
            unsafe { start.add(index).write(*value) };
        }
        buffer
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: inside the allocation.
        unsafe { self.memory.cast::<Pack>().add(GUARD).cast() }
    }

    pub fn address(&self) -> Address {
        Address(self.start().expose_provenance() as u64)
    }

    /// The contents. No kernel may be running.
    pub fn get<T: Copy>(&self) -> Vec<T> {
        // SAFETY: inside the buffer; every bit pattern is a value of the types that tests read.
        (0..self.bytes / size_of::<T>())
            .map(|index| unsafe { self.start().cast::<T>().add(index).read() })
            .collect()
    }

    pub fn assert_guards(&self) {
        // SAFETY: the whole allocation, which nobody accesses now.
        let packs = unsafe { &*self.memory };
        let tail = self.bytes.div_ceil(16) + GUARD;
        let guards = packs[..GUARD].iter().chain(&packs[tail..]);
        assert!(guards.flat_map(|pack| pack.0).all(|word| word == GUARD_WORD), "a guard was overwritten");
    }

    /// A word that kernels access atomically.
    pub fn atomic(&self, offset: u64) -> &AtomicU32 {
        // SAFETY: inside the buffer and aligned.
        unsafe { &*self.start().add(offset as usize).cast() }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: made by `Box::into_raw`.
        drop(unsafe { Box::from_raw(self.memory) });
    }
}

/// xorshift64*.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 33) % end
    }

    /// From -4 to 4, now and then a zero of either sign.
    pub fn element<E: Element>(&mut self) -> E {
        match self.below(32) {
            0 => E::from_f32(-0.0),
            1 => E::from_f32(0.0),
            _ => E::from_f32(self.below(1 << 20) as f32 / (1 << 17) as f32 - 4.0),
        }
    }

    pub fn elements<E: Element>(&mut self, count: usize) -> Vec<E> {
        (0..count).map(|_| self.element()).collect()
    }
}

/// A group of ranks with their workspaces.
pub struct World {
    pub size: u32,
    layout: Layout,
    regions: Vec<Buffer>,
    pub states: Vec<Buffer>,
    pub statuses: Vec<Buffer>,
    pub timeout: Duration,
}

impl World {
    pub fn new(size: u32, slot_bytes: u64) -> World {
        let layout = Layout::new(size, slot_bytes).unwrap();
        let regions: Vec<Buffer> =
            (0..size).map(|_| Buffer::new(layout.region_bytes() as usize, lamport::SENTINEL)).collect();
        World {
            size,
            layout,
            regions,
            states: (0..size).map(|_| Buffer::new(size_of::<RankState>(), 0)).collect(),
            statuses: (0..size).map(|_| Buffer::new(size_of::<Status>(), 0)).collect(),
            timeout: Duration::from_secs(60),
        }
    }

    pub fn group(&self, rank: u32) -> Group {
        Group {
            regions: array::from_fn(|rank| self.regions.get(rank).map_or(Address::NULL, Buffer::address)),
            state: self.states[rank as usize].address(),
            status: self.statuses[rank as usize].address(),
            slot_bytes: self.layout.slot_bytes(),
            timeout_ns: self.timeout.as_nanos() as u64,
            world_size: self.size,
            rank,
        }
    }

    /// Runs `rank` for every rank at the same time.
    pub fn run(&self, rank: impl Fn(u32) + Sync) {
        thread::scope(|scope| {
            for index in 0..self.size {
                let rank = &rank;
                scope.spawn(move || rank(index));
            }
        });
    }

    /// Every word of every slot is the sentinel, and nothing was written outside.
    pub fn assert_clean(&self) {
        for region in &self.regions {
            region.assert_guards();
            let words = region.get::<u32>();
            let slots = &words[SLOTS_OFFSET as usize / 4..];
            assert!(slots.iter().all(|word| *word == lamport::SENTINEL), "a slot was not refilled");
        }
        for buffer in self.states.iter().chain(&self.statuses) {
            buffer.assert_guards();
        }
    }

    pub fn failed(&self, rank: u32) -> u32 {
        self.statuses[rank as usize].atomic(Status::FAILED).load(Ordering::Acquire)
    }
}

/// One operation of a group, with every rank's tensors.
pub struct Case<E: Element> {
    pub operation: Operation,
    pub inputs: Vec<Vec<E>>,
    pub residual: Option<Vec<E>>,
    pub gamma: Vec<E>,
    pub scale: f32,
}

impl<E: Element> Case<E> {
    pub fn new(
        random: &mut Random,
        world: u32,
        tokens: u64,
        hidden: u64,
        residual: bool,
        what: What,
    ) -> Self {
        let count = (tokens * hidden) as usize;
        let operation = Operation {
            dtype: E::DTYPE,
            tokens,
            hidden,
            residual: Residual::replicated(residual),
            norm: (what != What::Sum)
                .then(|| Norm { weight_bias: random.below(2) as f32, ..Norm::default() }),
            quantization: match what {
                What::Sum | What::Norm => Quantization::None,
                What::Fp8 => Quantization::Fp8Static,
                What::NvFp4(layout) => Quantization::NvFp4 { layout },
            },
            keep_norm: random.below(2) == 1,
            mode: Mode::Auto,
        };
        operation.validate().unwrap();
        Case {
            operation,
            inputs: (0..world).map(|_| random.elements(count)).collect(),
            residual: residual.then(|| random.elements(count)),
            gamma: random.elements(hidden as usize),
            scale: match what {
                What::NvFp4(_) => 300.0,
                _ => 0.037,
            },
        }
    }

    /// The same with a sharded residual; it must have one, and a norm.
    pub fn sharded(mut self) -> Self {
        self.operation.residual = Residual::Sharded;
        self.operation.keep_norm &= self.operation.quantization == Quantization::None;
        self.operation.validate().unwrap();
        self
    }

    /// Whether rank `rank` holds the residual of token `token`.
    fn holds(&self, rank: u32, token: u64) -> bool {
        self.operation.residual != Residual::Sharded || owner(token, self.inputs.len() as u32) == rank
    }

    /// The rows of an activation that rank `rank` holds as its residual.
    fn held<T: Copy>(&self, rank: u32, activation: &[T]) -> Vec<T> {
        let rows = (0..self.operation.tokens).zip(activation.chunks(self.operation.hidden as usize));
        rows.filter(|(token, _)| self.holds(rank, *token)).flat_map(|(_, row)| row.to_vec()).collect()
    }
}

/// What an operation fuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Sum,
    Norm,
    Fp8,
    NvFp4(ScaleLayout),
}

pub const EVERYTHING: [What; 5] = [
    What::Sum,
    What::Norm,
    What::Fp8,
    What::NvFp4(ScaleLayout::Linear),
    What::NvFp4(ScaleLayout::Swizzled128x4),
];

/// One rank's memory for a case. Outputs start as what no operation writes there by chance.
pub struct Tensors {
    rank: u32,
    pub input: Buffer,
    pub residual: Option<Buffer>,
    pub gamma: Buffer,
    pub scale: Buffer,
    pub residual_out: Buffer,
    pub norm_out: Buffer,
    pub values: Buffer,
    pub scales: Buffer,
}

const POISON: u32 = 0x7b7b_7b7b;

impl Tensors {
    pub fn new<E: Element>(case: &Case<E>, rank: u32) -> Tensors {
        let operation = &case.operation;
        let (bytes, quantization) = (operation.activation_bytes() as usize, operation.quantization);
        let held = operation.residual_rows(rank, case.inputs.len() as u32) * operation.row_bytes();
        let values = quantization.value_bytes_per_row(operation.hidden) * operation.tokens;
        let scales = quantization.scale_bytes(operation.tokens, operation.hidden).unwrap();
        Tensors {
            rank,
            input: Buffer::of(&case.inputs[rank as usize]),
            residual: case.residual.as_ref().map(|residual| Buffer::of(&case.held(rank, residual))),
            gamma: Buffer::of(&case.gamma),
            scale: Buffer::of(&[case.scale]),
            residual_out: Buffer::new(held as usize, POISON),
            norm_out: Buffer::new(if operation.writes_norm() { bytes } else { 0 }, POISON),
            values: Buffer::new(values as usize, POISON),
            scales: Buffer::new(scales as usize, POISON),
        }
    }

    pub fn activations(&self) -> Activations {
        Activations {
            input: self.input.address(),
            residual: self.residual.as_ref().map_or(Address::NULL, Buffer::address),
            residual_out: self.residual_out.address(),
        }
    }

    pub fn norm<E: Element, Q>(&self, case: &Case<E>, quantizer: Q) -> RmsNorm<Q> {
        let norm = case.operation.norm.unwrap();
        RmsNorm {
            gamma: self.gamma.address(),
            norm_out: if case.operation.writes_norm() { self.norm_out.address() } else { Address::NULL },
            inverse_hidden: 1.0 / case.operation.hidden as f32,
            epsilon: norm.epsilon,
            weight_bias: norm.weight_bias,
            reserved: 0,
            quantizer,
        }
    }

    pub fn fp8(&self) -> Fp8Static {
        Fp8Static { values: self.values.address(), scale: self.scale.address() }
    }

    pub fn nvfp4(&self, layout: ScaleLayout) -> NvFp4 {
        NvFp4 {
            values: self.values.address(),
            scales: self.scales.address(),
            global_scale: self.scale.address(),
            swizzled: u32::from(layout == ScaleLayout::Swizzled128x4),
            reserved: 0,
        }
    }

    /// All outputs, as bytes.
    pub fn outputs(&self) -> [Vec<u8>; 4] {
        [&self.residual_out, &self.norm_out, &self.values, &self.scales].map(Buffer::get)
    }

    /// What is the same on all ranks of the outputs.
    pub fn shared_outputs<E: Element>(&self, case: &Case<E>) -> [Vec<u8>; 4] {
        let mut outputs = self.outputs();
        if case.operation.residual == Residual::Sharded {
            outputs[0].clear();
        }
        outputs
    }

    /// Every token that this rank holds the residual of is what the reference allows, and nothing was written outside the
    /// tensors.
    pub fn check<E: Element>(&self, case: &Case<E>, rounding: Rounding) {
        let operation = &case.operation;
        let hidden = operation.hidden as usize;
        let (residual_out, norm_out) = (self.residual_out.get::<E>(), self.norm_out.get::<E>());
        let (values, scales) = (self.values.get::<u8>(), self.scales.get::<u8>());
        let row_values = operation.quantization.value_bytes_per_row(operation.hidden) as usize;
        for index in (0..operation.tokens as usize).filter(|&index| case.holds(self.rank, index as u64)) {
            let sharded = operation.residual == Residual::Sharded;
            let held =
                if sharded { owned_index(index as u64, case.inputs.len() as u32) as usize } else { index };
            let elements = index * hidden..(index + 1) * hidden;
            let inputs: Vec<&[E]> = case.inputs.iter().map(|input| &input[elements.clone()]).collect();
            let token = Token {
                inputs: &inputs,
                residual: case.residual.as_ref().map(|residual| &residual[elements.clone()]),
                gamma: Gamma::Element(&case.gamma),
                scale: case.scale,
                index: index as u64,
            };
            let observed = Observed {
                residual_out: &residual_out[held * hidden..(held + 1) * hidden],
                norm_out: norm_out.get(elements).unwrap_or_default(),
                values: &values[index * row_values..(index + 1) * row_values],
                scales: &scales,
            };
            if let Err(mismatch) = reference::check_token(operation, rounding, &token, &observed) {
                panic!("{mismatch} ({operation:?})");
            }
        }
        if let Some(layout) = operation.quantization.scale_layout() {
            let mut cleared = scales.clone();
            layout.zero_padding_rows(operation.tokens, operation.hidden / 16, &mut cleared);
            assert!(cleared == scales, "padding rows of the scales are not zero");
        }
        let buffers =
            [&self.input, &self.gamma, &self.residual_out, &self.norm_out, &self.values, &self.scales];
        for buffer in buffers.into_iter().chain(&self.residual) {
            buffer.assert_guards();
        }
    }
}

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
