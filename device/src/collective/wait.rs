//! Waiting for pushed data, never for longer than the group allows.
//!
//! A wait ends when its data is there, when it has lasted [`Group::timeout_ns`], or when the rank is poisoned: by
//! another thread's wait, or by the host. The first to fail writes down in [`Status`] what it waited for. A thread
//! whose wait failed does not wait again: it runs on to the end of its kernel, through the barriers where others
//! expect it, its outputs mean nothing, and it passes nothing on that it does not know to be right. The host
//! finds [`Status::failed`] and gives the group up.

use fused_collective_core::{lamport, pack::Pack};

use super::ranks::peer;
use crate::{
    launch::{ABORTED, Address, Group, RankState, Shape, Status, TIMED_OUT},
    row::ThreadSlice,
    simt::{self, CHECKS_PER_ABORT_LOOK, POLLS_PER_CHECK},
};

/// What a wait is for, as [`Status`] records it.
#[derive(Clone, Copy)]
pub struct Awaited<'a> {
    /// The round.
    pub shape: &'a Shape,
    /// The token of the round.
    pub token: u32,
    /// See [`Status::hop`].
    pub hop: u32,
}

/// The waits of one thread in one operation.
pub struct Waiter<'a> {
    group: &'a Group,
    /// The operation's slot.
    pub(super) slot: u32,
    /// Whether a wait of this thread failed, or the rank was poisoned before: nothing is waited for.
    pub failed: bool,
}

/// The time that a wait has lasted.
#[derive(Default)]
struct Elapsed {
    polls: u32,
    /// By [`now`]: in half the registers of the clock itself, and a wait's are its kernel's scarcest.
    started: u32,
}

/// Bits of the clock that waits ignore: they count in steps of 1,024 ns, modulo 73 minutes.
const CLOCK_SHIFT: u32 = 10;

/// The time.
#[inline(always)]
fn now() -> u32 {
    (simt::nanoseconds() >> CLOCK_SHIFT) as u32
}

impl<'a> Waiter<'a> {
    #[inline(always)]
    pub(super) fn new(group: &'a Group, slot: u32, poisoned: bool) -> Self {
        Waiter { group, slot, failed: poisoned }
    }

    /// Waits for this thread's packs of chunk `chunk` of a row, which `source` sends, and refills them with the sentinel: the
    /// functions get `p` and the pack.
    #[inline(always)]
    pub(super) fn one<const P: usize, const RESIDENT: bool>(
        &mut self,
        slice: ThreadSlice<P, RESIDENT>,
        chunk: u32,
        poll: impl Fn(usize, u32) -> Pack,
        refill: impl Fn(usize, u32),
        source: u32,
        awaited: Awaited<'_>,
    ) -> [Pack; P] {
        let mut packs = [Pack::default(); P];
        let mut elapsed = Elapsed::default();
        loop {
            // All loads are issued before the first is looked at.
            slice.for_each(chunk, |p, pack| packs[p] = poll(p, pack));
            if packs.iter().fold(true, |complete, pack| complete & pack.is_complete()) || self.failed {
                break;
            }
            self.check(&mut elapsed, || source, awaited);
        }
        simt::warp_barrier();
        slice.for_each(chunk, refill);
        packs
    }

    /// Waits for what `source` sends for this thread's packs of chunk `chunk` of a row, and refills it with the
    /// sentinel: for each pack that `at` has an address for, `words` words there, a constant.
    ///
    /// # Safety
    /// The words are in this rank's slot, and this thread alone reads them in this operation.
    #[inline(always)]
    pub(super) unsafe fn words<const P: usize, const RESIDENT: bool>(
        &mut self,
        words: u32,
        slice: ThreadSlice<P, RESIDENT>,
        chunk: u32,
        at: impl Fn(u32) -> Option<Address>,
        source: u32,
        awaited: Awaited<'_>,
    ) -> [Pack; P] {
        let poll = |_, pack| match at(pack) {
            // SAFETY: as this function's.
            Some(at) => unsafe { simt::poll_words(at, words) },
            None => Pack::default(),
        };
        let refill = |_, pack| {
            if let Some(at) = at(pack) {
                // SAFETY: as this function's. A push, since a peer given up on may still write.
                unsafe { simt::push_words(at, Pack::SENTINEL, words) }
            }
        };
        self.one(slice, chunk, poll, refill, source, awaited)
    }

    /// Waits for this thread's packs of chunk `chunk` of a row from every peer, and refills them with the sentinel: the
    /// functions get the peer, `p` and the pack. In rank order, this rank's and those past the group's size zero; in a kernel
    /// for two ranks the peer's come first.
    #[inline(always)]
    pub(super) fn all<const N: usize, const P: usize, const RESIDENT: bool>(
        &mut self,
        slice: ThreadSlice<P, RESIDENT>,
        chunk: u32,
        poll: impl Fn(u32, usize, u32) -> Pack,
        refill: impl Fn(u32, usize, u32),
        awaited: Awaited<'_>,
    ) -> [[Pack; N]; P] {
        let (rank, world_size) = (self.group.rank, self.group.world_size);
        let group = self.group;
        let source = |index: usize| if N == 2 { peer(group, 1) } else { index as u32 };
        let is_peer = |index: usize| {
            if N == 2 { index == 0 } else { source(index) != rank && source(index) < world_size }
        };
        let mut packs = [[Pack::default(); N]; P];
        let mut elapsed = Elapsed::default();
        loop {
            // All loads are issued before the first is looked at.
            slice.for_each(chunk, |p, pack| {
                for (index, value) in packs[p].iter_mut().enumerate() {
                    if is_peer(index) {
                        *value = poll(source(index), p, pack);
                    }
                }
            });
            let all = packs.as_flattened();
            if all.iter().fold(true, |complete, pack| complete & pack.is_complete()) || self.failed {
                break;
            }
            let missing = || {
                let incomplete = |index: &(usize, &Pack)| !index.1.is_complete();
                all.iter().enumerate().find(incomplete).map_or(rank, |(index, _)| source(index % N))
            };
            self.check(&mut elapsed, missing, awaited);
        }
        simt::warp_barrier();
        slice.for_each(chunk, |p, pack| {
            for index in 0..N {
                if is_peer(index) {
                    refill(source(index), p, pack);
                }
            }
        });
        packs
    }

    /// Waits until what `source` writes at `at` is as `holds` says, and leaves it there.
    ///
    /// # Safety
    /// `at` is valid for a [poll](simt::poll) for as long as the group is.
    #[inline(always)]
    pub unsafe fn until(
        &mut self,
        at: Address,
        source: u32,
        awaited: Awaited<'_>,
        holds: impl Fn(Pack) -> bool,
    ) {
        let mut elapsed = Elapsed::default();
        // SAFETY: as this function's.
        while !holds(unsafe { simt::poll(at) }) && !self.failed {
            self.check(&mut elapsed, || source, awaited);
        }
    }

    /// Looks whether the host has asked for the end, at once: for kernels that may have nothing to wait for. `missing` is as
    /// [`Status::missing_rank`].
    ///
    /// # Safety
    /// The addresses in the group are as its documentation says.
    #[inline(always)]
    pub(super) unsafe fn look(&mut self, missing: u32, awaited: Awaited<'_>) {
        // SAFETY: as this function's.
        unsafe {
            if !self.failed && simt::load_relaxed(self.group.status.offset(Status::ABORT)) != 0 {
                self.fail(ABORTED, missing, awaited);
            }
        }
    }

    /// Fails for `reason`, as a wait does: poisons the rank and writes down what is missing, unless somebody has done so.
    ///
    /// # Safety
    /// As [`look`](Self::look).
    #[inline(always)]
    pub(super) unsafe fn fail(&mut self, reason: u32, missing: u32, awaited: Awaited<'_>) {
        self.failed = true;
        // `black_box` for the same reason as in `check`.
        let [state, status] =
            [self.group.state.0, self.group.status.0].map(|address| Address(simt::black_box_u64(address)));
        // SAFETY: as this function's.
        unsafe {
            if simt::replace_zero(state.offset(RankState::POISONED), reason) {
                record(state, status, reason, self.slot, missing, awaited);
            }
        }
    }

    /// Counts a poll that found data missing and, once in a while, decides whether to go on.
    #[inline(always)]
    fn check(&mut self, elapsed: &mut Elapsed, missing: impl Fn() -> u32, awaited: Awaited<'_>) {
        elapsed.polls = elapsed.polls.wrapping_add(1);
        if !elapsed.polls.is_multiple_of(POLLS_PER_CHECK) {
            return;
        }
        let now = now();
        if elapsed.polls == POLLS_PER_CHECK {
            elapsed.started = now;
        }
        // The host's word is across the bus, so threads take turns to look at it.
        let turn = (elapsed.polls / POLLS_PER_CHECK).wrapping_add(simt::thread());
        // `black_box`, so that nothing of this is computed ahead of the loop.
        let [state, status, timeout] =
            [self.group.state.0, self.group.status.0, self.group.timeout_ns].map(simt::black_box_u64);
        let poisoned = Address(state).offset(RankState::POISONED);
        // SAFETY: the group's addresses are as its documentation says.
        unsafe {
            let reason = if u64::from(now.wrapping_sub(elapsed.started)) > timeout >> CLOCK_SHIFT {
                TIMED_OUT
            } else if turn.is_multiple_of(CHECKS_PER_ABORT_LOOK)
                && simt::load_relaxed(Address(status).offset(Status::ABORT)) != 0
            {
                ABORTED
            } else {
                self.failed = simt::load_relaxed(poisoned) != 0;
                return;
            };
            self.failed = true;
            if simt::replace_zero(poisoned, reason) {
                record(Address(state), Address(status), reason, self.slot, missing(), awaited);
            }
        }
    }
}

/// Writes down what a thread waited for.
///
/// # Safety
/// The addresses are as [`Group`] says, and this is called once in the life of the group.
#[inline(always)]
unsafe fn record(
    state: Address,
    status: Address,
    reason: u32,
    slot: u32,
    missing_rank: u32,
    awaited: Awaited<'_>,
) {
    // SAFETY: the number of the operation, which this block at most advances by one meanwhile; and the fields of the
    // status, which the host reads after it has seen `failed` (acquire).
    unsafe {
        let current = simt::load_relaxed_u64(state.offset(RankState::epoch(simt::block())));
        // The remainder of the sum of both halves, since 2^32 leaves 1 when divided by the slots' number, 3.
        let halves = lamport::slot(current >> 32) + lamport::slot(current & u64::from(u32::MAX));
        let operation = current - u64::from(lamport::slot(halves) != u64::from(slot));
        simt::store_value(status.offset(Status::MISSING_RANK), missing_rank);
        simt::store_value(status.offset(Status::HOP), awaited.hop);
        simt::store_value(status.offset(Status::OPERATION), operation);
        // `black_box` for the same reason as in `check`.
        let first_token = simt::black_box_u64(awaited.shape.first_token);
        simt::store_value(status.offset(Status::TOKEN), first_token + awaited.token as u64);
        simt::store_value(status.offset(Status::CALL), simt::black_box_u64(awaited.shape.call));
        simt::store_release(status.offset(Status::FAILED), reason);
    }
}
