//! The settings of a verification, and the matrix of problems that they describe.

use fused_collective_core::{
    dtype::DType,
    fusion::{Norm, PartialSums},
    quant::Quantization,
};
use serde::Serialize;

use super::verdicts::Tally;
use crate::{
    backend::problem::Problem, check::inputs::Numbers, job::options::JobOptions, pattern::Pattern,
    quant_mode::QuantMode, wire::Wire,
};

/// The most tokens of patterns with further steps, and of rows in formats of fewer bits.
const PATTERN_TOKENS: u64 = 128;

/// Everything that the command line says about a verification. `num_tokens` and `hidden_dims` are not empty, no list has a
/// value twice, and every operation of the [problems](Settings::problems) is valid.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Settings {
    /// Token counts; 0 is one.
    pub num_tokens: Vec<u64>,
    /// Elements of a token.
    pub hidden_dims: Vec<u64>,
    /// Seed of the random inputs.
    pub seed: u64,
    /// True if every other row of the inputs holds NaN, infinities, subnormal numbers, zeros or the largest numbers.
    pub special: bool,
    /// The ranks and their backend. Its number of ranks is the largest of `group_sizes`.
    #[serde(flatten)]
    pub job: JobOptions,
    /// Ranks of a group, one size after the other; empty leaves the size to the launcher or to the backend.
    pub group_sizes: Vec<u32>,
    /// True if every `f32` goes through the backend's own conversions.
    pub conversions: bool,
    /// True if each rank in turn is withheld from an operation, which must time out on the others.
    pub faults: bool,
    /// Runs of each operation with dependent kernels that read its outputs as early as they may.
    pub dependents: u64,
}

impl Default for Settings {
    /// The whole matrix.
    fn default() -> Self {
        Settings {
            num_tokens: vec![0, 1, 2, 3, 17, 128, 1000, 2048],
            hidden_dims: vec![48, 2880, 4096, 7168, 8192, 16_384],
            seed: 0,
            special: false,
            job: JobOptions::default(),
            group_sizes: Vec::new(),
            conversions: true,
            faults: false,
            dependents: 0,
        }
    }
}

impl Settings {
    /// The part of the matrix that takes seconds. Token counts: none, one, a few that no number of ranks divides, and more.
    /// Hidden sizes: one that fills no warp, one that is no power of two, and a usual one.
    pub fn quick() -> Self {
        Settings {
            num_tokens: vec![0, 1, 17, 128],
            hidden_dims: vec![48, 2880, 8192],
            conversions: false,
            ..Settings::default()
        }
    }

    /// The contents of the tensors.
    pub fn numbers(&self) -> Numbers {
        Numbers { seed: self.seed, special: self.special }
    }

    /// Every problem of the matrix.
    pub fn problems(&self) -> impl Iterator<Item = Problem> + '_ {
        self.sections().flat_map(move |section| {
            let modes = move || section.quant_modes();
            section
                .shapes(self)
                .flat_map(move |shape| modes().map(move |quant_mode| shape.problem(quant_mode)))
        })
    }

    /// Cases of one group with the formats `wires`. In each of its formats a problem is solved by one-shot, by
    /// two-shot and, if it has one, with a sharded residual.
    pub fn count(&self, wires: &[Wire]) -> u64 {
        let cases =
            |problem: Problem| wires_of(&problem, wires).len() as u64 * (2 + u64::from(problem.sharded));
        self.problems().map(cases).sum()
    }

    pub(super) fn sections(&self) -> impl Iterator<Item = Section> + '_ {
        DType::ALL.into_iter().flat_map(move |dtype| {
            self.hidden_dims.iter().map(move |&hidden| Section {
                dtype,
                hidden,
                partial_sums: self.job.partial_sums(),
            })
        })
    }
}

/// Those of the formats that `problem` is solved in: all, if it has few tokens and no quantization, which follows
/// later.
pub(super) fn wires_of<'a>(problem: &Problem, wires: &'a [Wire]) -> &'a [Wire] {
    let is_plain = problem.residual && problem.quantization == Quantization::None;
    if is_plain && problem.tokens <= PATTERN_TOKENS { wires } else { &[Wire::Exact] }
}

/// Cases that are reported together, in a line for each quantization.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Section {
    pub(crate) dtype: DType,
    pub(crate) hidden: u64,
    /// The type in which sums cross between hosts.
    pub(crate) partial_sums: PartialSums,
}

impl Section {
    /// The quantizations that rows of this length have whole blocks for.
    pub(super) fn quant_modes(self) -> impl Iterator<Item = QuantMode> {
        QuantMode::ALL.into_iter().filter(move |quant_mode| quant_mode.quantization().supports(self.hidden))
    }

    pub(super) fn shapes(self, settings: &Settings) -> impl Iterator<Item = Shape> + '_ {
        let shape = move |(tokens, residual, pattern)| Shape { section: self, tokens, residual, pattern };
        let plain = [true, false].into_iter().flat_map(move |residual| {
            settings.num_tokens.iter().map(move |&tokens| (tokens, residual, Pattern::AllReduceNorm))
        });
        // Not for every number of tokens: they differ in what comes before the residual alone.
        let few = settings.num_tokens.iter().copied().filter(|&tokens| tokens <= PATTERN_TOKENS).max();
        let others = few.into_iter().flat_map(move |tokens| {
            let fitting =
                move |pattern: &Pattern| !pattern.is_default() && pattern.fits(self.dtype, self.hidden);
            Pattern::ALL.into_iter().filter(fitting).map(move |pattern| (tokens, true, pattern))
        });
        plain.chain(others).map(shape)
    }

    /// The line that reports its cases of one quantization.
    pub(super) fn line(self, quant_mode: QuantMode, tally: Tally) -> String {
        let Section { dtype, hidden, .. } = self;
        format!("{:<8}  {:<4}  hidden {hidden:>5}  {tally}", dtype.name(), quant_mode.name())
    }
}

/// The problems that differ in their quantization only. They have the same inputs, sums and norms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) section: Section,
    pub(crate) tokens: u64,
    pub(crate) residual: bool,
    pub(crate) pattern: Pattern,
}

impl Shape {
    pub(crate) fn problem(self, quant_mode: QuantMode) -> Problem {
        Problem {
            dtype: self.section.dtype,
            tokens: self.tokens,
            hidden: self.section.hidden,
            residual: self.residual,
            sharded: self.residual,
            norm: Norm::default(),
            pattern: self.pattern,
            quantization: quant_mode.quantization(),
            scale: quant_mode.scale(),
            partial_sums: self.section.partial_sums,
        }
    }

    pub(crate) fn title(self, quant_mode: QuantMode) -> String {
        let Shape { section: Section { dtype, hidden, .. }, tokens, residual, pattern } = self;
        let residual = if residual { "with residual" } else { "without residual" };
        let pattern = if pattern.is_default() { String::new() } else { format!(", {pattern}") };
        format!("{dtype} {quant_mode}, hidden {hidden}, {tokens} tokens, {residual}{pattern}")
    }
}
