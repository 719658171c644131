//! The regions that ranks share: made, exchanged through CUDA IPC, checked.

use fused_collective_core::{
    fusion::Operation,
    lamport::SENTINEL,
    launch::{Address, RankState},
    workspace::{Header, Layout, SLOTS_OFFSET, SlotRows},
};

use super::{
    Error,
    driver::IpcHandle,
    memory::{DeviceMemory, PeerMemory, require},
};
use crate::rendezvous::Group;

/// Regions have pages of their own: a peer that opens one may reach the pages whole.
const PAGE: u64 = 2 << 20;

/// The most bytes of a slot that [`slot_bytes`] recommends.
const MAX_SLOT_BYTES: u64 = 512 << 20;

/// Bytes of a slot that lets a group run `operation` in one round, in either mode, if 512 MiB do; else 512 MiB, or
/// what one token takes.
pub fn slot_bytes(world_size: u32, operation: &Operation) -> u64 {
    let bytes = |tokens| {
        let rows = SlotRows { world_size, tokens, row_bytes: operation.row_bytes() };
        let (one_shot, two_shot) = (rows.one_shot_bytes(), rows.two_shot_bytes());
        one_shot.unwrap_or(u64::MAX).max(two_shot.unwrap_or(u64::MAX))
    };
    bytes(operation.tokens).min(MAX_SLOT_BYTES).max(bytes(1))
}

/// This rank's region, every peer's, and what kernels need to find them.
#[derive(Debug)]
pub(crate) struct Workspace {
    // Peers' regions are closed before this rank's is freed.
    _peers: Vec<PeerMemory>,
    _region: DeviceMemory,
    table: DeviceMemory,
    state: DeviceMemory,
}

impl Workspace {
    /// Makes this rank's region and opens the others'. All ranks call this, with the same layout.
    ///
    /// # Errors
    /// The region does not fit into the GPU's memory; a pair of ranks cannot share memory; a region is not what it
    /// should be. The error names the ranks.
    pub(crate) fn share(group: &Group, layout: &Layout) -> Result<Workspace, Error> {
        let own = group.rank();
        let header = |rank| Header { world_size: layout.world_size(), rank, slot_bytes: layout.slot_bytes() };

        let region = make_region(layout, header(own))?;
        let handles = group.all_gather(&region.share()?.0)?;

        let mut addresses = Vec::with_capacity(handles.len());
        let mut peers = Vec::with_capacity(handles.len());
        for (rank, handle) in (0..).zip(&handles) {
            if rank == own {
                addresses.push(region.address());
                continue;
            }
            let apart = |why: String| Error::Pair { rank: own, peer: rank, why };
            let handle = <[u8; 64]>::try_from(&handle[..])
                .map_err(|_| apart(format!("its handle has {} bytes, not 64", handle.len())))?;
            let peer = PeerMemory::open(IpcHandle(handle)).map_err(|error| apart(error.to_string()))?;
            let mut words = [0u64; 8];
            peer.read(bytemuck::cast_slice_mut(&mut words)).map_err(|error| apart(error.to_string()))?;
            header(rank).check(words.map(u64::from_le)).map_err(|error| apart(error.to_string()))?;
            addresses.push(peer.address());
            peers.push(peer);
        }
        let table: Vec<u64> = addresses.iter().map(|address| address.0).collect();
        let workspace = Workspace {
            _peers: peers,
            _region: region,
            table: DeviceMemory::holding(bytemuck::cast_slice(&table))?,
            state: DeviceMemory::holding(&[0; size_of::<RankState>()])?,
        };
        // Nobody sends before everybody is ready.
        group.barrier()?;
        Ok(workspace)
    }

    /// The table of all regions' addresses.
    pub(crate) fn table(&self) -> Address {
        self.table.address()
    }

    /// This rank's [`RankState`].
    pub(crate) fn state(&self) -> Address {
        self.state.address()
    }
}

/// A region with its header and with slots full of the sentinel.
fn make_region(layout: &Layout, header: Header) -> Result<DeviceMemory, Error> {
    let bytes = layout.region_bytes().next_multiple_of(PAGE);
    require("the workspace", bytes)?;
    let mut region = DeviceMemory::new(bytes)?;
    region.fill_from(0, 0)?;
    region.fill_from(SLOTS_OFFSET, SENTINEL)?;
    let words = header.to_words().map(u64::to_le);
    region.write(0, bytemuck::cast_slice(&words))?;
    Ok(region)
}
