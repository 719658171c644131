//! The check of a token's outputs, with the inputs of all ranks made again.

use fused_collective::{cpu::Plain, group::Hosts};
use fused_collective_core::{
    dtype::{DType, bf16, f16},
    fusion::{Mode, Operation, PartialSums},
    norm::Weights,
    reference::check_token,
    specification::{Observed, Row, Token, TokenExperts},
};

use super::{
    inputs::{Numbers, Source, expert_row},
    outputs::{Outputs, row, row_of_sum, values},
    parallel,
    variants::Variant,
};
use crate::{backend::problem::Problem, measurement::SumError};

/// Rows whose sums are compared with exact ones.
const MOST_ROWS: u64 = 256;

/// The check of tokens: against the specification, bit for bit, where a variant has its bits, and against the reference. It
/// makes the inputs of all ranks itself.
pub(crate) struct Judge<'a, E> {
    operation: Operation,
    problem: &'a Problem,
    variant: &'a Variant,
    numbers: Numbers,
    /// The ranks, one host's after the other's, as their addends are summed.
    ranks: Vec<u32>,
    hosts: u32,
    /// In the order of `ranks`.
    inputs: Vec<Vec<E>>,
    residual: Vec<E>,
    gamma: Vec<E>,
    post_gamma: Vec<E>,
    /// The experts of a token on each of `ranks`; empty without experts.
    experts: Vec<Chosen<E>>,
    /// The times that the variant ran on the same tensors. In place, each time reads the outputs of the one before.
    pub(super) times: u32,
    /// The outputs of a token, as specified.
    specified: Specified<E>,
}

/// The experts of a token on one rank, whose rows are a tensor of their own.
#[derive(Clone)]
struct Chosen<E> {
    rows: Vec<E>,
    index: Vec<i32>,
    scales: Vec<f32>,
}

impl<E: Plain> Chosen<E> {
    fn new(top_k: usize, hidden: usize) -> Self {
        let rows = vec![E::default(); top_k * hidden];
        Chosen { rows, index: vec![-1; top_k], scales: vec![0.0; top_k] }
    }

    fn fill(&mut self, problem: &Problem, numbers: Numbers, (rank, ranks): (u32, u32), token: u64) {
        let (top_k, hidden) = (self.index.len() as u64, problem.hidden as usize);
        let places = token * top_k..(token + 1) * top_k;
        for ((place, k), row) in places.zip(0..).zip(self.rows.chunks_mut(hidden)) {
            let chosen = expert_row((rank, ranks), place, top_k as u32, problem.chosen());
            self.index[k as usize] = if chosen.is_some() { k } else { -1 };
            if let Some(chosen) = chosen {
                numbers.fill_row(Source::ExpertRows(rank), chosen, row);
            }
        }
        numbers.fill_row(Source::ExpertScales(rank), token, &mut self.scales);
    }

    fn experts(&self) -> TokenExperts<'_, E> {
        TokenExperts { rows: &self.rows, index: &self.index, scales: Weights::F32(&self.scales) }
    }
}

/// The memory of a [`Row`].
struct Specified<E> {
    residual_out: Vec<E>,
    norm: Vec<E>,
    values: Vec<u8>,
    scales: Vec<u8>,
}

impl<E> Specified<E> {
    fn row(&mut self) -> Row<'_, E> {
        let Specified { residual_out, norm, values, scales } = self;
        Row { residual_out, norm, values, scales }
    }
}

impl<'a, E: Plain> Judge<'a, E> {
    pub(crate) fn new(problem: &'a Problem, variant: &'a Variant, numbers: Numbers, hosts: &Hosts) -> Self {
        let ranks: Vec<u32> = hosts.in_order().collect();
        // NCCL's sums of all ranks are not those of hosts.
        let is_ours = !variant.steps.iter().any(|step| step.is_nccl());
        let partial_sums = if is_ours { problem.partial_sums } else { PartialSums::F32 };
        let row = vec![E::default(); problem.hidden as usize];
        let mut gamma = row.clone();
        numbers.fill_row(Source::Gamma, 0, &mut gamma);
        let mut post_gamma = row.clone();
        numbers.fill_row(Source::PostGamma, 0, &mut post_gamma);
        let experts = problem.pattern.experts();
        let experts = experts.map(|experts| Chosen::new(experts.top_k as usize, row.len()));
        // The mode shows in the bits of a wire format, the layout of the residual in none.
        let call = variant.fused();
        let operation = Operation {
            keep_norm: variant.writes_norm,
            rounding: variant.rounding(),
            partial_sums,
            ..call.map_or(problem.operation(Mode::Auto), |call| call.operation(problem))
        };
        Judge {
            specified: Specified {
                residual_out: row.clone(),
                norm: row.clone(),
                values: vec![0; operation.quantization.value_bytes_per_row(operation.hidden) as usize],
                scales: vec![0; Row::<E>::scale_bytes(&operation) as usize],
            },
            operation,
            problem,
            variant,
            numbers,
            inputs: vec![row.clone(); ranks.len()],
            residual: row,
            gamma,
            post_gamma,
            experts: experts.map_or(Vec::new(), |experts| vec![experts; ranks.len()]),
            times: 1,
            ranks,
            hosts: hosts.count(),
        }
    }

    /// Makes inputs of this variant's outputs in place, as all runs but the last leave them.
    fn advance(&mut self, index: u64) -> Result<(), String> {
        let Judge { operation, problem, inputs, residual, specified, .. } = self;
        let experts: Vec<_> = self.experts.iter().map(Chosen::experts).collect();
        for _ in 1..self.times {
            let rows: Vec<&[E]> = inputs.iter().map(Vec::as_slice).collect();
            let tensors = [&residual[..], &self.gamma, &self.post_gamma];
            let token = token_of(problem, (&rows, self.hosts), &experts, tensors, index);
            specified.row().compute(operation, &token).map_err(|error| error.to_string())?;
            if problem.residual {
                residual.copy_from_slice(&specified.residual_out);
            }
            if self.variant.writes_norm {
                inputs.iter_mut().for_each(|input| input.copy_from_slice(&specified.norm));
            }
        }
        if self.times > 1 && !inputs.iter().flatten().chain(&*residual).all(|x| x.to_f32().is_finite()) {
            return Err(format!(
                "after {} operations in place token {index} is not finite: use a wider element type",
                self.times
            ));
        }
        Ok(())
    }

    /// Makes the inputs of token `index`.
    fn fill(&mut self, index: u64) {
        let Judge { problem, numbers, .. } = *self;
        let ranks = self.ranks.len() as u32;
        for (&rank, input) in self.ranks.iter().zip(&mut self.inputs) {
            numbers.fill_row(Source::Input(rank), index, input);
        }
        numbers.fill_row(Source::Residual, index, &mut self.residual);
        for (&rank, experts) in self.ranks.iter().zip(&mut self.experts) {
            experts.fill(problem, numbers, (rank, ranks), index);
        }
    }

    /// The error of the specified sum of token `index` against the one without a wire format.
    fn sum_error(&mut self, index: u64) -> SumError {
        self.fill(index);
        let experts: Vec<_> = self.experts.iter().map(Chosen::experts).collect();
        let rows: Vec<&[E]> = self.inputs.iter().map(Vec::as_slice).collect();
        let tensors = [&self.residual[..], &self.gamma, &self.post_gamma];
        let token = token_of(self.problem, (&rows, self.hosts), &experts, tensors, index);
        let exact = Operation { wire: None, ..self.operation };
        let [sum, exact] = [&self.operation, &exact].map(|operation| {
            let mut sum = vec![0.0; self.problem.hidden as usize];
            token.sum(operation, &mut sum);
            sum
        });
        SumError::of(&sum, &exact)
    }

    /// The largest error of any output of token `index` in units in the last place, or a description of a wrong output.
    pub(crate) fn check(&mut self, outputs: &Outputs, index: u64) -> Result<f64, String> {
        let problem = self.problem;
        self.fill(index);
        self.advance(index)?;
        let experts: Vec<_> = self.experts.iter().map(Chosen::experts).collect();
        let rows: Vec<&[E]> = self.inputs.iter().map(Vec::as_slice).collect();
        let tensors = [&self.residual[..], &self.gamma, &self.post_gamma];
        let token = token_of(problem, (&rows, self.hosts), &experts, tensors, index);
        let hidden = problem.hidden as usize;
        let sum = row_of_sum(self.variant, index, self.inputs.len() as u32 / self.hosts);
        let (residual_out, norm_out) =
            (row::<E>(&outputs.residual_out, sum, hidden), row(&outputs.norm_out, index, hidden));
        let observed = Observed {
            residual_out: &residual_out,
            norm_out: &norm_out,
            values: values(problem, outputs, index),
            scales: &outputs.scale_out,
        };
        if self.variant.is_specified(self.inputs.len() as u32) {
            let mut row = self.specified.row();
            row.compute(&self.operation, &token).map_err(|error| error.to_string())?;
            row.compare(&self.operation, index, &observed).map_err(|wrong| wrong.to_string())?;
        }
        if self.operation.wire.is_some() {
            // It has the bits, and the reference judges exact sums.
            return Ok(0.0);
        }
        check_token(&self.operation, &token, &observed).map_err(|wrong| wrong.to_string())
    }
}

/// The specified inputs of token `index`, with its residual, gamma and the post-norm's.
fn token_of<'a, E: Plain>(
    problem: &Problem,
    (inputs, hosts): (&'a [&'a [E]], u32),
    experts: &'a [TokenExperts<'a, E>],
    [residual, gamma, post_gamma]: [&'a [E]; 3],
    index: u64,
) -> Token<'a, E> {
    Token {
        inputs,
        hosts,
        residual: problem.residual.then_some(residual),
        bias: None,
        post_gamma: Some(Weights::Element(post_gamma)),
        experts: Some(experts),
        gamma: Weights::Element(gamma),
        scale: problem.scale,
        index,
    }
}

/// The error of the sum of `variant`, whose bits are the specification's, if it has a wire format: that of the first
/// [`MOST_ROWS`] rows. Every rank computes the same.
pub(crate) fn sum_error(
    problem: &Problem,
    variant: &Variant,
    numbers: Numbers,
    hosts: &Hosts,
) -> Option<SumError> {
    fn typed<E: Plain>(
        problem: &Problem,
        variant: &Variant,
        numbers: Numbers,
        hosts: &Hosts,
    ) -> Option<SumError> {
        let of_row = |index| Judge::<E>::new(problem, variant, numbers, hosts).sum_error(index);
        SumError::of_rows(parallel::map(
            hosts.ranks_per_host(),
            (0..problem.tokens.min(MOST_ROWS)).collect(),
            of_row,
        ))
    }
    if variant.wire().is_exact() {
        return None;
    }
    match problem.dtype {
        DType::F32 => typed::<f32>(problem, variant, numbers, hosts),
        DType::F16 => typed::<f16>(problem, variant, numbers, hosts),
        DType::Bf16 => typed::<bf16>(problem, variant, numbers, hosts),
    }
}
