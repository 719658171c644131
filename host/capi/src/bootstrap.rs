//! A bootstrap by functions of the caller's.

use std::{
    ffi::{c_int, c_void},
    fmt,
};

use fused_collective::group::{Bootstrap, BootstrapError};

use crate::{failure::Failure, types::fc_bootstrap};

type AllGather = unsafe extern "C" fn(*mut c_void, *const c_void, u64, *mut c_void) -> c_int;
type Barrier = unsafe extern "C" fn(*mut c_void) -> c_int;

/// The caller's functions.
pub(crate) struct Callbacks {
    rank: u32,
    world_size: u32,
    context: *mut c_void,
    all_gather: AllGather,
    barrier: Option<Barrier>,
}

// SAFETY: the context is only passed to the caller's functions, from the thread that calls a function of the ABI; the ABI asks
// its caller for a context that this thread may use.
unsafe impl Send for Callbacks {}

/// A number that a function of the caller's returned.
#[derive(Debug)]
struct Returned(&'static str, c_int);

impl fmt::Display for Returned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the bootstrap's {} returned {}", self.0, self.1)
    }
}

impl std::error::Error for Returned {}

impl Callbacks {
    /// # Errors
    /// A group of one rank, a rank that it does not have, or no all-gather.
    pub(crate) fn new(given: &fc_bootstrap) -> Result<Callbacks, Failure> {
        let &fc_bootstrap { rank, world_size, context, all_gather, barrier, .. } = given;
        if world_size < 2 || rank >= world_size {
            return Err(Failure::Argument(format!(
                "there is no rank {rank} in a group of {world_size}: a group has 2 ranks or more, numbered from 0"
            )));
        }
        let all_gather =
            all_gather.ok_or_else(|| Failure::Argument("all_gather of fc_bootstrap is null".to_owned()))?;
        Ok(Callbacks { rank, world_size, context, all_gather, barrier })
    }

    /// Gathers as many bytes of each rank.
    fn gather(&self, bytes: &[u8]) -> Result<Vec<u8>, BootstrapError> {
        let mut all = vec![0; bytes.len() * self.world_size as usize];
        // SAFETY: the bytes are there, and there is room for those of all ranks; the function is what the caller says.
        let code = unsafe {
            (self.all_gather)(
                self.context,
                bytes.as_ptr().cast(),
                bytes.len() as u64,
                all.as_mut_ptr().cast(),
            )
        };
        if code == 0 { Ok(all) } else { Err(Returned("all_gather", code).into()) }
    }
}

impl Bootstrap for Callbacks {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world_size(&self) -> u32 {
        self.world_size
    }

    /// Two all-gathers: of the lengths, and of the bytes with zeros up to the longest.
    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>, BootstrapError> {
        let lengths = self.gather(&(bytes.len() as u64).to_le_bytes())?;
        let (lengths, _) = lengths.as_chunks();
        let lengths: Vec<usize> = lengths.iter().map(|bytes| u64::from_le_bytes(*bytes) as usize).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        if longest == 0 {
            return Ok(vec![Vec::new(); lengths.len()]);
        }
        let mut padded = bytes.to_vec();
        padded.resize(longest, 0);
        let all = self.gather(&padded)?;
        Ok(all.chunks(longest).zip(lengths).map(|(bytes, length)| bytes[..length].to_vec()).collect())
    }

    fn barrier(&self) -> Result<(), BootstrapError> {
        let Some(barrier) = self.barrier else { return self.all_gather(&[]).map(drop) };
        // SAFETY: the function is what the caller says.
        match unsafe { barrier(self.context) } {
            0 => Ok(()),
            code => Err(Returned("barrier", code).into()),
        }
    }
}
