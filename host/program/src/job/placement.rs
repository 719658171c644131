//! The backend and the number of ranks of a job.

use fused_collective::cuda;

use super::options::{BackendChoice, JobOptions};
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
}

/// Chooses the backend and the number of ranks of all groups. `asked` is the number that the user or a launcher gave;
/// `launched` is true if a launcher has started the ranks.
pub(super) fn choose(
    options: &JobOptions,
    all_reduces: &[AllReduceChoice],
    asked: Option<u32>,
    launched: bool,
) -> Result<(Backend, u32), Failure> {
    let &JobOptions { groups, oversubscribe, .. } = options;
    let on_cpu = (Backend::Cpu, asked.unwrap_or(DEFAULT_RANKS * groups));
    let check = |ranks: u32| check_peers(ranks / groups, groups, oversubscribe).map(|()| ranks);
    let chosen = match options.backend {
        BackendChoice::Cpu => on_cpu,
        BackendChoice::Auto => match gpu_ranks(asked, groups, oversubscribe).and_then(check) {
            Ok(ranks) => (Backend::Cuda, ranks),
            Err(_) => on_cpu,
        },
        BackendChoice::Cuda => {
            // A launcher may show each rank only its own GPU. Then the ranks check together, when they join.
            let check = |ranks| if launched { Ok(ranks) } else { check(ranks) };
            let ranks = gpu_ranks(asked, groups, oversubscribe).and_then(check).map_err(|error| {
                Failure::Usage(format!("--backend: cuda: {error}: use cpu, or leave the option out"))
            })?;
            (Backend::Cuda, ranks)
        }
    };
    if let (Backend::Cpu, [choice, ..]) = (chosen.0, all_reduces)
        && !all_reduces.contains(&AllReduceChoice::Custom)
    {
        return Err(Failure::Usage(format!(
            "--allreduce: {} needs the cuda backend: use custom, or leave the option out",
            choice.name()
        )));
    }
    Ok(chosen)
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
