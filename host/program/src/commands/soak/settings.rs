//! The settings of a soak.

use serde::Serialize;

use crate::job::options::JobOptions;

/// Everything that the command line says about a soak.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Settings {
    /// Duration in minutes; finite and above 0. It does not count if `operations` is given.
    pub minutes: f64,
    /// Operations of each group.
    pub operations: Option<u64>,
    /// Seed of the operations, shapes and inputs.
    pub seed: u64,
    /// The ranks and their backend.
    #[serde(flatten)]
    pub job: JobOptions,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { minutes: 1.0, operations: None, seed: 0, job: JobOptions::default() }
    }
}
