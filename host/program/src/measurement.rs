//! Measurements of variants, before any report.

use std::fmt;

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
    /// The error of the sum, if rows have a format of fewer bits between ranks.
    pub sum_error: Option<SumError>,
    /// Operations that one trial runs, back to back.
    pub operations_per_trial: u32,
    /// Microseconds per operation of the slowest rank, for each trial.
    pub times_us: Vec<f64>,
}

/// The error of a sum, relative to the root mean square of a row of the exact one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SumError {
    /// Root mean square.
    pub rms: f64,
    /// The largest of any element.
    pub largest: f64,
}

impl SumError {
    /// The error of a row. It is 0 where the exact row is.
    pub fn of(sum: &[f32], exact: &[f32]) -> SumError {
        let wide = |row: &[f32]| row.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        let root = |row: &[f64]| (row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64).sqrt();
        let (exact, sum) = (wide(exact), wide(sum));
        let errors: Vec<f64> = sum.iter().zip(&exact).map(|(x, exact)| (x - exact).abs()).collect();
        let (row, largest) = (root(&exact), errors.iter().copied().fold(0.0, f64::max));
        let relative = |error: f64| if error == 0.0 { 0.0 } else { error / row };
        SumError { rms: relative(root(&errors)), largest: relative(largest) }
    }

    /// The error of several rows; `None` of none.
    pub fn of_rows(rows: Vec<SumError>) -> Option<SumError> {
        let squares: f64 = rows.iter().map(|row| row.rms * row.rms).sum();
        let largest = rows.iter().map(|row| row.largest).reduce(f64::max)?;
        Some(SumError { rms: (squares / rows.len() as f64).sqrt(), largest })
    }
}

impl fmt::Display for SumError {
    /// `0.55% / 2.7%`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2}% / {:.1}%", self.rms * 100.0, self.largest * 100.0)
    }
}

impl Trials {
    /// The median of the times; `None` before the first trial.
    pub fn median_us(&self) -> Option<f64> {
        let mut sorted = self.times_us.clone();
        sorted.sort_by(f64::total_cmp);
        median(&sorted)
    }
}

/// Trials of two kinds: some took much longer than all others, as on a machine that was disturbed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TwoKinds {
    /// The number of slow trials.
    pub slow: usize,
    /// The median of the slow trials, in microseconds.
    pub slow_us: f64,
    /// The median of the others.
    pub others_us: f64,
}

/// The least ratio between a slow trial and every other.
const APART: f64 = 1.5;
/// The least share of the trials that makes a kind, as 1 in so many. A single trial makes none.
const ONE_IN: usize = 10;

/// The two kinds of trials with these times, if there are two: each at least a tenth of the trials, and at least two.
pub fn two_kinds(times_us: &[f64]) -> Option<TwoKinds> {
    let mut sorted = times_us.to_vec();
    sorted.sort_by(f64::total_cmp);
    let least = sorted.len().div_ceil(ONE_IN).max(2);
    let ratio = |at: usize| sorted[at] / sorted[at - 1];
    // The widest gap parts them.
    let at = (least..=sorted.len().checked_sub(least)?).max_by(|a, b| ratio(*a).total_cmp(&ratio(*b)))?;
    let (others, slow) = sorted.split_at(at);
    // Not for NaN.
    (ratio(at) >= APART).then_some(())?;
    Some(TwoKinds { slow: slow.len(), slow_us: median(slow)?, others_us: median(others)? })
}

/// `2 (n - 1) / n`, the ratio of bus bandwidth to algorithm bandwidth of an all-reduce of `n` ranks.
pub(crate) fn bus_factor(world_size: u32) -> f64 {
    let n = f64::from(world_size);
    2.0 * (n - 1.0) / n
}

/// The ratio of a time to another in plain words, up to the name of the other: `4.5% faster than`, `34 times as slow as`.
pub(crate) fn compared(ratio: f64) -> String {
    let times = |factor: f64| if factor < 10.0 { format!("{factor:.1}") } else { format!("{factor:.0}") };
    match ratio {
        _ if ratio >= 2.0 => format!("{} times as slow as", times(ratio)),
        _ if ratio <= 0.5 => format!("{} times as fast as", times(1.0 / ratio)),
        _ if ratio > 1.0 => format!("{:.1}% slower than", (ratio - 1.0) * 100.0),
        _ => format!("{:.1}% faster than", (1.0 - ratio) * 100.0),
    }
}

/// The middle of ascending numbers, or the mean of the two middle ones.
pub(crate) fn median(sorted: &[f64]) -> Option<f64> {
    let upper = *sorted.get(sorted.len() / 2)?;
    Some(if sorted.len().is_multiple_of(2) { (sorted[sorted.len() / 2 - 1] + upper) / 2.0 } else { upper })
}

/// The smallest of ascending numbers that at least `percent` of them do not exceed.
pub(crate) fn percentile(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.checked_sub(1)?).copied()
}

/// The reason why times are not usable, if one of them is not positive and finite.
pub(crate) fn invalid_duration(times_us: &[f64]) -> Option<String> {
    let time = times_us.iter().find(|time| !(time.is_finite() && **time > 0.0))?;
    Some(format!("a trial took {time} µs, not a valid duration"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trials_of_which_some_take_much_longer_are_of_two_kinds() {
        let kinds = TwoKinds { slow: 3, slow_us: 60.0, others_us: 3.5 };
        assert_eq!(two_kinds(&[3.0, 60.0, 4.0, 50.0, 3.5, 3.0, 120.0, 4.0]), Some(kinds));
        // Whichever is the more frequent.
        let kinds = TwoKinds { slow: 4, slow_us: 60.0, others_us: 3.5 };
        assert_eq!(two_kinds(&[60.0, 3.0, 60.0, 61.0, 4.0, 50.0]), Some(kinds));
    }

    #[test]
    fn the_error_of_a_sum_is_relative_to_its_row() {
        let row = SumError::of(&[3.0, -4.5, 3.0, 4.0], &[3.0, -4.0, 3.0, 4.0]);
        let [rms, largest] = [0.25, 0.5].map(|error| error / 12.5f64.sqrt());
        assert!((row.rms - rms).abs() < 1e-12 && (row.largest - largest).abs() < 1e-12, "{row:?}");
        assert_eq!(row.to_string(), "7.07% / 14.1%");
        let none = SumError { rms: 0.0, largest: 0.0 };
        assert_eq!(SumError::of(&[0.0; 2], &[0.0; 2]), none);
        let both = SumError::of_rows(vec![row, none]).unwrap();
        assert!((both.rms - rms / 2f64.sqrt()).abs() < 1e-12 && both.largest == row.largest, "{both:?}");
        assert_eq!(SumError::of_rows(Vec::new()), None);
    }

    #[test]
    fn trials_that_vary_a_little_or_of_which_one_stands_out_are_of_one_kind() {
        assert_eq!(two_kinds(&[3.0, 3.1, 3.3, 4.0, 4.4, 4.5]), None);
        assert_eq!(two_kinds(&[3.0, 3.0, 3.0, 3.0, 90.0]), None);
        // Two of thirty are fewer than a tenth.
        let mut times = vec![3.0; 30];
        times[7..9].fill(90.0);
        assert_eq!(two_kinds(&times), None);
        times[9] = 90.0;
        assert!(two_kinds(&times).is_some());
        for none in [&[][..], &[1.0], &[1.0, 9.0], &[1.0, 9.0, 9.0]] {
            assert_eq!(two_kinds(none), None);
        }
        assert_eq!(two_kinds(&[f64::NAN; 4]), None);
    }

    #[test]
    fn a_ratio_in_words_is_in_percent_up_to_twice_and_in_times_from_there() {
        let cases = [
            (1.0, "0.0% faster than"),
            (0.955, "4.5% faster than"),
            (1.25, "25.0% slower than"),
            (2.0, "2.0 times as slow as"),
            (34.421, "34 times as slow as"),
            (113.6, "114 times as slow as"),
            (0.5, "2.0 times as fast as"),
            (0.05, "20 times as fast as"),
        ];
        for (ratio, words) in cases {
            assert_eq!(compared(ratio), words);
        }
    }
}
