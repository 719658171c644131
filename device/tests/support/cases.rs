//! Operations with random tensors.

use std::ops::Range;

use fused_collective_core::{
    dtype::Element,
    fusion::{Experts, Mode, Norm, Operation, PartialSums, Residual, Rounding, WeightType},
    kernels::Epilogue,
    norm::Weights,
    plan::owner,
    quant::{GroupScale, Quantization, ScaleLayout},
    wire::WireFormat,
};

use super::{random::Random, rows::Rows};

/// One rank's experts.
#[derive(Clone)]
pub(super) struct RankExperts<E> {
    pub(super) rows: Vec<E>,
    /// Of each expert of each token, some less than 0.
    pub(super) index: Vec<i32>,
    scales: Vec<E>,
    /// The same, where the operation's scales are `f32`.
    scales_f32: Vec<f32>,
}

impl<E: Element> RankExperts<E> {
    fn new(random: &mut Random, tokens: u64, hidden: u64, top_k: u32) -> Self {
        let (rows, chosen) = (1 + random.below(5), (tokens * u64::from(top_k)) as usize);
        let mut index = || if random.below(3) == 0 { -1 } else { random.below(rows) as i32 };
        RankExperts {
            index: (0..chosen).map(|_| index()).collect(),
            rows: random.elements((rows * hidden) as usize),
            scales: random.elements(chosen),
            scales_f32: random.elements(chosen),
        }
    }

    /// Those of some tokens.
    fn of(&self, tokens: Range<u64>, top_k: u32) -> Self {
        let chosen = (tokens.start * u64::from(top_k)) as usize..(tokens.end * u64::from(top_k)) as usize;
        RankExperts {
            rows: self.rows.clone(),
            index: self.index[chosen.clone()].to_vec(),
            scales: self.scales[chosen.clone()].to_vec(),
            scales_f32: self.scales_f32[chosen].to_vec(),
        }
    }

    /// The scales of the operation's type.
    pub(super) fn scales(&self, experts: Experts) -> Weights<'_, E> {
        match experts.scales {
            WeightType::Element => Weights::Element(&self.scales),
            WeightType::F32 => Weights::F32(&self.scales_f32),
        }
    }
}

/// One operation of a group, with every rank's tensors.
pub struct Case<E: Element> {
    pub operation: Operation,
    /// Hosts of the group, each of as many ranks.
    pub hosts: u32,
    pub inputs: Vec<Vec<E>>,
    pub residual: Option<Vec<E>>,
    pub bias: Option<Vec<E>>,
    pub gamma: Vec<E>,
    /// The same, where the operation's gamma is `f32`: with bits that `E` has none for.
    pub gamma_f32: Vec<f32>,
    /// Both for the norm of the sum.
    post_gamma: (Vec<E>, Vec<f32>),
    /// Each rank's; none for an operation without.
    pub(super) experts: Vec<RankExperts<E>>,
    pub scale: f32,
}

impl<E: Element> Case<E> {
    /// Of `hidden` elements a row, or what is next above it that has whole blocks.
    pub fn new(
        random: &mut Random,
        world: u32,
        tokens: u64,
        hidden: u64,
        residual: bool,
        what: What,
    ) -> Self {
        let hidden = what.hidden(hidden);
        let count = (tokens * hidden) as usize;
        let mut weight_type = || if random.below(3) == 0 { WeightType::F32 } else { WeightType::Element };
        let [gamma, post_gamma, scales] = [(); 3].map(|()| weight_type());
        let operation = Operation {
            dtype: E::DTYPE,
            tokens,
            hidden,
            residual: Residual::replicated(residual),
            norm: (what != What::Sum).then(|| Norm {
                weight_bias: random.below(2) as f32,
                gamma,
                ..Norm::default()
            }),
            quantization: what.quantization(),
            keep_norm: random.below(2) == 1,
            rounding: if random.below(4) == 0 { Rounding::AfterAllReduce } else { Rounding::Once },
            bias: world > 1 && random.below(3) == 0,
            post_norm: (what != What::Sum && world > 1 && random.below(3) == 0).then(|| Norm {
                epsilon: 1e-3,
                weight_bias: random.below(2) as f32,
                gamma: post_gamma,
            }),
            experts: (world > 1 && random.below(3) == 0).then(|| Experts {
                top_k: 1 + random.below(9) as u32,
                scales,
                shared: random.below(2) == 1,
            }),
            wire: None,
            partial_sums: PartialSums::F32,
            mode: Mode::Auto,
        };
        operation.validate().unwrap();
        Case {
            operation,
            hosts: 1,
            inputs: (0..world).map(|_| random.elements(count)).collect(),
            residual: residual.then(|| random.elements(count)),
            bias: operation.bias.then(|| random.elements(hidden as usize)),
            gamma: random.elements(hidden as usize),
            gamma_f32: random.elements(hidden as usize),
            post_gamma: (random.elements(hidden as usize), random.elements(hidden as usize)),
            experts: operation.experts.map_or_else(Vec::new, |experts| {
                (0..world).map(|_| RankExperts::new(random, tokens, hidden, experts.top_k)).collect()
            }),
            scale: match what {
                What::NvFp4(_) => 300.0,
                _ => 0.037,
            },
        }
    }

    /// Some of the tokens as a case of their own. With a sharded residual the first is a multiple of the number of ranks.
    pub fn rows(&self, tokens: Range<u64>) -> Self {
        let hidden = self.operation.hidden;
        let elements = (tokens.start * hidden) as usize..(tokens.end * hidden) as usize;
        let top_k = self.operation.experts.map_or(0, |experts| experts.top_k);
        Case {
            operation: Operation { tokens: tokens.end - tokens.start, ..self.operation },
            hosts: self.hosts,
            inputs: self.inputs.iter().map(|input| input[elements.clone()].to_vec()).collect(),
            residual: self.residual.as_ref().map(|residual| residual[elements].to_vec()),
            bias: self.bias.clone(),
            gamma: self.gamma.clone(),
            gamma_f32: self.gamma_f32.clone(),
            post_gamma: self.post_gamma.clone(),
            experts: self.experts.iter().map(|experts| experts.of(tokens.clone(), top_k)).collect(),
            scale: self.scale,
        }
    }

    /// The same with a bias.
    pub fn with_bias(mut self, random: &mut Random) -> Self {
        self.operation.bias = true;
        self.bias = Some(random.elements(self.operation.hidden as usize));
        self
    }

    /// The same with a norm of the sum.
    pub fn with_post_norm(mut self, random: &mut Random) -> Self {
        let gamma = if random.below(2) == 0 { WeightType::F32 } else { WeightType::Element };
        let norm = Norm { epsilon: 1e-3, weight_bias: random.below(2) as f32, gamma };
        self.operation.post_norm = Some(norm);
        self
    }

    /// The same with addends that are made of experts' rows, and of a shared expert's if `shared`.
    pub fn with_experts(mut self, random: &mut Random, shared: bool) -> Self {
        let scales = if random.below(2) == 0 { WeightType::F32 } else { WeightType::Element };
        let experts = Experts { top_k: 1 + random.below(9) as u32, scales, shared };
        let Operation { tokens, hidden, .. } = self.operation;
        self.operation.experts = Some(experts);
        self.experts =
            self.inputs.iter().map(|_| RankExperts::new(random, tokens, hidden, experts.top_k)).collect();
        self
    }

    /// The same with nothing but the inputs in its sum, which is rounded once: no bias, no norm of it, no experts.
    pub fn plain(mut self) -> Self {
        self.operation.rounding = Rounding::Once;
        (self.operation.bias, self.bias) = (false, None);
        (self.operation.experts, self.experts) = (None, Vec::new());
        self.operation.post_norm = None;
        self
    }

    /// Its all-reduce alone.
    pub fn reduced(&self) -> Self {
        let operation = Operation {
            residual: Residual::None,
            norm: None,
            quantization: Quantization::None,
            keep_norm: false,
            post_norm: None,
            ..self.operation
        };
        Case { operation, residual: None, ..self.rows(0..operation.tokens) }
    }

    /// The same for kernels that keep rows so: those that stream them have no norm of the sum.
    pub fn of_rows(mut self, rows: Rows) -> Self {
        self.operation.post_norm = self.operation.post_norm.filter(|_| rows != Rows::Streamed);
        self
    }

    /// The same with addends that cross the links in a format of fewer bits, where the mode shows in the bits.
    pub fn encoded(mut self, format: WireFormat, mode: Mode) -> Self {
        self.operation.wire = Some(format);
        self.operation.mode = mode;
        self
    }

    /// The same with a sharded residual; it must have one, and a norm.
    pub fn sharded(mut self) -> Self {
        self.operation.residual = Residual::Sharded;
        self.operation.keep_norm &= self.operation.quantization == Quantization::None;
        self.operation.validate().unwrap();
        self
    }

    /// The same in a group of `hosts` hosts, between which sums cross in type `sums`.
    pub fn across(mut self, hosts: u32, sums: PartialSums) -> Self {
        assert!((self.inputs.len() as u32).is_multiple_of(hosts));
        self.hosts = hosts;
        self.operation.partial_sums = sums;
        self
    }

    /// Ranks of a host.
    pub fn ranks_per_host(&self) -> u32 {
        self.inputs.len() as u32 / self.hosts
    }

    /// Gamma of the operation's type.
    pub fn norm_gamma(&self) -> Weights<'_, E> {
        match self.operation.norm.map(|norm| norm.gamma) {
            Some(WeightType::F32) => Weights::F32(&self.gamma_f32),
            _ => Weights::Element(&self.gamma),
        }
    }

    /// The weight of the norm of the sum.
    pub(super) fn norm_post_gamma(&self) -> Option<Weights<'_, E>> {
        let (element, wide) = &self.post_gamma;
        self.operation.post_norm.map(|norm| match norm.gamma {
            WeightType::Element => Weights::Element(element),
            WeightType::F32 => Weights::F32(wide),
        })
    }

    /// Whether rank `rank` holds the residual of token `token`.
    pub(super) fn holds(&self, rank: u32, token: u64) -> bool {
        let ranks = self.ranks_per_host();
        self.operation.residual != Residual::Sharded || owner(token, ranks) == rank % ranks
    }

    /// The rows of an activation that rank `rank` holds as its residual.
    pub(super) fn held<T: Copy>(&self, rank: u32, activation: &[T]) -> Vec<T> {
        let rows = (0..self.operation.tokens).zip(activation.chunks(self.operation.hidden as usize));
        rows.filter(|(token, _)| self.holds(rank, *token)).flat_map(|(_, row)| row.to_vec()).collect()
    }
}

/// What an operation fuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Sum,
    Norm,
    Fp8,
    NvFp4(ScaleLayout),
    MxFp4(ScaleLayout),
    MxFp8(ScaleLayout),
    Fp8PerToken,
    Fp8PerGroup(u32, GroupScale, ScaleLayout),
}

pub const EVERYTHING: [What; 15] = [
    What::Sum,
    What::Norm,
    What::Fp8,
    What::NvFp4(ScaleLayout::Linear),
    What::NvFp4(ScaleLayout::Swizzled128x4),
    What::NvFp4(ScaleLayout::Swizzled8x4),
    What::MxFp4(ScaleLayout::Linear),
    What::MxFp4(ScaleLayout::Swizzled128x4),
    What::MxFp8(ScaleLayout::Swizzled128x4),
    What::MxFp8(ScaleLayout::ColumnMajor),
    What::Fp8PerToken,
    What::Fp8PerGroup(128, GroupScale::Ue8m0, ScaleLayout::DeepGemm),
    What::Fp8PerGroup(128, GroupScale::F32, ScaleLayout::DeepGemm),
    What::Fp8PerGroup(64, GroupScale::F32, ScaleLayout::ColumnMajor),
    What::Fp8PerGroup(64, GroupScale::Ue8m0, ScaleLayout::Swizzled8x4),
];

impl What {
    /// One of [`EVERYTHING`] for each epilogue that there are kernels with.
    pub fn of_each_epilogue(random: &mut Random) -> Vec<What> {
        let epilogue = |what: What| Epilogue::of(what != What::Sum, what.quantization());
        let mut chosen: Vec<What> = Vec::new();
        for (index, &what) in EVERYTHING.iter().enumerate() {
            if EVERYTHING[..index].iter().all(|&other| epilogue(other) != epilogue(what)) {
                let alike: Vec<What> =
                    EVERYTHING.into_iter().filter(|&other| epilogue(other) == epilogue(what)).collect();
                chosen.push(alike[random.below(alike.len() as u64) as usize]);
            }
        }
        chosen
    }

    pub fn quantization(self) -> Quantization {
        match self {
            What::Sum | What::Norm => Quantization::None,
            What::Fp8 => Quantization::Fp8Static,
            What::NvFp4(layout) => Quantization::NvFp4 { layout },
            What::MxFp4(layout) => Quantization::MxFp4 { layout },
            What::MxFp8(layout) => Quantization::MxFp8 { layout },
            What::Fp8PerToken => Quantization::Fp8PerToken,
            What::Fp8PerGroup(group, scales, layout) => Quantization::Fp8PerGroup { group, scales, layout },
        }
    }

    /// `hidden`, or what is next above it that has whole blocks.
    fn hidden(self, hidden: u64) -> u64 {
        hidden.next_multiple_of(self.quantization().block().unwrap_or(1))
    }
}
