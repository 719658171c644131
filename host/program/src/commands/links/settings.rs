//! The settings of a measurement of links.

use std::path::PathBuf;

use serde::Serialize;

use crate::job::options::JobOptions;

/// Everything that the command line says about a measurement of links.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Settings {
    /// The ranks and their backend.
    #[serde(flatten)]
    pub job: JobOptions,
    /// JSON report.
    #[serde(skip)]
    pub json: Option<PathBuf>,
}
