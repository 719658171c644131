//! How a rank sees in the data itself that a peer's data has arrived.
//!
//! A slot holds [`SENTINEL`] in every 32-bit word until a peer writes payload over it, and no payload
//! word equals the sentinel ([`strip`]). An aligned word is written at once on every machine this runs
//! on, so a word that is not the sentinel has arrived, and a row has arrived when all its words have.
//! No flag, no counter and no ordering between words is needed.
//!
//! # The slots
//! [`SLOTS`] slots take turns: operation `n` uses slot `n % 3`. Whoever reads a word puts the sentinel back at
//! once, so an operation leaves its slot as it found it, and no record of what it used is needed: shapes,
//! modes and element types may follow each other in any order.
//!
//! A rank may send for operation `n + 1` when it has ended `n`, or *ahead*, still in `n`, once it has received
//! data of `n` from every peer. Why a peer's slot is then empty, for a rank `a` that sends and any peer `b`:
//! - *Nobody still writes what `b` refills.* A word is written once in an operation, and `b` has read it.
//! - *`b` has refilled it.* Slot `(n + 1) % 3` was last used in `n - 2`. `a` has received something that `b` sent
//!   for `n`, directly or (in two-shot) as part of a sum by the token's owner. `b` sends for `n` no earlier than
//!   ahead, in `n - 1`: after it ended `n - 2`, refills included. `b`'s refill therefore precedes `b`'s sends of
//!   `n` (release), which precede `a`'s sends of `n + 1` (acquire, by reading them or what was made of them).
//! - Two slots would do without sending ahead. One would not: `a`, done with `n`, may send for `n + 1` while `b`
//!   still reads `n`.
//!
//! The CPU backend's tests put this under model checkers, and show of each rule what goes wrong without it.
//!
//! The argument needs a rank that ended an operation to have received something of every peer's: so it is with
//! one token or more. An operation without tokens is none: it takes no slot.

/// What a word of a slot holds until its data arrives.
///
/// As `f32` it is `-0.0`; as a pair of `f16` or `bf16`, `(+0.0, -0.0)`. One word serves every element
/// type, so a slot may be refilled in one type's operation and used in another's.
pub const SENTINEL: u32 = 0x8000_0000;

/// Slots that take turns.
pub const SLOTS: u64 = 3;

/// A payload word as it may be sent: the sentinel becomes all zeros, which changes a `-0.0` to `+0.0`
/// and nothing else. A rank strips its own input too, or sums would differ between ranks.
#[inline(always)]
pub const fn strip(word: u32) -> u32 {
    if word == SENTINEL { 0 } else { word }
}

/// Whether the word has arrived.
#[inline(always)]
pub const fn is_complete(word: u32) -> bool {
    word != SENTINEL
}

/// The slot that operation `operation` uses.
#[inline(always)]
pub const fn slot(operation: u64) -> u64 {
    operation % SLOTS
}
