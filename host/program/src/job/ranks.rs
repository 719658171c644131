//! The ranks of a job: why their common work ends early, and what they tell each other of it.

use std::fmt;

use fused_collective::group::rendezvous::{self, Group};

use crate::backend;
use serde::{Serialize, de::DeserializeOwned};

/// The end of ranks' common work ahead of time.
#[derive(Debug)]
pub enum Error {
    /// A rank was lost, or could not be reached.
    Group(rendezvous::Error),
    /// An operation could not run.
    Collective(backend::error::Error),
    /// Something else; the text is for the user.
    Failed(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Group(error) => error.fmt(f),
            Error::Collective(error) => error.fmt(f),
            Error::Failed(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Error {}

impl From<rendezvous::Error> for Error {
    fn from(error: rendezvous::Error) -> Self {
        Error::Group(error)
    }
}

impl From<backend::error::Error> for Error {
    fn from(error: backend::error::Error) -> Self {
        Error::Collective(error)
    }
}

/// Whether `holds` on every rank.
pub(crate) fn all(group: &Group, holds: bool) -> Result<bool, Error> {
    Ok(group.all_gather(&[u8::from(holds)])?.iter().all(|answer| answer == &[1]))
}

/// For each of this rank's times the largest that any rank has.
pub(crate) fn slowest(group: &Group, times: &[f64]) -> Result<Vec<f64>, Error> {
    let mut slowest = Vec::with_capacity(times.len());
    for times in times.chunks(rendezvous::MAX_MESSAGE / size_of::<f64>()) {
        let mut worst = vec![0.0f64; times.len()];
        for rank in group.all_gather(bytemuck::cast_slice(times))? {
            let theirs: Vec<f64> = bytemuck::allocation::pod_collect_to_vec(&rank);
            if theirs.len() != worst.len() {
                return Err(Error::Failed("ranks ran different numbers of trials".to_owned()));
            }
            for (worst, time) in worst.iter_mut().zip(theirs) {
                *worst = worst.max(time);
            }
        }
        slowest.extend(worst);
    }
    Ok(slowest)
}

/// What every rank found, in rank order, or the first rank's reason why something is wrong.
pub(crate) fn gather_verdicts<T: Serialize + DeserializeOwned>(
    group: &Group,
    verdict: Result<T, String>,
) -> Result<Result<Vec<T>, String>, Error> {
    let bytes = serde_json::to_vec(&verdict).map_err(|error| Error::Failed(error.to_string()))?;
    let mut found = Vec::new();
    for (rank, bytes) in group.all_gather(&bytes)?.iter().enumerate() {
        let verdict: Result<T, String> = serde_json::from_slice(bytes).map_err(|error| {
            Error::Failed(format!("rank {rank} sent a verdict that cannot be read: {error}"))
        })?;
        match verdict {
            Ok(result) => found.push(result),
            Err(why) => return Ok(Err(format!("rank {rank}: {why}"))),
        }
    }
    Ok(Ok(found))
}

/// Gives every rank the values of every rank, by rank.
///
/// # Errors
/// A rank was lost, or sent what cannot be read.
pub(crate) fn gather<T: Serialize + DeserializeOwned>(
    group: &Group,
    own: &T,
) -> Result<Vec<T>, backend::error::Error> {
    let unreadable = |error: serde_json::Error| {
        backend::error::Error::Other(format!("what a rank contributed to the set-up cannot be read: {error}"))
    };
    let bytes = serde_json::to_vec(own).map_err(unreadable)?;
    group.all_gather(&bytes)?.iter().map(|bytes| serde_json::from_slice(bytes).map_err(unreadable)).collect()
}
