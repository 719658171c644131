//! A rank's memory for an operation, and the comparison with `core::specification`.

use std::ops::Range;

use fused_collective_core::{
    dtype::{DType, Element},
    fusion::{Experts, Norm, Operation, Residual, Rounding},
    kernels::Quantizer,
    norm::Weights,
    pack::Pack,
    plan::owned_index,
    quant::{ScaleStrides, ScaleTensor},
    specification::{Mismatch, Observed, Row, Token, TokenExperts},
};
use fused_collective_device::launch::{
    self, Activations, Address, AnyEpilogue, AnyQuantizer, BlockScales, Encoding, Extras, Fp4, Fp8Block,
    Fp8PerToken, Fp8Static, MxFp4, PostNorm, RmsNorm,
};

use super::{cases::Case, memory::Buffer};

/// One rank's memory for a case. Outputs start as what no operation writes there by chance.
pub struct Tensors {
    rank: u32,
    rounding: Rounding,
    /// The offset of `norm_out` in the input's memory, in bytes, if it is there, and `residual_out` in the residual's.
    in_place: Option<u64>,
    encoding: Encoding,
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
        let ranks = case.ranks_per_host();
        let held = operation.residual_rows(rank % ranks, ranks) * operation.row_bytes();
        let values = quantization.value_bytes_per_row(operation.hidden) * operation.tokens;
        let scales = quantization.scale_bytes(operation.tokens, operation.hidden).unwrap();
        Tensors {
            rank,
            rounding: operation.rounding,
            in_place: None,
            encoding: Encoding::of(operation.wire),
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
        let (operation, ranks) = (&case.operation, u64::from(case.ranks_per_host()));
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
        let held = |buffer: &Buffer| address_before(buffer, self.before.held);
        let input = match &self.experts {
            Some((_, buffers)) => buffers.addends.address(),
            None => address_before(&self.input, self.before.elements),
        };
        let residual = self.residual.as_ref().map_or(Address::NULL, held);
        let mut activations = Activations::new(input, residual, held(self.residual_out()), self.rounding);
        let flag = |is_there, flag| if is_there { flag } else { 0 };
        activations.flags |= flag(self.bias.is_some(), Activations::BIAS)
            | flag(self.post_norm.is_some(), Activations::POST_NORM)
            | flag(self.experts.is_some(), Activations::EXPERTS);
        activations
    }

    pub fn extras(&self) -> Extras {
        let post_norm = self.post_norm.as_ref().map_or(PostNorm::NONE, |(norm, gamma)| PostNorm {
            gamma: gamma.address(),
            inverse_hidden: 1.0 / self.hidden as f32,
            epsilon: norm.epsilon,
            weight_bias: norm.weight_bias,
            gamma_f32: norm.gamma.is_wider(self.dtype).into(),
        });
        let experts = self.experts.as_ref().map_or(launch::Experts::NONE, |(experts, buffers)| {
            let chosen = self.before.tokens * u64::from(experts.top_k);
            let shared = address_before(&self.input, self.before.elements);
            launch::Experts {
                rows: buffers.rows.address(),
                index: address_before(&buffers.index, chosen * 4),
                scales: address_before(&buffers.scales, chosen * experts.scales.dtype(self.dtype).bytes()),
                shared: if experts.shared { shared } else { Address::NULL },
                top_k: experts.top_k,
                scales_f32: experts.scales.is_wider(self.dtype).into(),
            }
        });
        let bias = self.bias.as_ref().map_or(Address::NULL, Buffer::address);
        Extras { bias, post_norm, experts, encoding: self.encoding }
    }

    /// The epilogue as kernels take it that have one for all.
    pub fn any_epilogue<E: Element>(&self, case: &Case<E>) -> AnyEpilogue {
        let Operation { norm, quantization, .. } = case.operation;
        let blocks = self.scale_tensor(case).map(|_| self.block_scales(case));
        let quantizer = AnyQuantizer {
            values: address_before(&self.values, self.before.values),
            scales: blocks
                .unwrap_or(BlockScales { address: Address::NULL, strides: ScaleStrides::default() }),
            scale: self.scale.address(),
            kind: Quantizer::from(quantization) as u32,
            block_packs_log2: quantization
                .block()
                .map_or(0, |block| (block * size_of::<E>() as u64 / Pack::BYTES).ilog2()),
        };
        if norm.is_some() {
            return AnyEpilogue { norm: self.norm(case, quantizer) };
        }
        let (gamma, norm_out) = (Address::NULL, Address::NULL);
        let norm = RmsNorm {
            gamma,
            norm_out,
            inverse_hidden: 0.0,
            epsilon: 0.0,
            weight_bias: 0.0,
            gamma_f32: 0,
            quantizer,
        };
        AnyEpilogue { norm }
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
            gamma_f32: norm.gamma.is_wider(E::DTYPE).into(),
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
        let MxFp4 { values, scales } = self.mxfp4(case);
        Fp4 { values, scales, global_scale: self.scale.address() }
    }

    pub fn mxfp4<E: Element>(&self, case: &Case<E>) -> MxFp4 {
        MxFp4 { values: address_before(&self.values, self.before.values), scales: self.block_scales(case) }
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
                if sharded { owned_index(index as u64, case.ranks_per_host()) as usize } else { index };
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
                hosts: case.hosts,
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
