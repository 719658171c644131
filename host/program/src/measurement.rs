//! What is measured of a variant, before it is shown.

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

/// What was measured of one variant, before anything is derived from it.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurement {
    /// The variant's name.
    pub variant: String,
    /// Separate operations, or a fused one.
    pub kind: Kind,
    /// The times, or why there are none.
    pub result: Result<Trials, String>,
}

/// The trials of a verified variant.
#[derive(Clone, Debug, PartialEq)]
pub struct Trials {
    /// The largest error of any output element, in units in the last place of the output's type.
    pub max_error_ulp: f64,
    /// Operations that one trial runs, back to back.
    pub operations_per_trial: u32,
    /// For each trial the slowest rank's microseconds per operation.
    pub times_us: Vec<f64>,
}

impl Trials {
    /// The median of the times, as the report has it; `None` before the first trial.
    pub fn median_us(&self) -> Option<f64> {
        let mut sorted = self.times_us.clone();
        sorted.sort_by(f64::total_cmp);
        median(&sorted)
    }
}

/// `2 (n - 1) / n`: how often each byte of an all-reduce crosses the bus.
pub(crate) fn bus_factor(world_size: u32) -> f64 {
    let n = f64::from(world_size);
    2.0 * (n - 1.0) / n
}

pub(crate) fn median(sorted: &[f64]) -> Option<f64> {
    let upper = *sorted.get(sorted.len() / 2)?;
    Some(if sorted.len().is_multiple_of(2) { (sorted[sorted.len() / 2 - 1] + upper) / 2.0 } else { upper })
}
