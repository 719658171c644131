//! Groups of several hosts: two kernels a round, and between them a gather by NCCL.
//!
//! The ranks of a host are a [`Group`](crate::launch::Group) as if they were alone, and rank `r` of it owns the same tokens on
//! every host. So the owners of a token are the ranks of one place, one of each host, and these gather its sums.
//!
//! ```text
//! host_sum
//!     prologue    wait for the kernels before; make the addend, where it is not given; read the epoch
//!     push        for each token of the team that another rank owns:
//!                     write its row, stripped of the sentinel, to this rank's place in the owner's slot
//!     complete    for each token of the team that this rank owns:
//!                     poll the own slot until it has arrived from every peer; refill it with the sentinel
//!                     store the sum in rank order among this host's partial sums
//! gather          the owners' rows of every host, in place, by NCCL on the same stream
//! two_shot_hosts, sharded_hosts
//!     prologue    as of two-shot; look once whether the host has asked for the end; advance the epochs
//!     complete    as of two-shot; but the owner's sum is that of the hosts' sums, in the order of the hosts
//! ```
//! With one rank a host there are no hops: the first kernel stores its addends, and the second sums the hosts'.
//!
//! # One slot for both kernels
//! Both kernels run as the same operation, as only the second advances the epochs. The first uses the rows of the first hop in
//! the operation's slot, the second those of the second hop: the parts that two-shot has for them, which do not overlap. What
//! [`lamport`](fused_collective_core::lamport) asks of an operation holds of the two together:
//! - *A rank sends nothing of an operation before it has ended the one before*, refills included. The first kernel waits for
//!   the kernels before it, and the second comes after the first: both find the epoch that the operation before left.
//! - *Who has ended an operation has received data from every peer*: of each token that it owns, in the first kernel; of the
//!   others, a sum by the owner, who pushes it in the second kernel, when its first has received every peer's addend. So where
//!   the rank that has ended sends for the next operation, every peer has at least begun the first kernel of this one, and has
//!   ended the operation before.
//! - *A word is written once in an operation, and read once*: the first kernel polls and refills all of its own rows of the
//!   first hop, the second all of its rows of the second.
//! - A peer may be in its second kernel while this rank is in its first: it pushes to the part of the second hop, which nobody
//!   reads before this rank's second kernel, and whose words are the sentinel since this rank's refill three operations ago.
//!
//! # Why ranks cannot wait in a circle
//! Call the first kernel of operation `n` step `3 n`, its gather `3 n + 1`, and its second kernel `3 n + 2`. A stream runs them in
//! this order, and nothing that waits in one of them waits for a higher one, whatever the grids are:
//! - The first kernel waits for pushes of the same step, which wait for nothing in it.
//! - The gather waits for the same step of the ranks of its place, and these for the first kernels of their hosts.
//! - In the second kernel an owner waits for nothing, and who receives a token waits for its owner's second kernel, in the order
//!   of [`two_shot`](super::two_shot()) or of `turns`, which hold with owners that wait for less.
//!
//! # Failure
//! Between hosts nothing but rows is exchanged. If a wait of the first kernel has failed, its thread stores the sentinel in place
//! of its sums: so the second kernel of every host learns from its own rows that one has failed, and which. The gather itself
//! has no deadline of its own: [`Status::gathers_begun`](crate::launch::Status::gathers_begun) and `gathers_ended` let a thread of
//! the host's see that it lasts. When that thread has set [`Status::abort`](crate::launch::Status::abort) and ended the gather, the
//! second kernel finds the word set before it believes any row.

use fused_collective_core::{dtype::Element, pack::Pack, workspace::SlotRows};

use super::{
    begun::{Begun, serves},
    partials,
    ranks::{deal, dealt, first_slot, opaque, row_of},
    sharded::sharded_of,
    sum::{load_row, make_addend, sum_of},
    two_shot::two_hops,
    wait::{Awaited, Waiter},
};
use crate::{
    epilogue::{Epilogue, PackIndex},
    launch::{Activations, Address, FusedHosts, HostSum, Status},
    prologue::Prologue,
    row::{Team, ThreadSlice},
    simt,
    wire::Elements,
};

/// The first kernel, for hosts of at most `N` ranks, with `P` packs of a row in each thread: all of its share if `RESIDENT`,
/// else a chunk of it.
///
/// # Safety
/// Called once by every thread of a grid launched by the rules in [`launch`](crate::launch), with parameters as
/// their documentation says.
#[inline(always)]
pub unsafe fn host_sum<E, I, const N: usize, const P: usize, const RESIDENT: bool>(
    params: &HostSum,
    prologue: &I,
) where
    E: Element,
    I: Prologue<E>,
{
    if !serves::<N>(&params.group, 1) {
        return;
    }
    let HostSum { group, shape, activations, partials, .. } = params;
    let team = Team::join(false);
    let (team_index, teams) = (team.index, team.teams);
    let slice = ThreadSlice::<P, RESIDENT>::new(&team, shape);
    let row_bytes = shape.row_bytes();
    let stride = SlotRows::of_elements(group.world_size, shape.tokens as u64, row_bytes).first_hop(1, 0);
    // SAFETY: as this function's. Packs of `slice` and tokens below `shape.tokens` are inside the tensors and the slots,
    // and by the launch rules this thread's alone. The same holds for the blocks below.
    let own = |token, chunk| unsafe {
        load_row(activations.input, slice, chunk, &slice.indices(shape.operation_token(token), chunk))
    };

    let at = |row: Address, pack: u32| row.offset(pack as u64 * Pack::BYTES);

    // Prologue. The next kernel is not let in early: it is NCCL's, and need not wait for this one.
    simt::wait_for_prerequisites();
    if prologue.makes_addend(activations) {
        deal(team_index, teams, shape.tokens, |token| {
            // SAFETY: see above.
            unsafe { make_addend::<E, I, P, RESIDENT>(prologue, activations, shape, slice, token, None) };
        });
    }
    // SAFETY: see above.
    let mut begun = unsafe { Begun::read(group, Begun::epoch(group)) };
    // SAFETY: see above.
    unsafe { begun.tell(Status::GATHERS_BEGUN) };
    begun.stay();

    // Push.
    let slot_of = |waiter: &Waiter<'_>, rank| {
        first_slot::<N>(&opaque(group), rank).offset(waiter.slot as u64 * group.slot_bytes)
    };
    deal(team_index, teams, shape.tokens, |token| {
        let (owner, index) = dealt(token, group.world_size);
        if owner == group.rank || begun.waiter.failed {
            return;
        }
        let row = slot_of(&begun.waiter, owner).offset(group.rank as u64 * stride + index as u64 * row_bytes);
        slice.for_chunks(|chunk| {
            let packs = own(token, chunk);
            // SAFETY: see above.
            slice.for_each(chunk, |p, pack| unsafe { simt::push(at(row, pack), packs[p].strip()) });
        });
    });

    // Complete.
    deal(team_index, teams, shape.tokens, |token| {
        let (owner, index) = dealt(token, group.world_size);
        if owner != group.rank {
            return;
        }
        let first = slot_of(&begun.waiter, group.rank).offset(index as u64 * row_bytes);
        slice.for_chunks(|chunk| {
            let own = own(token, chunk);
            let from = |source, pack| at(row_of(first, source, stride), pack);
            // SAFETY: see above. The partial sums have a row for each token that this rank owns.
            unsafe {
                let packs = begun.waiter.all::<N, P, RESIDENT>(
                    slice,
                    chunk,
                    |source, _, pack| simt::poll(from(source, pack)),
                    // A push, since a peer given up on may still write.
                    |source, _, pack| simt::push(from(source, pack), Pack::SENTINEL),
                    Awaited { shape, token, hop: 1 },
                );
                slice.for_each(chunk, |p, pack| {
                    let in_row = PackIndex::new(0, pack, shape.row_packs);
                    let sum = sum_of::<E, _, N>(&Elements, group, in_row, &packs[p], own[p]);
                    partials::store::<E>(partials, shape, index, pack, sum, begun.waiter.failed);
                });
            }
        });
    });
}

/// The prologue of the second kernel: the first has made the addend, and there may be other extras.
#[derive(Clone, Copy)]
struct Summed;

impl<E: Element> Prologue<E> for Summed {
    #[inline(always)]
    fn makes_addend(&self, _activations: &Activations) -> bool {
        false
    }

    #[inline(always)]
    unsafe fn addend(&self, _index: PackIndex) -> Pack {
        Pack::default()
    }
}

/// The second kernel, for hosts of at most `N` ranks: [`two_shot`](super::two_shot()) of what the hosts have summed. `P` and
/// `RESIDENT` as there.
///
/// # Safety
/// As [`host_sum`], after that of the same round and the gather of its sums.
#[inline(always)]
pub unsafe fn two_shot_hosts<E, X, const N: usize, const P: usize, const RESIDENT: bool>(
    params: &FusedHosts<X>,
) where
    E: Element,
    X: Epilogue<E>,
{
    let FusedHosts { fused, partials } = params;
    // SAFETY: as this function's.
    unsafe { two_hops::<E, X, _, _, _, N, P, RESIDENT>(fused, &Summed, &Elements, partials) }
}

/// The second kernel with a sharded residual: [`sharded`](super::sharded()) of what the hosts have summed.
///
/// # Safety
/// As [`two_shot_hosts`], with parameters as their documentation says for a sharded residual.
#[inline(always)]
pub unsafe fn sharded_hosts<E, X, const N: usize, const P: usize, const RESIDENT: bool>(
    params: &FusedHosts<X>,
) where
    E: Element,
    X: Epilogue<E>,
{
    let FusedHosts { fused, partials } = params;
    // SAFETY: as this function's.
    unsafe { sharded_of::<E, X, _, _, _, N, P, RESIDENT>(fused, &Summed, &Elements, partials) }
}
