//! The packages that can be peers.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// Another package that the benchmark can measure in the same run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeerChoice {
    /// FlashInfer's fused all-reduce.
    FlashInfer,
    /// PyTorch's all-reduces, followed by eager operations and by compiled ones.
    Torch,
}

impl PeerChoice {
    /// Every peer.
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
