//! The options of `fused-collective links`.

use argh::{ArgsInfo, FromArgs};

use super::settings::Settings;
use crate::{
    job::options::{JobArgs, JobOptions},
    usage::UsageError,
    values::file,
};

/// Measure the links between ranks: latency, and bandwidth of stores and loads.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "links",
    help_triggers("-h", "--help", "help"),
    usage = "[<options>]",
    example = "{command_name}",
    example = "{command_name} --nproc-per-node 4 --json links.json",
    note = "Between every two idle ranks: the latency of a word (half a round trip, in µs), and the bandwidth",
    note = "of stores into the other's memory (push) and of loads from it (pull), in GB/s of 10^9 bytes; on",
    note = "CPUs also of stores that the other rank polls (polled push). Between all ranks at once: puts to",
    note = "all others, on GPUs with grids of several sizes, and copies in each rank's own memory. The best",
    note = "put gives the all-to-all put bandwidth, the limit for an operation's bus bandwidth.",
    note = "Received bytes are compared with those sent, first without a wait: if some do not arrive,",
    note = "nothing is measured. The last line and the JSON's \"verdict\" say whether each rank received",
    note = "what every other sent, or name the pairs that did not.",
    note = "On CPUs each rank is pinned to a core of its own meanwhile, within the CPUs that it may run on.",
    note = "Started plainly, the program starts its own ranks. Under torchrun, mpirun or srun it is a rank.",
    note = "Exit status: 0 the verdict is \"passed\"; 1 it is not, or a rank failed; 2 the command line is not",
    note = "valid."
)]
pub(crate) struct LinksArgs {
    /// auto, cpu or cuda (default: auto, which is cuda if there are enough GPUs)
    #[argh(option, arg_name = "name")]
    backend: Option<String>,

    /// ranks to start, 2 to 16 (default: one per GPU, else 2)
    #[argh(option, arg_name = "n")]
    nproc_per_node: Option<String>,

    /// let ranks share a GPU: times are meaningless
    #[argh(switch)]
    oversubscribe: bool,

    /// longest wait for another rank, in seconds (default: 10)
    #[argh(option, arg_name = "seconds")]
    deadline: Option<String>,

    /// write every figure to this file as JSON; - is the standard output, and the tables then go to the standard error
    #[argh(option, arg_name = "file")]
    json: Option<String>,
}

impl LinksArgs {
    /// Checks every value.
    pub(crate) fn settings(self) -> Result<Settings, UsageError> {
        let job = JobArgs {
            backend: self.backend,
            nproc_per_node: self.nproc_per_node,
            groups: None,
            hosts: None,
            partial_sums: None,
            oversubscribe: self.oversubscribe,
            deadline: self.deadline,
        };
        Ok(Settings { job: job.parse(JobOptions::default())?, json: file("--json", self.json)? })
    }
}
