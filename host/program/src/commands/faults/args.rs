//! The options of `fused-collective faults`.

use argh::{ArgsInfo, FromArgs};

use crate::{
    commands::{
        faults::{case::Case, run::Settings},
        values::{deadline, list, name, one, ranks},
    },
    job::options::BackendChoice,
    usage::UsageError,
};

/// Make ranks fail, one way at a time, and see that all others say so in time.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "faults",
    help_triggers("-h", "--help", "help"),
    usage = "[<options>]",
    example = "{command_name} --backend cuda --nproc-per-node 4",
    example = "{command_name} --cases operations/kill/0 replays/stop/1 --deadline 5",
    note = "A case is PHASE/FAULT/RANK. Phases: start, joined, ready, operations, replays, end; where there is",
    note = "NCCL, nccl. Faults: kill, crash, stop, exit, stuck; in ready, operations, replays and nccl abort;",
    note = "in operations and replays other-shape, other-mode, other-dtype, other-quant and other-order.",
    note = "Every other rank must report in time: at once, or at the deadline where nothing shows before.",
    note = "What must show at once is run with a deadline of 60 s or more, which cannot help it.",
    note = "After abort and other-... the same processes form a new group, which must be right.",
    note = "The program starts the ranks itself, so that it can watch how they end.",
    note = "Exit status: 0 all well; 1 a case failed; 2 the command line is not valid."
)]
pub(crate) struct FaultsArgs {
    /// cases to run (default: all that can be, of ranks 0 and 1)
    #[argh(option, arg_name = "case")]
    cases: Vec<String>,

    /// auto, cpu or cuda (default: auto, which is cuda where there are GPUs enough)
    #[argh(option, arg_name = "name")]
    backend: Option<String>,

    /// ranks to start, 2 to 16 (default: the GPUs there are, else 2)
    #[argh(option, arg_name = "n")]
    nproc_per_node: Option<String>,

    /// let ranks share a GPU: slow but right
    #[argh(switch)]
    oversubscribe: bool,

    /// longest wait for another rank, in seconds (default: 2)
    #[argh(option, arg_name = "seconds")]
    deadline: Option<String>,
}

impl FaultsArgs {
    pub(crate) fn settings(self) -> Result<Settings, UsageError> {
        let parse = |text: &str| name("--cases", text);
        let cases: Vec<Case> = list("--cases", &self.cases, parse, Vec::new())?;
        Ok(Settings {
            cases: (!cases.is_empty()).then_some(cases),
            deadline_seconds: one(self.deadline, deadline, 2.0)?,
            backend: one(self.backend, |text| name("--backend", text), BackendChoice::Auto)?,
            oversubscribe: self.oversubscribe,
            nproc_per_node: self.nproc_per_node.as_deref().map(ranks).transpose()?,
        })
    }
}
