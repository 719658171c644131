//! The report as data, in the form of the JSON file.

use std::time::SystemTime;

use fused_collective_core::dtype::DType;
use serde::{Deserialize, Serialize};

use crate::{
    commands::bench::settings::{Case, Settings, dtype_name},
    measurement::{Kind, SumError},
    peers::choice::PeerChoice,
    quant_mode::QuantMode,
    report::machine::Machine,
    usage::PROGRAM,
    wire::Wire,
};

/// Version of the JSON schema. A reader refuses any other.
pub const SCHEMA: u32 = 1;

/// One run of the benchmark.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Version of the program.
    pub version: String,
    /// Start of the run: RFC 3339, UTC.
    pub created: String,
    /// The program's arguments, without its name.
    pub command: Vec<String>,
    /// The machine of the run.
    pub machine: Machine,
    /// The backend that ran: `cpu` or `cuda`.
    pub backend: String,
    /// Ranks.
    pub world_size: u32,
    /// The settings of the run.
    pub settings: Settings,
    /// All-to-all put bandwidth in GB/s, measured in this run. Only for links between GPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub push_gb_s: Option<f64>,
    /// True if every variant was verified again after its trials; older reports do not say so.
    #[serde(default)]
    pub verified_after: bool,
    /// The answer, which follows from the configurations. Reading a report derives it anew.
    #[serde(default)]
    pub conclusion: Conclusion,
    /// The configurations, in the order measured.
    pub configurations: Vec<Configuration>,
}

/// The answer of a benchmark.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conclusion {
    /// The answer in words, a sentence or two each.
    pub sentences: Vec<String>,
    /// A line for each configuration, by element type, quantization mode and tokens.
    pub gains: Vec<Gain>,
}

/// The gain from fusing in one configuration.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gain {
    /// Element type.
    #[serde(with = "dtype_name")]
    pub dtype: DType,
    /// The quantization of the norm.
    pub quant_mode: QuantMode,
    /// Tokens.
    pub num_tokens: u64,
    /// The fastest variant of separate operations; `None` if none was verified.
    pub separate: Option<Fastest>,
    /// The fastest fused variant; `None` if none was verified.
    pub fused: Option<Fastest>,
    /// The separate variant's median over the fused one's.
    pub gain: Option<f64>,
}

/// The fastest variant of its kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fastest {
    /// The variant's name.
    pub variant: String,
    /// Median time in microseconds.
    pub median_us: f64,
    /// The middle half of the trials, from its shortest to its longest, as a share of the median.
    pub spread: f64,
}

/// One configuration. All its variants compute the same result.
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
    /// True if a residual is added.
    pub use_residual: bool,
    /// The quantization of the norm.
    pub quant_mode: QuantMode,
    /// Notes for a reader, a sentence each.
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
    /// Figures, or the reason of a failure.
    pub outcome: RowOutcome,
}

/// The result of a variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "lowercase", deny_unknown_fields)]
pub enum RowOutcome {
    /// Its results agree with the reference, and it was timed.
    Verified {
        /// The largest error of any output element.
        max_error: f64,
        /// Unit of `max_error`.
        unit: ErrorUnit,
        /// The error of the sum, if rows have a format of fewer bits between ranks.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sum_error: Option<SumError>,
        /// Operations that one trial runs, back to back.
        operations_per_trial: u32,
        /// One time per trial, in the order measured.
        times_us: Vec<f64>,
        /// The figures derived from the times.
        figures: Figures,
    },
    /// It failed, or its results are wrong, so it has no times.
    Failed {
        /// The reason, in a line.
        reason: String,
    },
}

/// The unit of an error. There is one, which the JSON names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ErrorUnit {
    /// Units in the last place of the output's type.
    Ulp,
}

/// The figures of one verified row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    /// Median time in microseconds; finite and above 0.
    pub median_us: f64,
    /// Shortest time in microseconds.
    pub min_us: f64,
    /// 99th percentile of the times in microseconds.
    pub p99_us: f64,
    /// Algorithm bandwidth at the median, in GB/s.
    pub algorithm_bandwidth_gb_s: f64,
    /// Bus bandwidth at the median, in GB/s.
    pub bus_bandwidth_gb_s: f64,
    /// The baseline's median over this one; `None` if no standard variant was verified.
    pub speedup: Option<f64>,
    /// True if this row is the baseline.
    pub is_baseline: bool,
}

impl Report {
    /// A report of this program on this machine, begun now, without configurations. `command` is the program's arguments
    /// without its name.
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
            verified_after: true,
            conclusion: Conclusion::default(),
            configurations: Vec::new(),
        }
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

    /// Every failed row, with the reason.
    pub fn failures(&self) -> impl Iterator<Item = (&Row, &str)> {
        self.rows.iter().filter_map(|row| match &row.outcome {
            RowOutcome::Failed { reason } => Some((row, reason.as_str())),
            RowOutcome::Verified { .. } => None,
        })
    }

    /// The key of the configuration within a report.
    pub fn case(&self) -> Case {
        Case { num_tokens: self.num_tokens, dtype: self.dtype, quant_mode: self.quant_mode }
    }
}

impl Row {
    /// The package that the row measures; `None` if it is this project. Names of a package's variants start with its name.
    pub fn peer(&self) -> Option<PeerChoice> {
        let is_of = |peer: &PeerChoice| {
            self.variant.strip_prefix(peer.name()).is_some_and(|rest| rest.starts_with('_'))
        };
        PeerChoice::ALL.into_iter().find(is_of)
    }

    /// True if it is a fused operation of this project.
    pub fn is_ours_fused(&self) -> bool {
        self.kind == Kind::Fused && self.peer().is_none()
    }

    /// The format of its rows between ranks.
    pub fn wire(&self) -> Wire {
        let is_named = |wire: &Wire| !wire.is_exact() && self.variant.contains(&wire.part_of_name());
        Wire::ALL.into_iter().find(is_named).unwrap_or_default()
    }

    /// True if its sum is exact. Only times of such rows are compared.
    pub fn is_exact(&self) -> bool {
        self.wire().is_exact() && !matches!(self.outcome, RowOutcome::Verified { sum_error: Some(_), .. })
    }

    /// True if the residual that it reads and writes is sharded, so that it sends and writes fewer bytes than others.
    pub fn is_sharded(&self) -> bool {
        self.variant.ends_with("_sharded")
    }

    /// The figures, if the row was verified.
    pub fn figures(&self) -> Option<&Figures> {
        match &self.outcome {
            RowOutcome::Verified { figures, .. } => Some(figures),
            RowOutcome::Failed { .. } => None,
        }
    }
}

/// A variant's name without the parts that the rows of a configuration share.
pub(super) fn short_name(variant: &str) -> String {
    let fused = variant.replace("fused_allreduce_rmsnorm", "fused");
    ["standard_", "_rmsnorm", "_fp8_quant", "_fp4_quant"]
        .iter()
        .fold(fused, |name, part| name.replace(part, ""))
}
