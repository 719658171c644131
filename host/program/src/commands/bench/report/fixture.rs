//! A small report with fixed figures, for the tests of its forms.

use fused_collective_core::dtype::DType;

use super::data::Report;
use crate::{
    commands::bench::settings::{Case, Settings},
    measurement::{Kind, Measurement, Trials},
    quant_mode::QuantMode,
    report::machine::Machine,
};

pub(super) fn trials(times_us: &[f64]) -> Result<Trials, String> {
    Ok(Trials { max_error_ulp: 0.5, sum_error: None, operations_per_trial: 10, times_us: times_us.to_vec() })
}

pub(super) fn measurement(variant: &str, result: Result<Trials, String>) -> Measurement {
    let kind = if variant.contains("standard_") { Kind::Standard } else { Kind::Fused };
    Measurement { variant: variant.to_owned(), kind, result }
}

/// A report without configurations, of settings that ask for `num_tokens` and `quant_modes`.
pub(super) fn empty(num_tokens: &[u64], quant_modes: &[QuantMode]) -> Report {
    let settings = Settings {
        num_tokens: num_tokens.to_vec(),
        quant_modes: quant_modes.to_vec(),
        trials: 3,
        ..Settings::default()
    };
    let machine = Machine {
        cpu: "Test CPU".to_owned(),
        cores: 2,
        memory_bytes: 16 << 30,
        os: "Linux (Test 1)".to_owned(),
        kernel: "6.1.0".to_owned(),
        arch: "x86_64".to_owned(),
        gpus: Vec::new(),
        rank_cpus: Vec::new(),
        driver: None,
    };
    let command = ["bench", "--output-file", "my results.md"].map(str::to_owned).to_vec();
    Report {
        version: "0.1.0".to_owned(),
        created: "2026-01-02T03:04:05Z".to_owned(),
        machine,
        ..Report::new(command, "cpu", 2, settings)
    }
}

pub(super) fn case(num_tokens: u64, quant_mode: QuantMode) -> Case {
    Case { num_tokens, dtype: DType::Bf16, quant_mode }
}

/// Two configurations, one with a failed row and a note.
pub(crate) fn report() -> Report {
    let mut report = empty(&[128], &[QuantMode::None, QuantMode::Fp8]);
    report.push(
        case(128, QuantMode::None),
        Vec::new(),
        vec![
            measurement("standard_allreduce_native_rms_norm", trials(&[400.0, 390.25, 1400.125])),
            measurement("standard_allreduce_rmsnorm_native_compiled", trials(&[250.0, 240.0, 260.5])),
            measurement("fused_allreduce_rmsnorm_oneshot", trials(&[125.0, 120.0, 130.0])),
            measurement(
                "fused_allreduce_rmsnorm_twoshot",
                Err("rank 1: 3 elements differ by up to 17 ulp".to_owned()),
            ),
        ],
    );
    report.push(
        case(128, QuantMode::Fp8),
        vec!["More ranks than cores: times include waiting for a core.".to_owned()],
        vec![
            measurement("standard_allreduce_native_rms_norm_custom_quant_fp8", trials(&[12_345.678])),
            measurement("standard_allreduce_rmsnorm_fp8_quant_native_compiled", trials(&[10_000.0])),
            measurement("fused_allreduce_rmsnorm_fp8_quant_oneshot", trials(&[20_000.0])),
        ],
    );
    report
}
