//! The GPUs of this host.

use std::sync::Arc;

use cust::{
    context::{Context, CurrentContext},
    device::{Device, DeviceAttribute},
};
use serde::{Deserialize, Serialize};

use super::{
    Error,
    driver::{check, failed, load},
};
use crate::{bounded, rendezvous::Group};

/// What tells hosts apart: a number that the kernel draws when it boots.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// This rank's GPU, whose primary context is the current one of this thread.
#[derive(Debug)]
pub(crate) struct Gpu {
    /// Its number among those that this process sees.
    pub(crate) ordinal: u32,
    /// The vendor's name for it.
    pub(crate) name: String,
    /// Compute capability: 90 is 9.0.
    pub(crate) capability: u32,
    /// Multiprocessors.
    pub(crate) units: u32,
    /// Bytes of the cache that all multiprocessors share.
    pub(crate) cache_bytes: u64,
    context: SharedContext,
}

/// How a rank's GPU is known to the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    host: String,
    uuid: [u8; 16],
}

impl Gpu {
    /// Takes GPU `ordinal` of those that this process sees.
    ///
    /// # Errors
    /// There is no driver or no such GPU.
    pub(crate) fn open(ordinal: u32) -> Result<Gpu, Error> {
        let count = count()?;
        if ordinal >= count {
            let plural = if count == 1 { "" } else { "s" };
            return Err(Error::Devices(format!(
                "LOCAL_RANK {ordinal} has no GPU: this process sees {count} GPU{plural}"
            )));
        }
        let device = Device::get_device(ordinal).map_err(failed("find the GPU"))?;
        let context = Context::new(device).map_err(failed("make a context on the GPU"))?;
        let attribute = |attribute| {
            let value = device.get_attribute(attribute).map_err(failed("ask what the GPU can do"))?;
            Ok::<u32, Error>(value.max(0) as u32)
        };
        let (major, minor) = (
            attribute(DeviceAttribute::ComputeCapabilityMajor)?,
            attribute(DeviceAttribute::ComputeCapabilityMinor)?,
        );
        Ok(Gpu {
            ordinal,
            name: device.name().map_err(failed("ask for the GPU's name"))?,
            capability: major * 10 + minor,
            units: attribute(DeviceAttribute::MultiprocessorCount)?,
            cache_bytes: attribute(DeviceAttribute::L2CacheSize)?.into(),
            context: SharedContext(Arc::new(context)),
        })
    }

    /// The GPU's context, for another thread.
    pub(crate) fn context(&self) -> SharedContext {
        self.context.clone()
    }

    fn identity(&self) -> Result<Identity, Error> {
        let host = bounded::read_to_string(BOOT_ID.as_ref(), 4096)
            .map_err(|error| Error::Devices(format!("cannot tell hosts apart by {BOOT_ID}: {error}")))?;
        Ok(Identity { host, uuid: uuid(self.ordinal)? })
    }
}

/// A GPU's context, retained once for all that share it: to retain it again can fail where the GPU has.
#[derive(Clone, Debug)]
pub(crate) struct SharedContext(Arc<Context>);

impl SharedContext {
    /// Makes it the calling thread's current context.
    pub(crate) fn make_current(&self) -> Result<(), Error> {
        CurrentContext::set_current(&*self.0).map_err(failed("make the GPU's context current"))
    }
}

/// GPUs that this process sees.
///
/// # Errors
/// There is no driver, or it finds no GPU.
pub fn count() -> Result<u32, Error> {
    load()?;
    Device::num_devices().map_err(failed("count the GPUs"))
}

/// Checks that there is a GPU for each rank of `groups` groups of `size` ranks, and that those of a group can reach each
/// other's memory: GPUs 0 to `size - 1` are the first group's, and so on; past the last GPU, from the first again, if
/// ranks may `oversubscribe` them.
///
/// # Errors
/// Which pair cannot, or how many GPUs there are.
pub fn check_peers(size: u32, groups: u32, oversubscribe: bool) -> Result<(), Error> {
    let (count, ranks) = (count()?, size * groups);
    if count < ranks && !(oversubscribe && count > 0) {
        return Err(Error::Devices(format!(
            "{ranks} ranks need {ranks} GPUs, one each, and there are {count} (--oversubscribe lets ranks share one)"
        )));
    }
    for first in 0..ranks {
        for second in first / size * size..(first / size + 1) * size {
            let (one, other) = (first % count, second % count);
            if one != other && !can_access(one, other)? {
                return Err(Error::Devices(format!(
                    "GPUs {one} and {other} cannot share memory: there is no peer access between them"
                )));
            }
        }
    }
    Ok(())
}

fn can_access(ordinal: u32, peer: u32) -> Result<bool, Error> {
    let mut can = 0;
    // SAFETY: devices by number, checked against their count, and room for the answer.
    let code = unsafe { (load()?.cuDeviceCanAccessPeer)(&mut can, ordinal as i32, peer as i32) };
    check("ask which GPUs can share memory", code)?;
    Ok(can != 0)
}

fn uuid(ordinal: u32) -> Result<[u8; 16], Error> {
    let mut uuid = [0; 16];
    // SAFETY: a device by number, checked against their count, and room for the answer.
    let code = unsafe { (load()?.cuDeviceGetUuid)(&mut uuid, ordinal as i32) };
    check("ask for the GPU's identity", code)?;
    Ok(uuid)
}

/// Checks that every rank has a GPU on this host which this rank's can reach, and one of its own unless ranks may
/// `oversubscribe` them. All ranks call this. Whether any two share one.
///
/// # Errors
/// Which pair of ranks cannot share memory, and why.
pub(crate) fn check_group(group: &Group, gpu: &Gpu, oversubscribe: bool) -> Result<bool, Error> {
    let rank = group.rank();
    let own = gpu.identity()?;
    let identities: Vec<Identity> = super::gather(group, &own)?;
    let found =
        (0..count()?).map(|ordinal| Ok((ordinal, uuid(ordinal)?))).collect::<Result<Vec<_>, Error>>()?;
    let reaches = |peer: &Identity| {
        // A GPU that this process does not see is left to the attempt to open its memory. One is no peer of itself.
        let seen = found.iter().find(|(_, uuid)| *uuid == peer.uuid && *peer != own);
        seen.map_or(Ok(true), |&(ordinal, _)| can_access(gpu.ordinal, ordinal))
    };
    for (peer, identity) in (0..).zip(&identities).filter(|&(peer, _)| peer != rank) {
        if let Some(why) = conflict(&own, identity, oversubscribe) {
            return Err(Error::Pair { rank: rank.min(peer), peer: rank.max(peer), why: why.to_owned() });
        }
        if !reaches(identity)? {
            let why = "there is no peer access between their GPUs".to_owned();
            return Err(Error::Pair { rank, peer, why });
        }
    }
    Ok(any_alike(&identities))
}

/// Whether any two ranks have the same GPU.
fn any_alike(identities: &[Identity]) -> bool {
    identities.iter().enumerate().any(|(rank, identity)| identities[..rank].contains(identity))
}

/// Why two ranks' GPUs cannot be in a group, as far as their names tell.
fn conflict(one: &Identity, other: &Identity, oversubscribe: bool) -> Option<&'static str> {
    if one.host != other.host {
        Some("they are on different hosts")
    } else if one.uuid == other.uuid && !oversubscribe {
        Some(
            "they use the same GPU: give each rank its own, by LOCAL_RANK or CUDA_VISIBLE_DEVICES, or let them share \
             it with --oversubscribe",
        )
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(host: &str, uuid: u8) -> Identity {
        Identity { host: host.to_owned(), uuid: [uuid; 16] }
    }

    #[test]
    fn ranks_on_two_hosts_or_one_gpu_conflict() {
        let own = identity("a", 1);
        let why = |other: &Identity| conflict(&own, other, false);
        assert_eq!(why(&identity("a", 2)), None);
        assert!(why(&identity("b", 2)).is_some_and(|why| why.contains("different hosts")));
        // The same number on another host would be another GPU.
        assert!(why(&identity("b", 1)).is_some_and(|why| why.contains("different hosts")));
        assert!(why(&identity("a", 1)).is_some_and(|why| why.contains("same GPU")));
    }

    #[test]
    fn ranks_share_a_gpu_if_they_may_but_never_a_host() {
        let own = identity("a", 1);
        assert_eq!(conflict(&own, &identity("a", 1), true), None);
        assert!(conflict(&own, &identity("b", 2), true).is_some());
        assert!(any_alike(&[identity("a", 2), own.clone(), identity("a", 2)]));
        assert!(!any_alike(&[identity("a", 2), own, identity("b", 2)]));
    }
}
