//! What is compared: the separate operations in the forms that a framework has them, and the fused one.
//!
//! Names are those of vLLM's benchmark of the same comparison:
//! - *native*: the operation as an eager framework runs it, one primitive step after another through memory;
//! - *custom*: one hand-written pass per operation;
//! - *compiled*: what a graph compiler makes of everything after the all-reduce, one pass.

use fused_collective_core::{fusion::Mode, reference::Rounding};

use crate::{
    collective::{Step, eager_fp8, eager_rms_norm},
    report::Kind,
    settings::QuantMode,
};

/// One way to solve a problem.
#[derive(Clone, Debug, PartialEq)]
pub struct Variant {
    /// The name in reports.
    pub name: String,
    /// Separate operations, or a fused one.
    pub kind: Kind,
    /// What runs, in order.
    pub steps: Vec<Step>,
    /// Whether `NormOut` is written on the way although the result is quantized.
    pub writes_norm: bool,
}

impl Variant {
    /// Where it rounds.
    pub fn rounding(&self) -> Rounding {
        match self.kind {
            Kind::Standard => Rounding::AfterAllReduce,
            Kind::Fused => Rounding::Once,
        }
    }
}

/// Every variant that solves `quant_mode`, separate ones first; these use the all-reduce of mode `all_reduce`.
pub fn variants(quant_mode: QuantMode, residual: bool, oneshot: bool, all_reduce: Mode) -> Vec<Variant> {
    let native = || eager_rms_norm(residual);
    let custom = || vec![Step::AddRmsNorm];
    let standard = |name: &str, rest: Vec<Step>| Variant {
        name: format!("standard_allreduce_{name}"),
        kind: Kind::Standard,
        writes_norm: !rest.contains(&Step::AddRmsNormQuantize),
        steps: [vec![Step::AllReduce(all_reduce)], rest].concat(),
    };
    let fused = |name: &str| {
        let modes = [(Mode::OneShot, "oneshot"), (Mode::TwoShot, "twoshot")];
        let name = format!("fused_allreduce_rmsnorm{name}");
        modes.into_iter().filter(move |&(mode, _)| oneshot || mode != Mode::OneShot).map(
            move |(mode, suffix)| Variant {
                name: format!("{name}_{suffix}"),
                kind: Kind::Fused,
                steps: vec![Step::Fused(mode)],
                writes_norm: quant_mode == QuantMode::None,
            },
        )
    };
    let (mut all, fused) = match quant_mode {
        QuantMode::None => (
            vec![
                standard("native_rms_norm", native()),
                standard("custom_rms_norm", custom()),
                standard("rmsnorm_native_compiled", custom()),
            ],
            fused(""),
        ),
        QuantMode::Fp8 => (
            vec![
                standard("native_rms_norm_native_quant_fp8", [native(), eager_fp8()].concat()),
                standard("native_rms_norm_custom_quant_fp8", [native(), vec![Step::Quantize]].concat()),
                standard("custom_rms_norm_native_quant_fp8", [custom(), eager_fp8()].concat()),
                standard("custom_rms_norm_custom_quant_fp8", [custom(), vec![Step::Quantize]].concat()),
                standard("rmsnorm_fp8_quant_native_compiled", vec![Step::AddRmsNormQuantize]),
            ],
            fused("_fp8_quant"),
        ),
        QuantMode::Fp4 => (
            vec![
                standard("native_rms_norm_fp4_quant", [native(), vec![Step::Quantize]].concat()),
                standard("custom_rms_norm_fp4_quant", [custom(), vec![Step::Quantize]].concat()),
                standard("rmsnorm_fp4_quant_native_compiled", vec![Step::AddRmsNormQuantize]),
            ],
            fused("_fp4_quant"),
        ),
    };
    all.extend(fused);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(quant_mode: QuantMode, oneshot: bool) -> Vec<String> {
        variants(quant_mode, true, oneshot, Mode::TwoShot).into_iter().map(|variant| variant.name).collect()
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
    fn every_variant_has_one_collective_and_knows_whether_it_writes_the_norm() {
        for quant_mode in QuantMode::ALL {
            for residual in [false, true] {
                for variant in variants(quant_mode, residual, true, Mode::OneShot) {
                    let collective = |step: &&Step| matches!(step, Step::AllReduce(_) | Step::Fused(_));
                    assert_eq!(variant.steps.iter().filter(collective).count(), 1, "{}", variant.name);
                    let one_pass = variant.steps.contains(&Step::AddRmsNormQuantize)
                        || (variant.kind == Kind::Fused && quant_mode != QuantMode::None);
                    assert_eq!(variant.writes_norm, !one_pass, "{}", variant.name);
                }
            }
        }
    }
}
