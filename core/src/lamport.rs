//! Arrival of data without flags: a receiver polls the data itself, as in the Lamport all-reduce of TensorRT-LLM.
//!
//! A slot holds [`SENTINEL`] in every 32-bit word until a peer overwrites the word with payload, and no payload word
//! equals the sentinel ([`strip`]). The processors at hand write an aligned word in one piece. So a word that is not
//! the sentinel has arrived, and a row has arrived when all its words have. The protocol needs no flag, no counter and
//! no order between words.
//!
//! # Rotation of slots
//! [`SLOTS`] slots take turns: operation `n` uses slot `n % 3`. The reader of a word writes the sentinel back at once,
//! so an operation leaves its slot as it was. Shapes, modes and element types may therefore follow each other in any
//! order, and no record of used words is kept.
//!
//! A rank may send for operation `n + 1` when it has ended `n`. It may also send *ahead*, while still in `n`, once it
//! has received data of `n` from every peer. The slot of a peer is then empty. For a sending rank `a` and any peer `b`:
//! - *No rank still writes the words that `b` refills.* A word is written once in an operation, and `b` has read it.
//! - *`b` has refilled the slot.* Slot `(n + 1) % 3` was last used in `n - 2`. `a` has received data that `b` sent for
//!   `n`, directly or (in two-shot) in a sum by the owner of the token. `b` sends for `n` no earlier than ahead,
//!   in `n - 1`: after `b` ended `n - 2`, refills included. The refill by `b` therefore precedes the sends of `b` for
//!   `n` (release). These precede the sends of `a` for `n + 1` (acquire, by reading them or a result of them).
//! - Two slots would suffice without sending ahead. One slot would not: `a`, done with `n`, may send for `n + 1` while
//!   `b` still reads `n`.
//!
//! The argument needs every rank that ended an operation to have received data from every peer, which holds from one
//! token on. An operation without tokens takes no slot. The tests of the CPU backend check these rules with model
//! checkers, and show for each rule the failure without it.

/// The content of a word of a slot until its data arrives.
///
/// Every bit is set: a NaN as `f32`, and two NaNs as a pair of `f16` or `bf16`. So no number is the sentinel. One
/// sentinel serves all element types, and operations of different types may use a slot in turn.
pub const SENTINEL: u32 = u32::MAX;

/// Number of slots.
pub const SLOTS: u64 = 3;

/// Makes a word of elements, or of E4M3 codes, fit to be sent: the sentinel becomes another NaN, or pair of NaNs. No
/// number changes, and no E4M3 code that [`encode`](crate::quant::e4m3::encode) returns.
#[inline(always)]
pub const fn strip(word: u32) -> u32 {
    if word < SENTINEL { word } else { SENTINEL - 1 }
}

/// Exchanges the sentinel with a word that the E2M1 codes of a row never are, `0x8000_0000`, and back: see
/// [`e2m1::canonical`](crate::quant::e2m1::canonical). Codes of four bits have no NaN, so every other word of them may be
/// sent as it is.
#[inline(always)]
pub const fn swap_e2m1(codes: u32) -> u32 {
    codes ^ !0x8000_0000
}

/// True if the word has arrived.
#[inline(always)]
pub const fn is_complete(word: u32) -> bool {
    word != SENTINEL
}

/// The slot of operation number `operation`.
#[inline(always)]
pub const fn slot(operation: u64) -> u64 {
    operation % SLOTS
}
