//! The variants of a problem: separate operations, as frameworks run them, and fused ones.
//!
//! The names are those of vLLM's benchmark of the same comparison:
//! - *allreduce*, *custom_allreduce*: the backend's [all-reduces](crate::backend::steps::AllReduce);
//! - *native*: the operation as an eager framework runs it, primitive steps that each pass through memory;
//! - *custom*: one hand-written pass per operation;
//! - *compiled*: one pass for everything after the all-reduce, like the code of a graph compiler.

use fused_collective_core::fusion::{Mode, Rounding};

use crate::{
    backend::{
        problem::{Problem, Tensor},
        steps::{Fused, Step, eager_fp8, eager_rms_norm},
    },
    measurement::Kind,
    pattern::Pattern,
    quant_mode::QuantMode,
    wire::Wire,
};

/// One way to solve a problem.
#[derive(Clone, Debug, PartialEq)]
pub struct Variant {
    /// The name in reports.
    pub name: String,
    /// Separate operations, or a fused one.
    pub kind: Kind,
    /// The steps, in order.
    pub steps: Vec<Step>,
    /// True if the residual that it reads and writes is sharded.
    pub sharded: bool,
    /// True if it writes `NormOut`, which a quantized result may do without.
    pub writes_norm: bool,
}

impl Variant {
    /// This variant with its outputs in place of its inputs, if it is fused.
    pub fn in_place(mut self) -> Self {
        for step in &mut self.steps {
            if let Step::Fused(call) = step {
                call.in_place = true;
            }
        }
        self
    }

    /// The fused operation, if it is the variant's last step.
    pub fn fused(&self) -> Option<Fused> {
        match self.steps.last() {
            Some(&Step::Fused(call)) => Some(call),
            _ => None,
        }
    }

    /// The format of its rows between ranks.
    pub fn wire(&self) -> Wire {
        self.fused().map_or(Wire::Exact, |call| call.wire)
    }

    /// The tensor that gets the sum.
    pub fn sum(&self, problem: &Problem) -> Tensor {
        self.fused().map_or(Tensor::ResidualOut, |call| call.sum(problem))
    }

    /// The tensor that gets the norm, if the variant [writes](Self::writes_norm) it.
    pub fn norm(&self) -> Tensor {
        self.fused().map_or(Tensor::NormOut, |call| call.norm())
    }

    /// The tensors that get the sum and, if it writes one, the norm.
    pub fn written(&self, problem: &Problem) -> (Tensor, Option<Tensor>) {
        (self.sum(problem), self.writes_norm.then(|| self.norm()))
    }

    /// The inputs that it overwrites.
    pub fn overwritten(&self, problem: &Problem) -> Vec<Tensor> {
        let (sum, norm) = self.written(problem);
        [Some(sum), norm].into_iter().flatten().filter(|tensor| !Tensor::OUTPUTS.contains(tensor)).collect()
    }

    /// The rounding of its sum.
    pub fn rounding(&self) -> Rounding {
        match self.kind {
            Kind::Standard => Rounding::AfterAllReduce,
            Kind::Fused => Rounding::Once,
        }
    }

    /// True if it does the arithmetic of [`core::specification`](fused_collective_core::specification), of a group of
    /// `world_size` ranks, and so has its bits. Eager steps round in between, and NCCL adds in an order of its own.
    pub fn is_specified(&self, world_size: u32) -> bool {
        self.steps.iter().all(|step| match step {
            Step::NcclAllReduce | Step::NcclSymmetricAllReduce => world_size == 2,
            Step::Eager(_) => false,
            Step::Fused(_)
            | Step::AllReduce(_)
            | Step::CombineExperts
            | Step::PostNorm
            | Step::AfterAllReduce
            | Step::AddRmsNorm
            | Step::AddRmsNormQuantize
            | Step::Quantize => true,
        })
    }
}

/// Every variant of `pattern` and `quant_mode`: the separate operations for each of `all_reduces`, then the fused ones in each of
/// `wires`. `all_reduces` has pairs of a name and a step. If `sharded`, one fused variant of each format has a sharded residual.
pub fn variants(
    pattern: Pattern,
    quant_mode: QuantMode,
    residual: bool,
    sharded: bool,
    oneshot: bool,
    wires: &[Wire],
    all_reduces: &[(&'static str, Step)],
) -> Vec<Variant> {
    let mut all: Vec<Variant> = all_reduces
        .iter()
        .flat_map(|&(name, step)| {
            forms(pattern, quant_mode, residual).into_iter().map(
                move |Form { name: rest_name, steps: rest, .. }| Variant {
                    name: format!("standard_{name}_{rest_name}"),
                    kind: Kind::Standard,
                    sharded: false,
                    writes_norm: !rest.contains(&Step::AddRmsNormQuantize)
                        && (quant_mode == QuantMode::None || !rest.contains(&Step::AfterAllReduce)),
                    steps: [before_all_reduce(pattern), vec![step], rest].concat(),
                },
            )
        })
        .collect();
    let quantization = match quant_mode {
        QuantMode::None => String::new(),
        _ => format!("_{quant_mode}_quant"),
    };
    let modes = [(Mode::OneShot, "oneshot"), (Mode::TwoShot, "twoshot")];
    let modes = modes.into_iter().filter(|&(mode, _)| oneshot || mode != Mode::OneShot);
    let modes = modes.map(|(mode, suffix)| (Step::fused(mode), suffix));
    let with_shards = sharded.then_some((Step::fused_sharded(), "twoshot_sharded"));
    let fused: Vec<_> = modes.chain(with_shards).collect();
    all.extend(wires.iter().flat_map(|&wire| {
        let name = format!("fused_allreduce_rmsnorm{quantization}{}", wire.part_of_name());
        fused.iter().map(move |&(step, suffix)| Variant {
            name: format!("{name}_{suffix}"),
            kind: Kind::Fused,
            steps: vec![step.sent_as(wire)],
            sharded: step == Step::fused_sharded(),
            writes_norm: quant_mode == QuantMode::None,
        })
    }));
    all
}

/// Those of the variants that a group of so many hosts can run: one-shot and formats of fewer bits do not cross hosts.
pub fn that_span(hosts: u32, mut variants: Vec<Variant>) -> Vec<Variant> {
    let crosses = |step: &Step| match *step {
        Step::Fused(Fused { mode, wire, .. }) => mode != Mode::OneShot && wire.is_exact(),
        Step::AllReduce(mode) => mode != Mode::OneShot,
        _ => true,
    };
    variants.retain(|variant| hosts == 1 || variant.steps.iter().all(crosses));
    variants
}

/// The steps before the all-reduce.
fn before_all_reduce(pattern: Pattern) -> Vec<Step> {
    pattern.experts().map(|_| Step::CombineExperts).into_iter().collect()
}

/// A form of the separate operations.
struct Form {
    name: String,
    /// The steps after the all-reduce.
    steps: Vec<Step>,
    /// True if everything after the all-reduce is one pass, as a compiler makes it.
    is_one_pass: bool,
}

/// The forms of a pattern. A norm of the sum has no eager form.
fn forms(pattern: Pattern, quant_mode: QuantMode, residual: bool) -> Vec<Form> {
    let mut forms = forms_without_post_norm(quant_mode, residual);
    if pattern.post_norm().is_some() {
        forms.retain(|form| !matches!(form.steps[0], Step::Eager(_)));
        for Form { steps, is_one_pass, .. } in &mut forms {
            if *is_one_pass {
                *steps = vec![Step::AfterAllReduce];
            } else {
                steps.insert(0, Step::PostNorm);
            }
        }
    }
    forms
}

fn forms_without_post_norm(quant_mode: QuantMode, residual: bool) -> Vec<Form> {
    let native = || eager_rms_norm(residual);
    let custom = || vec![Step::AddRmsNorm];
    let quantize = || vec![Step::Quantize];
    let apart = |name: &str, steps| Form { name: name.to_owned(), steps, is_one_pass: false };
    let one_pass = |name: String, step| Form { name, steps: vec![step], is_one_pass: true };
    match quant_mode {
        QuantMode::None => vec![
            apart("native_rms_norm", native()),
            apart("custom_rms_norm", custom()),
            one_pass("rmsnorm_native_compiled".to_owned(), Step::AddRmsNorm),
        ],
        QuantMode::Fp8 => vec![
            apart("native_rms_norm_native_quant_fp8", [native(), eager_fp8()].concat()),
            apart("native_rms_norm_custom_quant_fp8", [native(), quantize()].concat()),
            apart("custom_rms_norm_native_quant_fp8", [custom(), eager_fp8()].concat()),
            apart("custom_rms_norm_custom_quant_fp8", [custom(), quantize()].concat()),
            one_pass("rmsnorm_fp8_quant_native_compiled".to_owned(), Step::AddRmsNormQuantize),
        ],
        _ => vec![
            apart(&format!("native_rms_norm_{quant_mode}_quant"), [native(), quantize()].concat()),
            apart(&format!("custom_rms_norm_{quant_mode}_quant"), [custom(), quantize()].concat()),
            one_pass(format!("rmsnorm_{quant_mode}_quant_native_compiled"), Step::AddRmsNormQuantize),
        ],
    }
}

/// The number of [`variants`] for `all_reduces` all-reduces.
pub(crate) fn count(
    pattern: Pattern,
    quant_mode: QuantMode,
    sharded: bool,
    oneshot: bool,
    wires: &[Wire],
    all_reduces: usize,
) -> usize {
    forms(pattern, quant_mode, true).len() * all_reduces
        + wires.len() * (1 + usize::from(oneshot) + usize::from(sharded))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(quant_mode: QuantMode, oneshot: bool) -> Vec<String> {
        let all_reduces = [("allreduce", Step::AllReduce(Mode::TwoShot))];
        variants(Pattern::AllReduceNorm, quant_mode, true, false, oneshot, &[Wire::Exact], &all_reduces)
            .into_iter()
            .map(|variant| variant.name)
            .collect()
    }

    #[test]
    fn the_names_are_those_of_the_benchmark_that_users_know() {
        assert_eq!(
            names(QuantMode::None, true),
            [
                "standard_allreduce_native_rms_norm",
                "standard_allreduce_custom_rms_norm",
                "standard_allreduce_rmsnorm_native_compiled",
                "fused_allreduce_rmsnorm_oneshot",
                "fused_allreduce_rmsnorm_twoshot",
            ]
        );
        assert_eq!(
            names(QuantMode::Fp8, true),
            [
                "standard_allreduce_native_rms_norm_native_quant_fp8",
                "standard_allreduce_native_rms_norm_custom_quant_fp8",
                "standard_allreduce_custom_rms_norm_native_quant_fp8",
                "standard_allreduce_custom_rms_norm_custom_quant_fp8",
                "standard_allreduce_rmsnorm_fp8_quant_native_compiled",
                "fused_allreduce_rmsnorm_fp8_quant_oneshot",
                "fused_allreduce_rmsnorm_fp8_quant_twoshot",
            ]
        );
        assert_eq!(
            names(QuantMode::Fp4, false),
            [
                "standard_allreduce_native_rms_norm_fp4_quant",
                "standard_allreduce_custom_rms_norm_fp4_quant",
                "standard_allreduce_rmsnorm_fp4_quant_native_compiled",
                "fused_allreduce_rmsnorm_fp4_quant_twoshot",
            ]
        );
    }

    #[test]
    fn variants_have_the_bits_of_the_specification_unless_they_round_or_add_in_another_way() {
        let all_reduces = [
            ("custom_allreduce", Step::AllReduce(Mode::OneShot)),
            ("allreduce", Step::NcclAllReduce),
            ("symm_allreduce", Step::NcclSymmetricAllReduce),
        ];
        let of = |pattern| variants(pattern, QuantMode::Fp8, true, true, true, &Wire::ALL, &all_reduces);
        for variant in Pattern::ALL.into_iter().flat_map(of) {
            let is_eager = variant.name.contains("native_rms_norm") || variant.name.contains("native_quant");
            let is_ours = variant.name.contains("custom_allreduce") || variant.kind == Kind::Fused;
            assert_eq!(variant.is_specified(2), !is_eager, "{}", variant.name);
            assert_eq!(variant.is_specified(3), !is_eager && is_ours, "{}", variant.name);
        }
    }

    #[test]
    fn one_shot_and_formats_of_fewer_bits_stay_within_a_host() {
        let all_reduces = [("custom", Step::AllReduce(Mode::TwoShot)), ("allreduce", Step::NcclAllReduce)];
        let all =
            variants(Pattern::AllReduceNorm, QuantMode::None, true, true, true, &Wire::ALL, &all_reduces);
        assert_eq!(that_span(1, all.clone()), all);
        let names: Vec<_> = that_span(2, all).into_iter().map(|variant| variant.name).collect();
        let fused = ["fused_allreduce_rmsnorm_twoshot", "fused_allreduce_rmsnorm_twoshot_sharded"];
        assert_eq!(names[6..], fused);
    }

    #[test]
    fn every_variant_has_one_collective_and_knows_whether_it_writes_the_norm() {
        for (quant_mode, pattern) in
            QuantMode::ALL.into_iter().flat_map(|mode| Pattern::ALL.map(|pattern| (mode, pattern)))
        {
            for (residual, sharded) in [(false, false), (true, false), (true, true)] {
                let all_reduces =
                    [("allreduce", Step::NcclAllReduce), ("custom", Step::AllReduce(Mode::OneShot))];
                let all = variants(pattern, quant_mode, residual, sharded, true, &Wire::ALL, &all_reduces);
                assert_eq!(
                    all.len(),
                    count(pattern, quant_mode, sharded, true, &Wire::ALL, all_reduces.len())
                );
                assert_eq!(all.iter().filter(|variant| variant.sharded).count(), 3 * usize::from(sharded));
                for variant in all {
                    let collective = |step: &&Step| {
                        matches!(
                            step,
                            Step::AllReduce(_)
                                | Step::NcclAllReduce
                                | Step::NcclSymmetricAllReduce
                                | Step::Fused(_)
                        )
                    };
                    assert_eq!(variant.steps.iter().filter(collective).count(), 1, "{}", variant.name);
                    let whole = variant.kind == Kind::Fused || variant.steps.contains(&Step::AfterAllReduce);
                    let one_pass = variant.steps.contains(&Step::AddRmsNormQuantize)
                        || (whole && quant_mode != QuantMode::None);
                    let fused = variant.kind == Kind::Fused;
                    let of_pattern = |step: &Step| match pattern {
                        Pattern::AllReduceNorm => false,
                        Pattern::PostNorm => matches!(step, Step::PostNorm | Step::AfterAllReduce),
                        Pattern::Moe => *step == Step::CombineExperts,
                    };
                    let steps = variant.steps.iter().filter(|step| of_pattern(step)).count();
                    assert_eq!(steps, usize::from(!fused && !pattern.is_default()), "{}", variant.name);
                    assert_eq!(variant.writes_norm, !one_pass, "{}", variant.name);
                }
            }
        }
    }
}
