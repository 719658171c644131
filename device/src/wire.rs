//! The form in which addends cross the links: [elements](Elements), or [encoded](Encoding) in fewer bits.
//!
//! Whatever the form, what a pack becomes is a [`Pack`] again: of elements, or of the words of its codes, a word of scales that
//! it shares with its neighbours, and zeros.

use fused_collective_core::{
    dtype::Element,
    lamport,
    pack::Pack,
    wire::{self, BLOCK},
};

use crate::{
    convert,
    epilogue::PackIndex,
    launch::{Address, Encoding, Shape},
    simt::{self, WARP},
};

/// A form of addends.
///
/// Rows lie one after the other from `rows` on; `row` is which of them, and `index` the pack in it.
pub trait Wire<E: Element>: Copy {
    /// True for elements, whose rows are addressed by the index in a tensor alone, whatever `row` is.
    const ELEMENTS: bool;

    /// Bytes of a row.
    fn row_bytes(&self, shape: &Shape) -> u64;

    /// Makes of elements what is [pushed](Self::push). All lanes of a warp call this together, as [`make`](crate::epilogue::Epilogue::make).
    fn encode(&self, index: PackIndex, elements: Pack) -> Pack;

    /// Makes of a sum what is sent. As [`encode`](Self::encode).
    fn encode_sum(&self, index: PackIndex, sum: E::Wide) -> Pack;

    /// The addend, as the first of a sum.
    fn first(&self, index: PackIndex, sent: Pack) -> E::Wide;

    /// Adds the addend to a sum.
    fn add(&self, sum: &mut E::Wide, index: PackIndex, sent: Pack);

    /// Writes what a pack became to a slot, without the sentinel.
    ///
    /// # Safety
    /// The row is in a slot, and this warp alone writes these packs of it in this operation.
    unsafe fn push(&self, rows: Address, row: u32, index: PackIndex, sent: Pack);

    /// Reads it from the own slot.
    ///
    /// # Safety
    /// As [`push`](Self::push), reads.
    unsafe fn poll(&self, rows: Address, row: u32, index: PackIndex) -> Pack;

    /// Puts the sentinel back, when the whole warp has read what it wanted.
    ///
    /// # Safety
    /// As [`push`](Self::push).
    unsafe fn refill(&self, rows: Address, row: u32, index: PackIndex);
}

/// Addends that cross the links as they are.
#[derive(Clone, Copy, Debug)]
pub struct Elements;

impl<E: Element> Wire<E> for Elements {
    const ELEMENTS: bool = true;

    #[inline(always)]
    fn row_bytes(&self, shape: &Shape) -> u64 {
        shape.row_bytes()
    }

    #[inline(always)]
    fn encode(&self, _index: PackIndex, elements: Pack) -> Pack {
        elements
    }

    #[inline(always)]
    fn encode_sum(&self, _index: PackIndex, sum: E::Wide) -> Pack {
        convert::narrow::<E>(sum)
    }

    #[inline(always)]
    fn first(&self, _index: PackIndex, sent: Pack) -> E::Wide {
        convert::widen::<E>(sent)
    }

    #[inline(always)]
    fn add(&self, sum: &mut E::Wide, _index: PackIndex, sent: Pack) {
        for (sum, value) in sum.as_mut().iter_mut().zip(convert::widen::<E>(sent).as_ref()) {
            *sum += value;
        }
    }

    #[inline(always)]
    unsafe fn push(&self, rows: Address, _row: u32, index: PackIndex, sent: Pack) {
        // SAFETY: as this function's; so below.
        unsafe { simt::push(index.of(rows), sent.strip()) }
    }

    #[inline(always)]
    unsafe fn poll(&self, rows: Address, _row: u32, index: PackIndex) -> Pack {
        // SAFETY: see above.
        unsafe { simt::poll(index.of(rows)) }
    }

    #[inline(always)]
    unsafe fn refill(&self, rows: Address, _row: u32, index: PackIndex) {
        // SAFETY: see above. A push, since a peer given up on may still write.
        unsafe { simt::push(index.of(rows), Pack::SENTINEL) }
    }
}

/// Bits of the codes of the wider format; the others have half of them.
const INT8: u32 = 8;

/// The place of a pack's words in an encoded row.
#[derive(Clone, Copy)]
struct Place {
    codes: Address,
    /// Words of codes: 1 or 2.
    words: u32,
    /// True for the pack whose thread writes the codes: the first of those that share a word.
    has_codes: bool,
    scales: Address,
    /// The same of the scales.
    has_scales: bool,
}

/// Packs of a block.
const fn block_packs<E: Element>() -> u32 {
    BLOCK as u32 / E::LANES as u32
}

/// Packs that share a word of scales, which are two blocks'.
const fn pair_packs<E: Element>() -> u32 {
    2 * block_packs::<E>()
}

/// Bytes of the codes of `packs` packs.
#[inline(always)]
fn code_bytes<E: Element>(bits: u32, packs: u32) -> u64 {
    packs as u64 * (E::LANES as u32 * bits / 8) as u64
}

/// Bytes of a row of `packs` packs.
#[inline(always)]
fn row_bytes<E: Element>(bits: u32, packs: u32) -> u64 {
    let scale_bytes = packs.div_ceil(block_packs::<E>()) as u64 * 2;
    (code_bytes::<E>(bits, packs) + scale_bytes + 15) & !15
}

#[inline(always)]
fn place<E: Element>(bits: u32, rows: Address, row: u32, index: PackIndex) -> Place {
    let pack = index.pack;
    let row = rows.offset(row as u64 * row_bytes::<E>(bits, index.row_packs));
    // Four codes of four bits are half a word.
    let shared = if E::LANES == 8 || bits == INT8 { 1 } else { 2 };
    let scales = row.offset(code_bytes::<E>(bits, index.row_packs));
    Place {
        codes: row.offset(code_bytes::<E>(bits, pack & !(shared - 1))),
        words: if E::LANES == 8 && bits == INT8 { 2 } else { 1 },
        has_codes: pack & (shared - 1) == 0,
        scales: scales.offset((pack / pair_packs::<E>()) as u64 * 4),
        has_scales: pack.is_multiple_of(pair_packs::<E>()),
    }
}

/// The scale of the block of a pack.
#[inline(always)]
fn scale_of<E: Element>(index: PackIndex, scales: u32) -> f32 {
    let is_second = index.pack / block_packs::<E>() % 2 == 1;
    f32::from_bits(if is_second { scales & 0xffff_0000 } else { scales << 16 })
}

/// `values * reciprocal`, of at most eight values, as codes of `bits` bits with their offset, one in a byte:
/// [`wire::code`] of each. Four values are a word.
#[inline(always)]
fn codes(values: &[f32], reciprocal: f32, bits: u32) -> [u32; 2] {
    /// In its range the last place of an `f32` is 1, so that adding it rounds to whole numbers.
    const WHOLE: f32 = 12_582_912.0;
    let least = (1 << (bits - 1)) as f32;
    // A NaN becomes the least code, as `max` gives the other number.
    let code = |value: f32| ((value * reciprocal).max(-least).min(least - 1.0) + (WHOLE + least)).to_bits();
    let word = |values: &[f32; 4]| {
        let [a, b, c, d] = [code(values[0]), code(values[1]), code(values[2]), code(values[3])];
        // What the sums have of `WHOLE` goes away at once.
        let sum = a.wrapping_add(b << 8).wrapping_add(c << 16).wrapping_add(d << 24);
        sum.wrapping_sub(WHOLE.to_bits().wrapping_mul(0x0101_0101))
    };
    let (fours, _) = values.as_chunks();
    [fours.first().map_or(0, word), fours.get(1).map_or(0, word)]
}

/// Adds the elements that codes of `bits` bits stand for to a sum, in words as [`codes`] makes them.
#[inline(always)]
fn add_codes(sum: &mut [f32], words: [u32; 2], scale: f32, bits: u32) {
    let offset = convert::BYTE_IN_FLOAT + (1 << (bits - 1)) as f32;
    let add = |sum: &mut [f32; 4], word: u32| {
        // The difference is exact, and so is the product: the sum is rounded once.
        let plus = |place, sum| simt::fma(convert::byte_in_float(word, place) - offset, scale, sum);
        *sum = [plus(0, sum[0]), plus(1, sum[1]), plus(2, sum[2]), plus(3, sum[3])];
    };
    let (fours, _) = sum.as_chunks_mut();
    if let [first, rest @ ..] = fours {
        add(first, words[0]);
        if let [second, ..] = rest {
            add(second, words[1]);
        }
    }
}

impl<E: Element> Wire<E> for Encoding {
    const ELEMENTS: bool = false;

    #[inline(always)]
    fn row_bytes(&self, shape: &Shape) -> u64 {
        row_bytes::<E>(self.bits, shape.row_packs)
    }

    #[inline(always)]
    fn encode(&self, index: PackIndex, elements: Pack) -> Pack {
        // `black_box`, so that the registers of a second pack's values are not taken while the first's are in use.
        Wire::<E>::encode_sum(self, index, convert::widen::<E>(simt::black_box(elements)))
    }

    #[inline(always)]
    fn encode_sum(&self, index: PackIndex, sum: E::Wide) -> Pack {
        let (block, pair) = (block_packs::<E>(), pair_packs::<E>());
        let values = sum.as_ref();
        let own = values.iter().fold(0, |extreme, &value| wire::key(value).max(extreme));
        let scale = wire::scale(simt::tile_max(own, block, WARP), self.bits);
        let reciprocal = 1.0 / wire::decode_scale(scale);
        let is_second = index.pack / block % 2;
        // What is past the last block of a row is zero.
        let is_used = index.pack & !(block - 1) < index.row_packs;
        let scale = if is_used { u32::from(scale) } else { 0 };
        let scales = simt::tile_or(scale << (16 * is_second), pair, WARP);
        let [mut first, mut second] = codes(values, reciprocal, self.bits);
        if self.bits != INT8 {
            // The codes of eight elements are a word: of two packs, if they are of four.
            if E::LANES == 4 {
                first = simt::tile_or(first << (4 * (index.pack % 2)), 2, WARP);
            }
            (first, second) = (first | second << 4, 0);
        }
        Pack([lamport::strip(first), lamport::strip(second), scales, 0])
    }

    #[inline(always)]
    fn first(&self, index: PackIndex, sent: Pack) -> E::Wide {
        let mut sum = E::WIDE_ZERO;
        Wire::<E>::add(self, &mut sum, index, sent);
        sum
    }

    #[inline(always)]
    fn add(&self, sum: &mut E::Wide, index: PackIndex, sent: Pack) {
        const HALVES: u32 = 0x0f0f_0f0f;
        let Pack([mut first, mut second, scales, _]) = sent;
        if self.bits != INT8 {
            let half = if E::LANES == 4 { index.pack % 2 } else { 0 };
            (first, second) = (first >> (4 * half) & HALVES, first >> 4 & HALVES);
        }
        add_codes(sum.as_mut(), [first, second], scale_of::<E>(index, scales), self.bits);
    }

    #[inline(always)]
    unsafe fn push(&self, rows: Address, row: u32, index: PackIndex, sent: Pack) {
        // `black_box`, so that addresses are computed where they are used: kept since the poll, they would take up registers.
        let (bits, rows) = (simt::black_box_u32(self.bits), Address(simt::black_box_u64(rows.0)));
        let index = PackIndex::new(0, simt::black_box_u32(index.pack), index.row_packs);
        let place = place::<E>(bits, rows, row, index);
        // SAFETY: as this function's; so below.
        unsafe {
            if place.has_codes {
                simt::push_words(place.codes, sent, place.words);
            }
            if place.has_scales {
                simt::push_words(place.scales, Pack([sent.0[2], 0, 0, 0]), 1);
            }
        }
    }

    #[inline(always)]
    unsafe fn poll(&self, rows: Address, row: u32, index: PackIndex) -> Pack {
        let place = place::<E>(self.bits, rows, row, index);
        // SAFETY: see above.
        unsafe {
            let Pack([first, second, ..]) = simt::poll_words(place.codes, place.words);
            let Pack([scales, ..]) = simt::poll_words(place.scales, 1);
            Pack([first, second, scales, 0])
        }
    }

    #[inline(always)]
    unsafe fn refill(&self, rows: Address, row: u32, index: PackIndex) {
        let [word, _, _, zero] = Pack::SENTINEL.0;
        // SAFETY: see above. A push, since a peer given up on may still write.
        unsafe { Wire::<E>::push(self, rows, row, index, Pack([word, word, word, zero])) }
    }
}
