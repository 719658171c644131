//! The regions that ranks share: made, exchanged through CUDA IPC, checked.

use std::array;

use zerocopy::IntoBytes as _;

use fused_collective_core::{
    fusion::{Operation, Residual},
    lamport::{SENTINEL, SLOTS},
    launch::{Address, MAX_RANKS, RankState},
    workspace::{Header, Layout, SLOTS_OFFSET, SlotRows},
};

use super::{
    device::{Context, process},
    driver::{DevicePointer, Handle, IpcHandle},
    memory::{DeviceMemory, PeerMemory, require},
};
use crate::{error::Error, group::Bootstrap};

/// Regions have pages of their own: a peer that opens one may reach the pages whole.
const PAGE: u64 = 2 << 20;

/// A region of at most so many bytes is read whole to look for stray writes.
const ALWAYS_WHOLE: u64 = 8 << 20;
/// Of the slots of a larger one, so many bytes at either end.
const EDGE: u64 = 64 << 10;
/// Bytes of a region that are read at a time.
const READ_AT_ONCE: u64 = 64 << 20;

/// Words of a slot between operations.
const FULL: [u32; 4096] = [SENTINEL; 4096];

/// The most bytes of a slot that [`slot_bytes`] recommends.
const MAX_SLOT_BYTES: u64 = 512 << 20;

/// Bytes of a slot that lets a group run `operation` in one round, in either mode, if 512 MiB do; else 512 MiB, or
/// what the smallest round takes.
pub fn slot_bytes(world_size: u32, operation: &Operation) -> u64 {
    let bytes = |tokens| {
        let rows = SlotRows::of_elements(world_size, tokens, operation.row_bytes());
        let (one_shot, two_shot) = (rows.one_shot_bytes(), rows.two_shot_bytes());
        one_shot.unwrap_or(u64::MAX).max(two_shot.unwrap_or(u64::MAX))
    };
    // The smallest round of an operation with a sharded residual has a token for each rank.
    let least =
        if operation.residual == Residual::Sharded { operation.tokens.min(u64::from(world_size)) } else { 1 };
    bytes(operation.tokens).min(MAX_SLOT_BYTES).max(bytes(least.max(1)))
}

/// An allocation as other ranks find it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Name {
    process: [u8; 16],
    /// Means something in that process alone, as the address does.
    context: usize,
    address: DevicePointer,
    /// Means something in all others.
    handle: [u8; 64],
}

impl Name {
    fn of(memory: &DeviceMemory, context: &Context) -> Result<Name, Error> {
        let (address, context) = (memory.address().0, context.handle().expose_provenance());
        Ok(Name { process: process(), context, address, handle: memory.share()?.0 })
    }

    fn to_bytes(self) -> Vec<u8> {
        let Name { process, context, address, handle } = self;
        [&process[..], &context.to_le_bytes(), &address.to_le_bytes(), &handle].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Name> {
        let (&process, rest) = bytes.split_first_chunk()?;
        let (&context, rest) = rest.split_first_chunk()?;
        let (&address, rest) = rest.split_first_chunk()?;
        let (context, address) = (usize::from_le_bytes(context), u64::from_le_bytes(address));
        Some(Name { process, context, address, handle: rest.try_into().ok()? })
    }

    /// Opens the allocation for the GPU of `context`.
    fn open(self, context: &Context) -> Result<PeerMemory, Error> {
        if self.process == process() {
            let peer: Handle = std::ptr::with_exposed_provenance_mut(self.context);
            return PeerMemory::of_this_process(context, peer, self.address);
        }
        PeerMemory::open(context, IpcHandle(self.handle))
    }
}

/// This rank's region and every peer's.
#[derive(Debug)]
pub struct Regions {
    // Peers' regions are closed before this rank's is freed.
    peers: Vec<PeerMemory>,
    own: DeviceMemory,
    addresses: [Address; MAX_RANKS],
}

impl Regions {
    /// Makes this rank's region of `bytes` bytes for `what`, with its header and then `fill` in all words from
    /// [`SLOTS_OFFSET`] on, and opens the others'. All ranks call this, with the same arguments. A rank's region has
    /// the header that `header` gives for it.
    ///
    /// # Errors
    /// The region does not fit into the GPU's memory; a pair of ranks cannot share memory; a region is not what it
    /// should be. The error names the ranks.
    pub fn share(
        bootstrap: &dyn Bootstrap,
        context: &Context,
        what: &str,
        bytes: u64,
        fill: u32,
        header: impl Fn(u32) -> Header,
    ) -> Result<Regions, Error> {
        let rank = bootstrap.rank();
        let own = make_region(context, what, bytes, fill, header(rank))?;
        let name = Name::of(&own, context)?;
        let names = bootstrap.all_gather(&name.to_bytes()).map_err(Error::bootstrap)?;

        let mut addresses = Vec::with_capacity(names.len());
        let mut peers = Vec::with_capacity(names.len());
        for (peer, bytes) in (0..).zip(&names) {
            if peer == rank {
                addresses.push(own.address());
                continue;
            }
            let apart = |why: String| Error::Pair { rank, peer, why };
            let name = Name::from_bytes(bytes)
                .ok_or_else(|| apart(format!("its memory's name has {} bytes", bytes.len())))?;
            let opened = name.open(context).map_err(|error| apart(error.to_string()))?;
            let mut words = [0u64; 8];
            opened.read(words.as_mut_bytes()).map_err(|error| apart(error.to_string()))?;
            header(peer).check(words.map(u64::from_le)).map_err(|error| apart(error.to_string()))?;
            addresses.push(opened.address());
            peers.push(opened);
        }
        let addresses = array::from_fn(|rank| addresses.get(rank).copied().unwrap_or(Address::NULL));
        // Nobody sends before everybody is ready.
        bootstrap.barrier().map_err(Error::bootstrap)?;
        Ok(Regions { peers, own, addresses })
    }

    /// The addresses by which this GPU reaches every rank's region.
    pub fn addresses(&self) -> [Address; MAX_RANKS] {
        self.addresses
    }

    /// This rank's.
    pub fn own(&self) -> &DeviceMemory {
        &self.own
    }

    /// Closes the peers' regions. No kernel may use them any more.
    pub fn close_peers(&mut self) {
        self.peers.clear();
    }
}

/// The regions that a group's operations go through, and what kernels need to find them.
#[derive(Debug)]
pub(crate) struct Workspace {
    regions: Regions,
    state: DeviceMemory,
}

impl Workspace {
    /// Makes this rank's region and opens the others'. All ranks call this, with the same layout.
    ///
    /// # Errors
    /// As [`Regions::share`].
    pub(crate) fn share(
        bootstrap: &dyn Bootstrap,
        context: &Context,
        layout: &Layout,
    ) -> Result<Workspace, Error> {
        let header = |rank| Header { world_size: layout.world_size(), rank, slot_bytes: layout.slot_bytes() };
        let state = DeviceMemory::holding(context, &[0; size_of::<RankState>()])?;
        let regions =
            Regions::share(bootstrap, context, "the workspace", layout.region_bytes(), SENTINEL, header)?;
        Ok(Workspace { regions, state })
    }

    /// Closes the peers' regions. No kernel may use this workspace any more.
    pub(crate) fn close_peers(&mut self) {
        self.regions.close_peers();
    }

    /// Between operations: what this rank's region holds that is neither its `header` nor the sentinel in all slots
    /// and after them, if anything. A region of more than [`ALWAYS_WHOLE`] bytes is read whole only if `thorough`,
    /// else the first and the last [`EDGE`] bytes of each slot.
    ///
    /// # Errors
    /// The driver's.
    pub(crate) fn find_stray_write(
        &self,
        layout: &Layout,
        header: Header,
        thorough: bool,
    ) -> Result<Option<String>, Error> {
        let mut head = [0u64; (SLOTS_OFFSET / 8) as usize];
        self.regions.own.read(0, head.as_mut_bytes())?;
        let expected = header.to_words().map(u64::to_le);
        if head[..expected.len()] != expected || head[expected.len()..].iter().any(|&word| word != 0) {
            return Ok(Some("the header of this rank's region".to_owned()));
        }
        let end = self.regions.own.bytes();
        let mut ranges = Vec::new();
        if end <= ALWAYS_WHOLE || thorough {
            ranges.push(SLOTS_OFFSET..end);
        } else {
            for slot in 0..SLOTS {
                let (first, next) =
                    (layout.slot_offset(slot), layout.slot_offset(slot) + layout.slot_bytes());
                ranges.push(first..(first + EDGE).min(next));
                ranges.push(next.saturating_sub(EDGE).max(first)..next);
            }
            ranges.push(layout.region_bytes()..end);
        }
        let mut words = Vec::new();
        for range in ranges {
            for start in range.clone().step_by(READ_AT_ONCE as usize) {
                let bytes = READ_AT_ONCE.min(range.end - start);
                words.resize((bytes / 4) as usize, 0u32);
                self.regions.own.read(start, words.as_mut_bytes())?;
                // Whole chunks are compared at once: a region may have gigabytes.
                let chunk = words.chunks(FULL.len()).position(|chunk| *chunk != FULL[..chunk.len()]);
                let first = chunk.map_or(words.len(), |chunk| chunk * FULL.len());
                if let Some(at) = words[first..].iter().position(|&word| word != SENTINEL) {
                    let at = first + at;
                    return Ok(Some(format!("this rank's region, byte {}", start + at as u64 * 4)));
                }
            }
        }
        Ok(None)
    }

    /// The addresses by which this GPU reaches every rank's region.
    pub(crate) fn regions(&self) -> [Address; MAX_RANKS] {
        self.regions.addresses
    }

    /// This rank's [`RankState`].
    pub(crate) fn state(&self) -> Address {
        self.state.address()
    }
}

/// A region with its header and with `fill` in all words from [`SLOTS_OFFSET`] on.
fn make_region(
    context: &Context,
    what: &str,
    bytes: u64,
    fill: u32,
    header: Header,
) -> Result<DeviceMemory, Error> {
    let bytes = bytes.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
    require(context, what, bytes)?;
    let mut region = DeviceMemory::new(context, bytes)?;
    region.fill_from(0, 0)?;
    region.fill_from(SLOTS_OFFSET, fill)?;
    let words = header.to_words().map(u64::to_le);
    region.write(0, words.as_bytes())?;
    Ok(region)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_as_it_was_written_and_no_other_length_is() {
        let name = Name { process: [1; 16], context: 2, address: 3, handle: [4; 64] };
        assert_eq!(Name::from_bytes(&name.to_bytes()), Some(name));
        for length in [0, 95, 97] {
            assert_eq!(Name::from_bytes(&vec![0; length]), None, "{length}");
        }
    }
}
