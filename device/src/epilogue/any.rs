//! The epilogue and the quantizer that are chosen at launch: for kernels that are not worth an entry point for each.

use fused_collective_core::{dtype::Element, kernels, pack::Pack};

use super::{Epilogue, PackIndex, Quantizer, RowValues, normalize};
use crate::{
    launch::{
        Address, AnyEpilogue, AnyQuantizer, Fp4, Fp8Block, Fp8PerToken, Fp8Static, MxFp4, RmsNorm, Shape,
        Unquantized,
    },
    simt,
};

/// [`AnyQuantizer::kind`]s.
const FP8: u32 = kernels::Quantizer::Fp8 as u32;
const FP8_TOKEN: u32 = kernels::Quantizer::Fp8Token as u32;
const FP8_BLOCK: u32 = kernels::Quantizer::Fp8Block as u32;
const FP4: u32 = kernels::Quantizer::Fp4 as u32;
const MXFP4: u32 = kernels::Quantizer::MxFp4 as u32;

/// `$body` with `$quantizer` what `$any` stands for. A branch that all threads of a launch take alike.
macro_rules! chosen {
    ($any:expr, |$quantizer:ident| $body:expr) => {{
        let AnyQuantizer { values, scales, scale, kind, block_packs_log2 } = $any;
        // `black_box`, so that nothing of a branch is computed ahead of it.
        match simt::black_box_u32(*kind) {
            FP8 => {
                let $quantizer = Fp8Static { values: *values, scale: *scale };
                $body
            }
            FP8_TOKEN => {
                let $quantizer = Fp8PerToken { values: *values, scales: scales.address };
                $body
            }
            FP8_BLOCK => {
                let block_packs_log2 = *block_packs_log2;
                let $quantizer = Fp8Block { values: *values, scales: *scales, block_packs_log2, reserved: 0 };
                $body
            }
            FP4 => {
                let $quantizer = Fp4 { values: *values, scales: *scales, global_scale: *scale };
                $body
            }
            MXFP4 => {
                let $quantizer = MxFp4 { values: *values, scales: *scales };
                $body
            }
            _ => {
                let $quantizer = Unquantized;
                $body
            }
        }
    }};
}

/// Constants as they are kept, whichever the quantizer: one number, or none.
trait Constant: Copy {
    fn of(number: f32) -> Self;
    fn number(self) -> f32;
}

impl Constant for f32 {
    #[inline(always)]
    fn of(number: f32) -> f32 {
        number
    }

    #[inline(always)]
    fn number(self) -> f32 {
        self
    }
}

impl Constant for () {
    #[inline(always)]
    fn of(_: f32) {}

    #[inline(always)]
    fn number(self) -> f32 {
        0.0
    }
}

#[expect(clippy::unit_arg, reason = "quantizers without constants have the unit for them")]
impl<E: Element> Quantizer<E> for AnyQuantizer {
    const WORDS: u32 = 4;
    const SCALES: bool = true;
    const ROW_MAX: bool = true;
    type Constants = f32;

    #[inline(always)]
    fn words(&self) -> u32 {
        match self.kind {
            FP8 | FP8_TOKEN | FP8_BLOCK => <Fp8Static as Quantizer<E>>::WORDS,
            FP4 | MXFP4 => <Fp4 as Quantizer<E>>::WORDS,
            _ => <Unquantized as Quantizer<E>>::WORDS,
        }
    }

    #[inline(always)]
    fn sends_scales(&self) -> bool {
        match self.kind {
            FP8_TOKEN | FP8_BLOCK => true,
            FP4 | MXFP4 => <Fp4 as Quantizer<E>>::SCALES,
            _ => false,
        }
    }

    #[inline(always)]
    fn row_max(&self) -> bool {
        self.kind == FP8_TOKEN
    }

    #[inline(always)]
    unsafe fn constants(&self) -> f32 {
        // SAFETY: the addresses of the quantizer are this one's; so below.
        chosen!(self, |quantizer| unsafe { Quantizer::<E>::constants(&quantizer).number() })
    }

    #[inline(always)]
    unsafe fn fill_padding(&self, shape: &Shape, thread: u32, threads: u32) {
        // SAFETY: see above.
        chosen!(self, |quantizer| unsafe {
            Quantizer::<E>::fill_padding(&quantizer, shape, thread, threads)
        });
    }

    #[inline(always)]
    fn scale_packs_log2(&self) -> u32 {
        chosen!(self, |quantizer| Quantizer::<E>::scale_packs_log2(&quantizer))
    }

    #[inline(always)]
    unsafe fn store(&self, index: PackIndex, values: Pack, row_max: f32, number: f32) {
        chosen!(self, |quantizer| {
            // SAFETY: see above.
            unsafe { Quantizer::<E>::store(&quantizer, index, values, row_max, Constant::of(number)) }
        });
    }

    #[inline(always)]
    fn encode(&self, index: PackIndex, values: Pack, row_max: f32, number: f32) -> (Pack, u32) {
        chosen!(self, |quantizer| {
            Quantizer::<E>::encode(&quantizer, index, values, row_max, Constant::of(number))
        })
    }

    #[inline(always)]
    unsafe fn store_words(&self, index: PackIndex, norm_out: Address, words: Pack) {
        chosen!(self, |quantizer| {
            // SAFETY: see above.
            unsafe { Quantizer::<E>::store_words(&quantizer, index, norm_out, words) }
        });
    }

    #[inline(always)]
    unsafe fn store_scales(&self, index: PackIndex, scales: u32) {
        // SAFETY: see above.
        chosen!(self, |quantizer| unsafe { Quantizer::<E>::store_scales(&quantizer, index, scales) });
    }
}

/// The norm and its quantizer; without a norm, gamma is null.
type Norm = RmsNorm<AnyQuantizer>;

impl<E: Element> Epilogue<E> for AnyEpilogue {
    const ROW_SUM: bool = true;
    const ROW_MAX: bool = true;
    const WORDS: u32 = <Norm as Epilogue<E>>::WORDS;
    const SCALES: bool = true;
    type Constants = f32;
    type Weights = <Norm as Epilogue<E>>::Weights;
    type Ready = <Norm as Epilogue<E>>::Ready;

    #[inline(always)]
    fn row_sum(&self) -> bool {
        // `black_box`, so that this is asked where it is used.
        simt::black_box_u64(self.norm.gamma.0) != 0
    }

    #[inline(always)]
    fn row_max(&self) -> bool {
        Epilogue::<E>::row_max(&self.norm)
    }

    #[inline(always)]
    fn words(&self) -> u32 {
        Epilogue::<E>::words(&self.norm)
    }

    #[inline(always)]
    fn sends_scales(&self) -> bool {
        Epilogue::<E>::sends_scales(&self.norm)
    }

    #[inline(always)]
    unsafe fn constants(&self) -> f32 {
        // SAFETY: the addresses of the norm are this epilogue's; so below.
        unsafe { Epilogue::<E>::constants(&self.norm) }
    }

    #[inline(always)]
    unsafe fn weights(&self, pack: u32) -> Self::Weights {
        if !Epilogue::<E>::row_sum(self) {
            return Self::Weights::default();
        }
        // SAFETY: see above.
        unsafe { Epilogue::<E>::weights(&self.norm, pack) }
    }

    #[inline(always)]
    unsafe fn ready(&self, pack: u32, weights: Self::Weights) -> Self::Ready {
        if !Epilogue::<E>::row_sum(self) {
            return Self::Ready::default();
        }
        // SAFETY: see above.
        unsafe { Epilogue::<E>::ready(&self.norm, pack, weights) }
    }

    #[inline(always)]
    unsafe fn fill_padding(&self, shape: &Shape, thread: u32, threads: u32) {
        // SAFETY: see above.
        unsafe { Epilogue::<E>::fill_padding(&self.norm, shape, thread, threads) }
    }

    #[inline(always)]
    fn addend(&self, row: Pack) -> f32 {
        Epilogue::<E>::addend(&self.norm, row)
    }

    #[inline(always)]
    fn row_value(&self, sum: f32) -> f32 {
        Epilogue::<E>::row_value(&self.norm, sum)
    }

    #[inline(always)]
    fn magnitude(&self, row: Pack, row_value: f32, weights: Self::Ready) -> f32 {
        let is_norm = Epilogue::<E>::row_sum(self);
        let values = if is_norm { normalize::<E>(row, row_value, weights) } else { row };
        Quantizer::<E>::magnitude(&self.norm.quantizer, values)
    }

    #[inline(always)]
    fn scale_packs_log2(&self) -> u32 {
        Epilogue::<E>::scale_packs_log2(&self.norm)
    }

    #[inline(always)]
    unsafe fn finish(
        &self,
        index: PackIndex,
        row: Pack,
        of_row: RowValues,
        weights: Self::Ready,
        constants: f32,
    ) {
        // One call of the quantizer, with a norm or without: its code is long.
        let mut values = row;
        // SAFETY: the pack is inside the tensors, and this thread's alone.
        unsafe {
            if Epilogue::<E>::row_sum(self) {
                values = normalize::<E>(row, of_row.value, weights);
                if !self.norm.norm_out.is_null() {
                    simt::store(index.of(self.norm.norm_out), values);
                }
            }
            Quantizer::<E>::store(&self.norm.quantizer, index, values, of_row.max, constants);
        }
    }

    #[inline(always)]
    fn make(
        &self,
        index: PackIndex,
        row: Pack,
        of_row: RowValues,
        weights: Self::Ready,
        constants: f32,
    ) -> (Pack, u32) {
        Epilogue::<E>::make(&self.norm, index, row, of_row, weights, constants)
    }

    #[inline(always)]
    unsafe fn store(&self, index: PackIndex, words: Pack) {
        // SAFETY: see above.
        unsafe { Epilogue::<E>::store(&self.norm, index, words) }
    }

    #[inline(always)]
    unsafe fn store_scales(&self, index: PackIndex, scales: u32) {
        // SAFETY: see above.
        unsafe { Epilogue::<E>::store_scales(&self.norm, index, scales) }
    }
}
