//! The sums of hosts, as one kernel leaves them and the next one sums them; and what tells a kernel of two hops whether its
//! owners sum those or what ranks push.

use fused_collective_core::{dtype::Element, pack::Pack};

use super::{
    begun::Begun,
    wait::{Awaited, Waiter},
};
use crate::{
    convert,
    launch::{Address, HOST_FAILED, Partials, Shape, Status},
    simt,
};

/// The origin of what the owner of a token sums.
pub(super) trait Origin<E: Element>: Copy {
    /// True if ranks push it in this kernel, in a first hop; false if hosts have gathered it.
    const FIRST_HOP: bool;

    /// The fewest ranks of a group.
    const LEAST_RANKS: u32;

    /// Does what stands in place of a first hop, before the epochs are advanced. Every thread calls this.
    ///
    /// # Safety
    /// After the dependent-launch wait; the addresses are as their documentation says.
    unsafe fn begin(&self, begun: &mut Begun<'_>, shape: &Shape);

    /// Sums what hosts have gathered of pack `pack` of the `index`-th token that this rank owns. A failure of another host ends
    /// the operation as a wait that fails does.
    ///
    /// # Safety
    /// As [`begin`](Self::begin); there are the token and the pack.
    unsafe fn sum(&self, waiter: &mut Waiter<'_>, index: u32, pack: u32, awaited: Awaited<'_>) -> E::Wide;
}

/// Addends that the ranks of the group push.
#[derive(Clone, Copy)]
pub(super) struct Ranks;

impl<E: Element> Origin<E> for Ranks {
    const FIRST_HOP: bool = true;
    const LEAST_RANKS: u32 = 2;

    #[inline(always)]
    unsafe fn begin(&self, _begun: &mut Begun<'_>, _shape: &Shape) {}

    #[inline(always)]
    unsafe fn sum(
        &self,
        _waiter: &mut Waiter<'_>,
        _index: u32,
        _pack: u32,
        _awaited: Awaited<'_>,
    ) -> E::Wide {
        // Never called: hosts have gathered nothing. What ranks push is summed where it arrives, which keeps the kernels' code as it
        // was measured.
        E::WIDE_ZERO
    }
}

impl<E: Element> Origin<E> for Partials {
    const FIRST_HOP: bool = false;
    const LEAST_RANKS: u32 = 1;

    #[inline(always)]
    unsafe fn begin(&self, begun: &mut Begun<'_>, shape: &Shape) {
        // SAFETY: as this function's; so below.
        unsafe { begun.tell(Status::GATHERS_ENDED) };
        // Where the host has ended the gather the rows are those of another operation, and nothing in them tells. One thread of a
        // block looks, as the word is across the bus, and has the others know when they advance the epochs.
        if simt::thread() == 0 {
            // SAFETY: see above.
            unsafe { begun.waiter.look(self.host, Awaited { shape, token: 0, hop: HOST_FAILED }) };
        }
    }

    #[inline(always)]
    unsafe fn sum(&self, waiter: &mut Waiter<'_>, index: u32, pack: u32, awaited: Awaited<'_>) -> E::Wide {
        let mut at = place::<E>(self, awaited.shape, 0, index, pack);
        let mut sum = E::WIDE_ZERO;
        let mut host = 0;
        while host < self.hosts {
            // Those of two hosts are on their way at the same time.
            let is_second = host + 1 < self.hosts;
            let next = at.offset(self.host_stride);
            // SAFETY: as this function's; hosts have gathered these rows, and nobody writes them now.
            let [first, second] = unsafe { [load::<E>(self, true, at), load::<E>(self, is_second, next)] };
            let is_complete = |packs: [Pack; 2]| packs[0].is_complete() & packs[1].is_complete();
            if !(is_complete(first) & is_complete(second)) && !waiter.failed {
                let missing = if is_complete(first) { host + 1 } else { host };
                // SAFETY: as this function's.
                unsafe { waiter.fail(HOST_FAILED, missing, awaited) };
            }
            // Not added to zero, which would make another zero of -0.
            if host == 0 {
                sum = values::<E>(self, first);
            } else {
                add::<E>(&mut sum, values::<E>(self, first));
            }
            if is_second {
                add::<E>(&mut sum, values::<E>(self, second));
            }
            // `black_box`, or a compiler has the loop's body several times.
            host = simt::black_box_u32(host + 2);
            at = next.offset(self.host_stride);
        }
        sum
    }
}

/// Writes this host's sum of pack `pack` of the `index`-th token that this rank owns, without the sentinel; or the sentinel,
/// if a wait has `failed`.
///
/// # Safety
/// There are the token and the pack, and this thread alone touches them.
#[inline(always)]
pub(super) unsafe fn store<E: Element>(
    partials: &Partials,
    shape: &Shape,
    index: u32,
    pack: u32,
    sum: E::Wide,
    failed: bool,
) {
    let at = place::<E>(partials, shape, partials.host, index, pack);
    let fit = |pack: Pack| if failed { Pack::SENTINEL } else { pack.strip() };
    // SAFETY: as this function's; so below.
    unsafe {
        if is_wide::<E>(partials) {
            let (fours, _) = sum.as_ref().as_chunks::<4>();
            for (place, four) in (0..).zip(fours) {
                simt::store(at.offset(place * Pack::BYTES), fit(Pack(four.map(f32::to_bits))));
            }
        } else {
            simt::store(at, fit(convert::narrow::<E>(sum)));
        }
    }
}

/// True if a pack of elements is two packs of sums.
#[inline(always)]
fn is_wide<E: Element>(partials: &Partials) -> bool {
    E::LANES == 8 && partials.element == 0
}

/// The place of pack `pack` of row `index` of host `host`.
#[inline(always)]
fn place<E: Element>(partials: &Partials, shape: &Shape, host: u32, index: u32, pack: u32) -> Address {
    let packs = index as u64 * shape.row_packs as u64 + pack as u64;
    let bytes = packs * if is_wide::<E>(partials) { 2 * Pack::BYTES } else { Pack::BYTES };
    partials.rows.offset(host as u64 * partials.host_stride + bytes)
}

/// The sums of a pack of elements, if there are any: zeros else.
///
/// # Safety
/// They are at `at`, if there are any, and nobody writes them.
#[inline(always)]
unsafe fn load<E: Element>(partials: &Partials, is_there: bool, at: Address) -> [Pack; 2] {
    let is_wide = is_wide::<E>(partials);
    // SAFETY: as this function's.
    unsafe { [simt::load_if(is_there, at), simt::load_if(is_there & is_wide, at.offset(Pack::BYTES))] }
}

/// The sums in packs.
#[inline(always)]
fn values<E: Element>(partials: &Partials, packs: [Pack; 2]) -> E::Wide {
    if !is_wide::<E>(partials) {
        return convert::widen::<E>(packs[0]);
    }
    let mut values = E::WIDE_ZERO;
    let (fours, _) = values.as_mut().as_chunks_mut::<4>();
    for (four, pack) in fours.iter_mut().zip(&packs) {
        *four = pack.0.map(f32::from_bits);
    }
    values
}

#[inline(always)]
fn add<E: Element>(sum: &mut E::Wide, values: E::Wide) {
    for (sum, value) in sum.as_mut().iter_mut().zip(values.as_ref()) {
        *sum += value;
    }
}
