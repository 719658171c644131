//! The options of `fused-collective links`.

use std::path::PathBuf;

use argh::{ArgsInfo, FromArgs};

use crate::{
    commands::{
        links::run::Settings,
        values::{deadline, file, name, one, ranks},
    },
    usage::UsageError,
};

/// Measure what the links between ranks can do: latency, and bandwidth of stores and loads.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "links",
    help_triggers("-h", "--help", "help"),
    usage = "[<options>]",
    example = "{command_name}",
    example = "{command_name} --nproc-per-node 4 --json links.json",
    note = "Between every two ranks, while nothing else happens: how long a word takes (half a round trip,",
    note = "in µs), and how many bytes a second one rank stores into the other's memory, or loads from it",
    note = "(GB/s, 10^9 bytes); on CPUs also while the other rank polls what is stored. Then of all ranks at",
    note = "the same time: pushes to all others, on GPUs by grids of several sizes, and copies in their own",
    note = "memory. The best of these pushes is the push rate: what an operation's bandwidth can be held to.",
    note = "What was sent is held to what arrived, and a figure for which that fails is FAILED.",
    note = "Started plainly, the program starts its own ranks. Under torchrun, mpirun or srun it is one.",
    note = "Exit status: 0 all well; 1 a measurement or a rank failed; 2 the command line is not valid."
)]
pub(crate) struct LinksArgs {
    /// auto, cpu or cuda (default: auto, which is cuda where there are GPUs enough)
    #[argh(option, arg_name = "name")]
    backend: Option<String>,

    /// ranks to start, 2 to 16 (default: the GPUs there are, else 2)
    #[argh(option, arg_name = "n")]
    nproc_per_node: Option<String>,

    /// let ranks share a GPU: times mean nothing
    #[argh(switch)]
    oversubscribe: bool,

    /// longest wait for another rank, in seconds (default: 10)
    #[argh(option, arg_name = "seconds")]
    deadline: Option<String>,

    /// write every figure to this file
    #[argh(option, arg_name = "file")]
    json: Option<String>,
}

impl LinksArgs {
    /// The settings, and the file.
    pub(crate) fn settings(self) -> Result<(Settings, Option<PathBuf>), UsageError> {
        let default = Settings::default();
        let settings = Settings {
            deadline_seconds: one(self.deadline, deadline, default.deadline_seconds)?,
            backend: one(self.backend, |text| name("--backend", text), default.backend)?,
            oversubscribe: self.oversubscribe,
            nproc_per_node: self.nproc_per_node.as_deref().map(ranks).transpose()?,
        };
        Ok((settings, file("--json", self.json)?))
    }
}
