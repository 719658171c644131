//! The options of `fused-collective faults`.

use argh::{ArgsInfo, FromArgs};

use super::{case::Case, settings::Settings};
use crate::{
    job::options::{JobArgs, JobOptions},
    usage::UsageError,
    values::{list, name},
};

/// Make ranks fail, one at a time, and check that all others report it in time.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "faults",
    help_triggers("-h", "--help", "help"),
    usage = "[<options>]",
    example = "{command_name} --backend cuda --nproc-per-node 4",
    example = "{command_name} --cases operations/kill/0 replays/stop/1 --deadline 5",
    note = "A case is PHASE/FAULT/RANK. Phases: start, joined, ready, operations, replays, end; with NCCL",
    note = "also nccl. Faults: kill, crash, stop, exit, stuck; in ready, operations, replays and nccl also",
    note = "abort; in operations and replays also other-shape, other-mode, other-dtype, other-quant and",
    note = "other-order.",
    note = "Every other rank must report in time: at once, or at the deadline if nothing shows the fault.",
    note = "A fault that must be reported at once has a deadline of 60 s or more, which cannot report it.",
    note = "After abort and other-..., the same processes form a new group, which must give right results.",
    note = "The program starts the ranks itself, because it observes how they end.",
    note = "Exit status: 0 success; 1 a case failed; 2 the command line is not valid."
)]
pub(crate) struct FaultsArgs {
    /// cases to run (default: all possible ones of ranks 0 and 1)
    #[argh(option, arg_name = "case")]
    cases: Vec<String>,

    /// auto, cpu or cuda (default: auto, which is cuda if there are enough GPUs)
    #[argh(option, arg_name = "name")]
    backend: Option<String>,

    /// ranks to start, 2 to 16 (default: one per GPU, else 2)
    #[argh(option, arg_name = "n")]
    nproc_per_node: Option<String>,

    /// for tests, hosts to simulate on this one, each with --nproc-per-node ranks (default: 1)
    #[argh(option, arg_name = "n")]
    hosts: Option<String>,

    /// let ranks share a GPU: results are right, but slow
    #[argh(switch)]
    oversubscribe: bool,

    /// longest wait for another rank, in seconds (default: 2)
    #[argh(option, arg_name = "seconds")]
    deadline: Option<String>,
}

impl FaultsArgs {
    /// Checks every value.
    pub(crate) fn settings(self) -> Result<Settings, UsageError> {
        let parse = |text: &str| name("--cases", text);
        let cases: Vec<Case> = list("--cases", &self.cases, parse, Vec::new())?;
        let job = JobArgs {
            backend: self.backend,
            nproc_per_node: self.nproc_per_node,
            groups: None,
            hosts: self.hosts,
            partial_sums: None,
            oversubscribe: self.oversubscribe,
            deadline: self.deadline,
        };
        Ok(Settings {
            cases: (!cases.is_empty()).then_some(cases),
            job: job.parse(JobOptions { deadline_seconds: 2.0, ..JobOptions::default() })?,
        })
    }
}
