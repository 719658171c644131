//! The options of `fused-collective verify`.

use argh::{ArgsInfo, FromArgs};
use fused_collective_core::fusion::Mode;

use super::settings::Settings;
use crate::{
    job::options::{JobArgs, JobOptions, ranks},
    usage::UsageError,
    values::{check_operation, hidden_dim, list, number, one, seed},
};

/// Verify fused operations in every element type, quantization and mode.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "verify",
    help_triggers("-h", "--help", "help"),
    usage = "[<options>]",
    example = "{command_name} --quick --nproc-per-node 3",
    example = "{command_name} --backend cuda --nproc-per-node 2 3 4",
    example = "{command_name} --quick --nproc-per-node 2 --groups 2",
    example = "{command_name} --num-tokens 0 17 --hidden-dim 48,2880 --seed 7",
    note = "In every case all elements agree with the reference; all ranks and a repeated run have the same",
    note = "bits, and so have calls in place that its rows are cut into at random; one-shot and two-shot",
    note = "have the same residual_out; and no other byte is read or written: inputs, memory around tensors,",
    note = "and idle parts of the workspace.",
    note = "Prints a line for each element type, quantization and hidden size, and the cases that fail.",
    note = "Started plainly, the program starts its own ranks. Under torchrun, mpirun or srun it is a rank.",
    note = "List values are separated by spaces, commas or both. A repeated value counts once.",
    note = "Exit status: 0 success; 1 a case or a rank failed; 2 the command line is not valid."
)]
pub(crate) struct VerifyArgs {
    /// fewer shapes: tokens 0 1 17 128, hidden sizes 48 2880 8192
    #[argh(switch)]
    quick: bool,

    /// token counts (default: 0 1 2 3 17 128 1000 2048)
    #[argh(option, arg_name = "n")]
    num_tokens: Vec<String>,

    /// hidden sizes, multiples of 16 up to 65536 (default: 48 2880 4096 7168 8192 16384)
    #[argh(option, arg_name = "n")]
    hidden_dim: Vec<String>,

    /// seed of the random inputs (default: 0)
    #[argh(option, arg_name = "n")]
    seed: Option<String>,

    /// put special numbers into every other row of the inputs: NaN, infinities, subnormals, zeros, the largest
    #[argh(switch)]
    special: bool,

    /// auto, cpu or cuda (default: auto, which is cuda if there are enough GPUs)
    #[argh(option, arg_name = "name")]
    backend: Option<String>,

    /// ranks of a group, 2 to 16, one size after the other (default: on GPUs 2, 3, 4 and one per GPU, else 2)
    #[argh(option, arg_name = "n")]
    nproc_per_node: Vec<String>,

    /// groups of that size that run at the same time (default: 1)
    #[argh(option, arg_name = "n")]
    groups: Option<String>,

    /// also withhold each rank in turn; the others must time out by name, and a new group must work
    #[argh(switch)]
    faults: bool,

    /// runs of each bfloat16 operation with a dependent kernel that reads the outputs at once (default: 0)
    #[argh(option, arg_name = "n")]
    dependents: Option<String>,

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

impl VerifyArgs {
    /// Checks every value.
    pub(crate) fn settings(self) -> Result<Settings, UsageError> {
        let default = if self.quick { Settings::quick() } else { Settings::default() };
        let tokens = |text: &str| number("--num-tokens", text, "a number of tokens", 0, None);
        let spans_hosts = self.hosts.as_ref().is_some_and(|hosts| hosts != "1");
        let (of_host, group_sizes) = match &self.nproc_per_node[..] {
            // The ranks of each host, of which the only group is made.
            [of_host] if spans_hosts => (Some(of_host.clone()), Vec::new()),
            [_, _, ..] if spans_hosts => {
                return Err(UsageError::new(
                    "--nproc-per-node: with --hosts, use one number: the ranks of each host",
                ));
            }
            texts => (None, list("--nproc-per-node", texts, ranks, default.group_sizes)?),
        };
        let job = JobArgs {
            backend: self.backend,
            nproc_per_node: of_host,
            groups: self.groups,
            hosts: self.hosts,
            partial_sums: self.partial_sums,
            oversubscribe: self.oversubscribe,
            deadline: self.deadline,
        };
        let largest = group_sizes.iter().copied().max();
        let settings = Settings {
            num_tokens: list("--num-tokens", &self.num_tokens, tokens, default.num_tokens)?,
            hidden_dims: list("--hidden-dim", &self.hidden_dim, hidden_dim, default.hidden_dims)?,
            seed: one(self.seed, seed, default.seed)?,
            special: self.special,
            job: job.parse(JobOptions { nproc_per_node: largest, ..default.job })?,
            group_sizes,
            conversions: default.conversions,
            faults: self.faults,
            dependents: one(self.dependents, dependents, default.dependents)?,
        };
        for problem in settings.problems() {
            check_operation(&problem.operation(Mode::Auto))?;
        }
        Ok(settings)
    }
}

fn dependents(text: &str) -> Result<u64, UsageError> {
    number("--dependents", text, "a number of runs", 0, None)
}
