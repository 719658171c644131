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
    exchange::{Exchange, Incoming, Medium},
    rows::{Finish, FinishRow, Plain, RowOutputs, SumIncoming},
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

    /// Sums one row from every rank into `residual_out`: the others' are still coming.
    fn sum<M: Medium>(
        &mut self,
        token: u64,
        exchange: &Exchange<M>,
        sources: &[Option<Incoming<'_, M>>],
        arch: Arch,
    ) -> Result<(), Box<Failure>> {
        let range = self.range(token);
        let own = &self.input[range.clone()];
        let residual = self.residual.map(|residual| &residual[range.clone()]);
        let out = &mut self.residual_out[range];
        arch.dispatch(SumIncoming { exchange, sources, own, residual, out })
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

/// Room for a row that is normalized and goes nowhere but to the quantizer.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    words: Vec<u64>,
}

impl Scratch {
    /// A row of `hidden` elements, whole words.
    fn row<E: Pod>(&mut self, hidden: usize) -> &mut [E] {
        let words = (hidden * size_of::<E>()).div_ceil(8);
        if self.words.len() < words {
            self.words.resize(words, 0);
        }
        &mut bytemuck::cast_slice_mut(&mut self.words)[..hidden]
    }
}

/// Runs `plan` on this rank.
pub(crate) fn run<E: Plain, M: Medium>(
    exchange: &mut Exchange<M>,
    rank: u32,
    plan: &Plan,
    mut job: Job<'_, E>,
    scratch: &mut Scratch,
    arch: Arch,
) -> Result<(), Box<Failure>> {
    let mut rounds = plan.rounds().peekable();
    let mut first_hop_done = false;
    while let Some(round) = rounds.next() {
        let mut step = Step { exchange, rank, round, job: &mut job, scratch, arch };
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
    scratch: &'a mut Scratch,
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

    /// This rank's addend for token `token` of the operation.
    fn input(&self, token: u64) -> &[u8] {
        bytemuck::cast_slice(&self.job.input[self.job.range(token)])
    }

    /// Adds up `token`, every other rank's row for it being where `offset` says.
    fn sum(&mut self, token: u64, offset: impl Fn(&SlotRows, u32) -> u64) -> Result<(), Box<Failure>> {
        let (exchange, rows) = (self.exchange, self.rows());
        let what = What::Input(self.round.first_token + token);
        let incoming = |source| {
            let bytes = rows.row_bytes as usize;
            (source != self.rank).then(|| exchange.incoming(source, what, offset(&rows, source), bytes))
        };
        let sources: FixedVec<Option<Incoming<'_, M>>, MAX_WORLD> =
            (0..rows.world_size).map(incoming).collect();
        self.job.sum(self.round.first_token + token, exchange, &sources, self.arch)
    }

    fn finish(&mut self, token: u64) {
        let scratch = self.scratch.row(self.job.hidden);
        self.job.finish(self.round.first_token + token, scratch, self.arch);
    }

    fn one_shot(&mut self) -> Result<(), Box<Failure>> {
        let rows = self.rows();
        for token in 0..rows.tokens {
            let (operation, offset) = (self.exchange.operation(), rows.one_shot(self.rank, token));
            for peer in self.peers() {
                self.exchange.send_stripped(
                    operation,
                    peer,
                    offset,
                    self.input(self.round.first_token + token),
                );
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
            let offset = round.rows.first_hop(rank, owned_index(token, world));
            let row = self.input(round.first_token + token);
            self.exchange.send_stripped(operation, owner(token, world), offset, row);
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
