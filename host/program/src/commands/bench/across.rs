//! The notes on a group of several hosts.

use fused_collective_core::{
    cost::{self, Links},
    fusion::Mode,
    plan::{Limits, Plan},
};

use crate::{backend::problem::Problem, measurement::compared};

/// Notes for a reader on a group of several hosts: variants that were left out, and the times that the model of costs predicts.
pub(super) fn across_hosts(problem: &Problem, limits: &Limits) -> Vec<String> {
    let left_out = "one-shot and formats of fewer bits do not cross hosts: their variants are left out, and so is the bandwidth \
                    of links"
        .to_owned();
    let operation = problem.operation(Mode::Auto);
    let Ok(plan) = Plan::new(&operation, limits) else { return vec![left_out] };
    let links = Links::H200;
    let [fused, separate] = [cost::fused(&operation, &plan), cost::separate(&operation, &plan, &links)]
        .map(|cost| cost.nanoseconds(&links) / 1e3);
    let predicted = format!(
        "by the model of costs, for H200 GPUs with 400 Gb/s each between hosts, the fused operation takes {fused:.1} µs, and \
         NCCL's all-reduce with separate steps {separate:.1} µs: {}",
        compared(fused / separate)
    );
    vec![left_out, predicted]
}

#[cfg(test)]
mod tests {
    use fused_collective_core::{
        dtype::DType,
        fusion::{Norm, PartialSums},
    };

    use super::*;
    use crate::{pattern::Pattern, quant_mode::QuantMode};

    #[test]
    fn a_reader_is_told_what_is_left_out_and_what_the_model_predicts() {
        let problem = Problem {
            dtype: DType::Bf16,
            tokens: 1024,
            hidden: 8192,
            residual: true,
            sharded: false,
            norm: Norm::default(),
            pattern: Pattern::AllReduceNorm,
            quantization: QuantMode::Fp8.quantization(),
            scale: QuantMode::Fp8.scale(),
            partial_sums: PartialSums::F32,
        };
        let limits = Limits {
            world_size: 16,
            hosts: 2,
            slot_bytes: 1 << 30,
            compute_units: 132,
            max_cluster: 8,
            one_shot_bytes: 0,
        };
        let [left_out, predicted] = &across_hosts(&problem, &limits)[..] else { panic!("two notes") };
        assert!(left_out.starts_with("one-shot and formats of fewer bits do not cross hosts"), "{left_out}");
        assert!(
            predicted.contains("the fused operation takes") && predicted.contains("faster"),
            "{predicted}"
        );
        // A plan that there is not has no cost.
        assert_eq!(across_hosts(&problem, &Limits { slot_bytes: 1, ..limits }).len(), 1);
    }
}
