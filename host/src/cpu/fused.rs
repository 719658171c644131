//! The fused operation on one rank: the one-shot and two-shot collectives, row by row.
//!
//! A row is received, summed, normalized and quantized while it is in the nearest cache; memory sees each
//! activation once. All ranks' results are the same bits: sums are taken in rank order of rows that went
//! through the same `strip`, or the same [format](fused_collective_core::wire), whether they travelled or not.

use std::{array, ops::Range};

use fused_collective_core::{
    fusion::{Experts, Norm, Rounding},
    lamport,
    norm::Weights,
    plan::{Algorithm, Plan, Round, owned_index, owned_token, owned_tokens, owner},
    quant::{Quantization, ScaleLayout},
    wire::WireFormat,
    workspace::SlotRows,
};
use pulp::Arch;
use zerocopy::IntoBytes as _;

use super::{
    exchange::{Exchange, Incoming, Medium},
    experts::{CombineRow, ExpertRows},
    finish::{Finish, FinishRow, PostNormRow, RowOutputs},
    rows::{Plain, elements, elements_mut},
    sum::{Operand, SumIncoming},
    wire::{AddSent, EncodeRow, EncodeSum, RoundSum},
};
use crate::group::failure::{Failure, What};

const MAX_WORLD: usize = fused_collective_core::MAX_WORLD_SIZE as usize;

/// This rank's addend: the input, or what its experts' rows and the input are combined to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addend<'a, E> {
    pub(crate) input: Operand<&'a [E]>,
    pub(crate) experts: Option<(ExpertRows<'a, E>, Experts)>,
}

impl<'a, E: Plain> Addend<'a, E> {
    /// The input's row of `token`, until the norm takes its place.
    fn input<'s>(&self, token: u64, norm_out: &'s [E], hidden: usize) -> &'s [E]
    where
        'a: 's,
    {
        let start = token as usize * hidden;
        match self.input {
            Operand::Apart(input) => &input[start..start + hidden],
            Operand::InPlace => &norm_out[start..start + hidden],
        }
    }

    /// The row of `token`: the input's, or one that the experts' rows are combined to in `combined`.
    fn row<'s>(&self, token: u64, norm_out: &'s [E], combined: &'s mut [E], arch: Arch) -> &'s [E]
    where
        'a: 's,
    {
        let hidden = combined.len();
        let Some((rows, experts)) = self.experts else { return self.input(token, norm_out, hidden) };
        let shared = experts.shared.then(|| self.input(token, norm_out, hidden));
        let experts = rows.of_token(token as usize, &experts);
        arch.dispatch(CombineRow { experts, shared, out: &mut *combined });
        combined
    }
}

/// The tensors of one operation on one rank, sizes checked: see `Operation` for their shapes.
#[derive(Debug)]
pub(crate) struct Job<'a, E> {
    pub(crate) addend: Addend<'a, E>,
    pub(crate) residual: Option<Operand<&'a [E]>>,
    pub(crate) bias: Option<&'a [E]>,
    /// The norm of the sum, and its weight.
    pub(crate) post_norm: Option<(Norm, Weights<'a, E>)>,
    pub(crate) rounding: Rounding,
    pub(crate) wire: Option<WireFormat>,
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
    /// Ranks that the rows of the residual and of `residual_out` are dealt to: 1 where every rank has all of them.
    pub(crate) dealt_to: u32,
}

impl<E: Plain> Job<'_, E> {
    fn range(&self, token: u64) -> Range<usize> {
        let start = token as usize * self.hidden;
        start..start + self.hidden
    }

    /// The range of `token`'s row in the residual and in `residual_out`.
    fn residual_range(&self, token: u64) -> Range<usize> {
        self.range(owned_index(token, self.dealt_to))
    }

    /// Sums a row from every rank into `residual_out`: this rank's addend, and `sources`, which are still coming. An addend
    /// of experts' rows is in `place` of `scratch.sent`.
    fn sum_incoming<M: Medium>(
        &mut self,
        token: u64,
        place: Range<usize>,
        (exchange, sources): (&Exchange<M>, &[Option<Incoming<'_, M>>]),
        scratch: &mut Scratch,
        arch: Arch,
    ) -> Result<(), Box<Failure>> {
        let Scratch { row: normalized, sent, .. } = scratch;
        let (addend, bias, rounding, hidden) = (self.addend, self.bias, self.rounding, self.hidden);
        self.store_sum(token, row(normalized, hidden), arch, |norm_out, residual, out| {
            let own = match addend.experts {
                Some(_) => elements(&sent.as_bytes()[place]),
                None => addend.input(token, norm_out, hidden),
            };
            arch.dispatch(SumIncoming { exchange, sources, own, residual, bias, rounding, out })
        })
    }

    /// Rounds the sum in `scratch.sum` into `residual_out`.
    fn round_sum(&mut self, token: u64, scratch: &mut Scratch, arch: Arch) -> Result<(), Box<Failure>> {
        let Scratch { row: normalized, sum, .. } = scratch;
        let (sum, bias, rounding) = (row(sum, self.hidden), self.bias, self.rounding);
        self.store_sum(token, row(normalized, self.hidden), arch, |_, residual, out| {
            arch.dispatch(RoundSum { sum, bias, residual, rounding, out });
            Ok(())
        })
    }

    /// Stores the sum of `token` in `residual_out`, normalized first if there is a post-norm. `sum_up` gets `norm_out`, the
    /// residual to add and the row to fill; `normalized` holds a row.
    fn store_sum(
        &mut self,
        token: u64,
        normalized: &mut [E],
        arch: Arch,
        sum_up: impl FnOnce(&[E], Option<Operand<&[E]>>, &mut [E]) -> Result<(), Box<Failure>>,
    ) -> Result<(), Box<Failure>> {
        let range = self.residual_range(token);
        let residual = self.residual.map(|residual| residual.map(|residual| &residual[range.clone()]));
        let out = &mut self.residual_out[range];
        let Some((norm, gamma)) = self.post_norm else { return sum_up(self.norm_out, residual, out) };
        sum_up(self.norm_out, None, &mut *normalized)?;
        if let Some(Operand::Apart(residual)) = residual {
            out.copy_from_slice(residual);
        }
        let add = residual.is_some().then_some(self.rounding);
        arch.dispatch(PostNormRow { norm, gamma, row: normalized, add, out });
        map_words(out.as_mut_bytes(), lamport::strip);
        Ok(())
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

impl<E: Plain> Job<'_, E> {
    /// The result of the row of `residual_out` of one of this rank's tokens, as it may be sent: the norm, or its codes and
    /// then its scales in their order.
    fn make<'s>(&self, token: u64, scratch: &'s mut Scratch, arch: Arch) -> &'s mut [u8] {
        let sent = self.sent_bytes();
        let (result, scratch) = scratch.result_and_row::<E>(sent, self.hidden);
        let Some(finish) = &self.finish else { return result };
        let quantization = finish.quantization.with_layout(ScaleLayout::Linear);
        // The row is a tensor of its own.
        let finish = Finish { quantization, tokens: 1, ..*finish };
        let row = &self.residual_out[self.residual_range(token)];
        result[self.quant_row_bytes..].fill(0);
        if quantization == Quantization::None {
            let outputs = RowOutputs { norm: elements_mut(result), values: &mut [], scales: &mut [] };
            arch.dispatch(FinishRow { finish: &finish, row, token: 0, outputs, scratch });
        } else {
            let (values, scales) = result.split_at_mut(self.quant_row_bytes);
            let outputs = RowOutputs { norm: &mut [], values, scales };
            arch.dispatch(FinishRow { finish: &finish, row, token: 0, outputs, scratch });
        }
        let (codes, scales) = result.split_at_mut(self.quant_row_bytes);
        if quantization.is_fp4() {
            map_words(codes, lamport::swap_e2m1);
        } else {
            map_words(codes, lamport::strip);
        }
        if let Quantization::MxFp4 { .. } = quantization {
            // Four NaN scales in a word would be the sentinel.
            for col in (0..quantization.scale_cols(self.hidden as u64) as usize).rev() {
                (scales[2 * col], scales[2 * col + 1]) = (scales[col], 0);
            }
        }
        map_words(scales, lamport::strip);
        result
    }

    /// Bytes of what an owner sends of a row: whole words.
    fn sent_bytes(&self) -> usize {
        let quantization = self.finish.as_ref().map_or(Quantization::None, |finish| finish.quantization);
        match quantization {
            Quantization::None => self.hidden * size_of::<E>(),
            _ => self.quant_row_bytes + self.sent_scale_bytes(quantization).next_multiple_of(8),
        }
    }

    /// Bytes of a row's scales as an owner sends them.
    fn sent_scale_bytes(&self, quantization: Quantization) -> usize {
        let size = match quantization {
            Quantization::MxFp4 { .. } => 2,
            _ => quantization.scales(1, self.hidden as u64).map_or(0, |tensor| tensor.size),
        };
        (quantization.scale_cols(self.hidden as u64) * size) as usize
    }

    /// Stores what a token's owner made of its row.
    fn store(&mut self, token: u64, result: &[u8]) {
        let Some(finish) = &self.finish else { return };
        if finish.quantization == Quantization::None {
            let range = self.range(token);
            self.norm_out[range].copy_from_slice(elements(result));
            return;
        }
        let values = token as usize * self.quant_row_bytes;
        let (codes, scales) = result.split_at(self.quant_row_bytes);
        let values = &mut self.quant_out[values..values + self.quant_row_bytes];
        values.copy_from_slice(codes);
        let quantization = finish.quantization;
        if quantization.is_fp4() {
            map_words(values, lamport::swap_e2m1);
        }
        let Some(tensor) = quantization.scales(finish.tokens, self.hidden as u64) else { return };
        let size = tensor.size as usize;
        let sent = self.sent_scale_bytes(quantization) / tensor.cols as usize;
        for (col, scale) in (0..tensor.cols).zip(scales.chunks_exact(sent)) {
            let at = tensor.offset(token, col) as usize;
            self.scale_out[at..at + size].copy_from_slice(&scale[..size]);
        }
        for col in tensor.padding_cols() {
            let at = tensor.offset(token, col) as usize;
            self.scale_out[at..at + size].fill(0);
        }
    }
}

fn map_words(bytes: &mut [u8], map: impl Fn(u32) -> u32) {
    for word in bytes.as_chunks_mut().0 {
        *word = map(u32::from_ne_bytes(*word)).to_ne_bytes();
    }
}

/// Room for rows that are in no tensor, and for what a row becomes that is sent.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    /// An addend of experts' rows, before it is encoded in a wire format.
    combined: Vec<u64>,
    /// A sum that is normalized, or a norm that is quantized.
    row: Vec<u64>,
    result: Vec<u64>,
    /// A sum in `f32`, or an addend, that goes through a wire format.
    sum: Vec<u64>,
    /// Rows as they are sent: this rank's addends, each in its [place](Step::place), or a sum in a wire format.
    sent: Vec<u64>,
}

/// A row of `hidden` elements in `room`.
fn row<E: Plain>(room: &mut Vec<u64>, hidden: usize) -> &mut [E] {
    elements_mut(words(room, hidden * size_of::<E>()))
}

/// `bytes` bytes in `room`.
fn words(room: &mut Vec<u64>, bytes: usize) -> &mut [u8] {
    if room.len() * 8 < bytes {
        room.resize(bytes.div_ceil(8), 0);
    }
    &mut room.as_mut_bytes()[..bytes]
}

impl Scratch {
    /// The room for a row's result, `bytes` bytes, whole words.
    fn result(&mut self, bytes: usize) -> &mut [u8] {
        words(&mut self.result, bytes)
    }

    /// Both.
    fn result_and_row<E: Plain>(&mut self, bytes: usize, hidden: usize) -> (&mut [u8], &mut [E]) {
        (words(&mut self.result, bytes), row(&mut self.row, hidden))
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
            Algorithm::ShardedTwoShot => first_hop_done = step.sharded(first_hop_done, rounds.peek())?,
            Algorithm::Hierarchical | Algorithm::ShardedHierarchical => {
                unreachable!("a group on CPUs has one host")
            }
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

    /// The place of addend `index` in `scratch.sent`. One-shot keeps those of a round, two-shot one at a time.
    fn place(&self, index: u64) -> Range<usize> {
        let bytes = self.round.rows.row_bytes as usize;
        let start = index as usize * bytes;
        start..start + bytes
    }

    /// Makes this rank's addend for `token` of the operation, as it is sent but for the sentinel. It is in `place` of
    /// `scratch.sent`, unless it is the input's row itself.
    fn make_addend(&mut self, token: u64, place: Range<usize>) -> &[u8] {
        let Scratch { combined, sum, sent, .. } = &mut *self.scratch;
        let (Job { addend, norm_out, hidden, .. }, arch) = (&*self.job, self.arch);
        let sent = &mut words(sent, place.end)[place];
        let Some(format) = self.job.wire else {
            return addend.row(token, norm_out, elements_mut(sent), arch).as_bytes();
        };
        let row_of_token = addend.row(token, norm_out, row(combined, *hidden), arch);
        arch.dispatch(EncodeRow { format, row: row_of_token, wide: row(sum, *hidden), sent: &mut *sent });
        sent
    }

    /// Adds up `token`: this rank's addend, made in `place`, and every other rank's row, which is where `offset` says.
    fn sum(
        &mut self,
        token: u64,
        place: Range<usize>,
        offset: impl Fn(&SlotRows, u32) -> u64,
    ) -> Result<(), Box<Failure>> {
        if let Some(format) = self.job.wire {
            self.sum_sent(format, token, place, offset)?;
            return self.complete(token);
        }
        let (exchange, rows) = (self.exchange, self.rows());
        let what = What::Input(self.round.first_token + token);
        let incoming = |source| {
            let bytes = rows.row_bytes as usize;
            (source != self.rank).then(|| exchange.incoming(source, what, offset(&rows, source), bytes))
        };
        let sources: [_; MAX_WORLD] = array::from_fn(|rank| {
            let rank = rank as u32;
            if rank < rows.world_size { incoming(rank) } else { None }
        });
        let incoming = (exchange, &sources[..rows.world_size as usize]);
        self.job.sum_incoming(self.round.first_token + token, place, incoming, self.scratch, self.arch)
    }

    /// Adds up `token` in `scratch.sum`, of rows in a wire format: `own` is the place of this rank's.
    fn sum_sent(
        &mut self,
        format: WireFormat,
        token: u64,
        own: Range<usize>,
        offset: impl Fn(&SlotRows, u32) -> u64,
    ) -> Result<(), Box<Failure>> {
        let (rows, what) = (self.rows(), What::Input(self.round.first_token + token));
        let Scratch { sum, sent, result, .. } = &mut *self.scratch;
        let (sum, own) = (row::<f32>(sum, self.job.hidden), &sent.as_bytes()[own]);
        sum.fill(0.0);
        for source in 0..rows.world_size {
            let mut sent = own;
            if source != self.rank {
                let incoming = words(result, rows.row_bytes as usize);
                self.exchange.receive(source, what, offset(&rows, source), incoming)?;
                sent = incoming;
            }
            self.arch.dispatch(AddSent { format, sent, sum });
        }
        Ok(())
    }

    /// Makes a row of `residual_out` of the sum of `token` in the scratch.
    fn complete(&mut self, token: u64) -> Result<(), Box<Failure>> {
        self.job.round_sum(self.round.first_token + token, self.scratch, self.arch)
    }

    fn finish(&mut self, token: u64) {
        let scratch = row(&mut self.scratch.row, self.job.hidden);
        self.job.finish(self.round.first_token + token, scratch, self.arch);
    }

    fn one_shot(&mut self) -> Result<(), Box<Failure>> {
        let rows = self.rows();
        for token in 0..rows.tokens {
            let (exchange, peers, offset) = (self.exchange, self.peers(), rows.one_shot(self.rank, token));
            let row = self.make_addend(self.round.first_token + token, self.place(token));
            for peer in peers {
                exchange.send_stripped(exchange.operation(), peer, offset, row);
            }
        }
        for token in 0..rows.tokens {
            self.sum(token, self.place(token), |rows, source| rows.one_shot(source, token))?;
            self.finish(token);
        }
        Ok(())
    }

    /// First hop of `round`, which runs as `operation`: sends every token to its owner.
    fn first_hop(&mut self, operation: u64, round: &Round) {
        for (token, owner) in self.owned_by_others(&round.rows) {
            let offset = round.rows.first_hop(self.rank, owned_index(token, round.rows.world_size));
            let exchange = self.exchange;
            let row = self.make_addend(round.first_token + token, self.place(0));
            exchange.send_stripped(operation, owner, offset, row);
        }
    }

    /// First hop of this round, unless the round before did it.
    fn begin(&mut self, first_hop_done: bool) {
        if !first_hop_done {
            let round = self.round;
            self.first_hop(self.exchange.operation(), &round);
        }
    }

    /// First hop of the `next` round, if this rank may: who owned a token of this one has received from every rank, so
    /// all of them are here. Returns whether it did, so that nobody has to wait for it there.
    fn begin_next(&mut self, next: Option<&Round>) -> bool {
        let next = next.filter(|_| self.owned().next().is_some());
        if let Some(next) = next {
            self.first_hop(self.exchange.operation() + 1, next);
        }
        next.is_some()
    }

    /// This rank's tokens of the round.
    fn owned(&self) -> impl Iterator<Item = u64> + use<E, M> {
        let (rank, world) = (self.rank, self.rows().world_size);
        (0..owned_tokens(self.rows().tokens, rank, world)).map(move |index| owned_token(index, rank, world))
    }

    /// The other ranks' tokens of a round, and whose they are.
    fn owned_by_others(&self, rows: &SlotRows) -> impl Iterator<Item = (u64, u32)> + use<E, M> {
        let (rank, world) = (self.rank, rows.world_size);
        (0..rows.tokens)
            .map(move |token| (token, owner(token, world)))
            .filter(move |&(_, owner)| owner != rank)
    }

    /// Adds up one of this rank's tokens, which the others send in the first hop.
    fn sum_owned(&mut self, token: u64) -> Result<(), Box<Failure>> {
        let (index, place) = (owned_index(token, self.rows().world_size), self.place(0));
        self.make_addend(self.round.first_token + token, place.clone());
        self.sum(token, place, |rows, source| rows.first_hop(source, index))
    }

    /// Adds up one of this rank's tokens and sends the sum to all others: with the residual, or in a wire format without it.
    fn sum_and_send(&mut self, token: u64) -> Result<(), Box<Failure>> {
        let (exchange, rows, peers) = (self.exchange, self.rows(), self.peers());
        let send = |sum: &[u8]| {
            for peer in peers {
                exchange.send(exchange.operation(), peer, rows.second_hop(token), sum);
            }
        };
        let Some(format) = self.job.wire else {
            self.sum_owned(token)?;
            send(self.residual_out(token).as_bytes());
            return Ok(());
        };
        let (index, own) = (owned_index(token, rows.world_size), self.place(0));
        self.make_addend(self.round.first_token + token, own.clone());
        self.sum_sent(format, token, own, |rows, source| rows.first_hop(source, index))?;
        let Scratch { sum, sent, .. } = &mut *self.scratch;
        let (sum, sent) = (row(sum, self.job.hidden), words(sent, rows.sum_bytes as usize));
        self.arch.dispatch(EncodeSum { format, sum, sent: &mut *sent });
        send(sent);
        self.complete(token)
    }

    /// Waits for the sum of another rank's token, and makes a row of `residual_out` of it.
    fn receive_sum(&mut self, token: u64, owner: u32) -> Result<(), Box<Failure>> {
        let (exchange, rows) = (self.exchange, self.rows());
        let (what, offset) = (What::Sum(self.round.first_token + token), rows.second_hop(token));
        let Some(format) = self.job.wire else {
            return exchange.receive(owner, what, offset, self.residual_out(token).as_mut_bytes());
        };
        let Scratch { sum, sent, .. } = &mut *self.scratch;
        let (sum, sent) = (row(sum, self.job.hidden), words(sent, rows.sum_bytes as usize));
        exchange.receive(owner, what, offset, sent)?;
        sum.fill(0.0);
        self.arch.dispatch(AddSent { format, sent, sum });
        self.complete(token)
    }

    /// Returns whether it did the first hop of the `next` round too.
    fn two_shot(&mut self, first_hop_done: bool, next: Option<&Round>) -> Result<bool, Box<Failure>> {
        self.begin(first_hop_done);

        // The owner sums, and sends every sum before it normalizes any: others wait for them.
        for token in self.owned() {
            self.sum_and_send(token)?;
        }
        let early = self.begin_next(next);
        for token in self.owned() {
            self.finish(token);
        }

        // Second hop: everybody else's sums.
        for (token, owner) in self.owned_by_others(&self.rows()) {
            self.receive_sum(token, owner)?;
            self.finish(token);
        }
        Ok(early)
    }

    /// As [`two_shot`](Self::two_shot), but the second hop carries what owners make of their sums: nobody else has the
    /// residual.
    fn sharded(&mut self, first_hop_done: bool, next: Option<&Round>) -> Result<bool, Box<Failure>> {
        let (exchange, rows) = (self.exchange, self.rows());
        self.begin(first_hop_done);

        for token in self.owned() {
            self.sum_owned(token)?;
            let peers = self.peers();
            let of_operation = self.round.first_token + token;
            let result = self.job.make(of_operation, self.scratch, self.arch);
            for peer in peers {
                exchange.send(exchange.operation(), peer, rows.second_hop(token), result);
            }
            self.job.store(of_operation, result);
        }
        let early = self.begin_next(next);

        let others = self.owned_by_others(&rows);
        let result = self.scratch.result(self.job.sent_bytes());
        for (token, owner) in others {
            let of_operation = self.round.first_token + token;
            exchange.receive(owner, What::Sum(of_operation), rows.second_hop(token), result)?;
            self.job.store(of_operation, result);
        }
        Ok(early)
    }
}
