//! Operations with random tensors, a rank's memory for one, and the comparison with `core::specification`.

use std::ops::Range;

use fused_collective_core::{
    dtype::{DType, Element},
    fusion::{Experts, Mode, Norm, Operation, Residual, Rounding, WeightType},
    kernels::Epilogue,
    norm::Weights,
    pack::Pack,
    plan::{owned_index, owner},
    quant::{GroupScale, Quantization, ScaleLayout, ScaleTensor},
    specification::{Mismatch, Observed, Row, Token, TokenExperts},
};
use fused_collective_device::launch::{
    self, Activations, Address, BlockScales, Fp4, Fp8Block, Fp8PerToken, Fp8Static, PostNorm, RmsNorm,
};

use super::{Rows, memory::Buffer};

/// xorshift64*.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        (self.bits() >> 33) % end
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

/// One rank's experts.
#[derive(Clone)]
struct RankExperts<E> {
    rows: Vec<E>,
    /// Of each expert of each token, some less than 0.
    index: Vec<i32>,
    scales: Vec<E>,
    /// The same, where the operation's scales are `f32`.
    scales_f32: Vec<f32>,
}

impl<E: Element> RankExperts<E> {
    fn new(random: &mut Random, tokens: u64, hidden: u64, top_k: u32) -> Self {
        let (rows, chosen) = (1 + random.below(5), (tokens * u64::from(top_k)) as usize);
        let mut index = || if random.below(3) == 0 { -1 } else { random.below(rows) as i32 };
        RankExperts {
            index: (0..chosen).map(|_| index()).collect(),
            rows: random.elements((rows * hidden) as usize),
            scales: random.elements(chosen),
            scales_f32: random.elements(chosen),
        }
    }

    /// Those of some tokens.
    fn of(&self, tokens: Range<u64>, top_k: u32) -> Self {
        let chosen = (tokens.start * u64::from(top_k)) as usize..(tokens.end * u64::from(top_k)) as usize;
        RankExperts {
            rows: self.rows.clone(),
            index: self.index[chosen.clone()].to_vec(),
            scales: self.scales[chosen.clone()].to_vec(),
            scales_f32: self.scales_f32[chosen].to_vec(),
        }
    }

    /// The scales of the operation's type.
    fn scales(&self, experts: Experts) -> Weights<'_, E> {
        match experts.scales {
            WeightType::Element => Weights::Element(&self.scales),
            WeightType::F32 => Weights::F32(&self.scales_f32),
        }
    }
}

/// One operation of a group, with every rank's tensors.
pub struct Case<E: Element> {
    pub operation: Operation,
    pub inputs: Vec<Vec<E>>,
    pub residual: Option<Vec<E>>,
    pub bias: Option<Vec<E>>,
    pub gamma: Vec<E>,
    /// The same, where the operation's gamma is `f32`: with bits that `E` has none for.
    pub gamma_f32: Vec<f32>,
    /// Both for the norm of the sum.
    post_gamma: (Vec<E>, Vec<f32>),
    /// Each rank's; none for an operation without.
    experts: Vec<RankExperts<E>>,
    pub scale: f32,
}

impl<E: Element> Case<E> {
    /// Of `hidden` elements a row, or what is next above it that has whole blocks.
    pub fn new(
        random: &mut Random,
        world: u32,
        tokens: u64,
        hidden: u64,
        residual: bool,
        what: What,
    ) -> Self {
        let hidden = what.hidden(hidden);
        let count = (tokens * hidden) as usize;
        let mut weight_type = || if random.below(3) == 0 { WeightType::F32 } else { WeightType::Element };
        let [gamma, post_gamma, scales] = [(); 3].map(|()| weight_type());
        let operation = Operation {
            dtype: E::DTYPE,
            tokens,
            hidden,
            residual: Residual::replicated(residual),
            norm: (what != What::Sum).then(|| Norm {
                weight_bias: random.below(2) as f32,
                gamma,
                ..Norm::default()
            }),
            quantization: what.quantization(),
            keep_norm: random.below(2) == 1,
            rounding: if random.below(4) == 0 { Rounding::AfterAllReduce } else { Rounding::Once },
            bias: world > 1 && random.below(3) == 0,
            post_norm: (what != What::Sum && world > 1 && random.below(3) == 0).then(|| Norm {
                epsilon: 1e-3,
                weight_bias: random.below(2) as f32,
                gamma: post_gamma,
            }),
            experts: (world > 1 && random.below(3) == 0).then(|| Experts {
                top_k: 1 + random.below(9) as u32,
                scales,
                shared: random.below(2) == 1,
            }),
            wire: None,
            mode: Mode::Auto,
        };
        operation.validate().unwrap();
        Case {
            operation,
            inputs: (0..world).map(|_| random.elements(count)).collect(),
            residual: residual.then(|| random.elements(count)),
            bias: operation.bias.then(|| random.elements(hidden as usize)),
            gamma: random.elements(hidden as usize),
            gamma_f32: random.elements(hidden as usize),
            post_gamma: (random.elements(hidden as usize), random.elements(hidden as usize)),
            experts: operation.experts.map_or_else(Vec::new, |experts| {
                (0..world).map(|_| RankExperts::new(random, tokens, hidden, experts.top_k)).collect()
            }),
            scale: match what {
                What::NvFp4(_) => 300.0,
                _ => 0.037,
            },
        }
    }

    /// Some of the tokens as a case of their own. With a sharded residual the first is a multiple of the number of ranks.
    pub fn rows(&self, tokens: Range<u64>) -> Self {
        let hidden = self.operation.hidden;
        let elements = (tokens.start * hidden) as usize..(tokens.end * hidden) as usize;
        let top_k = self.operation.experts.map_or(0, |experts| experts.top_k);
        Case {
            operation: Operation { tokens: tokens.end - tokens.start, ..self.operation },
            inputs: self.inputs.iter().map(|input| input[elements.clone()].to_vec()).collect(),
            residual: self.residual.as_ref().map(|residual| residual[elements].to_vec()),
            bias: self.bias.clone(),
            gamma: self.gamma.clone(),
            gamma_f32: self.gamma_f32.clone(),
            post_gamma: self.post_gamma.clone(),
            experts: self.experts.iter().map(|experts| experts.of(tokens.clone(), top_k)).collect(),
            scale: self.scale,
        }
    }

    /// The same with nothing but the inputs in its sum: no bias, no norm of it, no experts.
    pub fn plain(mut self) -> Self {
        (self.operation.bias, self.bias) = (false, None);
        (self.operation.experts, self.experts) = (None, Vec::new());
        self.operation.post_norm = None;
        self
    }

    /// Its all-reduce alone.
    pub fn reduced(&self) -> Self {
        let operation = Operation {
            residual: Residual::None,
            norm: None,
            quantization: Quantization::None,
            keep_norm: false,
            post_norm: None,
            ..self.operation
        };
        Case { operation, residual: None, ..self.rows(0..operation.tokens) }
    }

    /// The same for kernels that keep rows so: those that stream them have no norm of the sum.
    pub fn of_rows(mut self, rows: Rows) -> Self {
        self.operation.post_norm = self.operation.post_norm.filter(|_| rows != Rows::Streamed);
        self
    }

    /// The same with a sharded residual; it must have one, and a norm.
    pub fn sharded(mut self) -> Self {
        self.operation.residual = Residual::Sharded;
        self.operation.keep_norm &= self.operation.quantization == Quantization::None;
        self.operation.validate().unwrap();
        self
    }

    /// Gamma of the operation's type.
    pub fn norm_gamma(&self) -> Weights<'_, E> {
        match self.operation.norm.map(|norm| norm.gamma) {
            Some(WeightType::F32) => Weights::F32(&self.gamma_f32),
            _ => Weights::Element(&self.gamma),
        }
    }

    /// The weight of the norm of the sum.
    fn norm_post_gamma(&self) -> Option<Weights<'_, E>> {
        let (element, wide) = &self.post_gamma;
        self.operation.post_norm.map(|norm| match norm.gamma {
            WeightType::Element => Weights::Element(element),
            WeightType::F32 => Weights::F32(wide),
        })
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
    MxFp4(ScaleLayout),
    MxFp8(ScaleLayout),
    Fp8PerToken,
    Fp8PerGroup(u32, GroupScale, ScaleLayout),
}

pub const EVERYTHING: [What; 15] = [
    What::Sum,
    What::Norm,
    What::Fp8,
    What::NvFp4(ScaleLayout::Linear),
    What::NvFp4(ScaleLayout::Swizzled128x4),
    What::NvFp4(ScaleLayout::Swizzled8x4),
    What::MxFp4(ScaleLayout::Linear),
    What::MxFp4(ScaleLayout::Swizzled128x4),
    What::MxFp8(ScaleLayout::Swizzled128x4),
    What::MxFp8(ScaleLayout::ColumnMajor),
    What::Fp8PerToken,
    What::Fp8PerGroup(128, GroupScale::Ue8m0, ScaleLayout::DeepGemm),
    What::Fp8PerGroup(128, GroupScale::F32, ScaleLayout::DeepGemm),
    What::Fp8PerGroup(64, GroupScale::F32, ScaleLayout::ColumnMajor),
    What::Fp8PerGroup(64, GroupScale::Ue8m0, ScaleLayout::Swizzled8x4),
];

impl What {
    /// One of [`EVERYTHING`] for each epilogue that there are kernels with.
    pub fn of_each_epilogue(random: &mut Random) -> Vec<What> {
        let epilogue = |what: What| Epilogue::of(what != What::Sum, what.quantization());
        let mut chosen: Vec<What> = Vec::new();
        for (index, &what) in EVERYTHING.iter().enumerate() {
            if EVERYTHING[..index].iter().all(|&other| epilogue(other) != epilogue(what)) {
                let alike: Vec<What> =
                    EVERYTHING.into_iter().filter(|&other| epilogue(other) == epilogue(what)).collect();
                chosen.push(alike[random.below(alike.len() as u64) as usize]);
            }
        }
        chosen
    }

    pub fn quantization(self) -> Quantization {
        match self {
            What::Sum | What::Norm => Quantization::None,
            What::Fp8 => Quantization::Fp8Static,
            What::NvFp4(layout) => Quantization::NvFp4 { layout },
            What::MxFp4(layout) => Quantization::MxFp4 { layout },
            What::MxFp8(layout) => Quantization::MxFp8 { layout },
            What::Fp8PerToken => Quantization::Fp8PerToken,
            What::Fp8PerGroup(group, scales, layout) => Quantization::Fp8PerGroup { group, scales, layout },
        }
    }

    /// `hidden`, or what is next above it that has whole blocks.
    fn hidden(self, hidden: u64) -> u64 {
        hidden.next_multiple_of(self.quantization().block().unwrap_or(1))
    }
}

/// One rank's memory for a case. Outputs start as what no operation writes there by chance.
pub struct Tensors {
    rank: u32,
    rounding: Rounding,
    /// The offset of `norm_out` in the input's memory, in bytes, if it is there, and `residual_out` in the residual's.
    in_place: Option<u64>,
    before: Before,
    pub input: Buffer,
    pub residual: Option<Buffer>,
    bias: Option<Buffer>,
    post_norm: Option<(Norm, Buffer)>,
    experts: Option<(Experts, ExpertBuffers)>,
    hidden: u64,
    dtype: DType,
    pub gamma: Buffer,
    pub scale: Buffer,
    residual_out: Buffer,
    norm_out: Buffer,
    pub values: Buffer,
    pub scales: Buffer,
}

/// The memory of a rank's experts, and of the addends that are made of them.
struct ExpertBuffers {
    rows: Buffer,
    index: Buffer,
    scales: Buffer,
    addends: Buffer,
}

/// A buffer of weights.
fn buffer_of<E: Element>(weights: Weights<'_, E>) -> Buffer {
    match weights {
        Weights::Element(weights) => Buffer::of(weights),
        Weights::F32(weights) => Buffer::of(weights),
    }
}

/// Bytes of each tensor before the rows that are there.
#[derive(Default)]
struct Before {
    tokens: u64,
    /// In the residual and what becomes of it.
    held: u64,
    elements: u64,
    values: u64,
    scales: u64,
}

/// The address that comes `bytes` before a buffer.
fn address_before(buffer: &Buffer, bytes: u64) -> Address {
    Address(buffer.address().0.wrapping_sub(bytes))
}

/// What outputs start as.
pub const POISON: u32 = 0x7b7b_7b7b;

impl Tensors {
    pub fn new<E: Element>(case: &Case<E>, rank: u32) -> Tensors {
        let operation = &case.operation;
        let (bytes, quantization) = (operation.activation_bytes() as usize, operation.quantization);
        let held = operation.residual_rows(rank, case.inputs.len() as u32) * operation.row_bytes();
        let values = quantization.value_bytes_per_row(operation.hidden) * operation.tokens;
        let scales = quantization.scale_bytes(operation.tokens, operation.hidden).unwrap();
        Tensors {
            rank,
            rounding: operation.rounding,
            in_place: None,
            before: Before::default(),
            input: Buffer::of(&case.inputs[rank as usize]),
            residual: case.residual.as_ref().map(|residual| Buffer::of(&case.held(rank, residual))),
            bias: case.bias.as_ref().map(|bias| Buffer::of(bias)),
            post_norm: operation.post_norm.zip(case.norm_post_gamma().map(buffer_of)),
            experts: operation.experts.zip(case.experts.get(rank as usize)).map(|(experts, of_rank)| {
                let buffers = ExpertBuffers {
                    rows: Buffer::of(&of_rank.rows),
                    index: Buffer::of(&of_rank.index),
                    scales: buffer_of(of_rank.scales(experts)),
                    // A round's at most.
                    addends: Buffer::new(bytes, POISON),
                };
                (experts, buffers)
            }),
            hidden: operation.hidden,
            dtype: operation.dtype,
            gamma: buffer_of(case.norm_gamma()),
            scale: Buffer::of(&[case.scale]),
            residual_out: Buffer::new(held as usize, POISON),
            norm_out: Buffer::new(if operation.writes_norm() { bytes } else { 0 }, POISON),
            values: Buffer::new(values as usize, POISON),
            scales: Buffer::new(scales as usize, POISON),
        }
    }

    /// The same as the last rows of tensors in which `tokens` tokens come before, a multiple of the number of ranks and
    /// of 128, in memory that is not there and must not be touched.
    pub fn preceded_by<E: Element>(self, case: &Case<E>, tokens: u64) -> Tensors {
        let (operation, ranks) = (&case.operation, case.inputs.len() as u64);
        assert!(tokens.is_multiple_of(128) && tokens.is_multiple_of(ranks));
        let quantization = operation.quantization;
        let elements = tokens * operation.row_bytes();
        let before = Before {
            tokens,
            held: if operation.residual == Residual::Sharded { elements / ranks } else { elements },
            elements,
            values: tokens * quantization.value_bytes_per_row(operation.hidden),
            scales: self.scale_tensor(case).map_or(0, |tensor| tensor.offset(tokens, 0)),
        };
        Tensors { before, ..self }
    }

    /// The same with `norm_out` in the input's memory and `residual_out` in the residual's.
    pub fn in_place(self) -> Tensors {
        Tensors { in_place: Some(0), ..self }
    }

    /// As [`in_place`](Self::in_place), but each row of `norm_out` is where the next token's input is.
    pub fn one_row_late<E: Element>(self, case: &Case<E>) -> Tensors {
        let row = vec![E::default(); case.operation.hidden as usize];
        let input = Buffer::of(&[&self.input.get::<E>()[..], &row].concat());
        Tensors { in_place: Some(case.operation.row_bytes()), input, ..self }
    }

    /// The memory of `residual_out`.
    pub fn residual_out(&self) -> &Buffer {
        self.residual.as_ref().filter(|_| self.in_place.is_some()).unwrap_or(&self.residual_out)
    }

    /// The memory of `norm_out`; empty if it is not written.
    pub fn norm_out(&self) -> &Buffer {
        if self.in_place.is_some() && self.norm_out.bytes > 0 { &self.input } else { &self.norm_out }
    }

    /// The addresses of all tensors.
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let inputs =
            [&self.input, &self.gamma, &self.scale].into_iter().chain(&self.residual).chain(&self.bias);
        let inputs = inputs.chain(self.post_norm.iter().map(|(_, gamma)| gamma)).chain(self.of_experts());
        let outputs = [&self.residual_out, &self.norm_out, &self.values, &self.scales];
        inputs.chain(outputs).map(Buffer::range).collect()
    }

    /// The memory of the experts.
    fn of_experts(&self) -> impl Iterator<Item = &Buffer> {
        self.experts.iter().flat_map(|(_, it)| [&it.rows, &it.index, &it.scales, &it.addends])
    }

    pub fn activations(&self) -> Activations {
        let is_wide = |weights| u32::from(weights == WeightType::F32 && self.dtype != DType::F32);
        let post_norm = self.post_norm.as_ref().map_or(PostNorm::NONE, |(norm, gamma)| PostNorm {
            gamma: gamma.address(),
            inverse_hidden: 1.0 / self.hidden as f32,
            epsilon: norm.epsilon,
            weight_bias: norm.weight_bias,
            gamma_f32: is_wide(norm.gamma),
        });
        let mut activations = Activations { post_norm, ..self.given_activations() };
        if let Some((experts, buffers)) = &self.experts {
            let chosen = self.before.tokens * u64::from(experts.top_k);
            activations.experts = launch::Experts {
                rows: buffers.rows.address(),
                index: address_before(&buffers.index, chosen * 4),
                scales: address_before(&buffers.scales, chosen * experts.scales.dtype(self.dtype).bytes()),
                shared: if experts.shared { activations.input } else { Address::NULL },
                top_k: experts.top_k,
                scales_f32: is_wide(experts.scales),
            };
            activations.input = buffers.addends.address();
        }
        activations
    }

    /// Without a norm of the sum and experts.
    fn given_activations(&self) -> Activations {
        let held = |buffer: &Buffer| address_before(buffer, self.before.held);
        let input = address_before(&self.input, self.before.elements);
        let residual = self.residual.as_ref().map_or(Address::NULL, held);
        let bias = self.bias.as_ref().map_or(Address::NULL, Buffer::address);
        Activations { bias, ..Activations::new(input, residual, held(self.residual_out()), self.rounding) }
    }

    pub fn norm<E: Element, Q>(&self, case: &Case<E>, quantizer: Q) -> RmsNorm<Q> {
        let norm = case.operation.norm.unwrap();
        RmsNorm {
            gamma: self.gamma.address(),
            norm_out: if case.operation.writes_norm() {
                address_before(self.norm_out(), self.before.elements).offset(self.in_place.unwrap_or(0))
            } else {
                Address::NULL
            },
            inverse_hidden: 1.0 / case.operation.hidden as f32,
            epsilon: norm.epsilon,
            weight_bias: norm.weight_bias,
            gamma_f32: u32::from(norm.gamma == WeightType::F32 && E::DTYPE != DType::F32),
            quantizer,
        }
    }

    pub fn fp8(&self) -> Fp8Static {
        Fp8Static { values: address_before(&self.values, self.before.values), scale: self.scale.address() }
    }

    pub fn fp8_per_token(&self) -> Fp8PerToken {
        Fp8PerToken {
            values: address_before(&self.values, self.before.values),
            scales: address_before(&self.scales, self.before.scales),
        }
    }

    /// The scales, of as many rows as the kernels are told of.
    fn scale_tensor<E: Element>(&self, case: &Case<E>) -> Option<ScaleTensor> {
        let Operation { quantization, tokens, hidden, .. } = case.operation;
        quantization.scales(tokens + self.before.tokens, hidden)
    }

    fn block_scales<E: Element>(&self, case: &Case<E>) -> BlockScales {
        let tensor = self.scale_tensor(case).unwrap();
        BlockScales { address: address_before(&self.scales, self.before.scales), strides: tensor.strides() }
    }

    pub fn fp8_block<E: Element>(&self, case: &Case<E>) -> Fp8Block {
        let block_bytes = case.operation.quantization.block().unwrap() * size_of::<E>() as u64;
        Fp8Block {
            values: address_before(&self.values, self.before.values),
            scales: self.block_scales(case),
            block_packs_log2: (block_bytes / Pack::BYTES).ilog2(),
            reserved: 0,
        }
    }

    pub fn fp4<E: Element>(&self, case: &Case<E>) -> Fp4 {
        let is_mx = matches!(case.operation.quantization, Quantization::MxFp4 { .. });
        Fp4 {
            values: address_before(&self.values, self.before.values),
            scales: self.block_scales(case),
            global_scale: if is_mx { Address::NULL } else { self.scale.address() },
        }
    }

    /// All outputs, as bytes.
    pub fn outputs(&self) -> [Vec<u8>; 4] {
        [self.residual_out(), self.norm_out(), &self.values, &self.scales].map(Buffer::get)
    }

    /// What is the same on all ranks of the outputs.
    pub fn shared_outputs<E: Element>(&self, case: &Case<E>) -> [Vec<u8>; 4] {
        let mut outputs = self.outputs();
        if case.operation.residual == Residual::Sharded {
            outputs[0].clear();
        }
        outputs
    }

    /// Every token that this rank holds the residual of is what `core` specifies, and nothing was written outside the
    /// tensors.
    pub fn check<E: Element>(&self, case: &Case<E>) {
        let operation = &case.operation;
        let zeros = vec![E::default(); operation.hidden as usize];
        let row_values = operation.quantization.value_bytes_per_row(operation.hidden) as usize;
        let scale_bytes = Row::<E>::scale_bytes(operation) as usize;
        self.check_by(case, |token, observed| {
            let mut row = Row {
                residual_out: &mut zeros.clone(),
                norm: &mut zeros.clone(),
                values: &mut vec![0; row_values],
                scales: &mut vec![0; scale_bytes],
            };
            row.compute(operation, token).unwrap();
            row.compare(operation, token.index, observed)
        });
    }

    /// As [`check`](Self::check), with each token's outputs judged by `check`.
    pub fn check_by<E: Element>(
        &self,
        case: &Case<E>,
        check: impl Fn(&Token<'_, E>, &Observed<'_, E>) -> Result<(), Mismatch>,
    ) {
        let operation = &case.operation;
        let hidden = operation.hidden as usize;
        let (residual_out, norm_out) = (self.residual_out().get::<E>(), self.norm_out().get::<E>());
        let norm_out =
            norm_out.get(self.in_place.unwrap_or(0) as usize / size_of::<E>()..).unwrap_or_default();
        let (values, scales) = (self.values.get::<u8>(), self.scales.get::<u8>());
        let row_values = operation.quantization.value_bytes_per_row(operation.hidden) as usize;
        for index in (0..operation.tokens as usize).filter(|&index| case.holds(self.rank, index as u64)) {
            let sharded = operation.residual == Residual::Sharded;
            let held =
                if sharded { owned_index(index as u64, case.inputs.len() as u32) as usize } else { index };
            let elements = index * hidden..(index + 1) * hidden;
            let inputs: Vec<&[E]> = case.inputs.iter().map(|input| &input[elements.clone()]).collect();
            let experts: Option<Vec<TokenExperts<'_, E>>> = operation.experts.map(|experts| {
                let top_k = experts.top_k as usize;
                let chosen = index * top_k..(index + 1) * top_k;
                let ranks = case.experts.iter();
                let of_ranks = ranks.map(|rank| TokenExperts {
                    rows: &rank.rows,
                    index: &rank.index[chosen.clone()],
                    scales: rank.scales(experts).range(chosen.clone()),
                });
                of_ranks.collect()
            });
            let token = Token {
                inputs: &inputs,
                residual: case.residual.as_ref().map(|residual| &residual[elements.clone()]),
                bias: case.bias.as_deref(),
                post_gamma: case.norm_post_gamma(),
                experts: experts.as_deref(),
                gamma: case.norm_gamma(),
                scale: case.scale,
                index: index as u64,
            };
            let observed = Observed {
                residual_out: &residual_out[held * hidden..(held + 1) * hidden],
                norm_out: norm_out.get(elements).unwrap_or_default(),
                values: &values[index * row_values..(index + 1) * row_values],
                scales: &scales,
            };
            if let Err(mismatch) = check(&token, &observed) {
                panic!("{mismatch} ({operation:?})");
            }
        }
        if let Some(tensor) = operation.quantization.scales(operation.tokens, operation.hidden) {
            let mut cleared = scales.clone();
            tensor.zero_padding_rows(&mut cleared);
            assert!(cleared == scales, "padding rows of the scales are not zero");
        }
        let buffers =
            [&self.input, &self.gamma, &self.residual_out, &self.norm_out, &self.values, &self.scales];
        for buffer in buffers.into_iter().chain(&self.residual).chain(self.of_experts()) {
            buffer.assert_guards();
        }
    }
}
