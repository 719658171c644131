//! The options of `fused-collective soak`.

use argh::{ArgsInfo, FromArgs};

use crate::{
    commands::{
        soak::run::Settings,
        values::{check_groups, deadline, groups, name, number, one, positive, ranks, seed},
    },
    usage::UsageError,
};

/// The longest soak: a year, in minutes.
const MAX_MINUTES: f64 = 525_600.0;

/// Run random operations, every result checked, for as long as wanted.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "soak",
    help_triggers("-h", "--help", "help"),
    usage = "[<options>]",
    example = "{command_name} --minutes 10 --seed 7 --nproc-per-node 4",
    example = "{command_name} --operations 1000000 --backend cuda",
    example = "{command_name} --minutes 10 --nproc-per-node 2 --groups 2",
    note = "Element types, shapes, quantizations, modes and their order are random, and so is each rank's",
    note = "pace; on GPUs some operations are captured and launched again and again, between others.",
    note = "Each problem's first results are checked against the reference, all later ones bit for bit.",
    note = "The same seed gives the same operations. A line a minute says how far it is.",
    note = "Groups run free of each other, each with a seed of its own, which repeats its operations alone.",
    note = "Started plainly, the program starts its own ranks. Under torchrun, mpirun or srun it is one.",
    note = "Exit status: 0 all well; 1 a result was wrong or a rank failed; 2 the command line is not valid."
)]
pub(crate) struct SoakArgs {
    /// how long, in minutes (default: 1)
    #[argh(option, arg_name = "n")]
    minutes: Option<String>,

    /// how many operations of each group, in place of a time
    #[argh(option, arg_name = "n")]
    operations: Option<String>,

    /// seed of everything random (default: 0)
    #[argh(option, arg_name = "n")]
    seed: Option<String>,

    /// auto, cpu or cuda (default: auto, which is cuda where there are GPUs enough)
    #[argh(option, arg_name = "name")]
    backend: Option<String>,

    /// ranks of a group, 2 to 16 (default: the GPUs there are, dealt out to the groups, else 2)
    #[argh(option, arg_name = "n")]
    nproc_per_node: Option<String>,

    /// groups that run at the same time, each of so many ranks (default: 1)
    #[argh(option, arg_name = "n")]
    groups: Option<String>,

    /// let ranks share a GPU: slow but right
    #[argh(switch)]
    oversubscribe: bool,

    /// longest wait for another rank, in seconds (default: 10)
    #[argh(option, arg_name = "seconds")]
    deadline: Option<String>,
}

impl SoakArgs {
    pub(crate) fn settings(self) -> Result<Settings, UsageError> {
        let default = Settings::default();
        if self.minutes.is_some() && self.operations.is_some() {
            return Err(UsageError::new("--minutes and --operations: give one of them"));
        }
        let minutes = |text: &str| positive("--minutes", text, "a number of minutes", Some(MAX_MINUTES));
        let operations = |text: String| number("--operations", &text, "a number of operations", 1, None);
        let settings = Settings {
            minutes: one(self.minutes, minutes, default.minutes)?,
            operations: self.operations.map(operations).transpose()?,
            seed: one(self.seed, seed, default.seed)?,
            deadline_seconds: one(self.deadline, deadline, default.deadline_seconds)?,
            backend: one(self.backend, |text| name("--backend", text), default.backend)?,
            oversubscribe: self.oversubscribe,
            nproc_per_node: self.nproc_per_node.as_deref().map(ranks).transpose()?,
            groups: one(self.groups, groups, default.groups)?,
        };
        check_groups(settings.groups, settings.nproc_per_node)?;
        Ok(settings)
    }
}
