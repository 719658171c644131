//! The command line, and the commands, each in a folder of its own with its arguments, its work and its report.
//!
//! A program that was started plainly checks its settings, and then starts itself once per rank. Each rank checks the
//! settings again, and takes part. Only rank 0 writes to the standard output.
//!
//! argh splits the arguments into options and writes the help. `values` and
//! [`job::options`] check every value. Parsing reads no file and starts no process; a command checks
//! its files before it runs.

mod arguments;
pub mod bench;
pub mod faults;
pub mod links;
mod normalize;
pub mod soak;
pub mod verify;

use std::{env, ffi::OsString, process::ExitCode};

#[cfg(test)]
use argh::FlagInfo;
use argh::{ArgsInfo, FlagInfoKind, FromArgs, Optionality};

use crate::{
    exit::{self, Failure, print},
    job::{self, launch},
    usage::{PROGRAM, UsageError},
};
use normalize::{Takes, normalize};

/// Runs the program with the process's arguments and environment.
pub fn main() -> ExitCode {
    let tied = launch::tie_to_parent().map_err(|error| Failure::Failed(error.to_string()));
    exit::code(tied.and_then(|()| run()))
}

fn run() -> Result<u8, Failure> {
    prepare().map_err(job::decline)?()
}

/// A command whose settings have been checked.
type Prepared = Box<dyn FnOnce() -> Result<u8, Failure>>;

fn prepare() -> Result<Prepared, Failure> {
    Ok(match parse(env::args_os().skip(1))? {
        Invocation::Print(text) => Box::new(move || print(&text).map(|()| exit::SUCCESS)),
        Invocation::Bench(settings) => prepared(bench::Bench::new(*settings)?, bench::Bench::run),
        Invocation::Verify(settings) => prepared(verify::Verify::new(settings)?, verify::Verify::run),
        Invocation::Links(settings) => prepared(links::Links::new(settings)?, links::Links::run),
        Invocation::Soak(settings) => prepared(soak::Soak::new(settings)?, soak::Soak::run),
        Invocation::Faults(settings) => prepared(faults::Faults::new(settings)?, faults::Faults::run),
    })
}

fn prepared<C: 'static>(command: C, run: fn(C) -> Result<u8, Failure>) -> Prepared {
    Box::new(move || run(command))
}

/// The request that the arguments make.
#[derive(Clone, Debug, PartialEq)]
pub enum Invocation {
    /// Run the benchmark.
    Bench(Box<bench::settings::Settings>),
    /// Run the verification matrix.
    Verify(verify::settings::Settings),
    /// Measure the links between ranks.
    Links(links::settings::Settings),
    /// Run random operations.
    Soak(soak::settings::Settings),
    /// Make ranks fail.
    Faults(faults::settings::Settings),
    /// Print the help or the version.
    Print(String),
}

/// Measure and verify fused all-reduce, residual add, RMSNorm and quantization.
#[derive(FromArgs, ArgsInfo)]
#[argh(
    help_triggers("-h", "--help", "help"),
    usage = "<command> [<options>]",
    example = "{command_name} bench --help",
    note = "Under torchrun, mpirun, mpiexec or srun the program is a rank of their job. FUSED_COLLECTIVE_KEY, a text that all ranks \
            of a job have in common, tells jobs apart where the launcher does not.",
    note = "Ranks of several hosts meet at MASTER_ADDR, at the port after MASTER_PORT, or at FUSED_COLLECTIVE_ADDRESS, HOST:PORT. \
            Only those with the same FUSED_COLLECTIVE_SECRET join, a random text such as that of `openssl rand -hex 32`.",
    note = "Exit status: 0 success; 1 something failed; 2 the command line is not valid."
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
#[expect(
    clippy::large_enum_variant,
    reason = "the program has one value of it, and argh does not parse into a box"
)]
enum Command {
    Bench(bench::args::BenchArgs),
    Verify(verify::args::VerifyArgs),
    Links(links::args::LinksArgs),
    Soak(soak::args::SoakArgs),
    Faults(faults::args::FaultsArgs),
}

/// Reads the program's arguments, without its name.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, UsageError> {
    let args: Vec<String> = args
        .into_iter()
        .map(|arg| {
            arg.into_string().map_err(|arg| UsageError::new(format_args!("{arg:?} is not valid UTF-8")))
        })
        .collect::<Result<_, _>>()?;
    let all = args;
    let args = normalize(&all, |option| takes(command(&all), option)).map_err(UsageError::new)?;
    let args: Vec<&str> = args.iter().map(|arg| &**arg).collect();
    let top = match TopLevel::from_args(&[PROGRAM], &args) {
        Ok(top) => top,
        Err(exit) if exit.status.is_ok() => return Ok(Invocation::Print(exit.output)),
        Err(exit) => return Err(refusal(&exit.output, command(&all))),
    };
    match top.command {
        _ if top.version => Ok(Invocation::Print(format!("{PROGRAM} {}\n", env!("CARGO_PKG_VERSION")))),
        Some(Command::Bench(args)) => args.settings().map(|settings| Invocation::Bench(Box::new(settings))),
        Some(Command::Verify(args)) => args.settings().map(Invocation::Verify),
        Some(Command::Links(args)) => args.settings().map(Invocation::Links),
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

/// The least likeness, by Jaro from 0 to 1, of words of which one may be meant by the other: the one that clap takes.
const LIKENESS: f64 = 0.7;

/// The error of arguments to `command` that argh refuses with `output`: with the word that may have been meant, and the help
/// that has them all.
fn refusal(output: &str, command: &str) -> UsageError {
    let text = output.split_whitespace().collect::<Vec<_>>().join(" ");
    let info = TopLevel::get_args_info();
    let of_command = info.commands.iter().find(|sub| sub.name == command);
    let help = of_command.map_or(format!("{PROGRAM} --help"), |_| format!("{PROGRAM} {command} --help"));
    let Some(unknown) = text.strip_prefix("Unrecognized argument: ") else {
        return UsageError::new(format_args!("{text}; see {help}"));
    };
    let known: Vec<&str> = match of_command {
        Some(sub) => sub.command.flags.iter().map(|flag| flag.long).chain(["--help"]).collect(),
        None => info.commands.iter().map(|sub| sub.name).chain(["--version", "--help"]).collect(),
    };
    // A part of a name is as good as a name with an error.
    let likeness = |name: &str| {
        let part = unknown.trim_start_matches('-');
        if part.len() > 2 && name.contains(part) { 1.0 } else { strsim::jaro(unknown, name) }
    };
    let best = known.into_iter().max_by(|one, other| likeness(one).total_cmp(&likeness(other)));
    let meant = best.filter(|name| likeness(name) >= LIKENESS);
    let meant = meant.map_or_else(String::new, |name| format!(" (did you mean {name}?)"));
    let what = match of_command {
        _ if unknown.starts_with('-') => "option",
        Some(_) => "argument",
        None => "command",
    };
    let of = of_command.map_or_else(String::new, |_| format!(" of {command}"));
    UsageError::new(format_args!("{unknown}: no {what}{of}{meant}; see {help}"))
}

/// The command that `args` name: the first argument that is neither an option nor a help trigger. No option before it has
/// a value.
fn command(args: &[String]) -> &str {
    args.iter().map(String::as_str).find(|arg| !arg.starts_with('-') && *arg != "help").unwrap_or_default()
}

/// The number of values that an option of a command takes.
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

/// The name of a command, and its options. An option with a value has the word that stands for it in the help.
#[cfg(test)]
pub(crate) type CommandOptions = (String, Vec<(String, Option<String>)>);

/// Every command.
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
