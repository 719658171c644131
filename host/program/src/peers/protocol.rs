//! What is said to a peer's process and what it answers, each one JSON object on a line of its own.

use serde::{Deserialize, Serialize};

use crate::measurement::Kind;

/// What a peer is asked. Each request but the last has one final [`Reply`].
#[derive(Debug, Serialize)]
#[serde(tag = "request", rename_all = "lowercase")]
pub(super) enum Request<'a> {
    /// Find the packages. Rank 0 opens the port that all ranks meet at.
    Start(Start<'a>),
    /// Meet the other ranks.
    Join { port: u16 },
    /// Verify and time every variant of one configuration.
    Measure(Measure<'a>),
}

#[derive(Debug, Serialize)]
pub(super) struct Start<'a> {
    pub(super) peer: &'a str,
    pub(super) rank: u32,
    pub(super) world_size: u32,
    /// `cpu` or `cuda`.
    pub(super) device: &'a str,
    /// The GPU.
    pub(super) local_rank: u32,
    /// The longest that ranks may wait for each other.
    pub(super) timeout_seconds: f64,
    /// The most tokens that will be asked for.
    pub(super) max_tokens: u64,
    pub(super) hidden_dim: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct Measure<'a> {
    pub(super) num_tokens: u64,
    pub(super) hidden_dim: u64,
    pub(super) dtype: &'a str,
    pub(super) use_residual: bool,
    pub(super) quant_mode: &'a str,
    pub(super) epsilon: f32,
    /// The per-tensor or global scale.
    pub(super) scale: f32,
    pub(super) oneshot: bool,
    pub(super) warmup: u32,
    pub(super) trials: u32,
    pub(super) seed: u64,
    /// Bytes of the cache that tensors must not be found in; 0 if they may.
    pub(super) cache_bytes: u64,
}

/// What a peer answers.
#[derive(Debug, PartialEq, Deserialize)]
#[serde(tag = "reply", rename_all = "lowercase", deny_unknown_fields)]
pub(super) enum Reply {
    /// Not the answer yet.
    Working {
        /// What it is at.
        on: String,
    },
    /// The packages are not there, or not usable.
    Unavailable {
        why: String,
        /// What would help, as one would type it.
        remedy: Option<String>,
    },
    Started {
        /// Rank 0's.
        port: Option<u16>,
    },
    Joined {
        /// The packages' versions.
        about: String,
    },
    Measured {
        rows: Vec<Row>,
        /// What was not measured, and why.
        notes: Vec<String>,
    },
}

/// One variant.
#[derive(Debug, PartialEq, Deserialize)]
pub(super) struct Row {
    pub(super) variant: String,
    pub(super) kind: Kind,
    #[serde(flatten)]
    pub(super) outcome: Outcome,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub(super) enum Outcome {
    Timed {
        max_error_ulp: f64,
        operations_per_trial: u32,
        /// On this rank.
        times_us: Vec<f64>,
    },
    Failed {
        /// Why the results are wrong.
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
        let timed = Outcome::Timed { max_error_ulp: 0.5, operations_per_trial: 20, times_us: vec![1.5] };
        let rows = vec![
            Row { variant: "a".to_owned(), kind: Kind::Fused, outcome: timed },
            Row {
                variant: "b".to_owned(),
                kind: Kind::Standard,
                outcome: Outcome::Failed { failed: "wrong".to_owned() },
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
