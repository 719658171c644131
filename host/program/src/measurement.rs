//! Measurements of variants, before any report.

use serde::{Deserialize, Serialize};

/// The two sides of the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Separate operations: a candidate for the baseline.
    Standard,
    /// One fused operation.
    Fused,
}

/// The measurement of one variant.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurement {
    /// The variant's name.
    pub variant: String,
    /// Separate operations, or a fused one.
    pub kind: Kind,
    /// The times, or the reason why there are none.
    pub result: Result<Trials, String>,
}

/// The trials of a verified variant.
#[derive(Clone, Debug, PartialEq)]
pub struct Trials {
    /// The largest error of any output element, in units in the last place of the output's type.
    pub max_error_ulp: f64,
    /// Operations that one trial runs, back to back.
    pub operations_per_trial: u32,
    /// Microseconds per operation of the slowest rank, for each trial.
    pub times_us: Vec<f64>,
}

impl Trials {
    /// The median of the times; `None` before the first trial.
    pub fn median_us(&self) -> Option<f64> {
        let mut sorted = self.times_us.clone();
        sorted.sort_by(f64::total_cmp);
        median(&sorted)
    }
}

/// `2 (n - 1) / n`, the ratio of bus bandwidth to algorithm bandwidth of an all-reduce of `n` ranks.
pub(crate) fn bus_factor(world_size: u32) -> f64 {
    let n = f64::from(world_size);
    2.0 * (n - 1.0) / n
}

/// The middle of ascending numbers, or the mean of the two middle ones.
pub(crate) fn median(sorted: &[f64]) -> Option<f64> {
    let upper = *sorted.get(sorted.len() / 2)?;
    Some(if sorted.len().is_multiple_of(2) { (sorted[sorted.len() / 2 - 1] + upper) / 2.0 } else { upper })
}

/// The reason why times are not usable, if one of them is not positive and finite.
pub(crate) fn invalid_duration(times_us: &[f64]) -> Option<String> {
    let time = times_us.iter().find(|time| !(time.is_finite() && **time > 0.0))?;
    Some(format!("a trial took {time} µs, not a valid duration"))
}
