//! Arithmetic on rows, vectorized for the processor it runs on.
//!
//! The sum and the norm are written in vectors (`lanes`); the quantizers' loops are `fused_collective_core`'s and
//! portable. [`pulp`] compiles each pass once more for AVX2 and AVX-512 and picks at run time. For that, a pass is a
//! struct with an always-inlined `with_simd`: a closure would be compiled once, for the oldest processor. Every processor
//! gives the bits of [`norm`]; those without a fused multiply-add compute it in software.

use fused_collective_core::{
    MAX_HIDDEN,
    fusion::{Norm, Rounding},
    norm::{self, Gamma},
    pack::Pack,
    quant::{self, Quantization},
};
use pulp::{Simd, WithSimd};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::{
    exchange::{Exchange, Incoming, Medium},
    lanes::{self, Lanes, WideLine, vectors},
    line::{self, Line},
};
use crate::group::failure::Failure;

/// An element that is also plain bytes.
pub trait Plain: Lanes {}
impl<E: Lanes> Plain for E {}

/// The elements that `bytes` hold.
///
/// # Panics
/// If they are not whole elements at an element's alignment.
#[inline(always)]
pub fn elements<E: Plain>(bytes: &[u8]) -> &[E] {
    <[E]>::ref_from_bytes(bytes).unwrap_or_else(|error| panic!("{error}"))
}

/// As [`elements`], to be written.
///
/// # Panics
/// As [`elements`].
#[inline(always)]
pub fn elements_mut<E: Plain>(bytes: &mut [u8]) -> &mut [E] {
    <[E]>::mut_from_bytes(bytes).unwrap_or_else(|error| panic!("{error}"))
}

/// The lines of a row and what is left. Rows need not be aligned to anything but their elements.
#[inline(always)]
fn lines<E: Plain>(row: &[E]) -> (&[Line], &[u8]) {
    row.as_bytes().as_chunks()
}

#[inline(always)]
fn lines_mut<E: Plain>(row: &mut [E]) -> (&mut [Line], &mut [u8]) {
    row.as_mut_bytes().as_chunks_mut()
}

/// The rest of a row, and zeros.
#[inline(always)]
fn padded(rest: &[u8]) -> Line {
    let mut line = [0; line::BYTES];
    line[..rest.len()].copy_from_slice(rest);
    line
}

/// Bytes of a [line](norm::LINE_PACKS) of the sum over a row.
const SUM_BYTES: usize = norm::LINE_PACKS * Pack::BYTES as usize;
/// Lines of the longest row.
const SUM_LINES: usize = MAX_HIDDEN as usize * 4 / SUM_BYTES;

/// [`norm::sum_of_squares`].
#[inline(always)]
fn sum_of_squares<E: Plain, S: Simd>(simd: S, row: &[E]) -> f32 {
    let mut sums = [0.0; SUM_LINES];
    let mut rows = row.as_bytes().chunks(SUM_BYTES);
    let lines = rows.len();
    for (sum, bytes) in sums.iter_mut().zip(&mut rows) {
        *sum = match bytes.try_into() {
            Ok(bytes) => line_squares::<E, S>(simd, bytes),
            Err(_) => {
                let mut line = [0; SUM_BYTES];
                line[..bytes.len()].copy_from_slice(bytes);
                line_squares::<E, S>(simd, &line)
            }
        };
    }
    // As `norm::sum_by_halves`, of no more than there are.
    let mut width = lines.next_power_of_two() / 2;
    while width > 0 {
        let (low, high) = sums.split_at_mut(width);
        low.iter_mut().zip(high).for_each(|(low, high)| *low += *high);
        width /= 2;
    }
    sums[0]
}

/// The sum of the squares of the 32 packs of a line.
#[inline(always)]
fn line_squares<E: Plain, S: Simd>(simd: S, bytes: &[u8; SUM_BYTES]) -> f32 {
    /// Words of a line.
    const WORDS: usize = SUM_BYTES / 4;
    let mut pairs = [0.0f32; WORDS];
    let lanes = S::F32_LANES;
    for (line, pairs) in
        bytes.as_chunks::<{ line::BYTES }>().0.iter().zip(pairs.chunks_exact_mut(line::BYTES / 4))
    {
        let wide = lanes::widen::<E, S>(simd, line);
        for ([even, odd], pairs) in wide.iter().zip(pairs.chunks_exact_mut(lanes)) {
            // Elements of 32 bits are a word each: their pairs are neighbours.
            let pair = match E::PER_WORD {
                2 => simd.mul_add_f32s(*odd, *odd, simd.mul_f32s(*even, *even)),
                _ => *even,
            };
            pairs.copy_from_slice(bytemuck::cast_slice(&[pair]));
        }
    }
    let mut packs = [0.0f32; norm::LINE_PACKS];
    for (pack, words) in packs.iter_mut().zip(pairs.as_chunks::<4>().0) {
        *pack = match E::PER_WORD {
            2 => (words[0] + words[2]) + (words[1] + words[3]),
            _ => {
                words[1].mul_add(words[1], words[0] * words[0])
                    + words[3].mul_add(words[3], words[2] * words[2])
            }
        };
    }
    norm::sum_by_halves(packs)
}

/// As [`norm::normalize_row`].
#[inline(always)]
fn normalize_row<E: Plain, S: Simd>(
    simd: S,
    row: &[E],
    gamma: &[E],
    inverse_rms: f32,
    bias: f32,
    out: &mut [E],
) {
    let (inverse_rms, bias) = (simd.splat_f32s(inverse_rms), simd.splat_f32s(bias));
    let ((row, row_rest), (gamma, gamma_rest), (out, out_rest)) = (lines(row), lines(gamma), lines_mut(out));
    for ((out, row), gamma) in out.iter_mut().zip(row).zip(gamma) {
        normalize_line::<E, S>(simd, row, gamma, inverse_rms, bias, out);
    }
    if !out_rest.is_empty() {
        let mut norm = padded(&[]);
        let (row, gamma) = (padded(row_rest), padded(gamma_rest));
        normalize_line::<E, S>(simd, &row, &gamma, inverse_rms, bias, &mut norm);
        out_rest.copy_from_slice(&norm[..out_rest.len()]);
    }
}

#[inline(always)]
fn normalize_line<E: Plain, S: Simd>(
    simd: S,
    row: &Line,
    gamma: &Line,
    inverse_rms: S::f32s,
    bias: S::f32s,
    out: &mut Line,
) {
    let (mut values, gamma) = (lanes::widen::<E, S>(simd, row), lanes::widen::<E, S>(simd, gamma));
    for (values, gamma) in values.iter_mut().zip(gamma).take(vectors::<S>()) {
        for (value, gamma) in values[..E::PER_WORD].iter_mut().zip(gamma) {
            *value = simd.mul_f32s(simd.mul_f32s(*value, inverse_rms), simd.add_f32s(bias, gamma));
        }
    }
    lanes::round::<E, S>(simd, &values, out);
}

/// `sum += addend`.
#[inline(always)]
fn add<E: Plain, S: Simd>(simd: S, sum: &mut WideLine<S>, addend: &WideLine<S>) {
    for (sum, addend) in sum.iter_mut().zip(addend).take(vectors::<S>()) {
        for (sum, addend) in sum[..E::PER_WORD].iter_mut().zip(addend) {
            *sum = simd.add_f32s(*sum, *addend);
        }
    }
}

/// `out = round(row + addend)`. All have the same length.
pub struct AddRow<'a, E> {
    /// `[hidden]`.
    pub row: &'a [E],
    /// `[hidden]`.
    pub addend: &'a [E],
    /// `[hidden]`: the sum.
    pub out: &'a mut [E],
}

impl<E: Plain> WithSimd for AddRow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let ((row, row_rest), (addend, addend_rest)) = (lines(self.row), lines(self.addend));
        let (out, out_rest) = lines_mut(self.out);
        for ((out, row), addend) in out.iter_mut().zip(row).zip(addend) {
            let mut sum = lanes::widen::<E, S>(simd, row);
            add::<E, S>(simd, &mut sum, &lanes::widen::<E, S>(simd, addend));
            lanes::round::<E, S>(simd, &sum, out);
        }
        if !out_rest.is_empty() {
            let (mut sum, mut rounded) = (lanes::widen::<E, S>(simd, &padded(row_rest)), padded(&[]));
            add::<E, S>(simd, &mut sum, &lanes::widen::<E, S>(simd, &padded(addend_rest)));
            lanes::round::<E, S>(simd, &sum, &mut rounded);
            out_rest.copy_from_slice(&rounded[..out_rest.len()]);
        }
    }
}

/// A tensor that is read, and may be in the memory of the output that takes its place.
#[derive(Clone, Copy, Debug)]
pub enum Operand<T> {
    /// A tensor of its own.
    Apart(T),
    /// The output's memory: `norm_out` for the input, `residual_out` for the residual.
    InPlace,
}

impl<T> Operand<T> {
    /// The same of what `map` makes of a tensor of its own.
    pub(crate) fn map<U>(self, map: impl FnOnce(T) -> U) -> Operand<U> {
        match self {
            Operand::Apart(tensor) => Operand::Apart(map(tensor)),
            Operand::InPlace => Operand::InPlace,
        }
    }
}

/// `out = round(x_0 + x_1 + ... + residual)`, in `f32` in that order. Every addend but the residual, and the result, is
/// [stripped](fused_collective_core::lamport::strip), so that the sum is the same whichever rank makes it. All have the
/// same length.
pub(crate) struct SumIncoming<'a, E, M: Medium> {
    pub(crate) exchange: &'a Exchange<M>,
    /// The other ranks' addends, by rank; `None` for this rank's own.
    pub(crate) sources: &'a [Option<Incoming<'a, M>>],
    pub(crate) own: &'a [E],
    /// In place, it is what `out` holds.
    pub(crate) residual: Option<Operand<&'a [E]>>,
    pub(crate) rounding: Rounding,
    pub(crate) out: &'a mut [E],
}

impl<E: Plain, M: Medium> WithSimd for SumIncoming<'_, E, M> {
    type Output = Result<(), Box<Failure>>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let SumIncoming { exchange, sources, own, residual, rounding, out } = self;
        let ((own, own_rest), (out, out_rest)) = (lines(own), lines_mut(out));
        let residual = residual.map(|residual| residual.map(lines));
        for (index, (out, own)) in out.iter_mut().zip(own).enumerate() {
            let in_place;
            let residual = match residual {
                Some(Operand::Apart((residual, _))) => Some(&residual[index]),
                Some(Operand::InPlace) => {
                    in_place = *out;
                    Some(&in_place)
                }
                None => None,
            };
            sum_line::<E, S, M>(simd, sources, Some(index), own, (residual, rounding), out)?;
        }
        if !out_rest.is_empty() {
            let residual = residual.map(|residual| match residual {
                Operand::Apart((_, rest)) => padded(rest),
                Operand::InPlace => padded(out_rest),
            });
            let mut sum = padded(&[]);
            sum_line::<E, S, M>(
                simd,
                sources,
                None,
                &padded(own_rest),
                (residual.as_ref(), rounding),
                &mut sum,
            )?;
            out_rest.copy_from_slice(&sum[..out_rest.len()]);
        }
        exchange.received();
        Ok(())
    }
}

/// Line `index`, or what follows the last one.
#[inline(always)]
fn sum_line<E: Plain, S: Simd, M: Medium>(
    simd: S,
    sources: &[Option<Incoming<'_, M>>],
    index: Option<usize>,
    own: &Line,
    (residual, rounding): (Option<&Line>, Rounding),
    out: &mut Line,
) -> Result<(), Box<Failure>> {
    let Some((first, others)) = sources.split_first() else { return Ok(()) };
    let mut words = [0; line::WORDS];
    // Added to zero, the first would lose the sign of its own.
    let mut sum = match first {
        Some(incoming) => {
            take(incoming, index, &mut words)?;
            lanes::widen::<E, S>(simd, bytemuck::cast_ref(&words))
        }
        None => lanes::widen_stripped::<E, S>(simd, own),
    };
    for source in others {
        let addend = match source {
            Some(incoming) => {
                take(incoming, index, &mut words)?;
                lanes::widen::<E, S>(simd, bytemuck::cast_ref(&words))
            }
            None => lanes::widen_stripped::<E, S>(simd, own),
        };
        add::<E, S>(simd, &mut sum, &addend);
    }
    if let Some(residual) = residual {
        if rounding == Rounding::AfterAllReduce {
            let mut rounded = padded(&[]);
            lanes::round::<E, S>(simd, &sum, &mut rounded);
            sum = lanes::widen::<E, S>(simd, &rounded);
        }
        add::<E, S>(simd, &mut sum, &lanes::widen::<E, S>(simd, residual));
    }
    lanes::round_stripped::<E, S>(simd, &sum, out);
    Ok(())
}

#[inline(always)]
fn take<M: Medium>(
    incoming: &Incoming<'_, M>,
    index: Option<usize>,
    words: &mut [u64; line::WORDS],
) -> Result<(), Box<Failure>> {
    match index {
        Some(index) => incoming.take_line(index, words),
        None => incoming.take_rest(words),
    }
}

/// The places of one row's results; an empty slice for one that the operation does not write.
#[derive(Debug)]
pub struct RowOutputs<'a, E> {
    /// `[hidden]`: the norm; empty if it is not stored.
    pub norm: &'a mut [E],
    /// The row's codes; empty without a quantization.
    pub values: &'a mut [u8],
    /// The tensor's scales, padding included; empty where there are none.
    pub scales: &'a mut [u8],
}

/// The norm and the quantization that follow the sum, the same for every row of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Finish<'a, E> {
    /// RMSNorm's parameters.
    pub norm: Norm,
    /// RMSNorm's weight, `[hidden]`.
    pub gamma: Gamma<'a, E>,
    /// The quantization of the norm.
    pub quantization: Quantization,
    /// The per-tensor or global scale, where the quantization reads one.
    pub scale: f32,
    /// Rows of the tensor, which the layout of scales depends on.
    pub tokens: u64,
}

impl<E: Plain> Finish<'_, E> {
    /// Zeroes what pads the rows of scales, once all rows of `hidden` elements are quantized.
    pub fn pad(&self, hidden: u64, scales: &mut [u8]) {
        if let (Some(block), Some(layout)) = (self.quantization.block(), self.quantization.scale_layout()) {
            layout.zero_padding_rows(self.tokens, hidden / block, scales);
        }
    }

    #[inline(always)]
    fn quantize(&self, normed: &[E], token: u64, values: &mut [u8], scales: &mut [u8]) {
        if self.quantization != Quantization::None {
            quant::quantize_row(self.quantization, normed, token, self.tokens, self.scale, values, scales)
                .expect("the tensors' sizes were checked against the operation");
        }
    }
}

/// Normalizes and quantizes `row`, the rounded sum of token `token`. `scratch` holds a row.
pub struct FinishRow<'a, E> {
    /// The norm and the quantization.
    pub finish: &'a Finish<'a, E>,
    /// `[hidden]`: the sum.
    pub row: &'a [E],
    /// The row's number in the tensor.
    pub token: u64,
    /// The results.
    pub outputs: RowOutputs<'a, E>,
    /// `[hidden]`, for a norm that is not stored.
    pub scratch: &'a mut [E],
}

impl<E: Plain> WithSimd for FinishRow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let FinishRow { finish, row, token, outputs, scratch } = self;
        let sum = sum_of_squares(simd, row);
        let mean = sum.mul_add(1.0 / row.len() as f32, finish.norm.epsilon);
        let inverse_rms = norm::rsqrt(mean, f32::mul_add);
        let normed = if outputs.norm.is_empty() { scratch } else { outputs.norm };
        let bias = finish.norm.weight_bias;
        match finish.gamma {
            Gamma::Element(gamma) => normalize_row(simd, row, gamma, inverse_rms, bias, normed),
            Gamma::F32(gamma) => norm::normalize_row(row, gamma, inverse_rms, bias, normed),
        }
        finish.quantize(normed, token, outputs.values, outputs.scales);
    }
}

/// Quantizes `normed`, the normalized row of token `token`.
pub struct QuantizeRow<'a, E> {
    /// The quantization.
    pub finish: &'a Finish<'a, E>,
    /// `[hidden]`: the norm.
    pub normed: &'a [E],
    /// The row's number in the tensor.
    pub token: u64,
    /// The row's codes.
    pub values: &'a mut [u8],
    /// The tensor's scales, padding included.
    pub scales: &'a mut [u8],
}

impl<E: Plain> WithSimd for QuantizeRow<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        self.finish.quantize(self.normed, self.token, self.values, self.scales);
    }
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsFd, time::Duration};

    use fused_collective_core::{
        dtype::{Element, bf16, f16},
        lamport,
        workspace::{Header, Layout},
    };
    use pulp::Arch;

    use super::*;
    use crate::{
        cpu::{region::Regions, wait::WaitGuard},
        group::failure::What,
        group::shared_memory::SharedMemory,
    };

    /// Row `number`, with numbers of all kinds in it.
    fn row<E: Plain>(number: usize, hidden: usize) -> Vec<E> {
        let special = [0.0, -0.0, 1e-40, 6e4, -6e4, f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        let value = |index: usize| match ((index * 31 + number * 17) % 97, index % 8) {
            // Two elements of 16 bits that are the sentinel on rank 1, and half of it on others: only on rank 1 does the
            // second lose its sign.
            (_, 6) => f32::from(number != 1),
            (_, 7) => -0.0,
            (kind @ 0..8, _) if index % 3 == 1 => special[kind],
            (kind, _) => (kind as f32 - 48.0) * 0.13,
        };
        (0..hidden).map(|index| E::from_f32(value(index))).collect()
    }

    fn bits<E: Element>(row: &[E]) -> Vec<u32> {
        row.iter().map(|element| element.to_bits()).collect()
    }

    fn stripped<E: Plain>(row: &[E]) -> Vec<E> {
        let mut row = row.to_vec();
        for word in row.as_mut_bytes().as_chunks_mut().0 {
            *word = lamport::strip(u32::from_ne_bytes(*word)).to_ne_bytes();
        }
        row
    }

    /// The rounded sums of elements, in order.
    fn sums<E: Plain>(addends: &[Vec<E>]) -> Vec<E> {
        let sum = |index: usize| {
            E::from_f32(
                addends.iter().map(|row| row[index].to_f32()).reduce(|sum, value| sum + value).unwrap(),
            )
        };
        (0..addends[0].len()).map(sum).collect()
    }

    #[track_caller]
    fn assert_same<E: Element>(found: &[E], expected: &[E], what: &str) {
        for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
            // Which of two NaN an addition keeps is nobody's promise.
            let nan = found.to_f32().is_nan() && expected.to_f32().is_nan();
            assert!(
                nan || found.to_bits() == expected.to_bits(),
                "{} {what}, element {index}: {found:?}, not {expected:?}",
                E::DTYPE
            );
        }
    }

    fn check_sums<E: Plain>(arch: Arch) {
        for hidden in (2..=208).step_by(2) {
            let (first, second) = (row::<E>(0, hidden), row::<E>(1, hidden));
            let mut out = vec![E::default(); hidden];
            arch.dispatch(AddRow { row: &first, addend: &second, out: &mut out });
            assert_same(&out, &sums(&[first, second]), &format!("row of {hidden}"));
        }
    }

    /// Rank 1's sum of rows that the others have sent.
    fn check_incoming<E: Plain>(arch: Arch, ranks: u32) {
        const RANK: u32 = 1;
        let layout = Layout::new(ranks, 1 << 14).unwrap();
        let memory = SharedMemory::create(layout.total_bytes()).unwrap();
        let exchange = |rank| {
            let guard = WaitGuard { rank, deadline: Duration::from_secs(10), monitor: None, log: None };
            Exchange::new(Regions::map(memory.as_fd(), layout).unwrap(), guard)
        };
        let mut exchanges: Vec<Exchange> = (0..ranks).map(exchange).collect();
        for (hidden, with_residual) in
            (4..=208).step_by(4).flat_map(|hidden| [(hidden, false), (hidden, true)])
        {
            let rows: Vec<Vec<E>> = (0..ranks as usize).map(|number| row(number, hidden)).collect();
            let residual = with_residual.then(|| row::<E>(20, hidden));
            let bytes = hidden * size_of::<E>();
            let at = |source: u32| u64::from(source) * bytes as u64;
            for source in (0..ranks).filter(|&source| source != RANK) {
                let exchange = &exchanges[source as usize];
                let row = rows[source as usize].as_bytes();
                exchange.send_stripped(exchange.operation(), RANK, at(source), row);
            }
            let exchange = &exchanges[RANK as usize];
            let incoming = |source| {
                (source != RANK).then(|| exchange.incoming(source, What::Input(0), at(source), bytes))
            };
            let sources: Vec<_> = (0..ranks).map(incoming).collect();
            let mut out = vec![E::default(); hidden];
            let own = &rows[RANK as usize][..];
            let residual = residual.as_deref();
            let in_place = hidden % 8 == 0;
            if let Some(residual) = residual.filter(|_| in_place) {
                out.copy_from_slice(residual);
            }
            let rounding = if hidden % 12 == 0 { Rounding::AfterAllReduce } else { Rounding::Once };
            let operand = |residual| if in_place { Operand::InPlace } else { Operand::Apart(residual) };
            arch.dispatch(SumIncoming {
                exchange,
                sources: &sources,
                own,
                residual: residual.map(operand),
                rounding,
                out: &mut out,
            })
            .unwrap();
            let mut addends: Vec<Vec<E>> = rows.iter().map(|row| stripped(row)).collect();
            if rounding == Rounding::AfterAllReduce {
                addends = vec![sums(&addends)];
            }
            addends.extend(residual.map(<[E]>::to_vec));
            assert_same(&out, &stripped(&sums(&addends)), &format!("{ranks} rows of {hidden}"));
            exchanges.iter_mut().for_each(Exchange::advance);
        }
        // Every word that was read is empty again.
        let header = Header { world_size: ranks, rank: RANK, slot_bytes: layout.slot_bytes() };
        exchanges[RANK as usize].publish_header(header);
        assert_eq!(exchanges[RANK as usize].find_stray_write(header), None);
    }

    fn check_norms<E: Plain>(arch: Arch) {
        for hidden in (2..=208).step_by(2) {
            let (row, gamma) = (row::<E>(1, hidden), row::<E>(2, hidden));
            let norm = Norm { weight_bias: 1.0, ..Norm::default() };
            let finish = Finish {
                norm,
                gamma: Gamma::Element(&gamma),
                quantization: Quantization::None,
                scale: 1.0,
                tokens: 1,
            };
            // Numbers only, or the norm is all NaN.
            let row: Vec<E> = row
                .into_iter()
                .map(|value| if value.to_f32().is_finite() { value } else { E::default() })
                .collect();
            let (mut found, mut scratch) = (row.clone(), row.clone());
            let outputs = RowOutputs { norm: &mut found, values: &mut [], scales: &mut [] };
            arch.dispatch(FinishRow { finish: &finish, row: &row, token: 0, outputs, scratch: &mut scratch });
            let sum = arch.dispatch(Squares(&row));
            assert_eq!(sum.to_bits(), norm::sum_of_squares(&row).to_bits(), "{} {hidden}", E::DTYPE);
            let mut expected = row.clone();
            let inverse_rms = norm::inverse_rms(sum, hidden as u64, norm.epsilon);
            norm::normalize_row(&row, &gamma, inverse_rms, 1.0, &mut expected);
            assert_eq!(bits(&found), bits(&expected), "{} {hidden}", E::DTYPE);
        }
    }

    struct Squares<'a, E>(&'a [E]);

    impl<E: Plain> WithSimd for Squares<'_, E> {
        type Output = f32;

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> f32 {
            sum_of_squares(simd, self.0)
        }
    }

    #[test]
    fn rows_of_every_length_are_added_as_elements_are() {
        for arch in [Arch::Scalar, Arch::new()] {
            check_sums::<f32>(arch);
            check_sums::<f16>(arch);
            check_sums::<bf16>(arch);
        }
    }

    #[test]
    fn rows_that_come_in_are_summed_in_rank_order_and_leave_their_places_empty() {
        for (arch, ranks) in [(Arch::Scalar, 2), (Arch::new(), 2), (Arch::new(), 5)] {
            check_incoming::<f32>(arch, ranks);
            check_incoming::<f16>(arch, ranks);
            check_incoming::<bf16>(arch, ranks);
        }
    }

    #[test]
    fn rows_of_every_length_are_normalized_as_elements_are() {
        for arch in [Arch::Scalar, Arch::new()] {
            check_norms::<f32>(arch);
            check_norms::<f16>(arch);
            check_norms::<bf16>(arch);
        }
    }
}
