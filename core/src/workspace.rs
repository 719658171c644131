//! The byte layout of the region that each rank shares with its peers.
//!
//! ```text
//! 0                  header: who made it, for which group (HEADER_BYTES)
//! HEADER_BYTES       control: one 64-byte line for each thing that ranks tell each other (CONTROL_BYTES)
//! SLOTS_OFFSET       slot 0, slot 1, slot 2, each slot_bytes long, filled with the Lamport sentinel
//! ```
//! A slot holds one round of one operation, in one of two ways; `R` is the bytes of a row:
//! - one-shot: `[source rank][token] -> R` bytes: what each peer sent;
//! - two-shot: `[source rank][owned token] -> R`, the tokens this rank owns as each peer sent them, then
//!   `[token] -> R`, every token's sum as its owner sent it; with a sharded residual what the owner made of it, at the
//!   start of `R` bytes.
//!
//! All sizes are `u64` and every product is checked.

use core::fmt;

use crate::{MAX_WORLD_SIZE, MIN_WORLD_SIZE, lamport::SLOTS};

/// First word of every region: `FUSEDCOL` in ASCII, little-endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"FUSEDCOL");
/// Layout version: a peer with another one is refused.
pub const VERSION: u64 = 2;
/// This library's version, as a header tells it: a peer with another one is refused. 16 bits a part.
pub const LIBRARY: u64 = {
    const fn part(text: &str) -> u64 {
        match u64::from_str_radix(text, 10) {
            Ok(part) => part,
            Err(_) => panic!("a package's version is made of numbers"),
        }
    }
    part(env!("CARGO_PKG_VERSION_MAJOR")) << 32
        | part(env!("CARGO_PKG_VERSION_MINOR")) << 16
        | part(env!("CARGO_PKG_VERSION_PATCH"))
};
/// Bytes of the header.
pub const HEADER_BYTES: u64 = 256;
/// Bytes of a control line: a flag has a cache line to itself.
pub const LINE_BYTES: u64 = 64;
/// Bytes of the control lines.
pub const CONTROL_BYTES: u64 = 4096 - HEADER_BYTES;
/// Where the slots start.
pub const SLOTS_OFFSET: u64 = HEADER_BYTES + CONTROL_BYTES;
/// Regions and slots start at multiples of this.
pub const ALIGNMENT: u64 = 4096;

/// What a region says of itself: eight little-endian words at offset 0, the magic first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Ranks in the group.
    pub world_size: u32,
    /// The rank that owns the region.
    pub rank: u32,
    /// Bytes of one slot.
    pub slot_bytes: u64,
}

/// Why a region is not a peer's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderError {
    /// The first word is not [`MAGIC`].
    Magic(u64),
    /// Another layout version.
    Version(u64),
    /// A field differs from what this rank expects.
    Mismatch {
        /// The field's name.
        field: &'static str,
        /// What the region says.
        found: u64,
        /// What it should say.
        expected: u64,
    },
}

impl fmt::Display for HeaderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            HeaderError::Magic(found) => {
                write!(f, "the region starts with {found:#018x}, not with {MAGIC:#018x}")
            }
            HeaderError::Version(found) => {
                write!(f, "the region has layout version {found}, this program has {VERSION}")
            }
            HeaderError::Mismatch { field, found, expected } => {
                write!(f, "the region's {field} is {found}, this rank expects {expected}")
            }
        }
    }
}

impl core::error::Error for HeaderError {}

impl Header {
    /// The words to write at the region's start. Write the magic (first word) last: it publishes the rest.
    pub const fn to_words(self) -> [u64; 8] {
        [MAGIC, VERSION, self.world_size as u64, self.rank as u64, self.slot_bytes, SLOTS, LIBRARY, 0]
    }

    /// Checks the words at the start of a peer's region against what it should be.
    pub fn check(self, words: [u64; 8]) -> Result<(), HeaderError> {
        if words[0] != MAGIC {
            return Err(HeaderError::Magic(words[0]));
        }
        if words[1] != VERSION {
            return Err(HeaderError::Version(words[1]));
        }
        let expected = self.to_words();
        let fields =
            [(6, "library version"), (2, "world size"), (3, "rank"), (4, "slot size"), (5, "slot count")];
        for (index, field) in fields {
            if words[index] != expected[index] {
                return Err(HeaderError::Mismatch { field, found: words[index], expected: expected[index] });
            }
        }
        Ok(())
    }
}

/// Where things are in a region, for a group of `world_size` ranks with slots of `slot_bytes`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    world_size: u32,
    slot_bytes: u64,
}

/// Why there is no such layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// A group of this size is not supported.
    WorldSize(u32),
    /// The sizes overflow 64 bits.
    TooLarge {
        /// Bytes of one slot.
        slot_bytes: u64,
    },
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            LayoutError::WorldSize(size) => {
                write!(
                    f,
                    "a group of {size} ranks is not supported: use {MIN_WORLD_SIZE} to {MAX_WORLD_SIZE}"
                )
            }
            LayoutError::TooLarge { slot_bytes } => {
                write!(f, "slots of {slot_bytes} bytes make a region of more bytes than 64 bits count")
            }
        }
    }
}

impl core::error::Error for LayoutError {}

impl Layout {
    /// A layout whose slots hold at least `slot_bytes` (rounded up to [`ALIGNMENT`]).
    pub fn new(world_size: u32, slot_bytes: u64) -> Result<Self, LayoutError> {
        if !(MIN_WORLD_SIZE..=MAX_WORLD_SIZE).contains(&world_size) {
            return Err(LayoutError::WorldSize(world_size));
        }
        let too_large = LayoutError::TooLarge { slot_bytes };
        let slot_bytes = slot_bytes.checked_next_multiple_of(ALIGNMENT).ok_or(too_large)?;
        let region = slot_bytes
            .checked_mul(SLOTS)
            .and_then(|slots| slots.checked_add(SLOTS_OFFSET))
            .ok_or(too_large)?;
        region.checked_mul(u64::from(world_size)).ok_or(too_large)?;
        Ok(Layout { world_size, slot_bytes })
    }

    /// Ranks in the group.
    pub const fn world_size(&self) -> u32 {
        self.world_size
    }

    /// Bytes of one slot.
    pub const fn slot_bytes(&self) -> u64 {
        self.slot_bytes
    }

    /// Bytes of one rank's region.
    pub const fn region_bytes(&self) -> u64 {
        SLOTS_OFFSET + SLOTS * self.slot_bytes
    }

    /// Bytes of all ranks' regions.
    pub const fn total_bytes(&self) -> u64 {
        self.region_bytes() * self.world_size as u64
    }

    /// Where slot `slot` starts in a region.
    pub const fn slot_offset(&self, slot: u64) -> u64 {
        debug_assert!(slot < SLOTS);
        SLOTS_OFFSET + slot * self.slot_bytes
    }

    /// Where control line `line` starts in a region.
    pub const fn control_offset(&self, line: u64) -> u64 {
        debug_assert!(line < CONTROL_BYTES / LINE_BYTES);
        HEADER_BYTES + line * LINE_BYTES
    }
}

/// Where rows are in a slot, for a round of `tokens` tokens with rows of `row_bytes`, dealt to `world_size` owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRows {
    /// Ranks in the group.
    pub world_size: u32,
    /// Tokens of the round.
    pub tokens: u64,
    /// Bytes of a row.
    pub row_bytes: u64,
}

impl SlotRows {
    /// Bytes of a slot that a one-shot round needs, or `None` past 64 bits.
    pub fn one_shot_bytes(&self) -> Option<u64> {
        self.tokens.checked_mul(self.row_bytes)?.checked_mul(u64::from(self.world_size))
    }

    /// Bytes of a slot that a two-shot round needs, or `None` past 64 bits.
    pub fn two_shot_bytes(&self) -> Option<u64> {
        let gathered =
            self.most_owned().checked_mul(self.row_bytes)?.checked_mul(u64::from(self.world_size))?;
        gathered.checked_add(self.tokens.checked_mul(self.row_bytes)?)
    }

    /// The most tokens that one rank owns.
    pub const fn most_owned(&self) -> u64 {
        self.tokens.div_ceil(self.world_size as u64)
    }

    /// One-shot: where rank `source` writes token `token` in the receiver's slot.
    pub const fn one_shot(&self, source: u32, token: u64) -> u64 {
        (source as u64 * self.tokens + token) * self.row_bytes
    }

    /// Two-shot, first hop: where rank `source` writes the owner's `owned`-th token in the owner's slot.
    pub const fn first_hop(&self, source: u32, owned: u64) -> u64 {
        (source as u64 * self.most_owned() + owned) * self.row_bytes
    }

    /// Two-shot, second hop: where the owner writes the sum of token `token` in the receiver's slot.
    pub const fn second_hop(&self, token: u64) -> u64 {
        (self.world_size as u64 * self.most_owned() + token) * self.row_bytes
    }
}
