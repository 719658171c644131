//! Joining a group of GPUs.

use std::{
    os::fd::AsFd,
    sync::{Arc, Mutex},
    time::Duration,
};

use fused_collective_core::{
    dtype::DType,
    kernels::{Module, Set},
    plan::{self, Limits},
    workspace::Layout,
};

use super::{
    super::{
        device::{self, Gpu},
        kernels::{Kernels, MAX_RANKS},
        memory::MappedStatus,
        workspace::Workspace,
    },
    CALLS_KEPT, Captured, Communicator, MAX_DEADLINE, Options,
    abort_flag::AbortFlag,
    across::{Across, Parts},
    call_table::CallTable,
    limits::{HOP_BYTES, agree},
    progress::Progress,
    unanimous::load_nccl,
};
use crate::{
    error::Error,
    group::{
        Bootstrap, Hosts,
        calls::{CallLog, Place},
        shared_memory::SharedMemory,
    },
};

impl Communicator {
    /// Joins the ranks of `bootstrap`, this one with GPU `ordinal` of those that the process sees, and makes a workspace.
    /// Processes may see different GPUs, each its own alone for instance, which is then GPU 0 in all of them.
    /// All ranks call this, with the same `options`. The thread's current context stays what it is.
    ///
    /// Waits end early when the bootstrap's monitor tells of a lost rank; without one, at the deadline.
    ///
    /// Ranks that give different names for their [host](Bootstrap::host) are a group of several hosts. Within a host they share
    /// memory, and NCCL carries the sums of hosts from one to the other: see [`nccl`](super::super::nccl).
    ///
    /// # Errors
    /// No driver, no kernels, not enough memory; two ranks of a host that cannot share memory, by number; a deadline past
    /// [`MAX_DEADLINE`]; the bootstrap's. Of several hosts also: different numbers of ranks; NCCL that is missing, older than
    /// 2.19, of different releases, or does not connect within the deadline.
    pub fn join(bootstrap: &dyn Bootstrap, ordinal: u32, options: &Options) -> Result<Communicator, Error> {
        let &Options { slot_bytes, deadline, oversubscribe, check_scales, ref kernels } = options;
        check_deadline(deadline)?;
        let (rank, world_size) = (bootstrap.rank(), bootstrap.world_size());
        let hosts = Hosts::meet(bootstrap).map_err(Error::bootstrap)?;
        let ranks_per_host = hosts.ranks_per_host();
        if ranks_per_host > MAX_RANKS {
            return Err(Error::Options(format!(
                "{ranks_per_host} ranks on a host are more than GPU kernels serve: use up to {MAX_RANKS}"
            )));
        }
        let (spans_hosts, within) = (hosts.count() > 1, hosts.within(bootstrap));
        // Of one host, as it was given: it may share files by better means.
        let within: &dyn Bootstrap = if spans_hosts { &within } else { bootstrap };
        // Before anything that takes its time.
        let library = spans_hosts.then(|| load_nccl(bootstrap)).transpose()?;
        let gpu = Gpu::open(ordinal)?;
        let context = gpu.context();
        let set = if spans_hosts { Set::Hosts } else { Set::Any8 };
        let module = Module { dtype: DType::Bf16, set };
        let mut kernels = Kernels::find(&gpu, kernels, module.name())?;
        let shares_gpus = device::check_group(bootstrap, ordinal, oversubscribe)?;
        let layout = Layout::new(ranks_per_host, slot_bytes)?;
        let limits = agree(
            bootstrap,
            Limits {
                world_size,
                hosts: hosts.count(),
                slot_bytes: layout.slot_bytes(),
                compute_units: gpu.units,
                max_cluster: kernels.max_cluster(),
                one_shot_bytes: plan::one_shot_bytes(world_size, HOP_BYTES),
            },
        )?;
        kernels.agree(limits.compute_units, limits.max_cluster);
        let layout = Layout::new(ranks_per_host, limits.slot_bytes)?;
        let log = share_log(within)?;
        let workspace = Workspace::share(within, context, &layout)?;
        let status = Arc::new(MappedStatus::new(context)?);
        let abort = AbortFlag::new(&status);
        let monitor = bootstrap.monitor();
        let on_loss = monitor.as_ref().map(|monitor| {
            let abort = Arc::clone(&abort);
            Mutex::new(monitor.on_loss(Box::new(move || abort.set())))
        });
        let slot_bytes = limits.slot_bytes;
        let across = |library| {
            let (hosts, status, abort) = (hosts.clone(), &status, &abort);
            Across::join(Parts { bootstrap, context, hosts, library, slot_bytes, deadline, status, abort })
        };
        let across = library.map(across).transpose()?;
        Ok(Communicator {
            rank,
            across,
            limits,
            deadline,
            monitor,
            failed: None,
            left: false,
            shares_gpus,
            check_scales,
            log,
            calls: CallTable::default(),
            launches: Vec::new(),
            host_sums: Vec::new(),
            captured: Captured::default(),
            abort,
            _on_loss: on_loss,
            status,
            progress: Progress::new(context, workspace.state())?,
            workspace,
            kernels,
            addends: None,
            layout,
            gpu,
        })
    }
}

/// Refuses a deadline that kernels would not keep.
fn check_deadline(deadline: Duration) -> Result<(), Error> {
    if deadline <= MAX_DEADLINE {
        return Ok(());
    }
    Err(Error::Options(format!(
        "a deadline of {} s is longer than GPU kernels can wait: use up to {} s",
        deadline.as_secs_f64(),
        MAX_DEADLINE.as_secs()
    )))
}

/// The memory in which the ranks' hosts tell each other what they call.
fn share_log(bootstrap: &dyn Bootstrap) -> Result<CallLog, Error> {
    let doing = "share memory between the ranks' hosts";
    let (rank, world_size) = (bootstrap.rank(), bootstrap.world_size());
    let place = Place::alone(CALLS_KEPT);
    let bytes = place.bytes(world_size);
    let own = match rank {
        0 => Some(SharedMemory::create(bytes).map_err(Error::system(doing))?),
        _ => None,
    };
    let file = bootstrap.share_file(own.as_ref().map(AsFd::as_fd)).map_err(Error::bootstrap)?;
    let memory = Arc::new(SharedMemory::map(file.as_fd(), bytes).map_err(Error::system(doing))?);
    Ok(CallLog::new(memory, place, rank, world_size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_that_kernels_would_not_keep_is_refused_and_not_cut_short() {
        assert!(check_deadline(MAX_DEADLINE).is_ok());
        let error = check_deadline(MAX_DEADLINE + Duration::from_millis(1)).unwrap_err().to_string();
        assert_eq!(error, "a deadline of 3600.001 s is longer than GPU kernels can wait: use up to 3600 s");
        assert!(check_deadline(Duration::MAX).is_err());
    }
}
