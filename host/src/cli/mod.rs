//! The command line: from arguments to a command's settings, or one line that says what is wrong with them.
//!
//! argh splits the arguments into options and writes the help; every value is checked here, so that each
//! error names the option, the value and what is valid. Nothing here touches the file system or starts
//! anything: whether files can be read and written is for
//! [`OutputFiles`](crate::report::outputs::OutputFiles) to say.

mod faults;
mod links;
mod normalize;
mod soak;
mod verify;

use std::{ffi::OsString, fmt, path::PathBuf, str::FromStr};

#[cfg(test)]
use argh::FlagInfo;
use argh::{ArgsInfo, FlagInfoKind, FromArgs, Optionality};
use fused_collective_core::{
    MAX_WORLD_SIZE,
    fusion::{Mode, Operation, OperationError},
};

use crate::{
    bounded::one_line,
    cuda,
    faults::Settings as FaultsSettings,
    links::Settings as LinksSettings,
    rendezvous::MIN_RANKS,
    settings::{Outputs, Settings},
    soak::Settings as SoakSettings,
    verify::Settings as VerifySettings,
};
use faults::FaultsArgs;
use links::LinksArgs;
use normalize::{Takes, normalize};
use soak::SoakArgs;
use verify::VerifyArgs;

/// The program's name, which starts every line it writes to stderr.
pub const PROGRAM: &str = "fused-collective";
/// Exit status of a run in which something failed: a variant, a case, a rank, or a comparison.
pub const EXIT_FAILED: u8 = 1;
/// Exit status of a run that was refused for what it was asked to do.
pub const EXIT_USAGE: u8 = 2;

/// The most trials, and the most to warm up: every trial's time is kept in memory and in the report.
const MAX_TRIALS: u32 = 1_000_000;
/// The longest deadline for ranks, in seconds: what kernels can wait. The same on every backend.
const MAX_DEADLINE: f64 = cuda::MAX_DEADLINE.as_secs() as f64;
/// The longest deadline for peers: a day, in seconds.
const MAX_PEER_DEADLINE: f64 = 86_400.0;

/// Why the program was refused: one line that names the value and what is valid. The program prints it after
/// its name and ends with [`EXIT_USAGE`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UsageError(String);

impl UsageError {
    /// An error with this text. Control characters (the text may quote a file name) are escaped, so that it
    /// stays one line.
    pub fn new(text: impl fmt::Display) -> Self {
        UsageError(one_line(&text.to_string()))
    }
}

impl fmt::Display for UsageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for UsageError {}

/// What the arguments ask for.
#[derive(Clone, Debug, PartialEq)]
pub enum Invocation {
    /// Run the benchmark.
    Bench(Box<Settings>),
    /// Run the verification matrix.
    Verify(VerifySettings),
    /// Measure the links between ranks, and write every figure to the file, if there is one.
    Links(LinksSettings, Option<PathBuf>),
    /// Run random operations.
    Soak(SoakSettings),
    /// Make ranks fail.
    Faults(FaultsSettings),
    /// Print this text (help, version) to stdout and end with status 0.
    Print(String),
}

/// Fused all-reduce, residual add, RMSNorm and quantization, against the separate operations.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    help_triggers("-h", "--help", "help"),
    usage = "<command> [<options>]",
    example = "{command_name} bench --help",
    note = "Exit status: 0 all well, 1 something failed, 2 the command line is not valid."
)]
struct TopLevel {
    /// print the version
    #[argh(switch)]
    version: bool,
    #[argh(subcommand)]
    command: Option<Command>,
}

#[derive(FromArgs, ArgsInfo)]
#[argh(subcommand)]
#[expect(clippy::large_enum_variant, reason = "there is one of it, and argh does not parse into a box")]
enum Command {
    Bench(BenchArgs),
    Verify(VerifyArgs),
    Links(LinksArgs),
    Soak(SoakArgs),
    Faults(FaultsArgs),
}

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
    example = "{command_name} --peers flashinfer,torch --python ~/venv/bin/python",
    example = "torchrun --no-python --nproc_per_node=4 {command_name}",
    note = "Every variant is verified before it is timed; its row says by how much it was off at most.",
    note = "Started plainly, the program starts its own ranks. Under torchrun, mpirun or srun it is one.",
    note = "Lists are given with spaces, with commas, or both. A repeated value counts once.",
    note = "Files appear when the run is done; one that cannot be written is found before it starts.",
    note = "Exit status: 0 all well; 1 a variant or a rank failed, or a row lost more than the tolerance;",
    note = "2 the command line is not valid."
)]
struct BenchArgs {
    /// token counts (default: 128 512 1024 2048)
    #[argh(option, arg_name = "n")]
    num_tokens: Vec<String>,

    /// hidden size, a multiple of 16 up to 65536 (default: 8192)
    #[argh(option, arg_name = "n")]
    hidden_dim: Option<String>,

    /// element types: float16, bfloat16, float32 (default: bfloat16)
    #[argh(option, arg_name = "dtype")]
    dtypes: Vec<String>,

    /// quantization modes: none, fp8, fp4 (default: none,fp8,fp4)
    #[argh(option, arg_name = "mode")]
    quant_modes: Vec<String>,

    /// the residual: replicated (on every rank), sharded (fused variants as well that have each row on its token's
    /// owner alone), or none (default: replicated)
    #[argh(option, arg_name = "how")]
    residual: Option<String>,

    /// the same as --residual none
    #[argh(switch)]
    no_residual: bool,

    /// leave the one-shot variants out
    #[argh(switch)]
    no_oneshot: bool,

    /// trials before those that count (default: 5)
    #[argh(option, arg_name = "n")]
    warmup: Option<String>,

    /// trials that count (default: 20)
    #[argh(option, arg_name = "n")]
    trials: Option<String>,

    /// seed of the random inputs (default: 0)
    #[argh(option, arg_name = "n")]
    seed: Option<String>,

    /// auto, cpu or cuda (default: auto, which is cuda where there are GPUs enough)
    #[argh(option, arg_name = "name")]
    backend: Option<String>,

    /// all-reduces of the separate operations on GPUs: nccl, custom (default: both)
    #[argh(option, arg_name = "name")]
    allreduce: Vec<String>,

    /// ranks to start, 2 to 16 (default: the GPUs there are, else 2)
    #[argh(option, arg_name = "n")]
    nproc_per_node: Option<String>,

    /// let ranks share a GPU: slow but right, and times mean nothing
    #[argh(switch)]
    oversubscribe: bool,

    /// longest wait for another rank, in seconds (default: 10)
    #[argh(option, arg_name = "seconds")]
    deadline: Option<String>,

    /// tensors come from memory, not from a cache: operations of a trial take turns on copies of them
    #[argh(switch)]
    cold: bool,

    /// packages of Python to measure as well, where they are installed: flashinfer, torch (default: none)
    #[argh(option, arg_name = "name")]
    peers: Vec<String>,

    /// python for the peers (default: python3)
    #[argh(option, arg_name = "program")]
    python: Option<String>,

    /// longest silence of a peer, in seconds: some compile their kernels first (default: 300)
    #[argh(option, arg_name = "seconds")]
    peer_deadline: Option<String>,

    /// write a Markdown report to this file
    #[argh(option, arg_name = "file")]
    output_file: Option<String>,

    /// write every figure to this file, for scripts and for --compare
    #[argh(option, arg_name = "file")]
    json: Option<String>,

    /// draw time over tokens into this SVG file
    #[argh(option, arg_name = "file")]
    plot: Option<String>,

    /// compare with the report that an earlier run wrote with --json
    #[argh(option, arg_name = "file")]
    compare: Option<String>,

    /// loss in percent past which --compare fails (default: 10)
    #[argh(option, arg_name = "percent")]
    tolerance: Option<String>,
}

/// Reads the program's arguments, without its name.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, UsageError> {
    let args: Vec<String> = args
        .into_iter()
        .map(|arg| {
            arg.into_string().map_err(|arg| UsageError::new(format_args!("{arg:?} is not valid UTF-8")))
        })
        .collect::<Result<_, _>>()?;
    let args = normalize(&args, |option| takes(command(&args), option)).map_err(UsageError::new)?;
    let args: Vec<&str> = args.iter().map(|arg| &**arg).collect();
    let top = match TopLevel::from_args(&[PROGRAM], &args) {
        Ok(top) => top,
        Err(exit) if exit.status.is_ok() => return Ok(Invocation::Print(exit.output)),
        Err(exit) => {
            let text = exit.output.split_whitespace().collect::<Vec<_>>().join(" ");
            return Err(UsageError::new(format_args!("{text}; see {PROGRAM} --help")));
        }
    };
    match top.command {
        _ if top.version => Ok(Invocation::Print(format!("{PROGRAM} {}\n", env!("CARGO_PKG_VERSION")))),
        Some(Command::Bench(args)) => args.settings().map(|settings| Invocation::Bench(Box::new(settings))),
        Some(Command::Verify(args)) => args.settings().map(Invocation::Verify),
        Some(Command::Links(args)) => {
            args.settings().map(|(settings, json)| Invocation::Links(settings, json))
        }
        Some(Command::Soak(args)) => args.settings().map(Invocation::Soak),
        Some(Command::Faults(args)) => args.settings().map(Invocation::Faults),
        None => {
            let line = format_args!(
                "no command given: use bench, verify, links, soak or faults, or see {PROGRAM} --help"
            );
            Err(UsageError::new(line))
        }
    }
}

/// The command that `args` name: the first that is no option and not a help trigger. No option comes before it that
/// has a value.
fn command(args: &[String]) -> &str {
    args.iter().map(String::as_str).find(|arg| !arg.starts_with('-') && *arg != "help").unwrap_or_default()
}

/// What an option of a command takes, as argh knows it.
fn takes(command: &str, option: &str) -> Takes {
    let info = TopLevel::get_args_info();
    let mut commands = info.commands.iter().filter(|sub| sub.name == command);
    let flag = commands.find_map(|sub| sub.command.flags.iter().find(|flag| flag.long == option));
    match flag {
        Some(flag) if matches!(flag.kind, FlagInfoKind::Switch) => Takes::Nothing,
        Some(flag) if flag.optionality == Optionality::Repeating => Takes::List,
        Some(_) => Takes::One,
        None => Takes::Nothing,
    }
}

/// The ranks that were asked for, if anyone asked: by `--nproc-per-node`, or by a launcher that set
/// `WORLD_SIZE` (or its like) to `launched`. With both they must agree, with neither the backend chooses.
pub fn world_size(nproc_per_node: Option<u32>, launched: Option<u32>) -> Result<Option<u32>, UsageError> {
    if let Some(world) = launched {
        check_world_size("WORLD_SIZE", world)?;
        if let Some(asked) = nproc_per_node.filter(|&asked| asked != world) {
            return Err(UsageError::new(format_args!(
                "--nproc-per-node: {asked} disagrees with the launcher's WORLD_SIZE, {world}: leave it out or use {world}"
            )));
        }
    }
    Ok(launched.or(nproc_per_node))
}

fn check_world_size(name: &str, ranks: u32) -> Result<(), UsageError> {
    if (MIN_RANKS..=MAX_WORLD_SIZE).contains(&ranks) {
        return Ok(());
    }
    let noun = if ranks == 1 { "rank" } else { "ranks" };
    Err(UsageError::new(format_args!(
        "{name}: {ranks} {noun} cannot form a group: use {MIN_RANKS} to {MAX_WORLD_SIZE}"
    )))
}

impl BenchArgs {
    fn settings(self) -> Result<Settings, UsageError> {
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
            use_residual,
            sharded_residual,
            oneshot: !self.no_oneshot,
            warmup: one(self.warmup, trials("--warmup", 0), default.warmup)?,
            trials: one(self.trials, trials("--trials", 1), default.trials)?,
            seed: one(self.seed, seed, default.seed)?,
            deadline_seconds: one(self.deadline, deadline, default.deadline_seconds)?,
            backend: one(self.backend, |text| name("--backend", text), default.backend)?,
            all_reduces: list(
                "--allreduce",
                &self.allreduce,
                |text| name("--allreduce", text),
                default.all_reduces,
            )?,
            nproc_per_node: self.nproc_per_node.map(|text| ranks(&text)).transpose()?,
            oversubscribe: self.oversubscribe,
            cold: self.cold,
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
                compare: file("--compare", self.compare)?,
            },
        };
        for case in settings.cases() {
            check_operation(&settings.operation(case, Mode::Auto))?;
        }
        Ok(settings)
    }
}

/// Refuses an operation that is none, and names the option that made it so.
fn check_operation(operation: &Operation) -> Result<(), UsageError> {
    operation.validate().map_err(|error| {
        let option = match error {
            OperationError::TooLarge { .. } => "--num-tokens",
            _ => "--hidden-dim",
        };
        UsageError::new(format_args!("{option}: {error}"))
    })
}

fn seed(text: &str) -> Result<u64, UsageError> {
    number("--seed", text, "a seed", 0, None)
}

fn hidden_dim(text: &str) -> Result<u64, UsageError> {
    number("--hidden-dim", text, "a hidden size", 0, None)
}

fn deadline(text: &str) -> Result<f64, UsageError> {
    seconds("--deadline", text, MAX_DEADLINE)
}

/// A time above 0 and up to `most`, in seconds. It is a nanosecond at least: what is shorter would be no time as a
/// [`Duration`](std::time::Duration).
fn seconds(option: &str, text: &str, most: f64) -> Result<f64, UsageError> {
    positive(option, text, "a number of seconds", Some(most)).map(|seconds| seconds.max(1e-9))
}

fn one<T>(
    text: Option<String>,
    parse: impl Fn(&str) -> Result<T, UsageError>,
    default: T,
) -> Result<T, UsageError> {
    text.map_or(Ok(default), |text| parse(&text))
}

/// The values of a list option, in order, each once. Commas separate, and may trail.
fn list<T: PartialEq>(
    option: &str,
    texts: &[String],
    parse: impl Fn(&str) -> Result<T, UsageError>,
    default: Vec<T>,
) -> Result<Vec<T>, UsageError> {
    if texts.is_empty() {
        return Ok(default);
    }
    let mut values = Vec::new();
    for text in texts.iter().flat_map(|text| text.split(',')).map(str::trim).filter(|text| !text.is_empty()) {
        let value = parse(text)?;
        if !values.contains(&value) {
            values.push(value);
        }
    }
    if values.is_empty() {
        Err(UsageError::new(format_args!("{option}: no value given")))
    } else {
        Ok(values)
    }
}

fn name<T: FromStr<Err: fmt::Display>>(option: &str, text: &str) -> Result<T, UsageError> {
    text.parse().map_err(|error| UsageError::new(format_args!("{option}: '{text}' is {error}")))
}

fn number<N: FromStr + PartialOrd + fmt::Display>(
    option: &str,
    text: &str,
    what: &str,
    from: N,
    to: Option<N>,
) -> Result<N, UsageError> {
    let number =
        text.parse().ok().filter(|number| *number >= from && to.as_ref().is_none_or(|to| number <= to));
    number.ok_or_else(|| {
        let valid = to.map_or(format!("whole numbers from {from}"), |to| format!("{from} to {to}"));
        UsageError::new(format_args!("{option}: '{text}' is not {what}: use {valid}"))
    })
}

/// A finite number above 0 and up to `most`, if there is a most.
fn positive(option: &str, text: &str, what: &str, most: Option<f64>) -> Result<f64, UsageError> {
    let valid = |number: &f64| number.is_finite() && *number > 0.0 && most.is_none_or(|most| *number <= most);
    text.parse().ok().filter(valid).ok_or_else(|| {
        let limit = most.map_or(String::new(), |most| format!(" and up to {most}"));
        UsageError::new(format_args!("{option}: '{text}' is not {what}: use a number above 0{limit}"))
    })
}

fn ranks(text: &str) -> Result<u32, UsageError> {
    let option = "--nproc-per-node";
    let ranks = text.parse().map_err(|_| {
        UsageError::new(format_args!(
            "{option}: '{text}' is not a number of ranks: use {MIN_RANKS} to {MAX_WORLD_SIZE}"
        ))
    })?;
    check_world_size(option, ranks).map(|()| ranks)
}

fn groups(text: &str) -> Result<u32, UsageError> {
    number("--groups", text, "a number of groups", 1, Some(MAX_WORLD_SIZE / MIN_RANKS))
}

/// Refuses more groups of so many ranks than one job can have.
fn check_groups(groups: u32, ranks: Option<u32>) -> Result<(), UsageError> {
    let ranks = ranks.unwrap_or(MIN_RANKS);
    if ranks * groups <= MAX_WORLD_SIZE {
        return Ok(());
    }
    Err(UsageError::new(format_args!(
        "--groups: {groups} groups of {ranks} ranks are more than {MAX_WORLD_SIZE} ranks: use fewer"
    )))
}

fn file(option: &str, text: Option<String>) -> Result<Option<PathBuf>, UsageError> {
    match text {
        Some(text) if text.is_empty() => {
            Err(UsageError::new(format_args!("{option}: '' is not a file name")))
        }
        text => Ok(text.map(PathBuf::from)),
    }
}

/// Of a command: its name, and its options as they are written, each with what stands for its value in the help if it
/// takes one.
#[cfg(test)]
pub(crate) type CommandOptions = (String, Vec<(String, Option<String>)>);

/// Every command, as argh knows it.
#[cfg(test)]
pub(crate) fn commands() -> Vec<CommandOptions> {
    let option = |flag: &FlagInfo<'_>| {
        let value = match flag.kind {
            FlagInfoKind::Switch => None,
            FlagInfoKind::Option { arg_name } => Some(arg_name.to_owned()),
        };
        (flag.long.to_owned(), value)
    };
    let commands = TopLevel::get_args_info().commands.into_iter();
    commands.map(|sub| (sub.name.to_owned(), sub.command.flags.iter().map(option).collect())).collect()
}

#[cfg(test)]
mod tests;
