//! The options of `fused-collective verify`.

use argh::{ArgsInfo, FromArgs};
use fused_collective_core::fusion::Mode;

use crate::{
    commands::{
        values::{
            check_groups, check_operation, deadline, groups, hidden_dim, list, name, number, one, ranks, seed,
        },
        verify::run::Settings,
    },
    usage::UsageError,
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
    note = "Every case: all elements against the reference, all ranks and a repeated run bit-identical,",
    note = "one-shot's residual_out bit-identical to two-shot's, and nothing else read or written: not the",
    note = "inputs, not a byte before or after a tensor, not the workspace where it holds no data.",
    note = "Prints a line for each element type, quantization and hidden size, and names cases that fail.",
    note = "Started plainly, the program starts its own ranks. Under torchrun, mpirun or srun it is one.",
    note = "Lists are given with spaces, with commas, or both. A repeated value counts once.",
    note = "Exit status: 0 all well; 1 a case or a rank failed; 2 the command line is not valid."
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

    /// special numbers in every other row of the inputs: NaN, infinities, subnormals, zeros, the largest
    #[argh(switch)]
    special: bool,

    /// auto, cpu or cuda (default: auto, which is cuda where there are GPUs enough)
    #[argh(option, arg_name = "name")]
    backend: Option<String>,

    /// ranks of a group, 2 to 16, one size after the other (default: on GPUs 2, 3, 4 and as many as there are, else 2)
    #[argh(option, arg_name = "n")]
    nproc_per_node: Vec<String>,

    /// groups that run at the same time, each of so many ranks (default: 1)
    #[argh(option, arg_name = "n")]
    groups: Option<String>,

    /// keep each rank in turn from an operation too: the others must say so in time, and work again when made anew
    #[argh(switch)]
    faults: bool,

    /// run bfloat16 operations so often with kernels that depend on them and read the outputs at once (default: 0)
    #[argh(option, arg_name = "n")]
    dependents: Option<String>,

    /// let ranks share a GPU: slow but right
    #[argh(switch)]
    oversubscribe: bool,

    /// longest wait for another rank, in seconds (default: 10)
    #[argh(option, arg_name = "seconds")]
    deadline: Option<String>,
}

impl VerifyArgs {
    pub(crate) fn settings(self) -> Result<Settings, UsageError> {
        let default = if self.quick { Settings::quick() } else { Settings::default() };
        let tokens = |text: &str| number("--num-tokens", text, "a number of tokens", 0, None);
        let settings = Settings {
            num_tokens: list("--num-tokens", &self.num_tokens, tokens, default.num_tokens)?,
            hidden_dims: list("--hidden-dim", &self.hidden_dim, hidden_dim, default.hidden_dims)?,
            seed: one(self.seed, seed, default.seed)?,
            special: self.special,
            deadline_seconds: one(self.deadline, deadline, default.deadline_seconds)?,
            backend: one(self.backend, |text| name("--backend", text), default.backend)?,
            nproc_per_node: list("--nproc-per-node", &self.nproc_per_node, ranks, default.nproc_per_node)?,
            groups: one(self.groups, groups, default.groups)?,
            oversubscribe: self.oversubscribe,
            conversions: default.conversions,
            faults: self.faults,
            dependents: one(self.dependents, dependents, default.dependents)?,
        };
        check_groups(settings.groups, settings.nproc_per_node.iter().copied().max())?;
        for problem in settings.problems() {
            check_operation(&problem.operation(Mode::Auto))?;
        }
        Ok(settings)
    }
}

fn dependents(text: &str) -> Result<u64, UsageError> {
    number("--dependents", text, "a number of runs", 0, None)
}
