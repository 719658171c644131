//! The 16-byte vector that every load and store moves.

use crate::{dtype::Element, lamport};

/// Sixteen bytes: four `f32`, or eight `f16` or `bf16`. The first element is in the low bits of the first word.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pack(pub [u32; 4]);

impl Pack {
    /// Bytes of a pack.
    pub const BYTES: u64 = 16;
    /// A pack that no rank ever sends: what a slot holds until data arrives.
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

    /// The pack as it may be sent: see [`lamport::strip`].
    #[inline(always)]
    pub fn strip(self) -> Self {
        Pack(self.0.map(lamport::strip))
    }

    /// Whether every word has arrived: see [`lamport::SENTINEL`].
    #[inline(always)]
    pub fn is_complete(self) -> bool {
        let [a, b, c, d] = self.0;
        lamport::is_complete(a) & lamport::is_complete(b) & lamport::is_complete(c) & lamport::is_complete(d)
    }
}
