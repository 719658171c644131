//! What each instruction does.

use super::{Geometry, Message, Running, Shuffle, Step, WARP};
use crate::{
    instruction::{LOCAL, Operation, Place, Space, Special},
    memory::Cell,
};

/// Stores to global memory that are on their way at the same time, at most.
const MOST_STORES: usize = 48;
/// Bits of an address in shared memory that are an offset; the block's rank in its cluster is above them.
const WINDOW_BITS: u32 = 24;

/// How many phases of a counter a thread knows to have ended, by what it has `observed`.
fn phases_in(observed: &[(u32, u64)]) -> impl Fn(u32) -> u64 {
    |counter| observed.iter().find(|(known, _)| *known == counter).map_or(0, |(_, phases)| *phases)
}

impl Running<'_> {
    /// Executes an instruction of a thread.
    pub(super) fn execute(&mut self, thread: usize, operation: &Operation) -> Result<Step, String> {
        match *operation {
            Operation::Compute { compute, to, from: [a, b, c] } => {
                let value = compute(self.get(thread, a), self.get(thread, b), self.get(thread, c));
                self.set(thread, to, value);
            }
            Operation::Special { to, of } => {
                let value = self.special(thread, of);
                self.set(thread, to, value);
            }
            Operation::Unpack { to: [low, high], from, bits } => {
                let value = self.get(thread, from);
                let part = |value: u64| value & ((1 << bits) - 1);
                if let Some(low) = low {
                    self.set(thread, low, part(value));
                }
                if let Some(high) = high {
                    self.set(thread, high, part(value >> bits));
                }
            }
            Operation::Pack { to, from: [low, high], bits } => {
                let part = |value: u64| value & ((1 << bits) - 1);
                let value = part(self.get(thread, low)) | part(self.get(thread, high)) << bits;
                self.set(thread, to, value);
            }
            Operation::LoadParameter { to, offset, bytes } => {
                let value = self.parameter(offset, bytes)?;
                self.set(thread, to, value);
            }
            Operation::Load { space, ref to, bytes, signed, from, constant, is_weak } => {
                let extended = |value: u64| {
                    let above = 64 - 8 * bytes as u32;
                    if signed { ((value << above) as i64 >> above) as u64 } else { value }
                };
                if let Some(local) = self.local(thread, space, from, bytes * to.len() as u64)? {
                    let mut values = [0; 4];
                    for (value, bytes) in values.iter_mut().zip(local.chunks_exact(bytes as usize)) {
                        let mut whole = [0; 8];
                        whole[..bytes.len()].copy_from_slice(bytes);
                        *value = extended(u64::from_le_bytes(whole));
                    }
                    for (register, value) in to.iter().zip(values) {
                        self.set(thread, *register, value);
                    }
                    return Ok(Step::Next);
                }
                self.check_grid(thread, constant)?;
                let all = bytes * to.len() as u64;
                let cell = self.touch(thread, from, all, false, is_weak)?;
                self.stores.complete_own(thread, cell, all);
                for (index, register) in to.iter().enumerate() {
                    self.set(thread, *register, extended(cell.at(index as u64 * bytes).load(bytes)));
                }
                // It may be polling.
                return Ok(Step::Pause);
            }
            Operation::Store { space, to, bytes, ref from, release, is_weak } => {
                let mut values = [0; 4];
                for (value, source) in values.iter_mut().zip(from) {
                    *value = self.get(thread, *source);
                }
                if let Some(local) = self.local(thread, space, to, bytes * from.len() as u64)? {
                    for (bytes, value) in local.chunks_exact_mut(bytes as usize).zip(values) {
                        bytes.copy_from_slice(&value.to_le_bytes()[..bytes.len()]);
                    }
                    return Ok(Step::Next);
                }
                self.check_grid(thread, false)?;
                let cell = self.touch(thread, to, bytes * from.len() as u64, true, is_weak)?;
                if release {
                    // What others stored before was made visible where it was ordered before this.
                    self.stores.complete_of(|other| other == thread);
                }
                for (index, &value) in values[..from.len()].iter().enumerate() {
                    self.stores.push(thread, cell.at(index as u64 * bytes), bytes, value);
                }
                while self.stores.len() > MOST_STORES {
                    self.stores.complete(0);
                }
            }
            Operation::CompareAndSwap { old, at, expected, new } => {
                self.check_grid(thread, false)?;
                let cell = self.touch(thread, at, 4, true, false)?;
                self.stores.complete_own(thread, cell, 4);
                let (expected, new) = (self.get(thread, expected) as u32, self.get(thread, new) as u32);
                let was = cell.compare_and_swap(expected, new);
                self.set(thread, old, u64::from(was));
            }
            Operation::LoadShared { ref to, from } => {
                let (address, access, block) =
                    (self.shared_address(thread, from), self.access(thread), self.block_of(thread));
                if !address.is_multiple_of(4 * to.len() as u64) {
                    return Err(format!("address {address} of shared memory is not aligned"));
                }
                for (index, register) in to.iter().enumerate() {
                    let observed = phases_in(&self.threads[thread].observed);
                    let shared = &mut self.blocks[block].shared;
                    let value = shared.load(address + index as u64 * 4, access, observed)?;
                    self.set(thread, *register, u64::from(value));
                }
            }
            Operation::StoreShared { to, from } => {
                let (address, value, access, block) = (
                    self.shared_address(thread, to),
                    self.get(thread, from) as u32,
                    self.access(thread),
                    self.block_of(thread),
                );
                let observed = phases_in(&self.threads[thread].observed);
                self.blocks[block].shared.store(address, value, access, observed)?;
            }
            Operation::Branch { target } => return Ok(Step::Jump(target)),
            Operation::BranchIndexed { index, ref targets } => {
                let index = self.get(thread, index) as u32;
                let target = targets.get(index as usize);
                return target
                    .map(|target| Step::Jump(*target))
                    .ok_or_else(|| format!("branch {index} of {}", targets.len()));
            }
            Operation::Return => {
                self.end(thread)?;
                return Ok(Step::End);
            }
            Operation::Shuffle { to, value, distance, clamp, mask } => {
                let (value, distance, clamp, mask) = (
                    self.get(thread, value) & 0xffff_ffff,
                    self.get(thread, distance) as usize & 31,
                    self.get(thread, clamp) as usize,
                    self.get(thread, mask) as u32,
                );
                let lane = thread % WARP;
                let (segment, last) = (clamp >> 8 & 31, clamp & 31);
                let last = lane & segment | last & !segment;
                let source = if lane ^ distance <= last { lane ^ distance } else { lane };
                self.meet(thread, mask, Some(Shuffle { value, source, to }))?;
                return Ok(Step::Wait);
            }
            Operation::SynchronizeWarp { mask } => {
                let mask = self.get(thread, mask) as u32;
                self.meet(thread, mask, None)?;
                return Ok(Step::Wait);
            }
            Operation::Barrier => {
                self.arrive(thread, None, false)?;
                return Ok(Step::Wait);
            }
            Operation::BarrierAny { to, value } => {
                let value = self.get(thread, value) != 0;
                self.arrive(thread, Some(to), value)?;
                return Ok(Step::Wait);
            }
            Operation::ArriveAtCluster => {
                let cluster = self.cluster_of(thread);
                self.threads[thread].cluster_arrivals += 1;
                self.cluster_arrivals[cluster] += 1;
                self.release_cluster(cluster);
            }
            Operation::WaitForCluster => {
                let cluster = self.cluster_of(thread);
                if self.cluster_has_passed(thread, cluster) {
                    return Ok(Step::Next);
                }
                self.threads[thread].waits_for_cluster = true;
                return Ok(Step::Wait);
            }
            Operation::InitializeCounter { at, count } => {
                let (address, count, block) =
                    (self.shared_address(thread, at), self.get(thread, count) as u32, self.block_of(thread));
                self.blocks[block].shared.initialize_counter(address, count)?;
            }
            Operation::Expect { at, bytes } => {
                let (address, bytes, block) =
                    (self.shared_address(thread, at), self.get(thread, bytes) as u32, self.block_of(thread));
                self.blocks[block].shared.expect(address, bytes)?;
            }
            Operation::Map { to, address, rank } => {
                let (address, rank) = (self.get(thread, address) as u32, self.get(thread, rank) as u32);
                if rank >= self.grid.geometry.cluster {
                    return Err(format!(
                        "there is no block {rank} in a cluster of {}",
                        self.grid.geometry.cluster
                    ));
                }
                self.set(thread, to, u64::from(address | (rank + 1) << WINDOW_BITS));
            }
            Operation::Send { to, value, counter } => {
                let (to, counter) = (self.shared_address(thread, to), self.shared_address(thread, counter));
                let rank = to >> WINDOW_BITS;
                if !(1..=u64::from(self.grid.geometry.cluster)).contains(&rank) {
                    return Err(format!("a word for address {to:#x}, which is in no block's memory"));
                }
                if rank != counter >> WINDOW_BITS {
                    return Err("a word for one block's memory and another's counter".to_owned());
                }
                let first = self.cluster_of(thread) * self.grid.geometry.cluster as usize;
                let offset = |address: u64| address & ((1 << WINDOW_BITS) - 1);
                let (address, counter) = (offset(to), offset(counter));
                let value = self.get(thread, value) as u32;
                let block = first + rank as usize - 1;
                self.messages.push(Message { sender: thread, block, address, value, counter });
            }
            Operation::TryWait { to, at, parity } => {
                let (address, parity, block) =
                    (self.shared_address(thread, at), self.get(thread, parity) & 1, self.block_of(thread));
                let phase = self.blocks[block].shared.counter(address)?.phase;
                let has_ended = phase & 1 != parity;
                if has_ended {
                    let observed = &mut self.threads[thread].observed;
                    observed.retain(|(counter, _)| u64::from(*counter) != address);
                    observed.push((address as u32, phase));
                }
                self.set(thread, to, u64::from(has_ended));
                return Ok(Step::Pause);
            }
            Operation::WaitForGrid => self.threads[thread].waited_for_grid = true,
            Operation::Fail(ref what) => return Err(what.clone()),
            Operation::Nothing => {}
        }
        Ok(Step::Next)
    }

    fn special(&self, thread: usize, of: Special) -> u64 {
        let Geometry { blocks, cluster, threads } = self.grid.geometry;
        let block = thread as u32 / threads;
        u64::from(match of {
            Special::Thread => thread as u32 % threads,
            Special::Threads => threads,
            Special::Block => block,
            Special::Blocks => blocks,
            Special::ClusterRank => block % cluster,
            Special::ClusterSize => cluster,
            Special::Cluster => block / cluster,
            Special::Clusters => blocks / cluster,
            Special::Nanoseconds => return self.began.elapsed().as_nanos() as u64,
        })
    }

    fn parameter(&self, offset: u64, bytes: u64) -> Result<u64, String> {
        let field = usize::try_from(offset).ok().and_then(|start| {
            let rest = self.grid.parameter.get(start..)?;
            rest.get(..bytes as usize)
        });
        let Some(field) = field else {
            return Err(format!(
                "{bytes} bytes at {offset} of {} bytes of parameter",
                self.grid.parameter.len()
            ));
        };
        let mut value = 0;
        for (index, byte) in field.iter().enumerate() {
            // SAFETY: loaded by the entry point, and so initialized, by the contract of `Grid::run`.
            value |= u64::from(unsafe { byte.assume_init() }) << (index * 8);
        }
        Ok(value)
    }

    /// What an earlier kernel may still write, or read, must not be accessed before the wait for it.
    fn check_grid(&self, thread: usize, constant: bool) -> Result<(), String> {
        if self.grid.entry.waits_for_grid && !constant && !self.threads[thread].waited_for_grid {
            return Err("global memory is accessed before griddepcontrol.wait".to_owned());
        }
        Ok(())
    }

    /// The local memory at a place, which a thread accesses; `None` at a place of global memory.
    fn local(
        &mut self,
        thread: usize,
        space: Space,
        place: Place,
        bytes: u64,
    ) -> Result<Option<&mut [u8]>, String> {
        let address = self.get(thread, place.address).wrapping_add(place.offset);
        match space {
            Space::Global => return Ok(None),
            Space::Generic if address < LOCAL => return Ok(None),
            Space::Generic | Space::Local => {}
        }
        if !address.is_multiple_of(bytes) {
            return Err(format!("{bytes} bytes at {address:#x} of local memory are not aligned"));
        }
        let local = &mut self.locals[thread];
        local.resize(self.grid.entry.local_bytes, 0);
        let start = usize::try_from(address.wrapping_sub(LOCAL)).ok();
        let inside = start.and_then(|start| local.get_mut(start..)?.get_mut(..bytes as usize));
        inside.map(Some).ok_or_else(|| format!("{bytes} bytes at {address:#x} are outside local memory"))
    }

    /// The global memory at a place, which a thread accesses.
    fn touch(
        &mut self,
        thread: usize,
        place: Place,
        bytes: u64,
        stores: bool,
        is_weak: bool,
    ) -> Result<Cell, String> {
        let address = self.get(thread, place.address).wrapping_add(place.offset);
        let cell = self.grid.memory.at(address, bytes)?;
        let by = (self.block_of(thread) as u32, self.access(thread));
        self.races.touch(address, bytes, by, stores, is_weak)?;
        Ok(cell)
    }

    /// Where in shared memory a place is; an address there has 32 bits.
    fn shared_address(&self, thread: usize, place: Place) -> u64 {
        u64::from((self.get(thread, place.address) as u32).wrapping_add(place.offset as u32))
    }
}
