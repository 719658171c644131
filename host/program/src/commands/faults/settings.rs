//! The settings of a test of faults.

use serde::Serialize;

use super::case::Case;
use crate::job::options::JobOptions;

/// Everything that the command line says about a test of faults.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Settings {
    /// The cases, in order; `None` for all cases of ranks 0 and 1 that the backend can have.
    pub cases: Option<Vec<Case>>,
    /// The ranks and their backend. A [case](Case::deadline) may have a longer deadline.
    #[serde(flatten)]
    pub job: JobOptions,
}
