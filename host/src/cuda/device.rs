//! The GPUs that this process sees, and the contexts that everything on them lives in.
//!
//! An ordinal means something in one process only: `CUDA_VISIBLE_DEVICES` and control groups decide which GPUs it counts. So
//! ranks tell GPUs apart by the driver's UUID, and a rank may use the GPU of a peer that it does not see.

use std::{
    ffi::{c_char, c_int},
    fs,
    marker::PhantomData,
    ptr::null_mut,
    sync::{Arc, OnceLock},
};

use super::driver::{Functions, Handle, check, load};
use crate::{
    error::Error,
    group::{Bootstrap, BootstrapError, Hosts},
};

/// The number that tells hosts apart: the kernel draws it when it boots.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// `CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT` and others.
const UNITS: u32 = 16;
const L2_CACHE_BYTES: u32 = 38;
const CAPABILITY_MAJOR: u32 = 75;
const CAPABILITY_MINOR: u32 = 76;
/// `CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED`.
const ALREADY_ENABLED: u32 = 704;

/// A GPU.
#[derive(Clone, Debug)]
pub struct Gpu {
    /// Its number among those that this process sees.
    pub ordinal: u32,
    /// The vendor's name for it.
    pub name: String,
    /// Compute capability: 90 is 9.0.
    pub capability: u32,
    /// Multiprocessors.
    pub units: u32,
    /// Bytes of the L2 cache.
    pub cache_bytes: u64,
    context: Context,
}

impl Gpu {
    /// Takes GPU `ordinal` of those that this process sees, with its primary context.
    ///
    /// # Errors
    /// There is no driver or no such GPU.
    pub fn open(ordinal: u32) -> Result<Gpu, Error> {
        let (driver, count) = (load()?, count()?);
        if ordinal >= count {
            let plural = if count == 1 { "" } else { "s" };
            return Err(Error::Device(format!(
                "there is no GPU {ordinal}: this process sees {count} GPU{plural}"
            )));
        }
        let mut device = 0;
        // SAFETY: `device` has room for the answer.
        check("find the GPU", unsafe { (driver.cuDeviceGet)(&mut device, ordinal as c_int) })?;
        let attribute = |attribute| {
            let mut value = 0;
            // SAFETY: the device was found, and `value` has room for the answer.
            let code = unsafe { (driver.cuDeviceGetAttribute)(&mut value, attribute, device) };
            check("ask what the GPU can do", code).map(|()| value.max(0) as u32)
        };
        let mut name = [0 as c_char; 256];
        // SAFETY: the device was found, and `name` has as much room as is said.
        let code = unsafe { (driver.cuDeviceGetName)(name.as_mut_ptr(), name.len() as c_int, device) };
        check("ask for the GPU's name", code)?;
        let name: Vec<u8> = name.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0).collect();
        Ok(Gpu {
            ordinal,
            name: String::from_utf8_lossy(&name).into_owned(),
            capability: attribute(CAPABILITY_MAJOR)? * 10 + attribute(CAPABILITY_MINOR)?,
            units: attribute(UNITS)?,
            cache_bytes: attribute(L2_CACHE_BYTES)?.into(),
            context: Context::retain(driver, device)?,
        })
    }

    /// The GPU's primary context: the one that CUDA's runtime, PyTorch and cudarc use.
    pub fn context(&self) -> &Context {
        &self.context
    }
}

/// A GPU's primary context, retained as long as a clone of it lives.
#[derive(Clone, Debug)]
pub struct Context(Arc<Primary>);

#[derive(Debug)]
struct Primary {
    driver: &'static Functions,
    device: c_int,
    handle: Handle,
}

// SAFETY: the driver's contexts belong to the process, and its functions may be called from any thread.
unsafe impl Send for Primary {}
// SAFETY: as above; the driver locks what threads share.
unsafe impl Sync for Primary {}

impl Drop for Primary {
    fn drop(&mut self) {
        // SAFETY: retained in `retain`, and released once.
        unsafe { (self.driver.cuDevicePrimaryCtxRelease_v2)(self.device) };
    }
}

impl Context {
    fn retain(driver: &'static Functions, device: c_int) -> Result<Context, Error> {
        let mut handle = null_mut();
        // SAFETY: the caller has the device from the driver, and `handle` has room for the answer.
        let code = unsafe { (driver.cuDevicePrimaryCtxRetain)(&mut handle, device) };
        check("make a context on the GPU", code)?;
        Ok(Context(Arc::new(Primary { driver, device, handle })))
    }

    /// The driver's handle, a `CUcontext`.
    pub fn handle(&self) -> Handle {
        self.0.handle
    }

    /// The driver.
    pub fn driver(&self) -> &'static Functions {
        self.0.driver
    }

    /// Makes the context current in this thread until the returned value is dropped, which restores the one before.
    ///
    /// # Errors
    /// The driver's.
    pub fn enter(&self) -> Result<Entered, Error> {
        // SAFETY: the context is retained.
        let code = unsafe { (self.0.driver.cuCtxPushCurrent_v2)(self.0.handle) };
        check("make the GPU's context current", code)?;
        Ok(Entered { context: self.clone(), this_thread: PhantomData })
    }

    /// Lets this context reach the memory of `peer`, another GPU's context in this process.
    ///
    /// # Errors
    /// The driver's: there is no way from this GPU to that one.
    pub(super) fn enable_peer(&self, peer: Handle) -> Result<(), Error> {
        let _entered = self.enter()?;
        // SAFETY: `peer` is a context of this process, as its rank said.
        match unsafe { (self.0.driver.cuCtxEnablePeerAccess)(peer, 0) } {
            ALREADY_ENABLED => Ok(()),
            code => check("enable access to the other rank's memory", code),
        }
    }
}

/// A context that is current in this thread: see [`Context::enter`].
#[derive(Debug)]
pub struct Entered {
    context: Context,
    /// Contexts are current by thread.
    this_thread: PhantomData<*const ()>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut popped = null_mut();
        // SAFETY: pushed in `enter`, by this thread; whoever pushed others since has popped them.
        unsafe { (self.context.0.driver.cuCtxPopCurrent_v2)(&mut popped) };
    }
}

/// Counts the GPUs that this process sees.
///
/// # Errors
/// There is no driver, or it finds no GPU.
pub fn count() -> Result<u32, Error> {
    let mut count = 0;
    // SAFETY: `count` has room for the answer.
    check("count the GPUs", unsafe { (load()?.cuDeviceGetCount)(&mut count) })?;
    Ok(count.max(0) as u32)
}

/// Asks whether GPU `ordinal` can reach the memory of GPU `peer`; both are numbers below [`count`].
///
/// # Errors
/// The driver's.
pub fn can_access(ordinal: u32, peer: u32) -> Result<bool, Error> {
    let mut can = 0;
    // SAFETY: the driver refuses devices that are not there, and `can` has room for the answer.
    let code = unsafe { (load()?.cuDeviceCanAccessPeer)(&mut can, ordinal as c_int, peer as c_int) };
    check("ask which GPUs can share memory", code)?;
    Ok(can != 0)
}

fn uuid(ordinal: u32) -> Result<[u8; 16], Error> {
    let mut uuid = [0; 16];
    // SAFETY: the driver refuses devices that are not there, and `uuid` has room for the answer.
    let code = unsafe { (load()?.cuDeviceGetUuid)(&mut uuid, ordinal as c_int) };
    check("ask for the GPU's identity", code)?;
    Ok(uuid)
}

/// A number that no other process has.
pub(super) fn process() -> [u8; 16] {
    static PROCESS: OnceLock<[u8; 16]> = OnceLock::new();
    *PROCESS.get_or_init(|| {
        let mut number = [0; 16];
        // A kernel without random numbers leaves the process's own: enough within one PID namespace.
        if rustix::rand::getrandom(&mut number, rustix::rand::GetRandomFlags::empty()).is_err() {
            number[..4].copy_from_slice(&std::process::id().to_le_bytes());
        }
        number
    })
}

/// A rank's GPU as the others know it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    uuid: [u8; 16],
    process: [u8; 16],
    host: Vec<u8>,
}

impl Identity {
    fn of(ordinal: u32) -> Result<Identity, Error> {
        let host = fs::read(BOOT_ID).map_err(Error::system("tell hosts apart by their boot identifier"))?;
        Ok(Identity { uuid: uuid(ordinal)?, process: process(), host })
    }

    fn to_bytes(&self) -> Vec<u8> {
        [&self.uuid[..], &self.process, &self.host].concat()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Identity> {
        let (&uuid, rest) = bytes.split_first_chunk()?;
        let (&process, host) = rest.split_first_chunk()?;
        Some(Identity { uuid, process, host: host.to_vec() })
    }

    fn is_same_gpu(&self, other: &Identity) -> bool {
        self.uuid == other.uuid && self.host == other.host
    }
}

/// Checks that every rank of this rank's host has a GPU which this rank's GPU `ordinal` can reach, and that every rank has one of
/// its own unless ranks may `oversubscribe` them. All ranks call this. Returns whether any two share one.
///
/// [`Communicator::join`](super::Communicator::join) does it as well. A GPU that this process does not see is left to that.
///
/// # Errors
/// A pair of ranks that cannot share memory, and why, on these two ranks at least; hosts with different numbers of ranks; the
/// bootstrap's.
pub fn check_group(bootstrap: &dyn Bootstrap, ordinal: u32, oversubscribe: bool) -> Result<bool, Error> {
    let rank = bootstrap.rank();
    let hosts = Hosts::meet(bootstrap).map_err(Error::bootstrap)?;
    let own = Identity::of(ordinal);
    // Without one, this rank still answers the others, which would wait for it.
    let told = own.as_ref().map_or_else(|_| Vec::new(), Identity::to_bytes);
    let all = bootstrap.all_gather(&told).map_err(Error::bootstrap)?;
    let own = own?;
    let identities: Vec<Identity> =
        all.iter().map(|bytes| Identity::from_bytes(bytes)).collect::<Option<_>>().ok_or_else(|| {
            Error::bootstrap(BootstrapError::from(
                "a rank has no GPU that it can name, or is of another version",
            ))
        })?;
    let found =
        (0..count()?).map(|ordinal| Ok((ordinal, uuid(ordinal)?))).collect::<Result<Vec<_>, Error>>()?;
    let reaches = |peer: &Identity| {
        // A GPU that this process does not see is left to the attempt to open its memory. One is no peer of itself.
        let seen = found.iter().find(|(_, uuid)| *uuid == peer.uuid && !peer.is_same_gpu(&own));
        seen.map_or(Ok(true), |&(peer, _)| can_access(ordinal, peer))
    };
    for (peer, identity) in (0..).zip(&identities).filter(|&(peer, _)| peer != rank) {
        let shares_memory = hosts.is_own(peer);
        if let Some(why) = conflict(&own, identity, shares_memory, oversubscribe) {
            return Err(Error::Pair { rank, peer, why });
        }
        if shares_memory && !reaches(identity)? {
            let why = "there is no peer access between their GPUs".to_owned();
            return Err(Error::Pair { rank, peer, why });
        }
    }
    Ok(any_alike(&identities))
}

/// True if any two ranks have the same GPU.
fn any_alike(identities: &[Identity]) -> bool {
    let alike =
        |(rank, identity): (usize, &Identity)| identities[..rank].iter().any(|one| one.is_same_gpu(identity));
    identities.iter().enumerate().any(alike)
}

/// The reason that two ranks' GPUs cannot be in a group, as far as their names tell. Ranks that gave the same name for their host
/// are to share memory.
fn conflict(one: &Identity, other: &Identity, shares_memory: bool, oversubscribe: bool) -> Option<String> {
    if one.host != other.host {
        let why = "they are on different hosts, which gave one name: give each host its own";
        return shares_memory.then(|| why.to_owned());
    }
    let remedy = if !one.is_same_gpu(other) {
        return None;
    } else if !oversubscribe {
        "give each rank its own, or allow ranks to share one"
    } else if one.process == other.process {
        // The driver shares a GPU between processes by turns; kernels of one process that wait for each other may
        // never run at the same time.
        "ranks that share a GPU are processes of their own, and these are of one process"
    } else {
        return None;
    };
    Some(format!("they use the same GPU, {}: {remedy}", uuid_text(one.uuid)))
}

/// A UUID as `nvidia-smi -L` shows it.
fn uuid_text(uuid: [u8; 16]) -> String {
    let digits = format!("{:032x}", u128::from_be_bytes(uuid));
    format!(
        "GPU-{}-{}-{}-{}-{}",
        &digits[..8],
        &digits[8..12],
        &digits[12..16],
        &digits[16..20],
        &digits[20..]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(host: &str, uuid: u8) -> Identity {
        Identity { uuid: [uuid; 16], process: [uuid ^ 1; 16], host: host.into() }
    }

    #[test]
    fn ranks_on_two_hosts_or_one_gpu_conflict() {
        let own = identity("a", 1);
        let why = |other: &Identity| conflict(&own, other, true, false);
        assert_eq!(why(&identity("a", 2)), None);
        assert!(why(&identity("b", 2)).is_some_and(|why| why.contains("different hosts")));
        // The same number on another host would be another GPU.
        assert!(why(&identity("b", 1)).is_some_and(|why| why.contains("different hosts")));
        assert_eq!(conflict(&own, &identity("b", 1), false, false), None, "NCCL joins these");
        assert!(conflict(&own, &identity("a", 1), false, false).is_some_and(|why| why.contains("same GPU")));
        assert_eq!(
            why(&identity("a", 1)).as_deref(),
            Some(
                "they use the same GPU, GPU-01010101-0101-0101-0101-010101010101: give each rank its own, or allow \
                 ranks to share one"
            )
        );
    }

    #[test]
    fn ranks_share_a_gpu_if_they_may_but_never_a_host_or_a_process() {
        let own = identity("a", 1);
        let other = Identity { process: [9; 16], ..own.clone() };
        assert_eq!(conflict(&own, &other, true, true), None);
        assert!(conflict(&own, &own, true, true).is_some_and(|why| why.contains("one process")));
        assert!(conflict(&own, &identity("b", 2), true, true).is_some());
        assert!(any_alike(&[identity("a", 2), own.clone(), identity("a", 2)]));
        assert!(!any_alike(&[identity("a", 2), own, identity("b", 2)]));
    }

    #[test]
    fn an_identity_is_read_as_it_was_written_and_nothing_shorter() {
        let own = identity("host", 3);
        assert_eq!(Identity::from_bytes(&own.to_bytes()), Some(own));
        assert_eq!(Identity::from_bytes(&[0; 31]), None);
    }

    #[test]
    fn ranks_without_a_gpu_of_their_own_are_all_told() {
        let ranks = crate::group::threads(2, std::time::Duration::from_secs(10));
        std::thread::scope(|scope| {
            for rank in ranks {
                // Without a GPU here both have none, else both have the same.
                scope.spawn(move || check_group(&rank, 0, false).expect_err("no group"));
            }
        });
    }
}
