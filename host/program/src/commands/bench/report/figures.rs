//! The figures that are derived from measured times.
//!
//! - The median is the middle time, or the mean of the two middle ones.
//! - The 99th percentile is by nearest rank: the smallest measured time that at least 99% of the trials do not exceed.
//!   With fewer than 100 trials that is the slowest one.
//! - Bandwidths are those of nccl-tests (`doc/PERFORMANCE.md` there). The algorithm bandwidth is a rank's input bytes over
//!   the time. The bus bandwidth of an all-reduce of `n` ranks is that times `2 (n - 1) / n`, and so is comparable with the
//!   speed of the links. Gigabytes are 10^9 bytes. The residual, gamma and quantized outputs are not counted,
//!   so that separate and fused operations are measured alike. The same holds for a variant with a sharded residual,
//!   although it sends fewer bytes.
//! - The baseline is the verified standard variant with the smallest median, the first of equals. The speedup of a row is
//!   the baseline's median over the row's.

use super::data::{Configuration, ErrorUnit, Figures, Report, Row, RowOutcome};
use crate::{
    commands::bench::settings::Case,
    measurement::{Kind, Measurement, Trials, bus_factor, invalid_duration, median, percentile},
};

impl Report {
    /// Adds a configuration with its measurements, and derives every figure.
    pub fn push(&mut self, case: Case, notes: Vec<String>, measured: Vec<Measurement>) {
        let mut configuration = Configuration {
            num_tokens: case.num_tokens,
            hidden_dim: self.settings.hidden_dim,
            dtype: case.dtype,
            use_residual: self.settings.use_residual,
            quant_mode: case.quant_mode,
            notes,
            rows: Vec::new(),
        };
        configuration.rows = rows(measured, configuration.input_bytes(), self.world_size);
        self.configurations.push(configuration);
        self.conclude();
    }
}

/// The rows of one configuration, whose ranks each reduce `bytes` bytes. A row fails if it has no times, a time that is
/// not positive and finite, or an error that is not finite.
fn rows(measured: Vec<Measurement>, bytes: f64, world_size: u32) -> Vec<Row> {
    let mut rows: Vec<Row> = measured.into_iter().map(|one| row(one, bytes, world_size)).collect();
    let baseline = (rows.iter().enumerate())
        .filter(|(_, row)| row.kind == Kind::Standard && row.is_exact())
        .filter_map(|(index, row)| Some((index, row.figures()?.median_us)))
        .min_by(|a, b| a.1.total_cmp(&b.1));
    if let Some((baseline, baseline_us)) = baseline {
        for (index, row) in rows.iter_mut().enumerate() {
            if let RowOutcome::Verified { figures, .. } = &mut row.outcome {
                figures.speedup = Some(baseline_us / figures.median_us);
                figures.is_baseline = index == baseline;
            }
        }
    }
    rows
}

fn row(Measurement { variant, kind, result }: Measurement, bytes: f64, world_size: u32) -> Row {
    let outcome = match result {
        Ok(trials) => timed(trials, bytes, world_size),
        Err(reason) => RowOutcome::Failed { reason: reason.split_whitespace().collect::<Vec<_>>().join(" ") },
    };
    Row { variant, kind, outcome }
}

fn timed(trials: Trials, bytes: f64, world_size: u32) -> RowOutcome {
    let Trials { max_error_ulp, sum_error, operations_per_trial, times_us } = trials;
    if let Some(reason) = invalid_duration(&times_us) {
        return RowOutcome::Failed { reason };
    }
    if !max_error_ulp.is_finite() {
        return RowOutcome::Failed { reason: format!("the largest error is {max_error_ulp} ulp") };
    }
    let mut sorted = times_us.clone();
    sorted.sort_by(f64::total_cmp);
    let (Some(median_us), Some(p99_us)) = (median(&sorted), percentile(&sorted, 99)) else {
        return RowOutcome::Failed { reason: "no trial was timed".to_owned() };
    };
    let algorithm_bandwidth_gb_s = bytes / median_us / 1e3;
    let figures = Figures {
        median_us,
        min_us: sorted[0],
        p99_us,
        algorithm_bandwidth_gb_s,
        bus_bandwidth_gb_s: algorithm_bandwidth_gb_s * bus_factor(world_size),
        speedup: None,
        is_baseline: false,
    };
    RowOutcome::Verified {
        max_error: max_error_ulp,
        unit: ErrorUnit::Ulp,
        sum_error,
        operations_per_trial,
        times_us,
        figures,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(variant: &str, kind: Kind, times_us: &[f64]) -> Measurement {
        let trials = Trials {
            max_error_ulp: 0.5,
            sum_error: None,
            operations_per_trial: 10,
            times_us: times_us.to_vec(),
        };
        Measurement { variant: variant.to_owned(), kind, result: Ok(trials) }
    }

    #[test]
    fn the_median_is_the_middle_or_the_mean_of_the_two_middle_times() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[1.0, 2.0, 9.0]), Some(2.0));
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), Some(3.0));
    }

    #[test]
    fn percentiles_are_by_nearest_rank() {
        let times: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(percentile(&times, 99), Some(198.0));
        assert_eq!(percentile(&times[..100], 99), Some(99.0));
        assert_eq!(percentile(&times[..99], 99), Some(99.0));
        assert_eq!(percentile(&times[..20], 99), Some(20.0));
        assert_eq!(percentile(&times[..1], 99), Some(1.0));
        assert_eq!(percentile(&[], 99), None);
    }

    #[test]
    fn bandwidths_are_those_of_nccl_tests() {
        // 128 tokens of 8192 bf16 in 10 us: 2,097,152 bytes / 10 us = 209.7152 GB/s.
        let rows = rows(vec![measured("a", Kind::Fused, &[20.0, 10.0, 5.0])], 2_097_152.0, 4);
        let figures = rows[0].figures().unwrap();
        assert_eq!((figures.median_us, figures.min_us, figures.p99_us), (10.0, 5.0, 20.0));
        assert!((figures.algorithm_bandwidth_gb_s - 209.7152).abs() < 1e-9);
        assert!((figures.bus_bandwidth_gb_s - 209.7152 * 1.5).abs() < 1e-9);
        assert_eq!([bus_factor(2), bus_factor(8), bus_factor(16)], [1.0, 1.75, 1.875]);
    }

    #[test]
    fn the_baseline_is_the_fastest_verified_standard_variant() {
        let mut wrong = measured("fastest, but wrong", Kind::Standard, &[1.0]);
        wrong.result = Err("wrong result".to_owned());
        let rows = rows(
            vec![
                measured("slow", Kind::Standard, &[40.0, 40.0]),
                wrong,
                measured("fast", Kind::Standard, &[10.0, 30.0]),
                measured("as fast, but later", Kind::Standard, &[20.0]),
                measured("fused", Kind::Fused, &[8.0]),
            ],
            1.0,
            2,
        );
        let speedups: Vec<_> = rows.iter().map(|row| row.figures().and_then(|f| f.speedup)).collect();
        assert_eq!(speedups, [Some(0.5), None, Some(1.0), Some(1.0), Some(2.5)]);
        let baselines: Vec<_> = rows
            .iter()
            .filter(|row| row.figures().is_some_and(|f| f.is_baseline))
            .map(|row| &row.variant)
            .collect();
        assert_eq!(baselines, ["fast"]);
    }

    #[test]
    fn without_a_standard_variant_there_is_no_speedup() {
        let rows = rows(vec![measured("fused", Kind::Fused, &[8.0])], 1.0, 2);
        let figures = rows[0].figures().unwrap();
        assert_eq!((figures.speedup, figures.is_baseline), (None, false));
    }

    #[test]
    fn times_that_are_no_times_fail_the_row() {
        let reason =
            |times: &[f64]| match &rows(vec![measured("a", Kind::Standard, times)], 1.0, 2)[0].outcome {
                RowOutcome::Failed { reason } => reason.clone(),
                RowOutcome::Verified { .. } => panic!("verified"),
            };
        assert_eq!(reason(&[]), "no trial was timed");
        assert_eq!(reason(&[1.0, 0.0]), "a trial took 0 µs, not a valid duration");
        assert_eq!(reason(&[f64::NAN]), "a trial took NaN µs, not a valid duration");
    }

    #[test]
    fn an_error_without_bound_fails_the_row() {
        let trials = Trials {
            max_error_ulp: f64::INFINITY,
            sum_error: None,
            operations_per_trial: 1,
            times_us: vec![1.0],
        };
        let outcome = timed(trials, 1.0, 2);
        assert_eq!(outcome, RowOutcome::Failed { reason: "the largest error is inf ulp".to_owned() });
    }
}
