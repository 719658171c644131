//! Values of all ranks, exchanged while the backend is set up.

use fused_collective::group::rendezvous::Group;
use serde::{Serialize, de::DeserializeOwned};

use super::error::Error;

/// The values of all ranks, in rank order.
///
/// # Errors
/// A rank was lost, or its value cannot be read.
pub(super) fn gather<T: Serialize + DeserializeOwned>(group: &Group, own: &T) -> Result<Vec<T>, Error> {
    let unreadable =
        |error: serde_json::Error| Error::Other(format!("cannot read a rank's part of the set-up: {error}"));
    let bytes = serde_json::to_vec(own).map_err(unreadable)?;
    group.all_gather(&bytes)?.iter().map(|bytes| serde_json::from_slice(bytes).map_err(unreadable)).collect()
}
