//! How a rank sees in the data itself that a peer's data has arrived.
//!
//! A slot holds [`SENTINEL`] in every 32-bit word until a peer writes payload over it, and no payload
//! word equals the sentinel ([`strip`]). An aligned word is written at once on every machine this runs
//! on, so a word that is not the sentinel has arrived, and a row has arrived when all its words have.
//! No flag, no counter and no ordering between words is needed.
//!
//! # The slots
//! [`SLOTS`] slots rotate. Operation `n` uses slot `n % 3` and, while its data is in flight, refills
//! slot `(n + 2) % 3` of its own region: the slot of operation `n - 1`, which operation `n + 2` will use.
//!
//! Why that is safe, for a rank `a` and any peer `b`:
//! - *Nobody still writes what `a` refills.* Having finished operation `n - 1`, `a` has seen every word
//!   that any peer sends it in that operation, so all those stores have happened.
//! - *`a` no longer reads it.* It finished operation `n - 1`.
//! - *No peer writes before the refill is done.* `b` writes slot `(n + 2) % 3` next in operation `n + 2`,
//!   so after it finished operation `n + 1`, for which it needed data that `a` sent in `n + 1`: after `a`
//!   finished `n`, the refill included. `a`'s refill therefore precedes `a`'s sends of `n + 1` (release),
//!   which precede `b`'s sends of `n + 2` (acquire, by reading them).
//! - Two slots would not do: `b`, finished with `n`, may write the slot of `n + 1` while `a` still reads
//!   that of `n`; the one to refill must be a third.
//!
//! In two-shot `a` may have sent its data to a third rank, the token's owner, whose result `b` needed: the
//! chain of releases and acquires is one link longer. Either way a rank that finished an operation of one
//! token or more knows that every rank began it. An operation without tokens is none: it takes no slot.

/// What a word of a slot holds until its data arrives.
///
/// As `f32` it is `-0.0`; as a pair of `f16` or `bf16`, `(+0.0, -0.0)`. One word serves every element
/// type, so a slot may be refilled in one type's operation and used in another's.
pub const SENTINEL: u32 = 0x8000_0000;

/// Slots in rotation.
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

/// The slot that operation `operation` refills with the sentinel.
#[inline(always)]
pub const fn refill_slot(operation: u64) -> u64 {
    (operation + 2) % SLOTS
}
