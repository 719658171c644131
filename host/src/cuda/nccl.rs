//! NCCL's all-reduce, the one that the fused operations are measured against.

use std::{
    ffi::c_void,
    ptr::null_mut,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use fused_collective_core::{dtype::DType, launch::Address};
use nccl_sys::{
    NCCL_UNIQUE_ID_BYTES, Nccl, ncclBfloat16, ncclComm_t, ncclFloat16, ncclFloat32, ncclResult_t,
    ncclSuccess, ncclSum, ncclUniqueId,
};

use super::{Error, device::Gpu, driver::Handle};
use crate::rendezvous::Group;

/// The first release that captures into graphs what its all-reduce does there: 2.19.
const MIN_VERSION: i32 = 21_900;

/// One rank's end of an NCCL communicator.
#[derive(Debug)]
pub(crate) struct NcclGroup {
    nccl: Arc<Nccl>,
    comm: ncclComm_t,
    version: i32,
    aborted: bool,
}

/// A communicator on its way from the thread that made it.
struct Made(Result<ncclComm_t, Error>);

// SAFETY: NCCL allows any thread to use a communicator, one at a time.
unsafe impl Send for Made {}

impl NcclGroup {
    /// Joins the ranks of `group`. All ranks call this. If one of them has no NCCL, none has: the error says which.
    ///
    /// # Errors
    /// NCCL is missing or too old on some rank; it cannot connect within `deadline`.
    pub(crate) fn join(group: &Group, gpu: &Gpu, deadline: Duration) -> Result<NcclGroup, Error> {
        let loaded = load();
        let reasons: Vec<Option<String>> =
            super::gather(group, &loaded.as_ref().err().map(ToString::to_string))?;
        if let Some((rank, why)) = (0..).zip(reasons).find_map(|(rank, why): (u32, _)| Some((rank, why?))) {
            return Err(Error::Nccl(format!("is not used: on rank {rank} {why}")));
        }
        let (nccl, version) = loaded?;
        let nccl = Arc::new(nccl);

        let mut id = ncclUniqueId { internal: [0; NCCL_UNIQUE_ID_BYTES] };
        if group.rank() == 0 {
            // SAFETY: room for the name.
            checked(&nccl, "make a name for the group", unsafe { (nccl.ncclGetUniqueId)(&mut id) })?;
        }
        let bytes = bytemuck::cast_slice(&id.internal);
        let shared = group.broadcast((group.rank() == 0).then_some(bytes))?;
        let shared: &[i8] = bytemuck::cast_slice(&shared);
        id.internal =
            shared.try_into().map_err(|_| Error::Nccl("has a name of another length".to_owned()))?;

        let comm = connect(&nccl, group, gpu, id, deadline)?;
        Ok(NcclGroup { nccl, comm, version, aborted: false })
    }

    /// The version: `2.28.9`.
    pub(crate) fn version(&self) -> String {
        let version = self.version;
        format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100)
    }

    /// Enqueues the sum of all ranks' `count` elements at `from` into `to`.
    ///
    /// # Errors
    /// NCCL's.
    ///
    /// # Safety
    /// Both tensors have `count` elements of type `dtype` until the operation has ended, and `stream` is a stream of
    /// the context that the communicator was made in.
    pub(crate) unsafe fn all_reduce(
        &self,
        dtype: DType,
        from: Address,
        to: Address,
        count: u64,
        stream: Handle,
    ) -> Result<(), Error> {
        let data_type = match dtype {
            DType::F32 => ncclFloat32,
            DType::F16 => ncclFloat16,
            DType::Bf16 => ncclBfloat16,
        };
        // SAFETY: as this function's; the communicator is alive.
        let result = unsafe {
            (self.nccl.ncclAllReduce)(
                from.0 as *const c_void,
                to.0 as *mut c_void,
                count as usize,
                data_type,
                ncclSum,
                self.comm,
                stream,
            )
        };
        checked(&self.nccl, "enqueue an all-reduce", result)
    }

    /// An error if anything went wrong in what was enqueued.
    ///
    /// # Errors
    /// NCCL's.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let mut result = ncclSuccess;
        // SAFETY: the communicator is alive, and there is room for the answer.
        let asked = unsafe { (self.nccl.ncclCommGetAsyncError)(self.comm, &mut result) };
        checked(&self.nccl, "tell how it went", asked)?;
        checked(&self.nccl, "run an all-reduce", result)
    }

    /// Ends what is running, and the communicator.
    pub(crate) fn abort(&mut self) {
        if !self.aborted {
            self.aborted = true;
            // SAFETY: the communicator is alive, and used no more.
            unsafe { (self.nccl.ncclCommAbort)(self.comm) };
        }
    }
}

impl Drop for NcclGroup {
    fn drop(&mut self) {
        if !self.aborted {
            // SAFETY: the communicator is alive, and used no more.
            unsafe { (self.nccl.ncclCommDestroy)(self.comm) };
        }
    }
}

fn load() -> Result<(Nccl, i32), Error> {
    let nccl = Nccl::load().map_err(|error| Error::Nccl(format!("cannot be loaded: {error}")))?;
    let mut version = 0;
    // SAFETY: room for the answer.
    checked(&nccl, "tell its version", unsafe { (nccl.ncclGetVersion)(&mut version) })?;
    if version < MIN_VERSION {
        return Err(Error::Nccl(format!("{version} is too old: use 2.19 or later")));
    }
    Ok((nccl, version))
}

/// Connects all ranks, in a thread that can be left behind: NCCL itself waits for ranks without a bound.
fn connect(
    nccl: &Arc<Nccl>,
    group: &Group,
    gpu: &Gpu,
    id: ncclUniqueId,
    deadline: Duration,
) -> Result<ncclComm_t, Error> {
    let (ranks, rank) = (group.world_size() as i32, group.rank() as i32);
    let (sender, receiver) = mpsc::channel();
    let context = gpu.context();
    let connecting = Arc::clone(nccl);
    let made = move || {
        context.make_current()?;
        let mut comm = null_mut();
        // SAFETY: room for the communicator; the name is rank 0's.
        let result = unsafe { (connecting.ncclCommInitRank)(&mut comm, ranks, id, rank) };
        checked(&connecting, "connect the group", result)?;
        Ok(comm)
    };
    thread::Builder::new()
        .name("nccl-connect".to_owned())
        // If nobody waits any more, the process is about to end.
        .spawn(move || drop(sender.send(Made(made()))))
        .map_err(|error| Error::Nccl(format!("cannot connect: {error}")))?;
    let late = |_| Error::Nccl(format!("did not connect the group within {:.1} s", deadline.as_secs_f64()));
    let Made(made) = receiver.recv_timeout(deadline).map_err(late)?;
    made
}

/// An error if `result` is one. `doing` completes "could not".
fn checked(nccl: &Nccl, doing: &'static str, result: ncclResult_t) -> Result<(), Error> {
    if result == ncclSuccess {
        return Ok(());
    }
    Err(Error::Nccl(format!("could not {doing}: {}", nccl.describe(result))))
}
