//! Sending and receiving rows through the shared regions, the Lamport way.
//!
//! `fused_collective_core::lamport` has the rules and the argument; this is where they meet atomics:
//! - A word is stored and loaded with one relaxed `AtomicU64` access, so it arrives whole, or as part of a [`mod@line`], which
//!   comes to the same. Which of two words arrives first does not matter: each is waited for.
//! - The receiver puts the sentinel back as it reads a word, while the cache line is at hand.
//! - A *release* fence before a row's stores and an *acquire* fence after its loads make "`a` refilled, then
//!   sent; `b` received, then sent" an order that also holds between different words: without them a
//!   processor could let `b`'s later store to a word be overwritten by `a`'s earlier refill of it. On x86
//!   both are free.

use std::{
    array,
    sync::atomic::{
        self, AtomicU64,
        Ordering::{self, Acquire, Relaxed, Release},
    },
};

use bytemuck::AnyBitPattern;
use fused_collective_core::{
    lamport,
    workspace::{Header, Layout},
};

use super::{
    line,
    region::Regions,
    wait::{Wait, WaitGuard},
};
use crate::group::failure::{Failure, What};

/// Two sentinel words: what an empty 64-bit word of a slot holds.
pub const EMPTY: u64 = lamport::SENTINEL as u64 | (lamport::SENTINEL as u64) << 32;

/// The memory that an [`Exchange`] runs over: the memory that ranks share, or a model checker's, which tries every order of
/// events that the memory model allows.
///
/// The provided methods are the rules. A model replaces one of them to show that the protocol needs it.
pub(crate) trait Medium {
    /// A 64-bit word that all ranks may access at any time.
    type Word: Word;

    /// The layout of a region.
    fn layout(&self) -> &Layout;

    /// The words of `bytes` bytes at `offset` of rank `rank`'s region.
    fn words(&self, rank: u32, offset: u64, bytes: u64) -> &[Self::Word];

    /// Orders what this thread does before and after, as [`atomic::fence`].
    #[inline(always)]
    fn fence(&self, order: Ordering) {
        atomic::fence(order);
    }

    /// The slot that `operation` uses.
    #[inline(always)]
    fn slot(&self, operation: u64) -> u64 {
        lamport::slot(operation)
    }

    /// Empties a word that was read.
    #[inline(always)]
    fn refill(&self, word: &Self::Word) {
        word.store(EMPTY, Relaxed);
    }

    /// Loads each word of a line.
    #[inline(always)]
    fn load_line(&self, words: &[Self::Word; line::WORDS]) -> [u64; line::WORDS] {
        array::from_fn(|index| words[index].load(Relaxed))
    }

    /// Stores each word of a line.
    #[inline(always)]
    fn store_line(&self, words: &[Self::Word; line::WORDS], values: [u64; line::WORDS]) {
        for (word, value) in words.iter().zip(values) {
            word.store(value, Relaxed);
        }
    }

    /// Empties each word of a line that was read.
    #[inline(always)]
    fn refill_line(&self, words: &[Self::Word; line::WORDS]) {
        for word in words {
            self.refill(word);
        }
    }

    /// Lets some time pass in `wait`.
    #[inline(always)]
    fn pause(&self, wait: &mut Wait<'_>) -> Result<(), Box<Failure>> {
        wait.pause()
    }
}

/// An atomic 64-bit word.
pub(crate) trait Word {
    /// As [`AtomicU64::load`].
    fn load(&self, order: Ordering) -> u64;
    /// As [`AtomicU64::store`].
    fn store(&self, value: u64, order: Ordering);
}

impl Word for AtomicU64 {
    #[inline(always)]
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }

    #[inline(always)]
    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }
}

impl Medium for Regions {
    type Word = AtomicU64;

    #[inline(always)]
    fn layout(&self) -> &Layout {
        self.layout()
    }

    #[inline(always)]
    fn words(&self, rank: u32, offset: u64, bytes: u64) -> &[AtomicU64] {
        self.words(rank, offset, bytes)
    }

    #[inline(always)]
    fn load_line(&self, words: &[AtomicU64; line::WORDS]) -> [u64; line::WORDS] {
        self.mover().load(words)
    }

    #[inline(always)]
    fn store_line(&self, words: &[AtomicU64; line::WORDS], values: [u64; line::WORDS]) {
        self.mover().store(words, values);
    }

    #[inline(always)]
    fn refill_line(&self, words: &[AtomicU64; line::WORDS]) {
        self.mover().store(words, [EMPTY; line::WORDS]);
    }
}

/// One rank's end of the shared regions.
#[derive(Debug)]
pub(crate) struct Exchange<M = Regions> {
    regions: M,
    rank: u32,
    /// Operations (rounds) begun so far, counted alike on every rank.
    operation: u64,
    guard: WaitGuard,
}

impl<M: Medium> Exchange<M> {
    /// Fills this rank's slots with the sentinel. Peers may send once they have seen its header.
    pub(crate) fn new(regions: M, guard: WaitGuard) -> Self {
        let rank = guard.rank;
        let layout = *regions.layout();
        for slot in 0..lamport::SLOTS {
            for word in regions.words(rank, layout.slot_offset(slot), layout.slot_bytes()) {
                word.store(EMPTY, Relaxed);
            }
        }
        Exchange { regions, rank, operation: 0, guard }
    }

    /// The end of waits.
    pub(crate) fn guard(&self) -> &WaitGuard {
        &self.guard
    }

    /// The end of waits.
    pub(crate) fn guard_mut(&mut self) -> &mut WaitGuard {
        &mut self.guard
    }

    /// Says that this rank's region is ready.
    pub(crate) fn publish_header(&self, header: Header) {
        let words = self.regions.words(self.rank, 0, 64);
        let [magic, fields @ ..] = header.to_words();
        for (word, field) in words[1..].iter().zip(fields) {
            word.store(field, Relaxed);
        }
        // Release: who sees the magic sees the fields, and the slots filled.
        words[0].store(magic, Release);
    }

    /// The header of rank `peer`, once its region is ready.
    pub(crate) fn wait_for_header(&self, peer: u32) -> Result<[u64; 8], Box<Failure>> {
        let words = self.regions.words(peer, 0, 64);
        let mut wait = self.wait(peer, What::Region);
        while words[0].load(Acquire) == 0 {
            self.regions.pause(&mut wait)?;
        }
        Ok(array::from_fn(|index| words[index].load(Relaxed)))
    }

    /// Between operations: what was written to this rank's region that is neither `header` nor the sentinel in all
    /// slots, if anything.
    pub(crate) fn find_stray_write(&self, header: Header) -> Option<String> {
        let words = self.regions.words(self.rank, 0, 64);
        if words.iter().zip(header.to_words()).any(|(word, expected)| word.load(Relaxed) != expected) {
            return Some("the header of this rank's region".to_owned());
        }
        let layout = self.regions.layout();
        (0..lamport::SLOTS).find_map(|slot| {
            let words = self.regions.words(self.rank, layout.slot_offset(slot), layout.slot_bytes());
            let at = words.iter().position(|word| word.load(Relaxed) != EMPTY)?;
            Some(format!("slot {slot} of this rank's region, byte {}", at * 8))
        })
    }

    /// The current operation.
    pub(crate) fn operation(&self) -> u64 {
        self.operation
    }

    /// Ends an operation: the next one uses the next slot. Everything sent to this rank must have been received.
    pub(crate) fn advance(&mut self) {
        self.operation += 1;
    }

    fn slot_words(&self, operation: u64, rank: u32, offset: u64, words: usize) -> &[M::Word] {
        let slot = self.regions.layout().slot_offset(self.regions.slot(operation));
        self.regions.words(rank, slot + offset, words as u64 * 8)
    }

    /// Writes `row`, whole words of which none holds the sentinel, to `offset` of the slot that rank `peer` has for
    /// `operation`: the current one, or the next one if every peer's data of the current one has begun to come.
    pub(crate) fn send(&self, operation: u64, peer: u32, offset: u64, row: &[u8]) {
        debug_assert!(row.as_chunks().0.iter().all(|&half| lamport::is_complete(u32::from_ne_bytes(half))));
        self.send_words::<false>(operation, peer, offset, row);
    }

    /// Sends a row that may hold the sentinel, [stripped](lamport::strip) of it.
    pub(crate) fn send_stripped(&self, operation: u64, peer: u32, offset: u64, row: &[u8]) {
        self.send_words::<true>(operation, peer, offset, row);
    }

    #[inline(always)]
    fn send_words<const STRIP: bool>(&self, operation: u64, peer: u32, offset: u64, row: &[u8]) {
        debug_assert!(operation - self.operation <= 1);
        let words = self.slot_words(operation, peer, offset, row.len() / 8);
        self.regions.fence(Release);
        let (lines, rest) = words.as_chunks();
        let (row_lines, row_rest) = row.as_chunks();
        for (words, line) in lines.iter().zip(row_lines) {
            self.regions.store_line(words, payload::<STRIP, { line::BYTES }, _>(*line));
        }
        for (word, value) in rest.iter().zip(row_rest.as_chunks().0) {
            word.store(payload::<STRIP, 8, _>(*value), Relaxed);
        }
    }

    /// The row of `bytes` bytes, whole words, at `offset` of this rank's current slot, which is `what` rank `from` writes
    /// there. Once it is taken out, [`received`](Self::received) must be called before anything is sent.
    pub(crate) fn incoming(&self, from: u32, what: What, offset: u64, bytes: usize) -> Incoming<'_, M> {
        let words = self.slot_words(self.operation, self.rank, offset, bytes / 8);
        Incoming { exchange: self, from, what, words }
    }

    /// Orders what was taken out of [incoming](Self::incoming) rows before what is sent from now on.
    pub(crate) fn received(&self) {
        self.regions.fence(Acquire);
    }

    /// Waits for an [incoming](Self::incoming) row and takes it out.
    pub(crate) fn receive(
        &self,
        from: u32,
        what: What,
        offset: u64,
        row: &mut [u8],
    ) -> Result<(), Box<Failure>> {
        let incoming = self.incoming(from, what, offset, row.len());
        let (lines, rest) = row.as_chunks_mut::<{ line::BYTES }>();
        let mut words = [0; line::WORDS];
        for (index, line) in lines.iter_mut().enumerate() {
            incoming.take_line(index, &mut words)?;
            *line = bytemuck::cast(words);
        }
        if !rest.is_empty() {
            incoming.take_rest(&mut words)?;
            rest.copy_from_slice(&bytemuck::bytes_of(&words)[..rest.len()]);
        }
        self.received();
        Ok(())
    }

    /// Returns when `what` has `arrived` from rank `from`.
    #[cold]
    #[inline(never)]
    fn wait_for(&self, from: u32, what: What, arrived: impl Fn() -> bool) -> Result<(), Box<Failure>> {
        let mut wait = self.wait(from, what);
        while !arrived() {
            self.regions.pause(&mut wait)?;
        }
        Ok(())
    }

    fn wait(&self, from: u32, what: What) -> Wait<'_> {
        Wait::new(&self.guard, from, what, self.operation)
    }

    /// Returns once every rank has called it as often as this one. `epoch` is that count, from 1.
    pub(crate) fn barrier(&self, epoch: u64) -> Result<(), Box<Failure>> {
        let line = self.regions.layout().control_offset(0);
        self.regions.words(self.rank, line, 8)[0].store(epoch, Release);
        for peer in (0..self.regions.layout().world_size()).filter(|&peer| peer != self.rank) {
            let word = &self.regions.words(peer, line, 8)[0];
            let mut wait = self.wait(peer, What::Barrier);
            while word.load(Acquire) < epoch {
                self.regions.pause(&mut wait)?;
            }
        }
        Ok(())
    }
}

/// A row that is on its way to this rank. Each line of it is taken out once.
pub(crate) struct Incoming<'a, M: Medium> {
    exchange: &'a Exchange<M>,
    from: u32,
    what: What,
    words: &'a [M::Word],
}

impl<M: Medium> Incoming<'_, M> {
    /// Waits for line `index` of the whole ones and takes it out.
    #[inline(always)]
    pub(crate) fn take_line(&self, index: usize, line: &mut [u64; line::WORDS]) -> Result<(), Box<Failure>> {
        let Exchange { regions, .. } = self.exchange;
        let words = &self.words.as_chunks().0[index];
        *line = regions.load_line(words);
        if !line::is_complete(line) {
            let arrived = || line::is_complete(&regions.load_line(words));
            self.exchange.wait_for(self.from, self.what, arrived)?;
            *line = regions.load_line(words);
        }
        regions.refill_line(words);
        Ok(())
    }

    /// Waits for what follows the last whole line and takes it out. Zeros follow it.
    #[inline(always)]
    pub(crate) fn take_rest(&self, line: &mut [u64; line::WORDS]) -> Result<(), Box<Failure>> {
        let Exchange { regions, .. } = self.exchange;
        *line = [0; line::WORDS];
        for (value, word) in line.iter_mut().zip(self.words.as_chunks::<{ line::WORDS }>().1) {
            *value = word.load(Relaxed);
            if !is_complete(*value) {
                self.exchange.wait_for(self.from, self.what, || is_complete(word.load(Relaxed)))?;
                *value = word.load(Relaxed);
            }
            regions.refill(word);
        }
        Ok(())
    }
}

/// Bytes of a row as words, [stripped](lamport::strip) of the sentinel or as they are.
#[inline(always)]
fn payload<const STRIP: bool, const BYTES: usize, T: AnyBitPattern>(mut bytes: [u8; BYTES]) -> T {
    if STRIP {
        for half in bytes.as_chunks_mut::<4>().0 {
            *half = lamport::strip(u32::from_ne_bytes(*half)).to_ne_bytes();
        }
    }
    bytemuck::pod_read_unaligned(&bytes)
}

/// A word is stored at once, so either of its halves tells.
#[inline(always)]
fn is_complete(word: u64) -> bool {
    lamport::is_complete(word as u32)
}
