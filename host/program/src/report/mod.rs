//! What a benchmark found, and every form in which it is shown.
//!
//! A [`Report`] is plain data. The benchmark makes it with [`Report::new`], adds a [`Configuration`] for each
//! one measured, and hands it to [`table`], [`markdown`], [`json`], [`plot`] and [`compare`]; none of them
//! computes a figure of its own. Times are microseconds per operation of the slowest rank. A row either was
//! verified and has figures, or failed and has a reason: there is nothing in between.

pub mod compare;
pub mod figures;
pub mod json;
pub mod machine;
pub mod markdown;
pub mod outputs;
pub mod plot;
pub mod progress;
pub mod table;

use std::time::SystemTime;

use fused_collective_core::dtype::DType;
use serde::{Deserialize, Serialize};

use crate::{
    commands::bench::settings::{Case, Settings, dtype_name},
    measurement::{Kind, Measurement},
    quant_mode::QuantMode,
    usage::PROGRAM,
};
use figures::Figures;
use machine::Machine;

/// Version of the JSON form. A reader refuses any other.
pub const SCHEMA: u32 = 1;

/// One run of the benchmark.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Version of the program.
    pub version: String,
    /// When the run started: RFC 3339, UTC.
    pub created: String,
    /// The program's arguments, without its name.
    pub command: Vec<String>,
    /// Where it ran.
    pub machine: Machine,
    /// The backend that ran: `cpu` or `cuda`.
    pub backend: String,
    /// Ranks.
    pub world_size: u32,
    /// What was asked for.
    pub settings: Settings,
    /// The rate, in GB/s, at which all ranks pushed to all others at the same time in this run: what the links allow. Only
    /// where they are links between GPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub push_gb_s: Option<f64>,
    /// What was found, in the order measured.
    pub configurations: Vec<Configuration>,
}

/// One configuration: variants that all compute the same thing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Configuration {
    /// Tokens.
    pub num_tokens: u64,
    /// Elements of a token.
    pub hidden_dim: u64,
    /// Element type.
    #[serde(with = "dtype_name")]
    pub dtype: DType,
    /// Whether a residual is added.
    pub use_residual: bool,
    /// What follows the norm.
    pub quant_mode: QuantMode,
    /// What a reader should know of this configuration, a sentence each.
    pub notes: Vec<String>,
    /// The variants, in the order measured.
    pub rows: Vec<Row>,
}

/// One variant of a configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// The variant's name.
    pub variant: String,
    /// Separate operations, or a fused one.
    pub kind: Kind,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "lowercase", deny_unknown_fields)]
pub enum Outcome {
    /// Its results agree with the reference, and it was timed.
    Verified {
        /// The largest error of any output element.
        max_error: f64,
        /// Unit of `max_error`.
        unit: ErrorUnit,
        /// Operations that one trial runs, back to back.
        operations_per_trial: u32,
        /// One time per trial, in the order measured.
        times_us: Vec<f64>,
        /// What follows from the times.
        figures: Figures,
    },
    /// It failed, or its results are wrong. It has no time.
    Failed {
        /// Why, in a line.
        reason: String,
    },
}

/// What an error is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ErrorUnit {
    /// Units in the last place of the output's type.
    Ulp,
}

impl Report {
    /// A report of this program on this machine, begun now, without configurations yet. `command` is the
    /// arguments without the program's name.
    pub fn new(command: Vec<String>, backend: &str, world_size: u32, settings: Settings) -> Self {
        Report {
            schema: SCHEMA,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            created: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            command,
            machine: Machine::here(),
            backend: backend.to_owned(),
            world_size,
            settings,
            push_gb_s: None,
            configurations: Vec::new(),
        }
    }

    /// Adds the configuration `case` with what was measured, every figure derived.
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
        configuration.rows = figures::rows(measured, configuration.input_bytes(), self.world_size);
        self.configurations.push(configuration);
    }

    /// The command that made the report, as a shell reads it.
    pub fn command_line(&self) -> String {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+.,:/@%".contains(c);
        let mut line = PROGRAM.to_owned();
        for word in &self.command {
            if !word.is_empty() && word.chars().all(plain) {
                line.extend([" ", word]);
            } else {
                line.extend([" '", &word.replace('\'', r"'\''"), "'"]);
            }
        }
        line
    }

    /// Every failed row, with its configuration and the reason.
    pub fn failures(&self) -> impl Iterator<Item = (&Configuration, &Row, &str)> {
        self.configurations.iter().flat_map(|configuration| {
            configuration.failures().map(move |(row, reason)| (configuration, row, reason))
        })
    }
}

impl Configuration {
    /// `num_tokens=128, dtype=bfloat16, with residual, quant=fp8`.
    pub fn title(&self) -> String {
        let residual = if self.use_residual { "with residual" } else { "no residual" };
        let Configuration { num_tokens, dtype, quant_mode, .. } = self;
        format!("num_tokens={num_tokens}, dtype={dtype}, {residual}, quant={quant_mode}")
    }

    /// Bytes of each rank's input.
    pub fn input_bytes(&self) -> f64 {
        self.num_tokens as f64 * self.hidden_dim as f64 * self.dtype.bytes() as f64
    }

    /// The rows that failed, and why.
    pub fn failures(&self) -> impl Iterator<Item = (&Row, &str)> {
        self.rows.iter().filter_map(|row| match &row.outcome {
            Outcome::Failed { reason } => Some((row, reason.as_str())),
            Outcome::Verified { .. } => None,
        })
    }

    /// What identifies it among the configurations of a report.
    pub fn case(&self) -> Case {
        Case { num_tokens: self.num_tokens, dtype: self.dtype, quant_mode: self.quant_mode }
    }
}

impl Row {
    /// The figures, if the row was verified.
    pub fn figures(&self) -> Option<&Figures> {
        match &self.outcome {
            Outcome::Verified { figures, .. } => Some(figures),
            Outcome::Failed { .. } => None,
        }
    }
}

/// The text of one row's cells, the same in the table and in Markdown.
struct Cells {
    median: String,
    min: String,
    p99: String,
    bus_bandwidth: String,
    max_error: String,
    speedup: String,
}

impl Cells {
    fn of(row: &Row) -> Cells {
        match &row.outcome {
            Outcome::Verified { max_error, figures, .. } => Cells {
                median: format!("{:.2}", figures.median_us),
                min: format!("{:.2}", figures.min_us),
                p99: format!("{:.2}", figures.p99_us),
                bus_bandwidth: format!("{:.2}", figures.bus_bandwidth_gb_s),
                max_error: format!("{max_error:.2}"),
                speedup: match figures.speedup {
                    _ if figures.is_baseline => "baseline".to_owned(),
                    Some(speedup) => format!("{speedup:.2}x"),
                    None => "-".to_owned(),
                },
            },
            Outcome::Failed { .. } => Cells {
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

#[cfg(test)]
pub(crate) mod fixture;
