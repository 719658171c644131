//! The requests to a peer's process and its replies. Each is one JSON object on a line of its own.

use serde::{Deserialize, Serialize};

use crate::measurement::{Kind, SumError};

/// A request to a peer. Each has one final [`Reply`].
#[derive(Debug, Serialize)]
#[serde(tag = "request", rename_all = "lowercase")]
pub(super) enum Request<'a> {
    /// Find the packages. Rank 0 opens the port that all ranks meet at.
    Start(StartRequest<'a>),
    /// Meet the other ranks.
    Join { port: u16 },
    /// Verify and time every variant of one configuration.
    Measure(&'a MeasureRequest),
}

/// One rank of a group of peers.
#[derive(Debug, Serialize)]
pub(super) struct StartRequest<'a> {
    pub(super) peer: &'a str,
    pub(super) rank: u32,
    pub(super) world_size: u32,
    /// `cpu` or `cuda`.
    pub(super) device: &'a str,
    /// The GPU.
    pub(super) local_rank: u32,
    /// Longest wait of a rank for another.
    pub(super) timeout_seconds: f64,
    /// The largest number of tokens in any request.
    pub(super) max_tokens: u64,
    pub(super) hidden_dim: u64,
    /// True if NVLink multicast may be used where the GPUs have it.
    pub(super) multicast: bool,
}

/// A configuration to measure.
#[derive(Debug, Serialize)]
pub struct MeasureRequest {
    /// Tokens.
    pub num_tokens: u64,
    /// Elements of a token.
    pub hidden_dim: u64,
    /// PyTorch's name of the element type.
    pub dtype: &'static str,
    /// True if a residual is added.
    pub use_residual: bool,
    /// The name of the [quantization mode](crate::quant_mode::QuantMode).
    pub quant_mode: &'static str,
    /// The weight bias of the norm of the sum, if there is one.
    pub post_weight_bias: Option<f32>,
    /// The experts of a token, beside a shared one, of MoE's last step.
    pub top_k: Option<u32>,
    /// True if rows may also cross the links in a format of fewer bits: for peers that have one.
    pub coded: bool,
    /// RMSNorm's epsilon.
    pub epsilon: f32,
    /// The per-tensor or global scale.
    pub scale: f32,
    /// True if one-shot variants are measured.
    pub oneshot: bool,
    /// Trials before those that count.
    pub warmup: u32,
    /// Trials that count.
    pub trials: u32,
    /// Seed of the random inputs.
    pub seed: u64,
    /// Bytes of the cache in which no operation may find its tensors; 0 if it may.
    pub cache_bytes: u64,
}

/// A reply of a peer.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(tag = "reply", rename_all = "lowercase", deny_unknown_fields)]
pub(super) enum Reply {
    /// A sign of life before the final reply.
    Working {
        /// The work at hand.
        on: String,
    },
    /// The packages are missing, or not usable.
    Unavailable {
        why: String,
        /// A command that would help.
        remedy: Option<String>,
    },
    Started {
        /// The port of rank 0; `None` from other ranks.
        port: Option<u16>,
    },
    Joined {
        /// The packages' versions.
        about: String,
    },
    Measured {
        rows: Vec<Row>,
        /// Variants that were not measured, and the reasons.
        notes: Vec<String>,
    },
}

/// One variant.
#[derive(Debug, PartialEq, Deserialize)]
pub(super) struct Row {
    pub(super) variant: String,
    pub(super) kind: Kind,
    #[serde(flatten)]
    pub(super) result: RowResult,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub(super) enum RowResult {
    Timed {
        max_error_ulp: f64,
        /// The error of a sum that is not exact.
        #[serde(default)]
        sum_error: Option<SumError>,
        operations_per_trial: u32,
        /// The times of this rank.
        times_us: Vec<f64>,
    },
    Failed {
        /// The reason why the results are wrong.
        failed: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_replies_have_the_form_that_peers_know() {
        let request = serde_json::to_string(&Request::Join { port: 7 }).unwrap();
        assert_eq!(request, r#"{"request":"join","port":7}"#);
        let reply = |text| serde_json::from_str::<Reply>(text).unwrap();
        assert_eq!(reply(r#"{"reply": "started", "port": null}"#), Reply::Started { port: None });
        let measured = reply(
            r#"{"reply": "measured", "notes": [], "rows": [
                {"variant": "a", "kind": "fused", "max_error_ulp": 0.5, "operations_per_trial": 20, "times_us": [1.5]},
                {"variant": "b", "kind": "standard", "failed": "wrong"}]}"#,
        );
        let timed = RowResult::Timed {
            max_error_ulp: 0.5,
            sum_error: None,
            operations_per_trial: 20,
            times_us: vec![1.5],
        };
        let rows = vec![
            Row { variant: "a".to_owned(), kind: Kind::Fused, result: timed },
            Row {
                variant: "b".to_owned(),
                kind: Kind::Standard,
                result: RowResult::Failed { failed: "wrong".to_owned() },
            },
        ];
        assert_eq!(measured, Reply::Measured { rows, notes: Vec::new() });
    }

    #[test]
    fn what_is_no_reply_is_refused() {
        for text in ["", "Traceback", "{}", r#"{"reply": "sorry"}"#, r#"{"reply": "joined"}"#, "[1]"] {
            assert!(serde_json::from_str::<Reply>(text).is_err(), "{text}");
        }
    }
}
