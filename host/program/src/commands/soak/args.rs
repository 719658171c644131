//! The options of `fused-collective soak`.

use argh::{ArgsInfo, FromArgs};

use super::settings::Settings;
use crate::{
    job::options::JobArgs,
    usage::UsageError,
    values::{number, one, positive, seed},
};

/// The longest soak: a year, in minutes.
const MAX_MINUTES: f64 = 525_600.0;

/// Run random operations for a given time, and check every result.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "soak",
    help_triggers("-h", "--help", "help"),
    usage = "[<options>]",
    example = "{command_name} --minutes 10 --seed 7 --nproc-per-node 4",
    example = "{command_name} --operations 1000000 --backend cuda",
    example = "{command_name} --minutes 10 --nproc-per-node 2 --groups 2",
    note = "Element types, shapes, quantizations, modes and their order are random, and so are pauses of each",
    note = "rank. Some operations write over their inputs, and some are cut into calls of some rows each.",
    note = "On GPUs some are captured in graphs, which are launched between others.",
    note = "The first results of a problem are checked against the reference, all later ones bit for bit.",
    note = "The same seed gives the same operations. The progress is printed once a minute.",
    note = "Groups run independently. Each has a seed of its own, which repeats its operations alone.",
    note = "Started plainly, the program starts its own ranks. Under torchrun, mpirun or srun it is a rank.",
    note = "Exit status: 0 success; 1 a result was wrong or a rank failed; 2 the command line is not valid."
)]
pub(crate) struct SoakArgs {
    /// duration in minutes (default: 1)
    #[argh(option, arg_name = "n")]
    minutes: Option<String>,

    /// number of operations of each group, in place of a duration
    #[argh(option, arg_name = "n")]
    operations: Option<String>,

    /// seed of the operations and inputs (default: 0)
    #[argh(option, arg_name = "n")]
    seed: Option<String>,

    /// auto, cpu or cuda (default: auto, which is cuda if there are enough GPUs)
    #[argh(option, arg_name = "name")]
    backend: Option<String>,

    /// ranks of a group, 2 to 16 (default: the GPUs divided by the groups, else 2)
    #[argh(option, arg_name = "n")]
    nproc_per_node: Option<String>,

    /// groups of that size that run at the same time (default: 1)
    #[argh(option, arg_name = "n")]
    groups: Option<String>,

    /// for tests, hosts to simulate on this one, each with --nproc-per-node ranks (default: 1)
    #[argh(option, arg_name = "n")]
    hosts: Option<String>,

    /// type of the sums that cross between hosts: f32 or element (default: f32)
    #[argh(option, arg_name = "type")]
    partial_sums: Option<String>,

    /// let ranks share a GPU: results are right, but slow
    #[argh(switch)]
    oversubscribe: bool,

    /// longest wait for another rank, in seconds (default: 10)
    #[argh(option, arg_name = "seconds")]
    deadline: Option<String>,
}

impl SoakArgs {
    /// Checks every value.
    pub(crate) fn settings(self) -> Result<Settings, UsageError> {
        let default = Settings::default();
        if self.minutes.is_some() && self.operations.is_some() {
            return Err(UsageError::new("--minutes and --operations: give one of them"));
        }
        let minutes = |text: &str| positive("--minutes", text, "a number of minutes", Some(MAX_MINUTES));
        let operations = |text: String| number("--operations", &text, "a number of operations", 1, None);
        let job = JobArgs {
            backend: self.backend,
            nproc_per_node: self.nproc_per_node,
            groups: self.groups,
            hosts: self.hosts,
            partial_sums: self.partial_sums,
            oversubscribe: self.oversubscribe,
            deadline: self.deadline,
        };
        Ok(Settings {
            minutes: one(self.minutes, minutes, default.minutes)?,
            operations: self.operations.map(operations).transpose()?,
            seed: one(self.seed, seed, default.seed)?,
            job: job.parse(default.job)?,
        })
    }
}
