//! The GPUs that a job's ranks get.

use fused_collective::{
    Error,
    cuda::{can_access, count},
};

/// Checks that there is a GPU for each rank of `groups` groups of `size` ranks, and that those of a group can reach each
/// other's memory: GPUs 0 to `size - 1` are the first group's, and so on; past the last GPU, from the first again, if
/// ranks may `oversubscribe` them.
///
/// # Errors
/// The pair that cannot, or the number of GPUs.
pub fn check_peers(size: u32, groups: u32, oversubscribe: bool) -> Result<(), Error> {
    let (count, ranks) = (count()?, size * groups);
    if count < ranks && !(oversubscribe && count > 0) {
        return Err(Error::Device(format!(
            "{ranks} ranks need {ranks} GPUs, one each, and there are {count} (--oversubscribe lets ranks share one)"
        )));
    }
    for first in 0..ranks {
        for second in first / size * size..(first / size + 1) * size {
            let (one, other) = (first % count, second % count);
            if one != other && !can_access(one, other)? {
                return Err(Error::Device(format!(
                    "GPUs {one} and {other} cannot share memory: there is no peer access between them"
                )));
            }
        }
    }
    Ok(())
}
