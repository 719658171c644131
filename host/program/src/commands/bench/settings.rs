//! What a benchmark is asked to measure, and where its results go.
//!
//! [`Settings`] is plain data: the [command line](crate::commands) makes one, the benchmark reads it, and the
//! [report](crate::report) stores what describes the measurement. Its lists hold at least one value and no
//! value twice, and every operation it [describes](Settings::operation) is valid.

use std::{fmt, ops::Not, path::PathBuf, str::FromStr, time::Duration};

use fused_collective_core::{
    dtype::DType,
    fusion::{Mode, Norm, Operation, Residual},
};
use serde::{Deserialize, Serialize};

use crate::{
    job::options::{AllReduceChoice, BackendChoice},
    quant_mode::QuantMode,
};

/// Other packages that the benchmark can measure in the same run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeerChoice {
    /// FlashInfer's fused all-reduce.
    FlashInfer,
    /// PyTorch's all-reduce with eager and with compiled operations after it.
    Torch,
}

impl PeerChoice {
    /// All of them.
    pub const ALL: [PeerChoice; 2] = [PeerChoice::FlashInfer, PeerChoice::Torch];

    /// The name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            PeerChoice::FlashInfer => "flashinfer",
            PeerChoice::Torch => "torch",
        }
    }
}

impl fmt::Display for PeerChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for PeerChoice {
    type Err = UnknownPeer;

    /// Reads `flashinfer` or `torch`.
    fn from_str(text: &str) -> Result<Self, UnknownPeer> {
        PeerChoice::ALL.into_iter().find(|peer| peer.name() == text).ok_or(UnknownPeer)
    }
}

/// The text names no peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownPeer;

impl fmt::Display for UnknownPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not a peer: use flashinfer or torch")
    }
}

impl std::error::Error for UnknownPeer {}

/// Where results go besides the terminal, and what they are compared with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outputs {
    /// Markdown report.
    pub output_file: Option<PathBuf>,
    /// JSON report.
    pub json: Option<PathBuf>,
    /// SVG plot.
    pub plot: Option<PathBuf>,
    /// An earlier JSON report to compare with.
    pub compare: Option<PathBuf>,
}

/// Everything that the command line says about a benchmark.
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
    /// Whether a residual is added.
    pub use_residual: bool,
    /// Whether fused variants with a sharded residual are measured as well.
    #[serde(default, skip_serializing_if = "Not::not")]
    pub sharded_residual: bool,
    /// Whether one-shot variants are measured.
    pub oneshot: bool,
    /// Trials before those that count.
    pub warmup: u32,
    /// Trials that count; at least 1.
    pub trials: u32,
    /// Seed of the random inputs.
    pub seed: u64,
    /// Longest wait for another rank, in seconds; finite and above 0.
    pub deadline_seconds: f64,
    /// The backend asked for.
    pub backend: BackendChoice,
    /// The all-reduces asked for.
    pub all_reduces: Vec<AllReduceChoice>,
    /// Ranks asked for; `None` leaves it to the launcher or to the backend.
    pub nproc_per_node: Option<u32>,
    /// Whether operations find their tensors in main memory, and in no cache.
    #[serde(default)]
    pub cold: bool,
    /// Other packages to measure.
    #[serde(default)]
    pub peers: Vec<PeerChoice>,
    /// Longest silence of a peer, in seconds; finite and above 0.
    #[serde(default = "default_peer_deadline")]
    pub peer_deadline_seconds: f64,
    /// Python for the peers. Where it lies says nothing about the measurement, so reports leave it out.
    #[serde(skip, default = "default_python")]
    pub python: PathBuf,
    /// Whether ranks may share a GPU, which makes times meaningless.
    #[serde(default, skip_serializing_if = "Not::not")]
    pub oversubscribe: bool,
    /// Loss in percent past which a comparison fails; finite and above 0.
    pub tolerance_percent: f64,
    /// Files. They say nothing about the measurement, so reports leave them out.
    #[serde(skip)]
    pub outputs: Outputs,
}

impl Default for Settings {
    /// The benchmark that runs when nothing else is said.
    fn default() -> Self {
        Settings {
            num_tokens: vec![128, 512, 1024, 2048],
            hidden_dim: 8192,
            dtypes: vec![DType::Bf16],
            quant_modes: QuantMode::ALL.to_vec(),
            use_residual: true,
            sharded_residual: false,
            oneshot: true,
            warmup: 5,
            trials: 20,
            seed: 0,
            deadline_seconds: 10.0,
            backend: BackendChoice::Auto,
            all_reduces: AllReduceChoice::ALL.to_vec(),
            nproc_per_node: None,
            cold: false,
            peers: Vec::new(),
            peer_deadline_seconds: default_peer_deadline(),
            python: default_python(),
            oversubscribe: false,
            tolerance_percent: 10.0,
            outputs: Outputs::default(),
        }
    }
}

/// One configuration to measure: all its variants compute the same thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Case {
    /// Tokens.
    pub num_tokens: u64,
    /// Element type.
    pub dtype: DType,
    /// What follows the norm.
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
            mode,
        }
    }

    /// Longest wait for another rank.
    pub fn deadline(&self) -> Duration {
        Duration::from_secs_f64(self.deadline_seconds)
    }

    /// Longest silence of a peer.
    pub fn peer_deadline(&self) -> Duration {
        Duration::from_secs_f64(self.peer_deadline_seconds)
    }
}

fn default_python() -> PathBuf {
    "python3".into()
}

/// Enough for a package to compile its kernels.
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
        let mut settings =
            Settings { dtypes: DType::ALL.to_vec(), nproc_per_node: Some(4), ..Settings::default() };
        settings.outputs.json = Some("a.json".into());
        settings.peers = PeerChoice::ALL.to_vec();
        let text = serde_json::to_string(&settings).unwrap();
        assert!(text.contains(r#""dtypes":["float32","float16","bfloat16"]"#), "{text}");
        assert!(text.contains(r#""peers":["flashinfer","torch"]"#), "{text}");
        let back: Settings = serde_json::from_str(&text).unwrap();
        assert_eq!(back, Settings { outputs: Outputs::default(), ..settings });
    }
}
