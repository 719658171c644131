//! What threads do together: the lanes of a warp, the threads of a block, and the blocks of a cluster.

use super::{Geometry, Lane, Running, Shuffle, WARP};
use crate::instruction::Register;

impl Running<'_> {
    /// A lane comes to an instruction that those of `mask` execute together.
    pub(super) fn meet(&mut self, thread: usize, mask: u32, shuffle: Option<Shuffle>) -> Result<(), String> {
        if mask & 1 << (thread % WARP) == 0 {
            return Err(format!("a lane that is not in its own mask {mask:#x}"));
        }
        self.threads[thread].lane = Some(Lane { mask, shuffle });
        self.release_lanes(thread, mask)
    }

    /// Lets the lanes of `mask` go on, in the warp of `thread`, if all that have not ended wait for each other.
    fn release_lanes(&mut self, thread: usize, mask: u32) -> Result<(), String> {
        let first = thread / WARP * WARP;
        let lanes = (first..first + WARP).filter(|lane| mask & 1 << (lane - first) != 0);
        let mut here: Vec<(usize, Option<Shuffle>)> = Vec::new();
        for lane in lanes.filter(|lane| !self.threads[*lane].ended) {
            match self.threads[lane].lane {
                Some(Lane { mask: of_lane, shuffle }) if of_lane == mask => here.push((lane, shuffle)),
                _ => return Ok(()),
            }
        }
        if here.iter().any(|(lane, _)| self.threads[*lane].at != self.threads[here[0].0].at) {
            return Err(format!("lanes of mask {mask:#x} come together at different instructions"));
        }
        // As they are at one instruction, all shuffle or none does.
        let orders_memory = here.iter().all(|(_, shuffle)| shuffle.is_none());
        if orders_memory {
            self.stores.complete_of(|of| here.iter().any(|(lane, _)| *lane == of));
        }
        for &(lane, shuffle) in &here {
            if let Some(Shuffle { source, to, .. }) = shuffle {
                let from = here.iter().find(|(other, _)| *other == first + source);
                let Some((_, Some(Shuffle { value, .. }))) = from else {
                    return Err(format!(
                        "a value of lane {source}, which does not shuffle with mask {mask:#x}"
                    ));
                };
                self.set(lane, to, *value);
            }
            let state = &mut self.threads[lane];
            state.lane = None;
            state.at += 1;
            state.meetings += u64::from(orders_memory && mask == u32::MAX);
            if lane != thread {
                self.runnable.push(lane);
            }
        }
        Ok(())
    }

    /// A thread comes to a barrier of its block.
    pub(super) fn arrive(&mut self, thread: usize, to: Option<Register>, value: bool) -> Result<(), String> {
        let index = self.block_of(thread);
        self.threads[thread].barrier = Some(to);
        let block = &mut self.blocks[index];
        if block.at_barrier == 0 {
            (block.any, block.is_asked) = (false, to.is_some());
        } else if to.is_some() != block.is_asked {
            return Err("threads of a block meet at barriers of two kinds".to_owned());
        }
        block.at_barrier += 1;
        block.any |= value;
        if block.ended > 0 {
            return Err("a barrier that threads of the block have ended without".to_owned());
        }
        if block.at_barrier < self.grid.geometry.threads {
            return Ok(());
        }
        let any = block.any;
        block.at_barrier = 0;
        let threads = self.grid.geometry.threads as usize;
        self.stores.complete_of(|of| of / threads == index);
        for member in index * threads..(index + 1) * threads {
            if let Some(Some(to)) = self.threads[member].barrier {
                self.set(member, to, u64::from(any));
            }
            let state = &mut self.threads[member];
            state.barrier = None;
            state.barriers += 1;
            state.at += 1;
            if member != thread {
                self.runnable.push(member);
            }
        }
        Ok(())
    }

    pub(super) fn cluster_has_passed(&self, thread: usize, cluster: usize) -> bool {
        let Geometry { cluster: blocks, threads, .. } = self.grid.geometry;
        self.cluster_arrivals[cluster] >= self.threads[thread].cluster_arrivals * u64::from(blocks * threads)
    }

    /// Lets threads go on whose cluster has arrived at its barrier.
    pub(super) fn release_cluster(&mut self, cluster: usize) {
        let members = (self.grid.geometry.cluster * self.grid.geometry.threads) as usize;
        for member in cluster * members..(cluster + 1) * members {
            if self.threads[member].waits_for_cluster && self.cluster_has_passed(member, cluster) {
                self.threads[member].waits_for_cluster = false;
                self.threads[member].at += 1;
                self.runnable.push(member);
            }
        }
    }

    /// A thread ends.
    pub(super) fn end(&mut self, thread: usize) -> Result<(), String> {
        self.threads[thread].ended = true;
        let block = self.block_of(thread);
        self.blocks[block].ended += 1;
        if self.blocks[block].at_barrier > 0 {
            return Err("ends while threads of its block wait at a barrier".to_owned());
        }
        let first = thread / WARP * WARP;
        // Lanes that have waited for this one alone go on, all of a mask with the first of them.
        for lane in first..first + WARP {
            if let Some(Lane { mask, .. }) = self.threads[lane].lane {
                self.release_lanes(thread, mask)?;
            }
        }
        Ok(())
    }
}
