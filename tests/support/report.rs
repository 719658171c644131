//! The JSON report as its readers know it: the schema, written a second time.
//!
//! It uses none of the program's types, so it finds a field that is renamed, added or left out by mistake.

use std::{fs, path::Path};

use serde::Deserialize;

/// One run of the benchmark.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the program's own types document the fields")]
pub struct Report {
    pub schema: u32,
    pub version: String,
    pub created: String,
    pub command: Vec<String>,
    pub machine: Machine,
    pub backend: String,
    pub world_size: u32,
    pub settings: Settings,
    /// Present only if links between GPUs were measured.
    #[serde(default)]
    pub push_gb_s: Option<f64>,
    pub verified_after: bool,
    pub conclusion: Conclusion,
    pub configurations: Vec<Configuration>,
}

/// The machine of the run.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the program's own types document the fields")]
pub struct Machine {
    pub cpu: String,
    pub cores: usize,
    pub memory_bytes: u64,
    pub os: String,
    pub kernel: String,
    pub arch: String,
    #[serde(default)]
    pub gpus: Vec<String>,
    #[serde(default)]
    pub rank_cpus: Vec<String>,
    #[serde(default)]
    pub driver: Option<String>,
}

/// The settings of the run.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the program's own types document the fields")]
pub struct Settings {
    pub num_tokens: Vec<u64>,
    pub hidden_dim: u64,
    pub dtypes: Vec<String>,
    pub quant_modes: Vec<String>,
    pub use_residual: bool,
    /// Present only if another than the default was asked for.
    #[serde(default)]
    pub pattern: Option<String>,
    /// Present only if others than exact ones were asked for.
    #[serde(default)]
    pub wires: Vec<String>,
    /// Present only if it was asked for.
    #[serde(default)]
    pub sharded_residual: bool,
    pub oneshot: bool,
    pub warmup: u32,
    pub trials: u32,
    pub seed: u64,
    pub deadline_seconds: f64,
    pub backend: String,
    pub all_reduces: Vec<String>,
    pub nproc_per_node: Option<u32>,
    pub cold: bool,
    /// Present only if fused variants write over their inputs.
    #[serde(default)]
    pub in_place: bool,
    pub peers: Vec<String>,
    pub peer_deadline_seconds: f64,
    /// Present only if ranks may share a GPU.
    #[serde(default)]
    pub oversubscribe: bool,
    pub tolerance_percent: f64,
}

/// The answer.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the program's own types document the fields")]
pub struct Conclusion {
    pub sentences: Vec<String>,
    pub gains: Vec<Gain>,
}

/// The gain from fusing in one configuration.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the program's own types document the fields")]
pub struct Gain {
    pub dtype: String,
    pub quant_mode: String,
    pub num_tokens: u64,
    pub separate: Option<Fastest>,
    pub fused: Option<Fastest>,
    pub gain: Option<f64>,
}

/// The fastest variant of its kind.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the program's own types document the fields")]
pub struct Fastest {
    pub variant: String,
    pub median_us: f64,
    pub spread: f64,
}

/// Variants that compute the same result.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the program's own types document the fields")]
pub struct Configuration {
    pub num_tokens: u64,
    pub hidden_dim: u64,
    pub dtype: String,
    pub use_residual: bool,
    pub quant_mode: String,
    pub notes: Vec<String>,
    pub rows: Vec<Row>,
}

/// One variant.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the program's own types document the fields")]
pub struct Row {
    pub variant: String,
    pub kind: String,
    pub outcome: Outcome,
}

/// The result of a variant.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "status", rename_all = "lowercase", deny_unknown_fields)]
#[expect(missing_docs, reason = "the program's own types document the fields")]
pub enum Outcome {
    Verified(Verified),
    Failed { reason: String },
}

/// A variant that was verified and timed.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the program's own types document the fields")]
pub struct Verified {
    pub max_error: f64,
    pub unit: String,
    #[serde(default)]
    pub sum_error: Option<SumError>,
    pub operations_per_trial: u32,
    pub times_us: Vec<f64>,
    pub figures: Figures,
}

/// The error of a sum that is not exact.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the program's own types document the fields")]
pub struct SumError {
    pub rms: f64,
    pub largest: f64,
}

/// The figures derived from the times.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "the program's own types document the fields")]
pub struct Figures {
    pub median_us: f64,
    pub min_us: f64,
    pub p99_us: f64,
    pub algorithm_bandwidth_gb_s: f64,
    pub bus_bandwidth_gb_s: f64,
    pub speedup: Option<f64>,
    pub is_baseline: bool,
}

impl Report {
    /// Reads the report in a file.
    ///
    /// # Panics
    /// The file has no report of this schema.
    pub fn read(path: &Path) -> Report {
        let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}\n{text}", path.display()))
    }
}

impl Configuration {
    /// The title in every form of the report.
    pub fn title(&self) -> String {
        let Configuration { num_tokens, dtype, quant_mode, .. } = self;
        let residual = if self.use_residual { "with residual" } else { "no residual" };
        format!("num_tokens={num_tokens}, dtype={dtype}, {residual}, quant={quant_mode}")
    }

    /// The names of its variants, in order.
    pub fn variants(&self) -> Vec<&str> {
        self.rows.iter().map(|row| row.variant.as_str()).collect()
    }
}

impl Row {
    /// Its measurement.
    ///
    /// # Panics
    /// The variant failed.
    pub fn verified(&self) -> &Verified {
        match &self.outcome {
            Outcome::Verified(verified) => verified,
            Outcome::Failed { reason } => panic!("{} failed: {reason}", self.variant),
        }
    }
}
