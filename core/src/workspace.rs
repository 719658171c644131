//! The byte layout of the region of memory that each rank shares with its peers.
//!
//! ```text
//! 0                  header: library, group and owner of the region (HEADER_BYTES)
//! HEADER_BYTES       control: 64-byte lines, one for each flag between ranks (CONTROL_BYTES)
//! SLOTS_OFFSET       slot 0, slot 1, slot 2, each slot_bytes long, filled with the Lamport sentinel
//! ```
//! A slot holds one round of one operation, in one of two forms. `R` is the bytes of a row as it crosses the links, in the
//! element type or in a [format](crate::wire) of fewer bits:
//! - one-shot: `[source rank][token] -> R`, the tokens as each peer sent them;
//! - two-shot: `[source rank][owned token] -> R`, the tokens of this rank as each peer sent them. Then
//!   `[token] -> R`, the sum of every token as its owner sent it. With a sharded residual the norm or its quantization
//!   is in place of the sum, at the start of its `R` bytes.
//!
//! Sizes are `u64`, and every product is checked.

use core::fmt;

use crate::{MAX_WORLD_SIZE, MIN_WORLD_SIZE, lamport::SLOTS};

/// First word of every region: `FUSEDCOL` in ASCII, little-endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"FUSEDCOL");
/// Version of the layout: a region of another version is refused.
pub const VERSION: u64 = 2;
/// Version of this library, 16 bits for each part: a region of another version is refused.
pub const LIBRARY: u64 = {
    const fn part(text: &str) -> u64 {
        match u64::from_str_radix(text, 10) {
            Ok(part) => part,
            Err(_) => panic!("the parts of a package's version are numbers"),
        }
    }
    part(env!("CARGO_PKG_VERSION_MAJOR")) << 32
        | part(env!("CARGO_PKG_VERSION_MINOR")) << 16
        | part(env!("CARGO_PKG_VERSION_PATCH"))
};
/// Bytes of the header.
pub const HEADER_BYTES: u64 = 256;
/// Bytes of a control line, so that each flag has a cache line of its own.
pub const LINE_BYTES: u64 = 64;
/// Bytes of the control lines.
pub const CONTROL_BYTES: u64 = 4096 - HEADER_BYTES;
/// Offset of the first slot.
pub const SLOTS_OFFSET: u64 = HEADER_BYTES + CONTROL_BYTES;
/// Alignment of regions and slots.
pub const ALIGNMENT: u64 = 4096;

/// The header of a region: eight little-endian words at offset 0, the magic first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Ranks in the group.
    pub world_size: u32,
    /// The rank that owns the region.
    pub rank: u32,
    /// Bytes of one slot.
    pub slot_bytes: u64,
}

/// A reason why a region is not the expected region of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderError {
    /// The first word is not [`MAGIC`].
    Magic(u64),
    /// The version of the layout is not [`VERSION`].
    Version(u64),
    /// A field has another value than this rank expects.
    Mismatch {
        /// Name of the field.
        field: &'static str,
        /// The value in the region.
        found: u64,
        /// The value that this rank expects.
        expected: u64,
    },
}

impl fmt::Display for HeaderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            HeaderError::Magic(found) => {
                write!(f, "the region starts with {found:#018x} in place of {MAGIC:#018x}: it has no header")
            }
            HeaderError::Version(found) => {
                write!(
                    f,
                    "the region has layout version {found}, but this library has {VERSION}: use one build for all ranks"
                )
            }
            HeaderError::Mismatch { field, found, expected } => {
                write!(f, "the {field} in the region is {found}, but this rank expects {expected}")
            }
        }
    }
}

impl core::error::Error for HeaderError {}

impl Header {
    /// The words at the start of the region. Write the magic, the first word, last: it publishes the other words.
    pub const fn to_words(self) -> [u64; 8] {
        [MAGIC, VERSION, self.world_size as u64, self.rank as u64, self.slot_bytes, SLOTS, LIBRARY, 0]
    }

    /// Checks the words at the start of the region of a peer; `self` is the expected header.
    ///
    /// # Errors
    /// [`HeaderError`] for the first difference.
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

/// Sizes and offsets in the regions of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    world_size: u32,
    slot_bytes: u64,
}

/// A reason why regions cannot have a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// The number of ranks is not from [`MIN_WORLD_SIZE`] to [`MAX_WORLD_SIZE`].
    WorldSize(u32),
    /// The regions are more bytes than 64 bits count.
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
                write!(
                    f,
                    "regions with slots of {slot_bytes} bytes are more bytes than 64 bits count: use smaller slots"
                )
            }
        }
    }
}

impl core::error::Error for LayoutError {}

impl Layout {
    /// The layout for `world_size` ranks with slots of `slot_bytes`, rounded up to a multiple of [`ALIGNMENT`].
    ///
    /// # Errors
    /// [`LayoutError`] for an unsupported number of ranks, and for more bytes than 64 bits count.
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

    /// Bytes of the region of one rank.
    pub const fn region_bytes(&self) -> u64 {
        SLOTS_OFFSET + SLOTS * self.slot_bytes
    }

    /// Bytes of the regions of all ranks.
    pub const fn total_bytes(&self) -> u64 {
        self.region_bytes() * self.world_size as u64
    }

    /// Offset of slot `slot` in a region.
    pub const fn slot_offset(&self, slot: u64) -> u64 {
        debug_assert!(slot < SLOTS);
        SLOTS_OFFSET + slot * self.slot_bytes
    }

    /// Offset of control line `line` in a region.
    pub const fn control_offset(&self, line: u64) -> u64 {
        debug_assert!(line < CONTROL_BYTES / LINE_BYTES);
        HEADER_BYTES + line * LINE_BYTES
    }
}

/// Offsets of rows in a slot, for one round of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRows {
    /// Ranks in the group.
    pub world_size: u32,
    /// Tokens of the round.
    pub tokens: u64,
    /// Bytes of an addend's row, in one-shot and in the first hop.
    pub row_bytes: u64,
    /// Bytes of a row of the second hop.
    pub sum_bytes: u64,
}

impl SlotRows {
    /// Rows of elements, of `row_bytes` bytes in either hop.
    #[inline(always)]
    pub const fn of_elements(world_size: u32, tokens: u64, row_bytes: u64) -> Self {
        SlotRows { world_size, tokens, row_bytes, sum_bytes: row_bytes }
    }

    /// Bytes of a slot that a one-shot round takes; `None` past 64 bits.
    pub fn one_shot_bytes(&self) -> Option<u64> {
        self.tokens.checked_mul(self.row_bytes)?.checked_mul(u64::from(self.world_size))
    }

    /// Bytes of a slot that a two-shot round takes; `None` past 64 bits.
    pub fn two_shot_bytes(&self) -> Option<u64> {
        let gathered =
            self.most_owned().checked_mul(self.row_bytes)?.checked_mul(u64::from(self.world_size))?;
        gathered.checked_add(self.tokens.checked_mul(self.sum_bytes)?)
    }

    /// The most tokens that one rank owns.
    pub const fn most_owned(&self) -> u64 {
        self.tokens.div_ceil(self.world_size as u64)
    }

    /// One-shot: offset in the slot of the receiver, to which rank `source` writes token `token`.
    pub const fn one_shot(&self, source: u32, token: u64) -> u64 {
        (source as u64 * self.tokens + token) * self.row_bytes
    }

    /// Two-shot, first hop: offset in the slot of the owner, to which rank `source` writes the token with index `owned`
    /// among those of the owner.
    pub const fn first_hop(&self, source: u32, owned: u64) -> u64 {
        (source as u64 * self.most_owned() + owned) * self.row_bytes
    }

    /// Two-shot, second hop: offset in the slot of the receiver, to which the owner writes the sum of token `token`.
    pub const fn second_hop(&self, token: u64) -> u64 {
        self.first_hop(self.world_size, 0) + token * self.sum_bytes
    }
}
