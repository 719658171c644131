//! The check of an implementation's outputs, token by token.
//!
//! An output passes if it lies between the least and the greatest value that the [allowed errors](super) permit.

use crate::{
    dtype::{DType, Element},
    fusion::{Norm, Operation, PartialSums, Rounding},
    norm::Weights,
    quant::{GroupScale, Quantization, e2m1, e4m3, scale, ue4m3, ue8m0},
    specification::{Mismatch, Observed, Output, Token},
};

/// Half the spacing of `f32` at 1.
const U: f64 = 1.0 / (1u64 << 24) as f64;
/// The smallest positive `f32`, twice the error of a product that is subnormal.
const SMALLEST: f64 = f32::from_bits(1) as f64;

/// The result of exact arithmetic, and the least and the greatest allowed result of `f32` arithmetic.
#[derive(Clone, Copy)]
struct Allowed {
    low: f64,
    exact: f64,
    high: f64,
}

impl Allowed {
    /// One value alone.
    const fn exactly(value: f64) -> Allowed {
        Allowed { low: value, exact: value, high: value }
    }

    fn around(exact: f64, slack: f64) -> Self {
        // An infinite sum must not allow NaN, which infinity minus a slack of infinity would.
        let slack = if exact.is_finite() { slack } else { 0.0 };
        Allowed { low: exact - slack, exact, high: exact + slack }
    }

    /// Both ends rounded to `E`.
    fn rounded<E: Element>(self) -> [f64; 2] {
        [self.low, self.high].map(|bound| f64::from(E::from_f64(bound).to_f32()))
    }

    /// All three rounded to `E`. `unit` becomes the distance of the ends, if that is larger.
    fn stored<E: Element>(self, unit: &mut f64) -> Allowed {
        let [low, high] = self.rounded::<E>();
        *unit = unit.max(high - low);
        Allowed { low, exact: f64::from(E::from_f64(self.exact).to_f32()), high }
    }

    /// This plus `addend`, whose sum `f32` arithmetic may miss by `slack`.
    fn plus(self, addend: f64, slack: f64) -> Allowed {
        let Allowed { low, exact, high } = self;
        let slack = if exact.is_finite() { slack } else { 0.0 };
        Allowed { low: low + addend - slack, exact: exact + addend, high: high + addend + slack }
    }

    /// The least and the greatest magnitude.
    fn magnitudes(self) -> [f64; 2] {
        let (low, high) = (self.low.abs(), self.high.abs());
        let least = if self.low < 0.0 && self.high > 0.0 { 0.0 } else { low.min(high) };
        [least, low.max(high)]
    }
}

/// The sum of all ranks' addends and the bias, and the sum of their magnitudes.
struct Reduced {
    sum: Allowed,
    magnitude: f64,
    /// The largest last place at which arithmetic may have rounded.
    unit: f64,
    /// True if a partial sum in `f32` may overflow although the whole sum does not.
    may_overflow: bool,
}

/// A sum of addends, the sum of their magnitudes, and their number.
struct Total {
    sum: Allowed,
    magnitude: f64,
    count: u32,
}

impl Total {
    const ZERO: Total = Total { sum: Allowed::exactly(0.0), magnitude: 0.0, count: 0 };

    fn add(&mut self, addend: Allowed) {
        self.add_all(Total { sum: addend, magnitude: addend.magnitudes()[1], count: 1 });
    }

    fn add_all(&mut self, other: Total) {
        let (Allowed { low, exact, high }, addend) = (self.sum, other.sum);
        self.sum = Allowed { low: low + addend.low, exact: exact + addend.exact, high: high + addend.high };
        self.magnitude += other.magnitude;
        self.count += other.count;
    }

    /// The sum in `f32`, whatever the order of its additions.
    fn in_f32(&self) -> Allowed {
        self.sum.plus(0.0, f64::from(self.count) * U * self.magnitude)
    }
}

fn overflows(magnitude: f64) -> bool {
    magnitude > f64::from(f32::MAX) && magnitude.is_finite()
}

/// True if `got` is between `low` and `high`, which may be in either order. NaN allows only NaN.
fn allows([low, high]: [f64; 2], got: f64) -> bool {
    if low.is_nan() || high.is_nan() { got.is_nan() } else { got >= low.min(high) && got <= low.max(high) }
}

/// The spacing at `value` of a floating-point format with `digits` bits of significand.
fn spacing(value: f64, digits: u32, min_exponent: i32) -> f64 {
    let exponent = (value.to_bits() >> 52 & 0x7ff) as i32 - 1023;
    let last_place = exponent.max(min_exponent) - (digits as i32 - 1);
    f64::from_bits(((last_place + 1023) as u64) << 52)
}

/// The distance of `got` from `exact`, in units of the spacing at `exact`; 0 if either is not finite.
fn error(got: f64, exact: f64, digits: u32, min_exponent: i32) -> f64 {
    if got == exact || !exact.is_finite() || !got.is_finite() {
        return 0.0;
    }
    (got - exact).abs() / spacing(exact, digits, min_exponent)
}

fn element_error<E: Element>(got: E, exact: f64) -> f64 {
    let dtype: DType = E::DTYPE;
    error(f64::from(got.to_f32()), exact, dtype.digits(), dtype.min_exponent())
}

/// Checks the outputs of an implementation for one token.
///
/// Returns the largest error of any output, in units in the last place of its type; a correctly rounded output is
/// within 0.5. The unit of a code is that of its format, scaled. The unit of a sum is that of `f32` at the addends,
/// if that is larger.
///
/// # Errors
/// The first output outside the [allowed errors](super).
///
/// # Panics
/// If a row is shorter than `observed.residual_out`, or codes or scales are not those of `operation`. If `operation` has a
/// [`wire`](Operation::wire) format: its sum is not meant to be exact.
pub fn check_token<E: Element>(
    operation: &Operation,
    token: &Token<'_, E>,
    observed: &Observed<'_, E>,
) -> Result<f64, Mismatch> {
    assert_eq!(operation.wire, None, "exact arithmetic is no measure of this sum");
    let mut checker = Checker { operation, token, observed, post: None };
    let residual_error = match operation.post_norm.map(|parameters| checker.post_norm(parameters)) {
        // The sum of squares may overflow too, and every element depends on it.
        Some(None) => 0.0,
        post => {
            checker.post = post.flatten();
            checker.residual_out()?
        }
    };
    let Some(norm) = operation.norm else { return Ok(residual_error) };
    let norm = checker.norm(norm);
    let norm_error = checker.norm_out(&norm)?;
    let quant_error = checker.quantized(&norm)?;
    Ok(residual_error.max(norm_error).max(quant_error))
}

struct Checker<'a, E> {
    operation: &'a Operation,
    token: &'a Token<'a, E>,
    observed: &'a Observed<'a, E>,
    /// The norm of the sum, if the operation has one.
    post: Option<TokenNorm<'a, E>>,
}

/// The norm of a token: parameters, and reciprocal root mean square.
struct TokenNorm<'a, E> {
    parameters: Norm,
    gamma: Weights<'a, E>,
    inverse_rms: Allowed,
    /// Allowed relative error of `f32` arithmetic.
    slack: f64,
}

/// The way from an element to the number that is encoded.
#[derive(Clone, Copy)]
enum Scaling {
    Times(f32),
    Over(f32),
}

impl Scaling {
    /// As the specification computes it.
    fn rounded(self, element: f32) -> f32 {
        match self {
            Scaling::Times(multiplier) => element * multiplier,
            Scaling::Over(divisor) => element / divisor,
        }
    }

    fn exact(self, element: f64) -> f64 {
        match self {
            Scaling::Times(multiplier) => element * f64::from(multiplier),
            Scaling::Over(divisor) => element / f64::from(divisor),
        }
    }
}

/// A block of a row: format, and the scaling by the observed scale.
struct Block {
    first: usize,
    elements: usize,
    scaling: Scaling,
    format: Format,
}

#[derive(Clone, Copy)]
enum Format {
    E4M3,
    E2M1,
}

impl Format {
    fn round(self, value: f32) -> f64 {
        f64::from(match self {
            Format::E4M3 => e4m3::decode(e4m3::encode(value)),
            Format::E2M1 => e2m1::decode(e2m1::encode(value)),
        })
    }

    /// The code of element `index`, decoded.
    fn get(self, values: &[u8], index: usize) -> f64 {
        f64::from(match self {
            Format::E4M3 => e4m3::decode(values[index]),
            Format::E2M1 => e2m1::decode(e2m1::unpack(values[index / 2])[index % 2]),
        })
    }

    fn error(self, got: f64, exact: f64) -> f64 {
        let (max, digits, min_exponent) = match self {
            Format::E4M3 => (f64::from(e4m3::MAX), 4, -6),
            Format::E2M1 => (f64::from(e2m1::MAX), 2, 0),
        };
        error(got, exact.clamp(-max, max), digits, min_exponent)
    }
}

impl<'a, E: Element> TokenNorm<'a, E> {
    /// The norm of a row of `hidden` elements whose sum of squares is, at least, exactly and at most, `squares`.
    fn new(parameters: Norm, gamma: Weights<'a, E>, hidden: usize, squares: [f64; 3]) -> Self {
        let slack = (8.0 + libm::sqrt(hidden as f64)) * U;
        let [high, exact, low] = squares.map(|squares| inverse_rms(squares, hidden, parameters.epsilon));
        let mut inverse_rms = Allowed { low, exact, high };
        // In `f32` a sum of squares past the largest number is infinite, and the reciprocal root 0.
        let largest = f64::from(f32::MAX);
        if squares[2] >= largest * (1.0 - slack) {
            inverse_rms.low = 0.0;
        }
        if squares[0] > largest * (1.0 + slack) {
            inverse_rms = Allowed::exactly(0.0);
        }
        TokenNorm { parameters, gamma, inverse_rms, slack }
    }

    /// The factor of element `index`, exactly.
    fn factor(&self, index: usize) -> f64 {
        self.inverse_rms.exact * self.weight(index)
    }

    fn weight(&self, index: usize) -> f64 {
        f64::from(self.parameters.weight_bias) + f64::from(self.gamma.get(index))
    }

    /// Element `index` of the norm, before it is rounded, of what is `value` in the row.
    fn of(&self, value: Allowed, index: usize) -> Allowed {
        let weight = self.weight(index);
        // A product below the smallest normal `f32` is rounded to a multiple of 2^-149, or flushed to 0.
        let tiny = f64::from(f32::MIN_POSITIVE) * (1.0 + weight.abs());
        let inverse_rms = self.inverse_rms;
        let exact = value.exact * inverse_rms.exact * weight;
        let mut norm = Allowed::exactly(exact);
        if exact.is_nan() {
            return norm;
        }
        for value in [value.low, value.high] {
            for inverse_rms in [inverse_rms.low, inverse_rms.high] {
                let product = value * inverse_rms * weight;
                let slack = product.abs() * self.slack + if product.abs() < tiny * 2.0 { tiny } else { 0.0 };
                norm.low = norm.low.min(product - slack);
                norm.high = norm.high.max(product + slack);
            }
        }
        norm
    }
}

impl<'a, E: Element> Checker<'a, E> {
    fn mismatch(&self, output: Output, index: usize, got: f64, [low, high]: [f64; 2]) -> Mismatch {
        Mismatch { output, token: self.token.index, index: index as u64, got, low, high }
    }

    fn residual_out(&self) -> Result<f64, Mismatch> {
        let mut largest = 0.0f64;
        for (index, &got) in self.observed.residual_out.iter().enumerate() {
            let (allowed, unit_of_addends, may_overflow) = self.sum(index);
            let bounds = allowed.rounded::<E>();
            let value = f64::from(got.to_f32());
            if !allows(bounds, value) && !may_overflow {
                return Err(self.mismatch(Output::Residual, index, value, bounds));
            }
            // If addends cancel, the last place of the sum is too fine a unit: `f32` rounds at the last place of
            // addends, and stores some sums of them.
            let unit = spacing(allowed.exact, E::DTYPE.digits(), E::DTYPE.min_exponent());
            let error = element_error(got, allowed.exact) * (unit / unit.max(unit_of_addends));
            largest = largest.max(error);
        }
        Ok(largest)
    }

    /// Element `index` of the sum of all ranks and the bias.
    fn reduced(&self, index: usize) -> Reduced {
        let (mut unit, mut may_overflow) = (0.0f64, false);
        let per_host = self.token.ranks_per_host(self.operation);
        let rounds_hosts = self.token.hosts > 1 && self.operation.partial_sums == PartialSums::Element;
        let mut total = Total::ZERO;
        for host in 0..self.token.hosts as usize {
            let mut partial = Total::ZERO;
            for rank in host * per_host..(host + 1) * per_host {
                partial.add(self.addend(rank, index, &mut unit, &mut may_overflow));
            }
            if rounds_hosts {
                may_overflow |= overflows(partial.magnitude);
                unit = unit.max(spacing(partial.magnitude, 24, -126));
                total.add(partial.in_f32().stored::<E>(&mut unit));
            } else {
                total.add_all(partial);
            }
        }
        if let Some(bias) = self.token.bias {
            total.add(Allowed::exactly(f64::from(bias[index].to_f32())));
        }
        let may_overflow = may_overflow || overflows(total.magnitude);
        let unit = unit.max(spacing(total.magnitude, 24, -126));
        Reduced { sum: total.in_f32(), magnitude: total.magnitude, unit, may_overflow }
    }

    /// Element `index` of the addend of rank `rank`.
    fn addend(&self, rank: usize, index: usize, unit: &mut f64, may_overflow: &mut bool) -> Allowed {
        let element = |row: &[E]| f64::from(row[index].to_f32());
        let Some((experts, shared)) = self.token.experts_of(self.operation) else {
            return Allowed::exactly(element(self.token.inputs[rank]));
        };
        let hidden = self.observed.residual_out.len();
        let products = experts[rank].chosen(hidden).map(|(scale, row)| f64::from(scale) * element(row));
        let terms = products.chain(shared.then(|| element(self.token.inputs[rank])));
        let (sum, magnitude, count) = terms.fold((0.0, 0.0, 0.0), |(sum, magnitude, count), term| {
            (sum + term, magnitude + term.abs(), count + 1.0)
        });
        *may_overflow |= overflows(magnitude);
        *unit = unit.max(spacing(magnitude, 24, -126));
        Allowed::around(sum, count * (U * magnitude + SMALLEST)).stored::<E>(unit)
    }

    /// Element `index` of the sum, plus the residual, before it is rounded; the largest last place at which arithmetic may have
    /// rounded; true if a partial sum may overflow.
    fn sum(&self, index: usize) -> (Allowed, f64, bool) {
        let Reduced { mut sum, mut magnitude, mut unit, may_overflow } = self.reduced(index);
        if let Some(norm) = &self.post {
            sum = norm.of(sum.stored::<E>(&mut unit), index);
            magnitude = sum.magnitudes()[1];
            unit = (unit * norm.factor(index).abs()).max(spacing(magnitude, 24, -126));
        }
        let Some(residual) = self.token.residual else { return (sum, unit, may_overflow) };
        let residual = f64::from(residual[index].to_f32());
        if self.operation.rounding == Rounding::AfterAllReduce {
            sum = sum.stored::<E>(&mut unit);
            magnitude = sum.magnitudes()[1];
        }
        magnitude += residual.abs();
        let unit = unit.max(spacing(magnitude, 24, -126));
        (sum.plus(residual, U * magnitude), unit, may_overflow || overflows(magnitude))
    }

    /// The norm of the sum; `None` if a partial sum may overflow.
    fn post_norm(&self, parameters: Norm) -> Option<TokenNorm<'a, E>> {
        let hidden = self.observed.residual_out.len();
        let gamma = self.token.post_gamma.expect("a norm of the sum has a weight");
        let mut squares = [0.0; 3];
        for index in 0..hidden {
            let Reduced { sum, may_overflow, .. } = self.reduced(index);
            if may_overflow {
                return None;
            }
            let sum = sum.stored::<E>(&mut 0.0);
            let [least, greatest] = sum.magnitudes();
            for (squares, value) in squares.iter_mut().zip([least, sum.exact, greatest]) {
                *squares += value * value;
            }
        }
        Some(TokenNorm::new(parameters, gamma, hidden, squares))
    }

    fn norm(&self, parameters: Norm) -> TokenNorm<'a, E> {
        let row = self.observed.residual_out;
        TokenNorm::new(parameters, self.token.gamma, row.len(), [sum_of_squares(row); 3])
    }

    fn exact_norm(&self, norm: &TokenNorm<'_, E>, index: usize) -> Allowed {
        let value = f64::from(self.observed.residual_out[index].to_f32());
        norm.of(Allowed::exactly(value), index)
    }

    /// The least and the greatest norm that the quantization may have read: both as observed, if the norm was written.
    fn norm_bounds(&self, norm: &TokenNorm<'_, E>, index: usize) -> [f32; 2] {
        match self.observed.norm_out.get(index) {
            Some(observed) => [observed.to_f32(); 2],
            None => self.exact_norm(norm, index).rounded::<E>().map(|bound| bound as f32),
        }
    }

    fn norm_out(&self, norm: &TokenNorm<'_, E>) -> Result<f64, Mismatch> {
        let mut largest = 0.0f64;
        for (index, &got) in self.observed.norm_out.iter().enumerate() {
            let allowed = self.exact_norm(norm, index);
            let bounds = allowed.rounded::<E>();
            let value = f64::from(got.to_f32());
            if !allows(bounds, value) {
                return Err(self.mismatch(Output::Norm, index, value, bounds));
            }
            largest = largest.max(element_error(got, allowed.exact));
        }
        Ok(largest)
    }

    fn quantized(&self, norm: &TokenNorm<'_, E>) -> Result<f64, Mismatch> {
        let hidden = self.observed.residual_out.len();
        let elements = self.operation.quantization.block().map_or(hidden, |block| block as usize);
        let format = match self.operation.quantization {
            Quantization::None => return Ok(0.0),
            Quantization::NvFp4 { .. } | Quantization::MxFp4 { .. } => Format::E2M1,
            _ => Format::E4M3,
        };
        let mut largest = 0.0f64;
        for first in (0..hidden).step_by(elements) {
            let scaling = self.scaling(norm, first, elements)?;
            let error = self.values(norm, &Block { first, elements, scaling, format })?;
            largest = largest.max(error);
        }
        Ok(largest)
    }

    /// Checks the scale of one block (or of the whole token) and returns the scaling of its elements.
    fn scaling(&self, norm: &TokenNorm<'_, E>, first: usize, elements: usize) -> Result<Scaling, Mismatch> {
        let (quantization, global) = (self.operation.quantization, self.token.scale);
        let nvfp4_global = scale::nvfp4_global(global);
        let block = first / elements;
        let hidden = self.observed.residual_out.len() as u64;
        let Some(tensor) = quantization.scales(self.operation.tokens, hidden) else {
            let is_quantized = quantization != Quantization::None;
            return Ok(Scaling::Times(if is_quantized { scale::fp8_multiplier(global) } else { 1.0 }));
        };
        let bits = tensor.get(self.observed.scales, self.token.index, block as u64).unwrap_or(u32::MAX);
        let code = bits as u8;
        let check = |largest: fn(f32, f32) -> f32, scale_of: &dyn Fn(f32) -> f32, got: f32| {
            let bounds = self.largest(norm, first, elements, largest).map(|amax| f64::from(scale_of(amax)));
            if allows(bounds, f64::from(got)) {
                Ok(())
            } else {
                Err(self.mismatch(Output::Scale, block, f64::from(got), bounds))
            }
        };
        let check_f32 = |scale_of: fn(f32) -> f32| {
            let got = f32::from_bits(bits);
            check(scale::amax, &scale_of, got).map(|()| Scaling::Over(got))
        };
        let check_ue8m0 = |largest: fn(f32, f32) -> f32, scale_of: fn(f32) -> u8| {
            check(largest, &|amax| ue8m0::decode(scale_of(amax)), ue8m0::decode(code))
                .map(|()| Scaling::Times(ue8m0::decode_reciprocal(code)))
        };
        match quantization {
            Quantization::None | Quantization::Fp8Static => Ok(Scaling::Times(1.0)),
            Quantization::Fp8PerToken => check_f32(scale::fp8_per_token),
            Quantization::Fp8PerGroup { scales: GroupScale::F32, .. } => check_f32(scale::fp8_group),
            Quantization::Fp8PerGroup { .. } | Quantization::MxFp8 { .. } => {
                check_ue8m0(scale::amax, scale::fp8_block)
            }
            Quantization::MxFp4 { .. } => check_ue8m0(scale::amax_or_nan, scale::mxfp4_block),
            Quantization::NvFp4 { .. } => {
                let scale_of = |amax| ue4m3::decode(scale::nvfp4_block(amax, nvfp4_global));
                check(scale::amax_or_nan, &scale_of, ue4m3::decode(code))?;
                Ok(Scaling::Times(scale::nvfp4_multiplier(code, nvfp4_global)))
            }
        }
    }

    /// The least and the greatest largest magnitude of a block.
    fn largest(
        &self,
        norm: &TokenNorm<'_, E>,
        first: usize,
        elements: usize,
        largest: fn(f32, f32) -> f32,
    ) -> [f32; 2] {
        (first..first + elements).fold([0.0, 0.0], |[low, high], index| {
            let [a, b] = self.norm_bounds(norm, index).map(f32::abs);
            // The least magnitude of an interval across 0 would be 0. That is left out: such an interval is as narrow
            // as the allowed error, so a block with this largest magnitude is one of zeros.
            [largest(low, a.min(b)), largest(high, a.max(b))]
        })
    }

    fn values(&self, norm: &TokenNorm<'_, E>, block: &Block) -> Result<f64, Mismatch> {
        let Block { first, elements, scaling, format } = *block;
        let mut largest = 0.0f64;
        for index in first..first + elements {
            let bounds = self.norm_bounds(norm, index).map(|bound| format.round(scaling.rounded(bound)));
            let got = format.get(self.observed.values, index);
            if !allows(bounds, got) {
                return Err(self.mismatch(Output::Value, index, got, bounds));
            }
            let exact = match self.observed.norm_out.get(index) {
                Some(observed) => f64::from(observed.to_f32()),
                None => f64::from(E::from_f64(self.exact_norm(norm, index).exact).to_f32()),
            };
            largest = largest.max(format.error(got, scaling.exact(exact)));
        }
        Ok(largest)
    }
}

/// `1 / sqrt(mean + epsilon)` of the mean of `squares`. As in the [specification](crate::norm::rsqrt), the mean and epsilon
/// count as 2^-126 at least.
fn inverse_rms(squares: f64, hidden: usize, epsilon: f32) -> f64 {
    let mean = squares / hidden as f64 + f64::from(epsilon);
    1.0 / libm::sqrt(if mean < f64::from(f32::MIN_POSITIVE) { f64::from(f32::MIN_POSITIVE) } else { mean })
}

fn sum_of_squares<E: Element>(row: &[E]) -> f64 {
    row.iter().map(|value| f64::from(value.to_f32())).map(|value| value * value).sum()
}
