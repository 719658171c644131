//! What becomes of a row once it is summed.
//!
//! An epilogue sees the finished row (`residual_out`: summed, with the residual, rounded) pack by pack. It may ask
//! for one sum over the row, as RMSNorm does, before it stores anything. [`Plain`] and [`RmsNorm`] are epilogues;
//! what either hands on, the row or its norm, goes to a [`Quantizer`].

use fused_collective_core::{dtype::Element, norm, pack::Pack, quant::scale};

use crate::{
    convert,
    launch::{Address, Plain, RmsNorm, Shape, Unquantized},
    simt::{self, WARP},
};

mod any;
mod fp4;
mod fp8;
mod scales;

/// [`Epilogue::scale_packs_log2`] of a row that has one scale.
pub const WHOLE_ROW: u32 = 31;

/// The position of a pack in the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackIndex {
    /// The token, counted from the operation's first.
    pub token: u64,
    /// The pack in its row.
    pub pack: u32,
    /// Packs of a row.
    pub row_packs: u32,
    /// Bytes before the pack, in a tensor of elements.
    offset: u64,
}

impl PackIndex {
    /// Pack `pack` of token `token`, of rows of `row_packs` packs.
    #[inline(always)]
    pub fn new(token: u64, pack: u32, row_packs: u32) -> PackIndex {
        PackIndex { token, pack, row_packs, offset: (token * row_packs as u64 + pack as u64) * Pack::BYTES }
    }

    /// The same, in registers: a compiler does not compute it again wherever it is used.
    #[inline(always)]
    pub(crate) fn kept(self) -> PackIndex {
        PackIndex { offset: simt::black_box_u64(self.offset), ..self }
    }

    /// Lanes of the warp that have packs of this row at the same time, from lane 0 on.
    #[inline(always)]
    pub fn lanes(self) -> u32 {
        (self.row_packs - self.pack / WARP * WARP).min(WARP)
    }

    /// The pack's index in the whole tensor.
    #[inline(always)]
    pub fn in_tensor(self) -> u64 {
        self.offset / Pack::BYTES
    }

    /// The pack's address in a tensor of elements.
    #[inline(always)]
    pub fn of(self, tensor: Address) -> Address {
        tensor.offset(self.offset)
    }
}

/// Values of a row that all its packs need.
#[derive(Clone, Copy, Debug, Default)]
pub struct RowValues {
    /// [`Epilogue::row_value`]; 0 without [`Epilogue::ROW_SUM`].
    pub value: f32,
    /// The largest [`Epilogue::magnitude`]; 0 without [`Epilogue::ROW_MAX`].
    pub max: f32,
}

/// The work on a row after the collective. Implement it to fuse something else: [`finish`](Self::finish) is all that it
/// takes where there are neither constants nor weights nor a sum over the row.
///
/// Calls come from every thread for the packs that are its own: `constants` and `weights` first, which may be before the
/// dependent-launch wait, so they read only what is constant while kernels run; then for each row `addend` for each pack,
/// `row_value` once, `magnitude` for each pack, `finish` for each pack. A thread that has more than one pack of a row calls
/// `weights` before each `finish` instead.
///
/// The lanes of a warp that hold packs of a row run `finish` for it together, [as many](PackIndex::lanes) from lane 0 on, and
/// neighbours in the row are neighbours in the warp: so they may use [`tile_max`](simt::tile_max) among themselves. There
/// is no other synchronization in it.
///
/// # Results that are sent
/// With a sharded residual a token's owner makes the results, and every rank stores them:
/// [`collective::sharded`](crate::collective::sharded) calls `make`, `store` and `store_scales` in place of `finish`. A
/// pack becomes [`WORDS`](Self::WORDS) words and, where there are [`SCALES`](Self::SCALES), several packs of a row one
/// word of scales. An epilogue that leaves `WORDS` at 0 has no such kernels.
///
/// # Chosen at launch
/// The constants say what a kernel has code for. Of an epilogue whose parameters choose among several, as
/// [`AnyEpilogue`](crate::launch::AnyEpilogue), the functions named like them say what a launch needs, at most that.
pub trait Epilogue<E: Element>: Copy {
    /// Whether `finish` needs a sum over the row. Without, `addend` and `row_value` are never called.
    const ROW_SUM: bool = false;
    /// True if `finish` needs the largest magnitude of the row. Without, `magnitude` is never called.
    const ROW_MAX: bool = false;
    /// Words that a pack becomes: 1, 2 or 4; 0 where results are not sent.
    const WORDS: u32 = 0;
    /// True if scales are sent beside the words.
    const SCALES: bool = false;

    /// What is read once for the whole operation.
    type Constants: Copy + Default;
    /// What is read for each pack of a row, the same in every row.
    type Weights: Copy + Default;
    /// The weights as `finish` takes them.
    type Ready: Copy + Default;

    /// [`ROW_SUM`](Self::ROW_SUM), of this launch.
    #[inline(always)]
    fn row_sum(&self) -> bool {
        Self::ROW_SUM
    }

    /// [`ROW_MAX`](Self::ROW_MAX), of this launch.
    #[inline(always)]
    fn row_max(&self) -> bool {
        Self::ROW_MAX
    }

    /// [`WORDS`](Self::WORDS), of this launch.
    #[inline(always)]
    fn words(&self) -> u32 {
        Self::WORDS
    }

    /// [`SCALES`](Self::SCALES), of this launch.
    #[inline(always)]
    fn sends_scales(&self) -> bool {
        Self::SCALES
    }

    /// Reads the constants.
    ///
    /// # Safety
    /// The addresses in `self` are as its documentation says.
    #[inline(always)]
    unsafe fn constants(&self) -> Self::Constants {
        Self::Constants::default()
    }

    /// Reads the weights of pack `pack` of a row.
    ///
    /// # Safety
    /// As [`constants`](Self::constants); `pack` is less than the row's number of packs.
    #[inline(always)]
    unsafe fn weights(&self, _pack: u32) -> Self::Weights {
        Self::Weights::default()
    }

    /// Makes the weights of pack `pack` of a row ready. Where a kernel has registers for the result it calls this once, else for
    /// each row.
    ///
    /// # Safety
    /// As [`weights`](Self::weights).
    #[inline(always)]
    unsafe fn ready(&self, _pack: u32, _weights: Self::Weights) -> Self::Ready {
        Self::Ready::default()
    }

    /// Writes what its outputs have besides rows. Every thread of the launch calls this once, after the
    /// dependent-launch wait: it is thread `thread` of `threads`.
    ///
    /// # Safety
    /// As [`constants`](Self::constants).
    #[inline(always)]
    unsafe fn fill_padding(&self, _shape: &Shape, _thread: u32, _threads: u32) {}

    /// A pack's addend to the sum over its row.
    #[inline(always)]
    fn addend(&self, _row: Pack) -> f32 {
        0.0
    }

    /// What all packs of a row are told, from the sum over it.
    #[inline(always)]
    fn row_value(&self, _sum: f32) -> f32 {
        0.0
    }

    /// A pack's largest magnitude, which must not be NaN, of what the maximum over its row is taken of.
    #[inline(always)]
    fn magnitude(&self, _row: Pack, _row_value: f32, _weights: Self::Ready) -> f32 {
        0.0
    }

    /// The logarithm of the number of packs whose scales are one word: at most 5, or [`WHOLE_ROW`].
    #[inline(always)]
    fn scale_packs_log2(&self) -> u32 {
        0
    }

    /// Stores what is made of one pack of a row.
    ///
    /// # Safety
    /// As [`constants`](Self::constants); `index` is inside the tensors.
    unsafe fn finish(
        &self,
        index: PackIndex,
        row: Pack,
        of_row: RowValues,
        weights: Self::Ready,
        constants: Self::Constants,
    );

    /// Makes of a pack of a row what is sent: its words, the others zero, and for the first pack of those that share a word
    /// of scales this word.
    ///
    /// All lanes of a warp call this together, with `pack` the pack of lane 0 plus the lane. Those past the row's end
    /// (`row_packs` or more) have zeros, and what they make is not used.
    #[inline(always)]
    fn make(
        &self,
        _index: PackIndex,
        _row: Pack,
        _of_row: RowValues,
        _weights: Self::Ready,
        _constants: Self::Constants,
    ) -> (Pack, u32) {
        (Pack::default(), 0)
    }

    /// Stores the words that a pack became.
    ///
    /// # Safety
    /// As [`finish`](Self::finish).
    #[inline(always)]
    unsafe fn store(&self, _index: PackIndex, _words: Pack) {}

    /// Stores a word of scales, of the packs of which `index` is the first.
    ///
    /// # Safety
    /// As [`finish`](Self::finish).
    #[inline(always)]
    unsafe fn store_scales(&self, _index: PackIndex, _scales: u32) {}
}

/// A quantization of a finished row or norm, pack by pack.
pub trait Quantizer<E: Element>: Copy {
    /// As [`Epilogue::WORDS`]: quantizers of a norm send their codes.
    const WORDS: u32;
    /// As [`Epilogue::SCALES`].
    const SCALES: bool = false;
    /// As [`Epilogue::ROW_MAX`]: the maximum is that of [`magnitude`](Self::magnitude)s.
    const ROW_MAX: bool = false;

    /// What is read once for the whole operation: see [`Epilogue::Constants`].
    type Constants: Copy + Default;

    /// As [`Epilogue::words`].
    #[inline(always)]
    fn words(&self) -> u32 {
        Self::WORDS
    }

    /// As [`Epilogue::sends_scales`].
    #[inline(always)]
    fn sends_scales(&self) -> bool {
        Self::SCALES
    }

    /// As [`Epilogue::row_max`].
    #[inline(always)]
    fn row_max(&self) -> bool {
        Self::ROW_MAX
    }

    /// Reads the constants.
    ///
    /// # Safety
    /// The addresses in `self` are as its documentation says.
    #[inline(always)]
    unsafe fn constants(&self) -> Self::Constants {
        Self::Constants::default()
    }

    /// As [`Epilogue::fill_padding`].
    ///
    /// # Safety
    /// As [`constants`](Self::constants).
    #[inline(always)]
    unsafe fn fill_padding(&self, _shape: &Shape, _thread: u32, _threads: u32) {}

    /// As [`Epilogue::scale_packs_log2`].
    #[inline(always)]
    fn scale_packs_log2(&self) -> u32 {
        0
    }

    /// The largest magnitude of a pack, NaN skipped.
    #[inline(always)]
    fn magnitude(&self, values: Pack) -> f32 {
        convert::widen::<E>(values).as_ref().iter().fold(0.0, |largest, &value| scale::amax(largest, value))
    }

    /// Quantizes one pack and stores it. Synchronization as in [`Epilogue`].
    ///
    /// # Safety
    /// As [`constants`](Self::constants); `index` is inside the tensors.
    unsafe fn store(&self, index: PackIndex, values: Pack, row_max: f32, constants: Self::Constants);

    /// As [`Epilogue::make`], of a pack of the norm.
    fn encode(&self, index: PackIndex, values: Pack, row_max: f32, constants: Self::Constants)
    -> (Pack, u32);

    /// As [`Epilogue::store`]. `norm_out` is where the norm goes, if that is what is sent.
    ///
    /// # Safety
    /// As [`store`](Self::store).
    unsafe fn store_words(&self, index: PackIndex, norm_out: Address, words: Pack);

    /// As [`Epilogue::store_scales`].
    ///
    /// # Safety
    /// As [`store`](Self::store).
    #[inline(always)]
    unsafe fn store_scales(&self, _index: PackIndex, _scales: u32) {}
}

impl<E: Element> Quantizer<E> for Unquantized {
    /// The norm itself is sent.
    const WORDS: u32 = 4;
    type Constants = ();

    #[inline(always)]
    unsafe fn store(&self, _index: PackIndex, _values: Pack, _row_max: f32, _constants: ()) {}

    #[inline(always)]
    fn encode(&self, _index: PackIndex, values: Pack, _row_max: f32, _constants: ()) -> (Pack, u32) {
        (values, 0)
    }

    #[inline(always)]
    unsafe fn store_words(&self, index: PackIndex, norm_out: Address, words: Pack) {
        // SAFETY: as this function's.
        unsafe { simt::store(index.of(norm_out), words) }
    }
}

impl<E: Element, Q: Quantizer<E>> Epilogue<E> for Plain<Q> {
    const ROW_MAX: bool = Q::ROW_MAX;
    type Constants = Q::Constants;
    type Weights = ();
    type Ready = ();

    #[inline(always)]
    fn row_max(&self) -> bool {
        self.quantizer.row_max()
    }

    #[inline(always)]
    unsafe fn constants(&self) -> Q::Constants {
        // SAFETY: the addresses of the quantizer are this epilogue's.
        unsafe { self.quantizer.constants() }
    }

    #[inline(always)]
    unsafe fn fill_padding(&self, shape: &Shape, thread: u32, threads: u32) {
        // SAFETY: as this function's.
        unsafe { self.quantizer.fill_padding(shape, thread, threads) }
    }

    #[inline(always)]
    fn magnitude(&self, row: Pack, _: f32, _: ()) -> f32 {
        self.quantizer.magnitude(row)
    }

    #[inline(always)]
    unsafe fn finish(&self, index: PackIndex, row: Pack, of_row: RowValues, _: (), constants: Q::Constants) {
        // SAFETY: as this function's.
        unsafe { self.quantizer.store(index, row, of_row.max, constants) }
    }
}

impl<E: Element, Q: Quantizer<E>> Epilogue<E> for RmsNorm<Q> {
    const ROW_SUM: bool = true;
    const ROW_MAX: bool = Q::ROW_MAX;
    const WORDS: u32 = Q::WORDS;
    const SCALES: bool = Q::SCALES;
    type Constants = Q::Constants;
    /// Gamma, if it is elements.
    type Weights = Pack;
    /// Gamma plus its bias.
    type Ready = E::Wide;

    #[inline(always)]
    fn row_max(&self) -> bool {
        self.quantizer.row_max()
    }

    #[inline(always)]
    fn words(&self) -> u32 {
        self.quantizer.words()
    }

    #[inline(always)]
    fn sends_scales(&self) -> bool {
        self.quantizer.sends_scales()
    }

    #[inline(always)]
    unsafe fn constants(&self) -> Q::Constants {
        // SAFETY: as this function's.
        unsafe { self.quantizer.constants() }
    }

    #[inline(always)]
    unsafe fn weights(&self, pack: u32) -> Pack {
        if has_f32_gamma::<E, Q>(self) {
            return Pack::default();
        }
        // SAFETY: gamma has a row's packs and is constant.
        unsafe { simt::load_constant(self.gamma.offset(pack as u64 * Pack::BYTES)) }
    }

    #[inline(always)]
    unsafe fn ready(&self, pack: u32, gamma: Pack) -> E::Wide {
        let mut weights = if has_f32_gamma::<E, Q>(self) {
            // Not kept where there are few registers, but read for each row, from a cache.
            // SAFETY: gamma has as many `f32` as a row has elements, and is constant.
            unsafe { f32_weights::<E>(self.gamma, pack) }
        } else {
            // `black_box`, so that nothing of this is computed ahead of the loop over rows where it is called in that.
            convert::widen::<E>(simt::black_box(gamma))
        };
        for weight in weights.as_mut() {
            *weight += self.weight_bias;
        }
        weights
    }

    #[inline(always)]
    unsafe fn fill_padding(&self, shape: &Shape, thread: u32, threads: u32) {
        // SAFETY: as this function's.
        unsafe { self.quantizer.fill_padding(shape, thread, threads) }
    }

    #[inline(always)]
    fn addend(&self, row: Pack) -> f32 {
        norm::pack_squares::<E>(convert::widen::<E>(row), simt::fma)
    }

    #[inline(always)]
    fn row_value(&self, sum: f32) -> f32 {
        norm::inverse_rms(sum, self.inverse_hidden, self.epsilon, simt::fma)
    }

    #[inline(always)]
    fn magnitude(&self, row: Pack, inverse_rms: f32, weights: E::Wide) -> f32 {
        self.quantizer.magnitude(normalize::<E>(row, inverse_rms, weights))
    }

    #[inline(always)]
    fn scale_packs_log2(&self) -> u32 {
        self.quantizer.scale_packs_log2()
    }

    #[inline(always)]
    unsafe fn finish(
        &self,
        index: PackIndex,
        row: Pack,
        of_row: RowValues,
        weights: E::Wide,
        constants: Q::Constants,
    ) {
        let norm = normalize::<E>(row, of_row.value, weights);
        // SAFETY: the pack is inside the tensors, and this thread's alone.
        unsafe {
            if !self.norm_out.is_null() {
                simt::store(index.of(self.norm_out), norm);
            }
            self.quantizer.store(index, norm, of_row.max, constants);
        }
    }

    #[inline(always)]
    fn make(
        &self,
        index: PackIndex,
        row: Pack,
        of_row: RowValues,
        weights: E::Wide,
        constants: Q::Constants,
    ) -> (Pack, u32) {
        self.quantizer.encode(index, normalize::<E>(row, of_row.value, weights), of_row.max, constants)
    }

    #[inline(always)]
    unsafe fn store(&self, index: PackIndex, words: Pack) {
        // SAFETY: as this function's.
        unsafe { self.quantizer.store_words(index, self.norm_out, words) }
    }

    #[inline(always)]
    unsafe fn store_scales(&self, index: PackIndex, scales: u32) {
        // SAFETY: as this function's.
        unsafe { self.quantizer.store_scales(index, scales) }
    }
}

/// The weights of pack `pack` of a row: `f32` beside elements of 16 bits if they are `wide`, else elements.
///
/// # Safety
/// `gamma` has a row's weights, and is constant.
#[inline(always)]
pub(crate) unsafe fn weights<E: Element>(gamma: Address, wide: bool, pack: u32) -> E::Wide {
    // SAFETY: as this function's.
    unsafe {
        if E::LANES == 8 && wide {
            f32_weights::<E>(gamma, pack)
        } else {
            convert::widen::<E>(simt::load_constant(gamma.offset(pack as u64 * Pack::BYTES)))
        }
    }
}

/// The weights of pack `pack` of a row, which are `f32`.
///
/// # Safety
/// As [`weights`].
#[inline(always)]
unsafe fn f32_weights<E: Element>(gamma: Address, pack: u32) -> E::Wide {
    let mut weights = E::WIDE_ZERO;
    let first = gamma.offset(simt::black_box_u32(pack) as u64 * (E::LANES as u64 * 4));
    for (index, four) in weights.as_mut().as_chunks_mut::<4>().0.iter_mut().enumerate() {
        // SAFETY: as this function's.
        let Pack(words) = unsafe { simt::load_constant(first.offset(index as u64 * Pack::BYTES)) };
        *four = words.map(f32::from_bits);
    }
    weights
}

/// True if gamma is `f32` beside elements of 16 bits.
#[inline(always)]
fn has_f32_gamma<E: Element, Q>(norm: &RmsNorm<Q>) -> bool {
    E::LANES == 8 && norm.gamma_f32 != 0
}

/// The norm of a pack of a row.
#[inline(always)]
fn normalize<E: Element>(row: Pack, inverse_rms: f32, weights: E::Wide) -> Pack {
    let mut wide = convert::widen::<E>(row);
    for (value, weight) in wide.as_mut().iter_mut().zip(weights.as_ref()) {
        *value = *value * inverse_rms * weight;
    }
    convert::narrow::<E>(wide)
}
