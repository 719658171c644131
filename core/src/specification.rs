//! The operation, specified to the bit: what every backend gives, whatever the tokens beside a token, the mode, the layout
//! of the residual, the rounds, the blocks and threads that share a row.
//!
//! All arithmetic is in `f32`, each operation rounded to nearest even, subnormal numbers included:
//! 1. `sum = x_0 + x_1 + ...`, in rank order; plus the bias, if there is one; with [`Rounding::AfterAllReduce`] rounded to the
//!    element type. With [`Experts`] `x_r` is the addend that rank `r` makes of its experts' rows.
//!    In a group of several hosts, `sum = (host 0) + (host 1) + ...`, where each host's sum is that of its own ranks in rank
//!    order, with [`PartialSums::Element`] rounded to the element type.
//!    With a [`wire`](Operation::wire) format, `x_r` is what [`wire`] makes of rank `r`'s addend, and the sum
//!    starts from `+0`. In two-shot, unless the residual is sharded, the sum of all ranks goes through the format as well,
//!    before the bias is added.
//!    With a [`post_norm`](Operation::post_norm) this sum is rounded in any case, and replaced by its norm; with
//!    [`Rounding::AfterAllReduce`] the norm is rounded too.
//! 2. `residual_out = round(sum + residual)`; without a residual `round(sum)`.
//! 3. `norm` of the rounded `residual_out`, by the operations of [`norm`](crate::norm#order-of-operations), rounded.
//! 4. Codes and scales of the rounded `norm`, by [`quant::scale`].
//!
//! A NaN is a NaN: its sign and payload are not specified, in elements, in `f32` scales and in codes.
//!
//! [`Row::compute`] is the specification, and [`Row::compare`] holds an implementation to it. The
//! [reference](crate::reference) in `f64` says how far the specification is from exact arithmetic.
//!
//! ```
//! use fused_collective_core::{
//!     dtype::DType,
//!     fusion::{Mode, Norm, Operation, PartialSums, Residual, Rounding},
//!     norm::Weights,
//!     quant::Quantization,
//!     specification::{Observed, Output, Row, Token},
//! };
//!
//! let operation = Operation {
//!     dtype: DType::F32,
//!     tokens: 1,
//!     hidden: 16,
//!     residual: Residual::None,
//!     norm: Some(Norm { epsilon: 0.0, ..Norm::default() }),
//!     quantization: Quantization::None,
//!     keep_norm: false,
//!     rounding: Rounding::Once,
//!     bias: false,
//!     post_norm: None,
//!     experts: None,
//!     wire: None,
//!     partial_sums: PartialSums::F32,
//!     mode: Mode::OneShot,
//! };
//! let (rank_0, rank_1, ones) = ([1.0f32; 16], [3.0; 16], [1.0; 16]);
//! let token = Token {
//!     inputs: &[&rank_0, &rank_1],
//!     hosts: 1,
//!     residual: None,
//!     bias: None,
//!     post_gamma: None,
//!     experts: None,
//!     gamma: Weights::Element(&ones),
//!     scale: 1.0,
//!     index: 0,
//! };
//! let (mut sum, mut norm) = ([0.0; 16], [0.0; 16]);
//! let mut row = Row { residual_out: &mut sum, norm: &mut norm, values: &mut [], scales: &mut [] };
//! row.compute(&operation, &token)?;
//! assert_eq!(row.residual_out, [4.0; 16]);
//! assert_eq!(row.norm, ones);
//!
//! let wrong = [1.0, 1.0, 1.0, 1.000_000_1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
//! let observed = Observed { residual_out: &[4.0; 16], norm_out: &wrong, values: &[], scales: &[] };
//! let mismatch = row.compare(&operation, token.index, &observed).unwrap_err();
//! assert_eq!((mismatch.output, mismatch.index), (Output::Norm, 3));
//! # Ok::<(), fused_collective_core::quant::RowError>(())
//! ```

use core::fmt;

use crate::{
    dtype::Element,
    fusion::{Experts, Mode, Norm, Operation, PartialSums, Residual, Rounding},
    norm::{self, Weights},
    quant::{self, Quantization, RowError, ScaleLayout, e2m1, e4m3, ue4m3, ue8m0},
    wire::{self, WireFormat},
};

/// The inputs of one token of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Token<'a, E> {
    /// Row of the token in the input of each rank, in rank order, `[hidden]` each; not read with experts of which none is
    /// shared.
    pub inputs: &'a [&'a [E]],
    /// Hosts of the group, each with as many ranks, which follow each other in rank order; 1 for a group of one host.
    pub hosts: u32,
    /// The experts of the token on each rank, in rank order; not read without experts.
    pub experts: Option<&'a [TokenExperts<'a, E>]>,
    /// Row of the token in the residual, `[hidden]`; `None` without a residual.
    pub residual: Option<&'a [E]>,
    /// The bias of the sum, `[hidden]`; `None` without one.
    pub bias: Option<&'a [E]>,
    /// The weight of the norm of the sum, `[hidden]`; not read without one.
    pub post_gamma: Option<Weights<'a, E>>,
    /// The weight of RMSNorm, `[hidden]`; not read without a norm.
    pub gamma: Weights<'a, E>,
    /// The per-tensor or global scale; not read by the other quantizations.
    pub scale: f32,
    /// Index of the token, which is its row in the tensor of scales.
    pub index: u64,
}

/// The experts of one token on one rank.
#[derive(Clone, Copy, Debug)]
pub struct TokenExperts<'a, E> {
    /// The rank's rows, `[any, hidden]`.
    pub rows: &'a [E],
    /// The row of each of the token's experts, `[top_k]`; less than 0 for one that is on another rank.
    pub index: &'a [i32],
    /// The scale of each, `[top_k]`.
    pub scales: Weights<'a, E>,
}

impl<'a, E: Element> TokenExperts<'a, E> {
    /// The scale and the row, `[hidden]`, of each expert that this rank has, in the token's order.
    ///
    /// # Panics
    /// If an index is past the last row, or there are fewer scales than indices.
    pub fn chosen(&self, hidden: usize) -> impl Iterator<Item = (f32, &'a [E])> + Clone + use<'a, E> {
        let Self { rows, index, scales } = *self;
        let of_expert = move |(k, &row): (usize, &i32)| {
            let row = usize::try_from(row).ok()?;
            Some((scales.get(k), &rows[row * hidden..][..hidden]))
        };
        index.iter().enumerate().filter_map(of_expert)
    }

    /// The addend that this rank makes of its experts' rows and the row of the shared expert: the operations of
    /// [`Experts`].
    ///
    /// # Panics
    /// As [`chosen`](Self::chosen); if a row is shorter than `out`.
    pub fn addend(&self, shared: Option<&[E]>, out: &mut [E]) {
        let hidden = out.len();
        for (index, out) in out.iter_mut().enumerate() {
            *out = E::from_f32(self.element(hidden, shared, index));
        }
    }

    /// Element `index` of the addend, before it is rounded.
    fn element(&self, hidden: usize, shared: Option<&[E]>, index: usize) -> f32 {
        let routed =
            self.chosen(hidden).fold(0.0, |sum, (scale, row)| libm::fmaf(scale, row[index].to_f32(), sum));
        shared.map_or(routed, |shared| routed + shared[index].to_f32())
    }
}

/// The outputs of an implementation for one token.
#[derive(Clone, Copy, Debug)]
pub struct Observed<'a, E> {
    /// The sum, plus the residual, `[hidden]`.
    pub residual_out: &'a [E],
    /// The norm, `[hidden]`; empty if the operation does not write it.
    pub norm_out: &'a [E],
    /// The codes of the token; empty without quantization.
    pub values: &'a [u8],
    /// The scales of the whole tensor; empty if there are none.
    pub scales: &'a [u8],
}

/// An output of the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// The sum, plus the residual.
    Residual,
    /// The norm.
    Norm,
    /// A code of the quantized norm, decoded.
    Value,
    /// A scale of the quantized norm, decoded.
    Scale,
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Output::Residual => "residual_out",
            Output::Norm => "norm_out",
            Output::Value => "quant_out",
            Output::Scale => "scale_out",
        })
    }
}

/// A wrong value of an implementation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mismatch {
    /// The output that has the value.
    pub output: Output,
    /// Index of the token.
    pub token: u64,
    /// Index of the element in the token; for a scale, of the block.
    pub index: u64,
    /// The value that was written, decoded.
    pub got: f64,
    /// The least right value.
    pub low: f64,
    /// The greatest right value.
    pub high: f64,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { output, token, index, got, low, high } = self;
        write!(f, "{output}[{token}, {index}] is {got:e}, not {low:e}")?;
        if low.to_bits() == high.to_bits() { Ok(()) } else { write!(f, " to {high:e}") }
    }
}

impl core::error::Error for Mismatch {}

/// The outputs of one token, in memory of the caller's.
#[derive(Debug)]
pub struct Row<'a, E> {
    /// The sum, plus the residual, `[hidden]`.
    pub residual_out: &'a mut [E],
    /// The norm, `[hidden]`; not touched without one.
    pub norm: &'a mut [E],
    /// The codes: [`Quantization::value_bytes_per_row`].
    pub values: &'a mut [u8],
    /// The scales of the token alone, in the [linear](ScaleLayout::Linear) layout: [`Row::scale_bytes`].
    pub scales: &'a mut [u8],
}

impl<E: Element> Row<'_, E> {
    /// Bytes of the scales of one token of `operation`.
    pub fn scale_bytes(operation: &Operation) -> u64 {
        linear(operation.quantization).scale_bytes(1, operation.hidden).unwrap_or(0)
    }

    /// Computes the outputs of `token`.
    ///
    /// # Errors
    /// Those of [`quant::quantize_row`], for slices of a wrong length.
    ///
    /// # Panics
    /// If a row of `token` is shorter than `residual_out`, `norm` has another length, there is no rank, or a tensor of the
    /// operation is missing; as [`TokenExperts::chosen`]. With a [`wire`](Operation::wire) format, if the mode is
    /// [`Mode::Auto`], which leaves open whether the sum goes through it, and the residual is not sharded; if there are
    /// several hosts, which such rows do not cross. If the ranks are not as many on each host.
    pub fn compute(&mut self, operation: &Operation, token: &Token<'_, E>) -> Result<(), RowError> {
        let add_residual = |mut sum: f32, index: usize| {
            if let Some(residual) = token.residual {
                if operation.rounding == Rounding::AfterAllReduce {
                    sum = E::from_f32(sum).to_f32();
                }
                sum += residual[index].to_f32();
            }
            E::from_f32(sum)
        };
        let hidden = self.residual_out.len();
        for (block, out) in self.residual_out.chunks_mut(wire::BLOCK).enumerate() {
            let first = block * wire::BLOCK;
            let sums = token.sums(operation, hidden, first, out.len());
            for ((index, sum), out) in (first..).zip(sums).zip(out) {
                *out = match operation.post_norm {
                    Some(_) => E::from_f32(sum),
                    None => add_residual(sum, index),
                };
            }
        }
        if let Some(post) = operation.post_norm {
            let gamma = token.post_gamma.expect("a norm of the sum has a weight");
            let inverse_rms = inverse_rms(self.residual_out, &post);
            for (index, out) in self.residual_out.iter_mut().enumerate() {
                let norm = out.to_f32() * inverse_rms * (post.weight_bias + gamma.get(index));
                *out = add_residual(norm, index);
            }
        }
        let Some(parameters) = operation.norm else { return Ok(()) };
        let row = &*self.residual_out;
        assert_eq!(self.norm.len(), row.len(), "a norm has as many elements as its row");
        let inverse_rms = inverse_rms(row, &parameters);
        for (index, (out, value)) in self.norm.iter_mut().zip(row).enumerate() {
            let weight = parameters.weight_bias + token.gamma.get(index);
            *out = norm::normalize(value.to_f32(), inverse_rms, weight);
        }
        let quantization = linear(operation.quantization);
        quant::quantize_row(quantization, self.norm, 0, 1, token.scale, self.values, self.scales)
    }

    /// Compares an implementation's outputs for token `token` with these, which [`compute`](Self::compute) made. A slice of
    /// `observed` that is empty is not compared, and neither is padding.
    ///
    /// # Errors
    /// The first value that is another.
    ///
    /// # Panics
    /// If a slice of `observed` is neither empty nor an output of `operation`.
    pub fn compare(
        &self,
        operation: &Operation,
        token: u64,
        observed: &Observed<'_, E>,
    ) -> Result<(), Mismatch> {
        let mismatch = |output, index: usize, got: f64, right: f64| Mismatch {
            output,
            token,
            index: index as u64,
            got,
            low: right,
            high: right,
        };
        let elements = |output, got: &[E], right: &[E]| {
            assert!(got.is_empty() || got.len() == right.len(), "{output} has another length");
            // Slices that are equal but for their NaNs are rare: a comparison of bits vectorizes.
            let differs = got.iter().zip(right).position(|(got, right)| {
                got.to_bits() != right.to_bits() && !(got.to_f32().is_nan() && right.to_f32().is_nan())
            });
            match differs {
                Some(index) => {
                    Err(mismatch(output, index, got[index].to_f32().into(), right[index].to_f32().into()))
                }
                None => Ok(()),
            }
        };
        elements(Output::Residual, observed.residual_out, self.residual_out)?;
        if operation.norm.is_none() {
            return Ok(());
        }
        elements(Output::Norm, observed.norm_out, self.norm)?;
        self.compare_scales(operation, token, observed.scales)
            .map_err(|(index, got, right)| mismatch(Output::Scale, index, got.into(), right.into()))?;
        let lengths = [observed.values.len(), self.values.len()];
        assert!(lengths[0] == 0 || lengths[0] == lengths[1], "{} has another length", Output::Value);
        let is_e2m1 = operation.quantization.is_fp4();
        let differs = observed.values.iter().zip(&*self.values).position(|(&got, &right)| {
            got != right && (is_e2m1 || !(e4m3::decode(got).is_nan() && e4m3::decode(right).is_nan()))
        });
        let Some(byte) = differs else { return Ok(()) };
        let (got, right) = (observed.values[byte], self.values[byte]);
        if !is_e2m1 {
            return Err(mismatch(Output::Value, byte, e4m3::decode(got).into(), e4m3::decode(right).into()));
        }
        let [got, right] = [got, right].map(e2m1::unpack);
        let second = usize::from(got[0] == right[0]);
        let [got, right] = [got, right].map(|codes| e2m1::decode(codes[second]).into());
        Err(mismatch(Output::Value, byte * 2 + second, got, right))
    }

    /// Compares the scales of a token; else the index of the block, and both scales, decoded.
    fn compare_scales(
        &self,
        operation: &Operation,
        token: u64,
        scales: &[u8],
    ) -> Result<(), (usize, f32, f32)> {
        let Operation { quantization, tokens, hidden, .. } = *operation;
        let (Some(tensor), Some(right)) =
            (quantization.scales(tokens, hidden), linear(quantization).scales(1, hidden))
        else {
            return Ok(());
        };
        if scales.is_empty() {
            return Ok(());
        }
        let decode = |bits: u32| match quantization {
            Quantization::NvFp4 { .. } => ue4m3::decode(bits as u8),
            _ if tensor.size == 4 => f32::from_bits(bits),
            _ => ue8m0::decode(bits as u8),
        };
        for col in 0..tensor.cols {
            let bits = [tensor.get(scales, token, col), right.get(self.scales, 0, col)];
            assert!(!bits.contains(&None), "{} has another length", Output::Scale);
            let [got, right] = bits.map(|bits| bits.map_or(f32::NAN, decode));
            // Codes are compared by their bits: of two that are NaN, one may be no code of the format.
            if bits[0] != bits[1] && !(tensor.size == 4 && got.is_nan() && right.is_nan()) {
                return Err((col as usize, got, right));
            }
        }
        Ok(())
    }
}

impl<'a, E: Element> Token<'a, E> {
    /// The experts of each rank, if `operation` has some, and whether there is a shared one.
    pub(crate) fn experts_of(&self, operation: &Operation) -> Option<(&'a [TokenExperts<'a, E>], bool)> {
        let Experts { shared, .. } = operation.experts?;
        Some((self.experts.expect("an operation with experts has their rows"), shared))
    }

    /// Ranks of each host.
    ///
    /// # Panics
    /// If there are none, if they are not as many on each host, or if rows in a wire format would cross hosts.
    pub(crate) fn ranks_per_host(&self, operation: &Operation) -> usize {
        let ranks = self.experts_of(operation).map_or(self.inputs.len(), |(experts, _)| experts.len());
        let hosts = self.hosts as usize;
        assert!(ranks > 0, "a group has at least one rank");
        assert!(
            hosts > 0 && ranks.is_multiple_of(hosts),
            "{ranks} ranks are not as many on each of {hosts} hosts"
        );
        assert!(hosts == 1 || operation.wire.is_none(), "rows in a wire format do not cross hosts");
        ranks / hosts
    }

    /// The sum of all ranks and the bias, before it is rounded.
    ///
    /// # Panics
    /// As [`Row::compute`], of rows shorter than `sum`.
    pub fn sum(&self, operation: &Operation, sum: &mut [f32]) {
        let hidden = sum.len();
        for (block, sum) in sum.chunks_mut(wire::BLOCK).enumerate() {
            sum.copy_from_slice(&self.sums(operation, hidden, block * wire::BLOCK, sum.len())[..sum.len()]);
        }
    }

    /// `count` elements from `first` on, a block of the wire format, of the sum of `hidden` elements.
    fn sums(&self, operation: &Operation, hidden: usize, first: usize, count: usize) -> [f32; wire::BLOCK] {
        let experts = self.experts_of(operation);
        let addend = |rank: usize, index: usize| match experts {
            Some((experts, shared)) => {
                let shared = shared.then(|| self.inputs[rank]);
                E::from_f32(experts[rank].element(hidden, shared, index)).to_f32()
            }
            None => self.inputs[rank][index].to_f32(),
        };
        let per_host = self.ranks_per_host(operation);
        // Added to -0, the first addend is itself.
        let zero = if operation.wire.is_some() { 0.0 } else { -0.0 };
        let mut block = [zero; wire::BLOCK];
        for host in 0..self.hosts as usize {
            let mut partial = [zero; wire::BLOCK];
            let sums = &mut partial[..count];
            for rank in host * per_host..(host + 1) * per_host {
                let mut addends = [0.0; wire::BLOCK];
                let addends = &mut addends[..count];
                addends.iter_mut().zip(first..).for_each(|(x, index)| *x = addend(rank, index));
                match operation.wire {
                    Some(format) => add_sent(format, addends, sums),
                    None => sums.iter_mut().zip(addends).for_each(|(sum, x)| *sum += *x),
                }
            }
            if self.hosts == 1 {
                block = partial;
                break;
            }
            if operation.partial_sums == PartialSums::Element {
                sums.iter_mut().for_each(|sum| *sum = E::from_f32(*sum).to_f32());
            }
            block[..count].iter_mut().zip(sums).for_each(|(sum, x)| *sum += *x);
        }
        if let Some(format) = operation.wire.filter(|_| sends_sum(operation)) {
            let sent = block;
            block = [0.0; wire::BLOCK];
            add_sent(format, &sent[..count], &mut block[..count]);
        }
        if let Some(bias) = self.bias {
            block[..count].iter_mut().zip(&bias[first..]).for_each(|(sum, bias)| *sum += bias.to_f32());
        }
        block
    }
}

/// True if a second hop carries the sum.
fn sends_sum(operation: &Operation) -> bool {
    match operation.mode {
        _ if operation.residual == Residual::Sharded => false,
        Mode::OneShot => false,
        Mode::TwoShot => true,
        Mode::Auto => panic!("the bits of {:?} depend on the mode of its plan", operation.wire),
    }
}

/// Adds a block to `sum` as it is received.
fn add_sent(format: WireFormat, block: &[f32], sum: &mut [f32]) {
    /// Bytes of a block of the widest format.
    const MOST: usize = WireFormat::Int8.row_bytes(wire::BLOCK as u64) as usize;
    let row = &mut [0; MOST][..format.row_bytes(block.len() as u64) as usize];
    format.encode(block, row);
    format.add(row, sum);
}

fn inverse_rms<E: Element>(row: &[E], norm: &Norm) -> f32 {
    norm::inverse_rms(norm::sum_of_squares(row), 1.0 / row.len() as f32, norm.epsilon, libm::fmaf)
}

/// The quantization with its scales in the linear layout.
const fn linear(quantization: Quantization) -> Quantization {
    quantization.with_layout(ScaleLayout::Linear)
}
