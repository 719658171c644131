//! What becomes of a row once it is summed.
//!
//! An epilogue sees the finished row (`residual_out`: summed, with the residual, rounded) pack by pack. It may ask
//! for one sum over the row, as RMSNorm does, before it stores anything. [`Plain`] and [`RmsNorm`] are epilogues;
//! what either hands on, the row or its norm, goes to a [`Quantizer`].

use fused_collective_core::{dtype::Element, pack::Pack};

use crate::{
    convert,
    params::{Address, Plain, RmsNorm, Shape},
    simt,
};

mod quantize;

/// Where a pack is in the operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The token, counted from the operation's first.
    pub token: u64,
    /// The pack in its row.
    pub pack: u32,
    /// Packs of a row.
    pub row_packs: u32,
}

impl Place {
    /// Which pack of the whole tensor this is.
    #[inline(always)]
    pub fn index(self) -> u64 {
        self.token * self.row_packs as u64 + self.pack as u64
    }

    /// Where the pack is in a tensor of elements.
    #[inline(always)]
    pub fn of(self, tensor: Address) -> Address {
        tensor.offset(self.index() * Pack::BYTES)
    }
}

/// What is done with a row after the collective. Implement it to fuse something else.
///
/// Calls come from every thread for the packs that are its own: `constants` and `weights` first, before the
/// dependent-launch wait, so they may read only what is constant while kernels run; then for each row `addend` for
/// each pack, `row_value` once, `finish` for each pack. A thread that has more than one pack of a row calls `weights`
/// before each `finish` instead.
///
/// Lanes that hold the packs of one aligned group of 16 elements run `finish` for it together, so they may use
/// [`tile_max`](simt::tile_max) among themselves. There is no other synchronization in it.
pub trait Epilogue<E: Element>: Copy {
    /// Whether `finish` needs a sum over the row. Without, `addend` and `row_value` are never called.
    const ROW_SUM: bool;
    /// What is read once for the whole operation.
    type Constants: Copy;
    /// What is read for each pack of a row, the same in every row.
    type Weights: Copy + Default;

    /// Reads the constants.
    ///
    /// # Safety
    /// The addresses in `self` are as its documentation says.
    unsafe fn constants(&self) -> Self::Constants;

    /// Reads the weights of pack `pack` of a row.
    ///
    /// # Safety
    /// As [`constants`](Self::constants); `pack` is less than the row's number of packs.
    unsafe fn weights(&self, pack: u32) -> Self::Weights;

    /// Writes what its outputs have besides rows. Every thread of the launch calls this once, after the
    /// dependent-launch wait: it is thread `thread` of `threads`.
    ///
    /// # Safety
    /// As [`constants`](Self::constants).
    #[inline(always)]
    unsafe fn fill_padding(&self, _shape: &Shape, _thread: u32, _threads: u32) {}

    /// What a pack adds to the sum over its row.
    fn addend(&self, row: Pack) -> f32;

    /// What all packs of a row are told, from the sum over it.
    fn row_value(&self, sum: f32) -> f32;

    /// Stores what is made of one pack of a row. `row_value` is 0 without [`ROW_SUM`](Self::ROW_SUM).
    ///
    /// # Safety
    /// As [`constants`](Self::constants); `place` is inside the tensors.
    unsafe fn finish(
        &self,
        place: Place,
        row: Pack,
        row_value: f32,
        weights: Self::Weights,
        constants: Self::Constants,
    );
}

/// An epilogue whose results can be sent: a token's owner makes them, and every rank stores them. What a pack becomes is
/// [`WORDS`](Self::WORDS) words, and for each [`SCALE_PACKS`](Self::SCALE_PACKS) packs of a row one word of block
/// scales.
///
/// [`collective::sharded`](crate::collective::sharded) uses this in place of [`finish`](Epilogue::finish).
pub trait Gathered<E: Element>: Epilogue<E> {
    /// Words that a pack becomes: 1, 2 or 4.
    const WORDS: u32;
    /// Packs whose block scales are one word: a power of two, at most 32; 0 where no scales are sent.
    const SCALE_PACKS: u32;

    /// What becomes of a pack of a row: its words, the others zero, and for the first pack of each
    /// [`SCALE_PACKS`](Self::SCALE_PACKS) their scales. `row_value` is 0 without [`ROW_SUM`](Epilogue::ROW_SUM).
    ///
    /// All lanes of a warp call this together, with `pack` the pack of lane 0 plus the lane. Those past the row's end
    /// (`row_packs` or more) have zeros, and what they make is not used.
    fn make(
        &self,
        place: Place,
        row: Pack,
        row_value: f32,
        weights: Self::Weights,
        constants: Self::Constants,
    ) -> (Pack, u32);

    /// Stores the words that a pack became.
    ///
    /// # Safety
    /// As [`finish`](Epilogue::finish).
    unsafe fn store(&self, place: Place, words: Pack);

    /// Stores the scales of `SCALE_PACKS` packs, of which `place` is the first.
    ///
    /// # Safety
    /// As [`finish`](Epilogue::finish).
    unsafe fn store_scales(&self, place: Place, scales: u32);
}

/// A quantizer whose codes can be sent: what [`Gathered`] asks, of a norm.
pub trait Encoder<E: Element>: Quantizer<E> {
    /// As [`Gathered::WORDS`].
    const WORDS: u32;
    /// As [`Gathered::SCALE_PACKS`].
    const SCALE_PACKS: u32;

    /// As [`Gathered::make`], of a pack of the norm.
    fn encode(place: Place, values: Pack, constants: Self::Constants) -> (Pack, u32);

    /// As [`Gathered::store`]. `norm_out` is where the norm goes, if that is what is sent.
    ///
    /// # Safety
    /// As [`Quantizer::store`].
    unsafe fn store_words(&self, place: Place, norm_out: Address, words: Pack);

    /// As [`Gathered::store_scales`].
    ///
    /// # Safety
    /// As [`Quantizer::store`].
    #[inline(always)]
    unsafe fn store_scales(&self, _place: Place, _scales: u32) {}
}

/// What is made of a finished row or norm, pack by pack.
pub trait Quantizer<E: Element>: Copy {
    /// What is read once for the whole operation: see [`Epilogue::Constants`].
    type Constants: Copy;

    /// Reads the constants.
    ///
    /// # Safety
    /// The addresses in `self` are as its documentation says.
    unsafe fn constants(&self) -> Self::Constants;

    /// As [`Epilogue::fill_padding`].
    ///
    /// # Safety
    /// As [`constants`](Self::constants).
    #[inline(always)]
    unsafe fn fill_padding(&self, _shape: &Shape, _thread: u32, _threads: u32) {}

    /// Quantizes one pack and stores it. Synchronization as in [`Epilogue`].
    ///
    /// # Safety
    /// As [`constants`](Self::constants); `place` is inside the tensors.
    unsafe fn store(&self, place: Place, values: Pack, constants: Self::Constants);
}

impl<E: Element, Q: Quantizer<E>> Epilogue<E> for Plain<Q> {
    const ROW_SUM: bool = false;
    type Constants = Q::Constants;
    type Weights = ();

    #[inline(always)]
    unsafe fn constants(&self) -> Q::Constants {
        // SAFETY: as this function's.
        unsafe { self.quantizer.constants() }
    }

    #[inline(always)]
    unsafe fn weights(&self, _pack: u32) {}

    #[inline(always)]
    unsafe fn fill_padding(&self, shape: &Shape, thread: u32, threads: u32) {
        // SAFETY: as this function's.
        unsafe { self.quantizer.fill_padding(shape, thread, threads) }
    }

    #[inline(always)]
    fn addend(&self, _row: Pack) -> f32 {
        0.0
    }

    #[inline(always)]
    fn row_value(&self, _sum: f32) -> f32 {
        0.0
    }

    #[inline(always)]
    unsafe fn finish(&self, place: Place, row: Pack, _: f32, _: (), constants: Q::Constants) {
        // SAFETY: as this function's.
        unsafe { self.quantizer.store(place, row, constants) }
    }
}

impl<E: Element, Q: Quantizer<E>> Epilogue<E> for RmsNorm<Q> {
    const ROW_SUM: bool = true;
    type Constants = Q::Constants;
    /// Gamma.
    type Weights = Pack;

    #[inline(always)]
    unsafe fn constants(&self) -> Q::Constants {
        // SAFETY: as this function's.
        unsafe { self.quantizer.constants() }
    }

    #[inline(always)]
    unsafe fn weights(&self, pack: u32) -> Pack {
        // SAFETY: gamma has a row's packs and is constant.
        unsafe { simt::load_constant(self.gamma.offset(pack as u64 * Pack::BYTES)) }
    }

    #[inline(always)]
    unsafe fn fill_padding(&self, shape: &Shape, thread: u32, threads: u32) {
        // SAFETY: as this function's.
        unsafe { self.quantizer.fill_padding(shape, thread, threads) }
    }

    #[inline(always)]
    fn addend(&self, row: Pack) -> f32 {
        let mut sum = 0.0;
        for &value in convert::widen::<E>(row).as_ref() {
            sum = simt::fma(value, value, sum);
        }
        sum
    }

    #[inline(always)]
    fn row_value(&self, sum: f32) -> f32 {
        simt::rsqrt(simt::fma(sum, self.inverse_hidden, self.epsilon))
    }

    #[inline(always)]
    unsafe fn finish(&self, place: Place, row: Pack, inverse_rms: f32, gamma: Pack, constants: Q::Constants) {
        let norm = normalize::<E, Q>(self, row, inverse_rms, gamma);
        // SAFETY: the place is inside the tensors, and this thread's alone.
        unsafe {
            if !self.norm_out.is_null() {
                simt::store(place.of(self.norm_out), norm);
            }
            self.quantizer.store(place, norm, constants);
        }
    }
}

/// The norm of a pack of a row.
#[inline(always)]
fn normalize<E: Element, Q>(epilogue: &RmsNorm<Q>, row: Pack, inverse_rms: f32, gamma: Pack) -> Pack {
    let mut wide = convert::widen::<E>(row);
    for (value, gamma) in wide.as_mut().iter_mut().zip(convert::widen::<E>(simt::opaque(gamma)).as_ref()) {
        *value = *value * inverse_rms * (epilogue.weight_bias + gamma);
    }
    convert::narrow::<E>(wide)
}

impl<E: Element, Q: Encoder<E>> Gathered<E> for RmsNorm<Q> {
    const WORDS: u32 = Q::WORDS;
    const SCALE_PACKS: u32 = Q::SCALE_PACKS;

    #[inline(always)]
    fn make(
        &self,
        place: Place,
        row: Pack,
        inverse_rms: f32,
        gamma: Pack,
        constants: Q::Constants,
    ) -> (Pack, u32) {
        Q::encode(place, normalize::<E, Q>(self, row, inverse_rms, gamma), constants)
    }

    #[inline(always)]
    unsafe fn store(&self, place: Place, words: Pack) {
        // SAFETY: as this function's.
        unsafe { self.quantizer.store_words(place, self.norm_out, words) }
    }

    #[inline(always)]
    unsafe fn store_scales(&self, place: Place, scales: u32) {
        // SAFETY: as this function's.
        unsafe { self.quantizer.store_scales(place, scales) }
    }
}
