//! The options of `fused-collective bench`.

use argh::{ArgsInfo, FromArgs};
use fused_collective_core::fusion::Mode;

use super::settings::{Outputs, Settings};
use crate::{
    job::options::JobArgs,
    usage::UsageError,
    values::{check_operation, file, hidden_dim, list, name, number, one, positive, seconds, seed},
};

/// The most trials, and the most warm-up trials. Memory and the report hold the time of every trial.
const MAX_TRIALS: u32 = 1_000_000;
/// The longest deadline for peers: a day, in seconds.
const MAX_PEER_DEADLINE: f64 = 86_400.0;

/// Benchmark fused operations against separate ones.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    subcommand,
    name = "bench",
    help_triggers("-h", "--help", "help"),
    usage = "[<options>]",
    example = "{command_name} --num-tokens 128 512 --dtypes float16 bfloat16 --nproc-per-node 4",
    example = "{command_name} --quant-modes none,fp8 --output-file results.md --plot results.svg",
    example = "{command_name} --json today.json --compare yesterday.json --tolerance 5",
    example = "{command_name} --from results.json --plot results.svg",
    example = "{command_name} --peers flashinfer,torch --python ~/venv/bin/python",
    example = "torchrun --no-python --nproc_per_node=4 {command_name}",
    note = "Every variant is verified before it is timed and after. Its row has its largest error.",
    note = "On CPUs each rank is pinned to a core of its own while it is timed, one of those that it may run",
    note = "on (taskset, cgroups, a launcher's binding). The report says which.",
    note = "Started plainly, the program starts its own ranks. Under torchrun, mpirun or srun it is a rank.",
    note = "List values are separated by spaces, commas or both. A repeated value counts once.",
    note = "Files are checked before the run, and written when it is complete. An output - is the standard",
    note = "output, and the tables then go to the standard error; an input - is the standard input.",
    note = "If --json names the file of --compare, and a row is slower or a variant failed, the file stays",
    note = "as it is, and the new report goes to a file beside it whose name ends in .new.",
    note = "Exit status: 0 success; 1 a variant or a rank failed, or a row is slower than the tolerance",
    note = "allows; 2 the command line is not valid."
)]
pub(crate) struct BenchArgs {
    /// token counts (default: 128 512 1024 2048)
    #[argh(option, arg_name = "n")]
    num_tokens: Vec<String>,

    /// hidden size, a multiple of 16 up to 65536 (default: 8192)
    #[argh(option, arg_name = "n")]
    hidden_dim: Option<String>,

    /// element types: float16, bfloat16, float32 (default: bfloat16)
    #[argh(option, arg_name = "dtype")]
    dtypes: Vec<String>,

    /// quantization modes: none, fp8, fp4, fp8_per_token, fp8_group128, fp8_group128_f32, fp8_group64, mxfp8, mxfp4
    /// (default: none,fp8,fp4)
    #[argh(option, arg_name = "mode")]
    quant_modes: Vec<String>,

    /// fused steps: all-reduce-norm, post-norm (the sum is normalized before the residual is added, as in Gemma 3) or moe
    /// (each rank adds what it makes of the rows of 8 experts and a shared one) (default: all-reduce-norm)
    #[argh(option, arg_name = "name")]
    pattern: Option<String>,

    /// formats of rows between ranks in fused variants: exact, int8, int4 (default: exact)
    #[argh(option, arg_name = "name")]
    wire: Vec<String>,

    /// residual: replicated (on every rank), sharded (measures also fused variants with each row on its token's owner
    /// only), or none (default: replicated)
    #[argh(option, arg_name = "how")]
    residual: Option<String>,

    /// same as --residual none
    #[argh(switch)]
    no_residual: bool,

    /// leave the one-shot variants out
    #[argh(switch)]
    no_oneshot: bool,

    /// trials that do not count, before those that do (default: 5)
    #[argh(option, arg_name = "n")]
    warmup: Option<String>,

    /// trials that count (default: 20)
    #[argh(option, arg_name = "n")]
    trials: Option<String>,

    /// seed of the random inputs (default: 0)
    #[argh(option, arg_name = "n")]
    seed: Option<String>,

    /// auto, cpu or cuda (default: auto, which is cuda if there are enough GPUs)
    #[argh(option, arg_name = "name")]
    backend: Option<String>,

    /// all-reduces of the separate operations on GPUs: nccl, nccl-symmetric (over symmetric windows), custom (default: all)
    #[argh(option, arg_name = "name")]
    allreduce: Vec<String>,

    /// ranks to start, 2 to 16 (default: one per GPU, else 2)
    #[argh(option, arg_name = "n")]
    nproc_per_node: Option<String>,

    /// for tests, hosts to simulate on this one, each with --nproc-per-node ranks (default: 1)
    #[argh(option, arg_name = "n")]
    hosts: Option<String>,

    /// type of the sums that cross between hosts: f32 or element (default: f32)
    #[argh(option, arg_name = "type")]
    partial_sums: Option<String>,

    /// let ranks share a GPU: results are right, times are meaningless
    #[argh(switch)]
    oversubscribe: bool,

    /// longest wait for another rank, or for a pipe's writer, in seconds (default: 10)
    #[argh(option, arg_name = "seconds")]
    deadline: Option<String>,

    /// read tensors from memory, not from a cache: the operations of a trial take turns on copies of them
    #[argh(switch)]
    cold: bool,

    /// write over the inputs in fused variants: norm_out over input, residual_out over residual
    #[argh(switch)]
    in_place: bool,

    /// other packages to measure, if Python has them: flashinfer, torch (default: none)
    #[argh(option, arg_name = "name")]
    peers: Vec<String>,

    /// path of the Python that runs the peers (default: python3)
    #[argh(option, arg_name = "program")]
    python: Option<String>,

    /// longest silence of a peer, in seconds; some compile their kernels first (default: 300)
    #[argh(option, arg_name = "seconds")]
    peer_deadline: Option<String>,

    /// write a Markdown report to this file
    #[argh(option, arg_name = "file")]
    output_file: Option<String>,

    /// write every figure to this file as JSON, for scripts and for --compare
    #[argh(option, arg_name = "file")]
    json: Option<String>,

    /// plot time over tokens into this SVG file: the fastest separate variant, each fused one, each peer's best
    #[argh(option, arg_name = "file")]
    plot: Option<String>,

    /// plot every variant
    #[argh(switch)]
    plot_all: bool,

    /// show the JSON report of an earlier run, and measure nothing
    #[argh(option, arg_name = "file")]
    from: Option<String>,

    /// compare with the JSON report of an earlier run
    #[argh(option, arg_name = "file")]
    compare: Option<String>,

    /// slowdown in percent past which --compare fails (default: 10)
    #[argh(option, arg_name = "percent")]
    tolerance: Option<String>,
}

impl BenchArgs {
    /// Checks every value.
    pub(crate) fn settings(self) -> Result<Settings, UsageError> {
        let default = Settings::default();
        let tokens = |text: &str| number("--num-tokens", text, "a number of tokens", 1, None);
        let trials = |option, from| {
            move |text: &str| number(option, text, "a number of trials", from, Some(MAX_TRIALS))
        };
        let (use_residual, sharded_residual) = match (self.residual.as_deref(), self.no_residual) {
            (None, is_none) => (!is_none, false),
            (Some("none"), _) => (false, false),
            (Some("replicated"), false) => (true, false),
            (Some("sharded"), false) => (true, true),
            (Some(how @ ("replicated" | "sharded")), true) => {
                return Err(UsageError::new(format_args!(
                    "--residual: '{how}' and --no-residual contradict each other: leave one out"
                )));
            }
            (Some(how), _) => {
                return Err(UsageError::new(format_args!(
                    "--residual: '{how}' is not a kind of residual: use replicated, sharded or none"
                )));
            }
        };
        let settings = Settings {
            num_tokens: list("--num-tokens", &self.num_tokens, tokens, default.num_tokens)?,
            hidden_dim: one(self.hidden_dim, hidden_dim, default.hidden_dim)?,
            dtypes: list("--dtypes", &self.dtypes, |text| name("--dtypes", text), default.dtypes)?,
            quant_modes: list(
                "--quant-modes",
                &self.quant_modes,
                |text| name("--quant-modes", text),
                default.quant_modes,
            )?,
            pattern: one(self.pattern, |text| name("--pattern", text), default.pattern)?,
            wires: list("--wire", &self.wire, |text| name("--wire", text), default.wires)?,
            use_residual,
            sharded_residual,
            oneshot: !self.no_oneshot,
            warmup: one(self.warmup, trials("--warmup", 0), default.warmup)?,
            trials: one(self.trials, trials("--trials", 1), default.trials)?,
            seed: one(self.seed, seed, default.seed)?,
            job: JobArgs {
                backend: self.backend,
                nproc_per_node: self.nproc_per_node,
                groups: None,
                hosts: self.hosts,
                partial_sums: self.partial_sums,
                oversubscribe: self.oversubscribe,
                deadline: self.deadline,
            }
            .parse(default.job)?,
            all_reduces: list(
                "--allreduce",
                &self.allreduce,
                |text| name("--allreduce", text),
                default.all_reduces,
            )?,
            cold: self.cold,
            in_place: self.in_place,
            peers: list("--peers", &self.peers, |text| name("--peers", text), default.peers)?,
            peer_deadline_seconds: one(
                self.peer_deadline,
                |text| seconds("--peer-deadline", text, MAX_PEER_DEADLINE),
                default.peer_deadline_seconds,
            )?,
            python: file("--python", self.python)?.unwrap_or(default.python),
            tolerance_percent: one(
                self.tolerance,
                |text| positive("--tolerance", text, "a percentage", None),
                default.tolerance_percent,
            )?,
            outputs: Outputs {
                output_file: file("--output-file", self.output_file)?,
                json: file("--json", self.json)?,
                plot: file("--plot", self.plot)?,
                plot_all: self.plot_all,
                from: file("--from", self.from)?,
                compare: file("--compare", self.compare)?,
            },
        };
        if settings.outputs.from.is_some() && !settings.is_default_measurement() {
            return Err(UsageError::new(
                "--from: it shows a report and measures nothing, so options of a measurement have no effect: \
                 use only --output-file, --json, --plot, --plot-all, --compare, --tolerance and --deadline with it",
            ));
        }
        for case in settings.cases() {
            check_operation(&settings.operation(case, Mode::Auto))?;
        }
        Ok(settings)
    }
}
