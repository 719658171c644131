//! The fused operation on one rank: the one-shot and two-shot collectives, row by row.
//!
//! A row is received, summed, normalized and quantized while it is in the nearest cache; memory sees each
//! activation once. All ranks' results are the same bits: sums are taken in rank order of rows that went
//! through the same `strip`, whether they travelled or not.

use bytemuck::Pod;
use fused_collective_core::{
    plan::{Algorithm, Plan, Round, owned_index, owned_token, owned_tokens, owner},
    workspace::SlotRows,
};
use heapless::Vec as FixedVec;
use pulp::Arch;

use super::{
    exchange::{Exchange, Medium},
    rows::{Finish, FinishRow, Plain, RowOutputs, StripRow, SumRows},
};
use crate::failure::{Failure, What};

const MAX_WORLD: usize = fused_collective_core::MAX_WORLD_SIZE as usize;

/// The tensors of one operation on one rank, sizes checked: see `Operation` for their shapes.
#[derive(Debug)]
pub(crate) struct Job<'a, E> {
    pub(crate) input: &'a [E],
    pub(crate) residual: Option<&'a [E]>,
    pub(crate) residual_out: &'a mut [E],
    /// Empty unless written.
    pub(crate) norm_out: &'a mut [E],
    /// Empty unless written.
    pub(crate) quant_out: &'a mut [u8],
    /// Empty unless written.
    pub(crate) scale_out: &'a mut [u8],
    /// `None`: the sum is all there is.
    pub(crate) finish: Option<Finish<'a, E>>,
    pub(crate) hidden: usize,
    pub(crate) quant_row_bytes: usize,
}

impl<E: Plain> Job<'_, E> {
    fn range(&self, token: u64) -> std::ops::Range<usize> {
        let start = token as usize * self.hidden;
        start..start + self.hidden
    }

    /// Sums one row from every rank into `residual_out`.
    fn sum(&mut self, token: u64, rows: &[&[E]], arch: Arch) {
        let range = self.range(token);
        let residual = self.residual.map(|residual| &residual[range.clone()]);
        let out = &mut self.residual_out[range];
        arch.dispatch(SumRows { rows, residual, strip: true, out });
    }

    /// Normalizes and quantizes the row of `residual_out` that is complete.
    fn finish(&mut self, token: u64, scratch: &mut [E], arch: Arch) {
        let Some(finish) = &self.finish else { return };
        let range = self.range(token);
        let values = token as usize * self.quant_row_bytes;
        let outputs = RowOutputs {
            norm: if self.norm_out.is_empty() { &mut [] } else { &mut self.norm_out[range.clone()] },
            values: &mut self.quant_out[values..values + self.quant_row_bytes],
            scales: self.scale_out,
        };
        let row = &self.residual_out[range];
        arch.dispatch(FinishRow { finish, row, token, outputs, scratch });
    }
}

/// Rows that are between memory and a peer: one from each rank, this rank's own being what it sends, and one of
/// scratch.
#[derive(Debug, Default)]
pub(crate) struct Staging {
    words: Vec<u64>,
    row_words: usize,
}

impl Staging {
    /// Makes room for one row from each rank and one scratch row.
    pub(crate) fn reserve(&mut self, world_size: u32, row_bytes: u64) {
        self.row_words = (row_bytes / 8) as usize;
        let needed = self.row_words * (world_size as usize + 1);
        if self.words.len() < needed {
            self.words.resize(needed, 0);
        }
    }

    fn row<T: Pod>(&self, index: u32) -> &[T] {
        let start = index as usize * self.row_words;
        bytemuck::cast_slice(&self.words[start..start + self.row_words])
    }

    fn row_mut<T: Pod>(&mut self, index: u32) -> &mut [T] {
        let start = index as usize * self.row_words;
        bytemuck::cast_slice_mut(&mut self.words[start..start + self.row_words])
    }
}

/// Runs `plan` on this rank.
pub(crate) fn run<E: Plain, M: Medium>(
    exchange: &mut Exchange<M>,
    rank: u32,
    plan: &Plan,
    mut job: Job<'_, E>,
    staging: &mut Staging,
    arch: Arch,
) -> Result<(), Box<Failure>> {
    staging.reserve(plan.world_size, plan.row_bytes);
    let mut rounds = plan.rounds().peekable();
    let mut first_hop_done = false;
    while let Some(round) = rounds.next() {
        let mut step = Step { exchange, rank, round, job: &mut job, staging, arch };
        match plan.algorithm {
            Algorithm::OneShot => step.one_shot()?,
            Algorithm::TwoShot => first_hop_done = step.two_shot(first_hop_done, rounds.peek())?,
        }
        exchange.advance();
    }
    if let Some(finish) = job.finish {
        finish.pad(job.hidden as u64, job.scale_out);
    }
    Ok(())
}

/// One round of one operation.
struct Step<'a, 'b, E, M> {
    exchange: &'a Exchange<M>,
    rank: u32,
    round: Round,
    job: &'a mut Job<'b, E>,
    staging: &'a mut Staging,
    arch: Arch,
}

impl<E: Plain, M: Medium> Step<'_, '_, E, M> {
    fn rows(&self) -> SlotRows {
        self.round.rows
    }

    /// The other ranks, the next one first: everyone starts with another destination.
    fn peers(&self) -> impl Iterator<Item = u32> + use<E, M> {
        let (rank, world) = (self.rank, self.round.rows.world_size);
        (1..world).map(move |step| (rank + step) % world)
    }

    /// The row of `residual_out` of `token`.
    fn residual_out(&mut self, token: u64) -> &mut [E] {
        let range = self.job.range(self.round.first_token + token);
        &mut self.job.residual_out[range]
    }

    /// This rank's addend for token `token` of the operation, as it may be sent, in its place in the staging.
    fn stage_input(&mut self, token: u64) {
        let row = &self.job.input[self.job.range(token)];
        self.arch.dispatch(StripRow { row, out: self.staging.row_mut(self.rank) });
    }

    /// Adds up `token`, once every other rank's row for it is where `offset` says.
    fn sum(&mut self, token: u64, offset: impl Fn(&SlotRows, u32) -> u64) -> Result<(), Box<Failure>> {
        let input = What::Input(self.round.first_token + token);
        for source in self.peers() {
            let at = offset(&self.rows(), source);
            self.exchange.receive(source, input, at, self.staging.row_mut(source))?;
        }
        self.stage_input(self.round.first_token + token);
        let rows: FixedVec<&[E], MAX_WORLD> =
            (0..self.rows().world_size).map(|rank| self.staging.row(rank)).collect();
        self.job.sum(self.round.first_token + token, &rows, self.arch);
        Ok(())
    }

    fn finish(&mut self, token: u64) {
        let scratch = self.staging.row_mut(self.round.rows.world_size);
        self.job.finish(self.round.first_token + token, scratch, self.arch);
    }

    fn one_shot(&mut self) -> Result<(), Box<Failure>> {
        let rows = self.rows();
        for token in 0..rows.tokens {
            self.stage_input(self.round.first_token + token);
            let offset = rows.one_shot(self.rank, token);
            for peer in self.peers() {
                self.exchange.send(self.exchange.operation(), peer, offset, self.staging.row(self.rank));
            }
        }
        for token in 0..rows.tokens {
            self.sum(token, |rows, source| rows.one_shot(source, token))?;
            self.finish(token);
        }
        Ok(())
    }

    /// First hop of `round`, which runs as `operation`: sends every token to its owner.
    fn first_hop(&mut self, operation: u64, round: &Round) {
        let (rank, world) = (self.rank, round.rows.world_size);
        for token in (0..round.rows.tokens).filter(|&token| owner(token, world) != rank) {
            self.stage_input(round.first_token + token);
            let offset = round.rows.first_hop(rank, owned_index(token, world));
            self.exchange.send(operation, owner(token, world), offset, self.staging.row(rank));
        }
    }

    /// Returns whether it did the first hop of the `next` round too, so that nobody has to wait for it there.
    fn two_shot(&mut self, first_hop_done: bool, next: Option<&Round>) -> Result<bool, Box<Failure>> {
        let exchange = self.exchange;
        let operation = exchange.operation();
        let rows = self.rows();
        let (rank, world) = (self.rank, rows.world_size);
        if !first_hop_done {
            let round = self.round;
            self.first_hop(operation, &round);
        }

        // The owner sums, and sends every sum before it normalizes any: others wait for them.
        let owned = owned_tokens(rows.tokens, rank, world);
        for index in 0..owned {
            let token = owned_token(index, rank, world);
            self.sum(token, |rows, source| rows.first_hop(source, index))?;
            for peer in self.peers() {
                let row = bytemuck::cast_slice(self.residual_out(token));
                exchange.send(operation, peer, rows.second_hop(token), row);
            }
        }
        // Who owns a token has received from every rank, and may send early.
        let early = next.filter(|_| owned > 0);
        if let Some(next) = early {
            self.first_hop(operation + 1, next);
        }
        for index in 0..owned {
            self.finish(owned_token(index, rank, world));
        }

        // Second hop: everybody else's sums.
        for token in (0..rows.tokens).filter(|&token| owner(token, world) != rank) {
            let sum = What::Sum(self.round.first_token + token);
            let row = bytemuck::cast_slice_mut(self.residual_out(token));
            exchange.receive(owner(token, world), sum, rows.second_hop(token), row)?;
            self.finish(token);
        }
        Ok(early.is_some())
    }
}
