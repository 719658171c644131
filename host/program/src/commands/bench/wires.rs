//! The expectation of wire formats: whether coding takes less time than what it keeps off the links.

use fused_collective_core::{
    cost::{Links, encoding_pays},
    fusion::{Mode, Operation},
    plan::Limits,
};

use crate::{backend::problem::Problem, wire::Wire};

/// A sentence on whether each of `wires` is expected to pay between GPUs, by the model in `core`; `None` without formats.
pub(super) fn expected(problem: &Problem, wires: &[Wire], limits: &Limits) -> Option<String> {
    let pays = |wire: &Wire| {
        let operation = Operation { wire: Some(wire.format()?), ..problem.operation(Mode::Auto) };
        let pays = encoding_pays(&operation, limits, &Links::H200).ok()?;
        Some(format!(
            "{wire} between ranks is {}expected to be faster than exact rows",
            if pays { "" } else { "not " }
        ))
    };
    let sentences: Vec<String> = wires.iter().filter_map(pays).collect();
    (!sentences.is_empty()).then(|| format!("by a model of H200 GPUs, {} here", sentences.join(", and ")))
}

#[cfg(test)]
mod tests {
    use fused_collective_core::{dtype::DType, fusion::Norm};

    use super::*;
    use crate::{pattern::Pattern, quant_mode::QuantMode};

    #[test]
    fn formats_pay_from_some_size_on() {
        let limits = Limits {
            world_size: 2,
            hosts: 1,
            slot_bytes: 1 << 30,
            compute_units: 132,
            max_cluster: 8,
            one_shot_bytes: u64::MAX,
        };
        let told = |tokens, wires: &[Wire]| {
            let problem = Problem {
                dtype: DType::Bf16,
                tokens,
                hidden: 8192,
                residual: true,
                sharded: false,
                norm: Norm::default(),
                pattern: Pattern::AllReduceNorm,
                quantization: QuantMode::None.quantization(),
                scale: QuantMode::None.scale(),
                partial_sums: Default::default(),
            };
            expected(&problem, wires, &limits)
        };
        assert_eq!(told(64, &[Wire::Exact]), None);
        assert_eq!(
            told(1, &Wire::ALL).as_deref(),
            Some(
                "by a model of H200 GPUs, int8 between ranks is not expected to be faster than exact rows, and int4 between \
                 ranks is not expected to be faster than exact rows here"
            )
        );
        assert_eq!(
            told(64, &[Wire::Exact, Wire::Int8]).as_deref(),
            Some("by a model of H200 GPUs, int8 between ranks is expected to be faster than exact rows here")
        );
    }
}
