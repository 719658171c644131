//! The backend and the number of ranks of a job.

use fused_collective::{cuda, group::rendezvous::Group};

use super::{
    options::{BackendChoice, JobOptions},
    ranks::{Error, all},
};
use crate::backend::all_reduce_choice::AllReduceChoice;
use crate::{backend::cuda::gpus::check_peers, exit::Failure};

/// The ranks of a group where neither the user nor the GPUs say.
const DEFAULT_RANKS: u32 = 2;

/// The backend that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backend {
    Cpu,
    Cuda,
}

impl Backend {
    pub(super) fn name(self) -> &'static str {
        match self {
            Backend::Cpu => "cpu",
            Backend::Cuda => "cuda",
        }
    }

    /// Refuses all-reduces of which the backend has none.
    pub(super) fn check_all_reduces(self, all_reduces: &[AllReduceChoice]) -> Result<(), Failure> {
        if let (Backend::Cpu, [choice, ..]) = (self, all_reduces)
            && !all_reduces.contains(&AllReduceChoice::Custom)
        {
            return Err(Failure::Usage(format!(
                "--allreduce: {} needs the cuda backend: use custom, or leave the option out",
                choice.name()
            )));
        }
        Ok(())
    }
}

/// Chooses the backend and the number of ranks of all groups. `asked` is the number that the user or a launcher gave. Ranks of
/// a `foreign` launcher may each see another GPU, and check together whether these fit, when they have met. So do those of
/// several hosts with their number on each.
pub(super) fn choose(
    options: &JobOptions,
    all_reduces: &[AllReduceChoice],
    asked: Option<u32>,
    foreign: bool,
    several_hosts: bool,
) -> Result<(Backend, u32), Failure> {
    let &JobOptions { groups, oversubscribe, .. } = options;
    let on_cpu = (Backend::Cpu, asked.unwrap_or(DEFAULT_RANKS * groups));
    let check = |ranks: u32| {
        if foreign { Ok(ranks) } else { check_peers(ranks / groups, groups, oversubscribe).map(|()| ranks) }
    };
    let on_gpus = || match asked {
        Some(ranks) if several_hosts => cuda::count().map(|_| ranks),
        _ => gpu_ranks(asked, groups, oversubscribe).and_then(check),
    };
    let chosen = match options.backend {
        BackendChoice::Cpu => on_cpu,
        BackendChoice::Auto => on_gpus().map_or(on_cpu, |ranks| (Backend::Cuda, ranks)),
        BackendChoice::Cuda => {
            let ranks = on_gpus().map_err(|error| {
                Failure::Usage(format!("--backend: cuda: {error}: use cpu, or leave the option out"))
            })?;
            (Backend::Cuda, ranks)
        }
    };
    chosen.0.check_all_reduces(all_reduces)?;
    Ok(chosen)
}

/// The backend of all ranks of `group`, of which each has `found` one by itself: GPUs if every rank has one, and one of its own
/// unless they may `oversubscribe` them. All ranks call this, and return the same.
pub(super) fn settle(
    group: &Group,
    found: Backend,
    ordinal: impl FnOnce() -> Result<u32, fused_collective::Error>,
    oversubscribe: bool,
) -> Result<Backend, Error> {
    let ordinal = ordinal().ok().filter(|_| found == Backend::Cuda);
    let has_one = all(group, ordinal.is_some())?;
    let (true, Some(ordinal)) = (has_one, ordinal) else { return Ok(Backend::Cpu) };
    let fit = cuda::check_group(group, ordinal, oversubscribe);
    Ok(if all(group, fit.is_ok())? { Backend::Cuda } else { Backend::Cpu })
}

/// The ranks of `groups` groups on GPUs: `asked`, or one per GPU. If ranks may `oversubscribe` GPUs, at least enough to
/// form the groups.
fn gpu_ranks(asked: Option<u32>, groups: u32, oversubscribe: bool) -> Result<u32, fused_collective::Error> {
    let count = match cuda::count()? {
        count @ 1.. if oversubscribe => count.max(DEFAULT_RANKS * groups),
        count => count,
    };
    let ranks = asked.unwrap_or((count / groups).min(cuda::MAX_RANKS) * groups);
    if (DEFAULT_RANKS..=cuda::MAX_RANKS).contains(&(ranks / groups)) {
        return Ok(ranks);
    }
    let most = cuda::MAX_RANKS;
    let group = if groups == 1 { "a group".to_owned() } else { format!("{groups} groups") };
    Err(fused_collective::Error::Device(format!(
        "{ranks} GPUs cannot form {group}: {DEFAULT_RANKS} to {most} can form one"
    )))
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use fused_collective::group::rendezvous::Membership;

    use super::*;

    /// Settles two ranks, of which each has `found` a backend, and GPU 0 if that is CUDA.
    fn settled(key: &str, found: [Backend; 2]) -> [Backend; 2] {
        let key = &format!("{key} {}", std::process::id());
        thread::scope(|scope| {
            let rank = |rank, found| {
                let deadline = Duration::from_secs(60);
                let membership = Membership { rank, world_size: 2, key, config: b"", deadline };
                let group = Group::join(&membership).unwrap();
                let settled = settle(&group, found, || Ok(0), false).unwrap();
                // Both have made the same calls.
                group.farewell().unwrap();
                settled
            };
            let [first, second] = found;
            let other = scope.spawn(move || rank(1, second));
            [rank(0, first), other.join().unwrap()]
        })
    }

    #[test]
    fn ranks_settle_on_gpus_only_if_each_has_one_of_its_own() {
        assert_eq!(settled("settled: one GPU", [Backend::Cuda, Backend::Cpu]), [Backend::Cpu; 2]);
        assert_eq!(settled("settled: none", [Backend::Cpu; 2]), [Backend::Cpu; 2]);
        // The same GPU, or none at all.
        assert_eq!(settled("settled: a common GPU", [Backend::Cuda; 2]), [Backend::Cpu; 2]);
    }
}
