//! The 16-byte vector of elements: the unit of all loads, stores and exchanges.
//!
//! A row is a whole number of packs, since hidden sizes are multiples of 16. The order of elements in a pack is their
//! order in little-endian memory.

use crate::{dtype::Element, lamport};

/// Sixteen bytes: four `f32`, or eight `f16` or `bf16`. The first element is in the low bits of the first word.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pack(pub [u32; 4]);

impl Pack {
    /// Bytes of a pack.
    pub const BYTES: u64 = 16;
    /// The content of a slot until data arrives; no rank ever sends a word of it.
    pub const SENTINEL: Pack = Pack([lamport::SENTINEL; 4]);

    /// The elements as `f32`, exactly.
    #[inline(always)]
    pub fn widen<E: Element>(self) -> E::Wide {
        E::widen(self.0)
    }

    /// Rounds `wide` to elements, to nearest even.
    #[inline(always)]
    pub fn narrow<E: Element>(wide: E::Wide) -> Self {
        Pack(E::narrow(wide))
    }

    /// Replaces sentinel words, which must not be sent, by other NaNs: see [`lamport::strip`].
    #[inline(always)]
    pub fn strip(self) -> Self {
        Pack(self.0.map(lamport::strip))
    }

    /// True if every word has arrived: see [`lamport::is_complete`].
    #[inline(always)]
    pub fn is_complete(self) -> bool {
        let [a, b, c, d] = self.0;
        lamport::is_complete(a) & lamport::is_complete(b) & lamport::is_complete(c) & lamport::is_complete(d)
    }
}
