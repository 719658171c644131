//! Exchanges between the ranks of a job, and the errors that end their common work.

use std::fmt;

use fused_collective::group::{
    Hosts,
    rendezvous::{self, Group},
};
use serde::{Serialize, de::DeserializeOwned};

use crate::backend::error;

/// The reason why ranks end their common work early.
#[derive(Debug)]
pub enum Error {
    /// A rank was lost, or could not be reached.
    Group(rendezvous::Error),
    /// An operation could not run.
    Collective(error::Error),
    /// Another failure; the text is for the user.
    Failed(String),
    /// A failure that all ranks have alike, which rank 0 reports; the text is for the user.
    OfAll(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Group(error) => error.fmt(f),
            Error::Collective(error) => error.fmt(f),
            Error::Failed(what) | Error::OfAll(what) => f.write_str(what),
        }
    }
}

impl std::error::Error for Error {}

impl From<rendezvous::Error> for Error {
    fn from(error: rendezvous::Error) -> Self {
        Error::Group(error)
    }
}

impl From<error::Error> for Error {
    fn from(error: error::Error) -> Self {
        Error::Collective(error)
    }
}

impl From<fused_collective::Error> for Error {
    fn from(error: fused_collective::Error) -> Self {
        Error::Collective(error.into())
    }
}

/// The hosts of a group.
///
/// # Panics
/// If they have different numbers of ranks, which the job has checked.
pub(crate) fn hosts(group: &Group) -> Hosts {
    group.by_host().expect("hosts have as many ranks each")
}

/// True if `holds` is true on every rank.
pub(crate) fn all(group: &Group, holds: bool) -> Result<bool, Error> {
    Ok(group.all_gather(&[u8::from(holds)])?.iter().all(|answer| answer == &[1]))
}

/// The element-wise maximum of `times` over all ranks. Every rank passes as many times.
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

/// The results of all ranks, in rank order, or the error of the first rank that has one. Every rank returns the same.
pub(crate) fn gather_verdicts<T: Serialize + DeserializeOwned>(
    group: &Group,
    verdict: Result<T, String>,
) -> Result<Result<Vec<T>, String>, Error> {
    let bytes = serde_json::to_vec(&verdict).map_err(|error| Error::Failed(error.to_string()))?;
    let mut found = Vec::new();
    for (rank, bytes) in group.all_gather(&bytes)?.iter().enumerate() {
        let verdict: Result<T, String> = serde_json::from_slice(bytes)
            .map_err(|error| Error::Failed(format!("cannot read the verdict of rank {rank}: {error}")))?;
        match verdict {
            Ok(result) => found.push(result),
            Err(why) => return Ok(Err(format!("rank {rank}: {why}"))),
        }
    }
    Ok(Ok(found))
}
