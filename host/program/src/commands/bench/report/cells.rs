//! The text of a row's cells, the same in the table and in Markdown.

use super::data::{Row, RowOutcome};

/// The cells of one row after its name.
pub(super) struct Cells {
    pub(super) median: String,
    pub(super) min: String,
    pub(super) p99: String,
    pub(super) bus_bandwidth: String,
    pub(super) max_error: String,
    pub(super) speedup: String,
}

impl Cells {
    pub(super) fn of(row: &Row) -> Cells {
        match &row.outcome {
            RowOutcome::Verified { max_error, sum_error, figures, .. } => Cells {
                median: format!("{:.2}", figures.median_us),
                min: format!("{:.2}", figures.min_us),
                p99: format!("{:.2}", figures.p99_us),
                bus_bandwidth: format!("{:.2}", figures.bus_bandwidth_gb_s),
                max_error: sum_error.map_or_else(|| format!("{max_error:.2}"), |error| error.to_string()),
                speedup: match figures.speedup {
                    _ if figures.is_baseline => "baseline".to_owned(),
                    Some(speedup) => format!("{speedup:.2}x"),
                    None => "-".to_owned(),
                },
            },
            RowOutcome::Failed { .. } => Cells {
                median: "FAILED".to_owned(),
                min: "-".to_owned(),
                p99: "-".to_owned(),
                bus_bandwidth: "-".to_owned(),
                max_error: "-".to_owned(),
                speedup: "-".to_owned(),
            },
        }
    }
}
