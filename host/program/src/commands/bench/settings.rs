//! The settings of a benchmark.
//!
//! [`Settings`] is plain data: the command line makes one, the benchmark reads it, and the report stores the fields that
//! describe the measurement. Its lists hold at least one value and no value twice, and every operation that it
//! [describes](Settings::operation) is valid.

use std::{ops::Not, path::PathBuf, time::Duration};

use fused_collective_core::{
    dtype::DType,
    fusion::{Mode, Norm, Operation, Residual, Rounding},
};
use serde::{Deserialize, Serialize};

use crate::backend::all_reduce_choice::AllReduceChoice;
use crate::{
    job::options::JobOptions, pattern::Pattern, peers::choice::PeerChoice, quant_mode::QuantMode, wire::Wire,
};

/// The files that a benchmark reads and writes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outputs {
    /// Markdown report.
    pub output_file: Option<PathBuf>,
    /// JSON report.
    pub json: Option<PathBuf>,
    /// SVG plot.
    pub plot: Option<PathBuf>,
    /// True if the plot has every variant, and not only those that decide.
    pub plot_all: bool,
    /// JSON report to show in place of a measurement.
    pub from: Option<PathBuf>,
    /// Earlier JSON report to compare with.
    pub compare: Option<PathBuf>,
}

/// Everything that the command line says about a benchmark, in the form of the JSON report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Token counts to measure, each at least 1.
    pub num_tokens: Vec<u64>,
    /// Elements of a token.
    pub hidden_dim: u64,
    /// Element types to measure.
    #[serde(with = "dtype_names")]
    pub dtypes: Vec<DType>,
    /// Quantization modes to measure.
    pub quant_modes: Vec<QuantMode>,
    /// The pattern of fused steps.
    #[serde(default, skip_serializing_if = "Pattern::is_default")]
    pub pattern: Pattern,
    /// The formats of rows between ranks in fused variants.
    #[serde(default = "default_wires", skip_serializing_if = "is_default_wires")]
    pub wires: Vec<Wire>,
    /// True if a residual is added.
    pub use_residual: bool,
    /// True if fused variants with a sharded residual are measured as well.
    #[serde(default, skip_serializing_if = "Not::not")]
    pub sharded_residual: bool,
    /// True if one-shot variants are measured.
    pub oneshot: bool,
    /// Trials before those that count.
    pub warmup: u32,
    /// Trials that count; at least 1.
    pub trials: u32,
    /// Seed of the random inputs.
    pub seed: u64,
    /// The ranks and their backend.
    #[serde(flatten)]
    pub job: JobOptions,
    /// The all-reduces of the separate operations on GPUs.
    pub all_reduces: Vec<AllReduceChoice>,
    /// True if operations find their tensors in main memory, and in no cache.
    #[serde(default)]
    pub cold: bool,
    /// True if fused variants write over their inputs.
    #[serde(default, skip_serializing_if = "Not::not")]
    pub in_place: bool,
    /// Other packages to measure.
    #[serde(default)]
    pub peers: Vec<PeerChoice>,
    /// Longest silence of a peer, in seconds; finite and above 0.
    #[serde(default = "default_peer_deadline")]
    pub peer_deadline_seconds: f64,
    /// Python for the peers. Its path says nothing about the measurement, so reports leave it out.
    #[serde(skip, default = "default_python")]
    pub python: PathBuf,
    /// Loss in percent past which a comparison fails; finite and above 0.
    pub tolerance_percent: f64,
    /// The files. They say nothing about the measurement, so reports leave them out.
    #[serde(skip)]
    pub outputs: Outputs,
}

impl Default for Settings {
    /// The benchmark without options.
    fn default() -> Self {
        Settings {
            num_tokens: vec![128, 512, 1024, 2048],
            hidden_dim: 8192,
            dtypes: vec![DType::Bf16],
            quant_modes: QuantMode::DEFAULT.to_vec(),
            pattern: Pattern::default(),
            wires: default_wires(),
            use_residual: true,
            sharded_residual: false,
            oneshot: true,
            warmup: 5,
            trials: 20,
            seed: 0,
            job: JobOptions::default(),
            all_reduces: AllReduceChoice::ALL.to_vec(),
            cold: false,
            in_place: false,
            peers: Vec::new(),
            peer_deadline_seconds: default_peer_deadline(),
            python: default_python(),
            tolerance_percent: 10.0,
            outputs: Outputs::default(),
        }
    }
}

/// One configuration to measure. All its variants compute the same result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Case {
    /// Tokens.
    pub num_tokens: u64,
    /// Element type.
    pub dtype: DType,
    /// The quantization of the norm.
    pub quant_mode: QuantMode,
}

impl Settings {
    /// The configurations to measure, in the order of the report.
    pub fn cases(&self) -> impl Iterator<Item = Case> + '_ {
        self.num_tokens.iter().flat_map(move |&num_tokens| {
            self.dtypes.iter().flat_map(move |&dtype| {
                self.quant_modes.iter().map(move |&quant_mode| Case { num_tokens, dtype, quant_mode })
            })
        })
    }

    /// The operation that a configuration measures.
    pub fn operation(&self, case: Case, mode: Mode) -> Operation {
        Operation {
            dtype: case.dtype,
            tokens: case.num_tokens,
            hidden: self.hidden_dim,
            residual: Residual::replicated(self.use_residual),
            norm: Some(Norm::default()),
            quantization: case.quant_mode.quantization(),
            keep_norm: false,
            rounding: Rounding::Once,
            bias: false,
            post_norm: self.pattern.post_norm(),
            experts: self.pattern.experts(),
            wire: None,
            partial_sums: self.job.partial_sums(),
            mode,
        }
    }

    /// True if nothing is set that changes a measurement.
    pub(super) fn is_default_measurement(&self) -> bool {
        let default = Settings::default();
        let deadline_seconds = self.job.deadline_seconds;
        let measurement = Settings {
            outputs: self.outputs.clone(),
            tolerance_percent: self.tolerance_percent,
            job: JobOptions { deadline_seconds, ..default.job },
            ..default
        };
        *self == measurement
    }

    /// Longest silence of a peer.
    pub fn peer_deadline(&self) -> Duration {
        Duration::from_secs_f64(self.peer_deadline_seconds)
    }
}

fn default_wires() -> Vec<Wire> {
    vec![Wire::Exact]
}

fn is_default_wires(wires: &Vec<Wire>) -> bool {
    *wires == default_wires()
}

fn default_python() -> PathBuf {
    "python3".into()
}

/// The time that a package may need to compile its kernels.
const fn default_peer_deadline() -> f64 {
    300.0
}

/// Serializes an element type as its PyTorch name. `core` does not depend on serde.
pub(crate) mod dtype_name {
    use fused_collective_core::dtype::DType;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(crate) fn serialize<S: Serializer>(dtype: &DType, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(dtype.name())
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<DType, D::Error> {
        let name = String::deserialize(deserializer)?;
        name.parse().map_err(|error| D::Error::custom(format_args!("'{name}' is {error}")))
    }
}

/// Serializes a list of element types as their PyTorch names.
mod dtype_names {
    use fused_collective_core::dtype::DType;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Name(#[serde(with = "super::dtype_name")] DType);

    pub(super) fn serialize<S: Serializer>(dtypes: &[DType], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(dtypes.iter().copied().map(Name))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<DType>, D::Error> {
        let names = Vec::<Name>::deserialize(deserializer)?;
        Ok(names.into_iter().map(|Name(dtype)| dtype).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_operations() {
        let settings = Settings::default();
        assert_eq!(settings.cases().count(), 12);
        for case in settings.cases() {
            assert_eq!(settings.operation(case, Mode::Auto).validate(), Ok(()));
        }
    }

    #[test]
    fn cases_vary_the_quantization_fastest() {
        let settings = Settings {
            num_tokens: vec![1, 2],
            dtypes: vec![DType::F16, DType::F32],
            quant_modes: vec![QuantMode::None, QuantMode::Fp8],
            ..Settings::default()
        };
        let names: Vec<String> =
            settings.cases().map(|c| format!("{} {} {}", c.num_tokens, c.dtype, c.quant_mode)).collect();
        let expected = "1 float16 none|1 float16 fp8|1 float32 none|1 float32 fp8|\
                        2 float16 none|2 float16 fp8|2 float32 none|2 float32 fp8";
        assert_eq!(names.join("|"), expected);
    }

    #[test]
    fn settings_survive_json_but_for_the_files() {
        let job = JobOptions { nproc_per_node: Some(4), ..JobOptions::default() };
        let mut settings = Settings { dtypes: DType::ALL.to_vec(), job, ..Settings::default() };
        settings.outputs.json = Some("a.json".into());
        settings.peers = PeerChoice::ALL.to_vec();
        let text = serde_json::to_string(&settings).unwrap();
        assert!(text.contains(r#""dtypes":["float32","float16","bfloat16"]"#), "{text}");
        assert!(text.contains(r#""peers":["flashinfer","torch"]"#), "{text}");
        assert!(text.contains(r#""nproc_per_node":4"#), "{text}");
        let back: Settings = serde_json::from_str(&text).unwrap();
        assert_eq!(back, Settings { outputs: Outputs::default(), ..settings });
        let more = text.replacen('{', r#"{"surprise":1,"#, 1);
        let error = serde_json::from_str::<Settings>(&more).unwrap_err().to_string();
        assert!(error.starts_with("unknown field `surprise`"), "{error}");
    }
}
