//! The program's commands, each whole in a folder of its own: its arguments, what it does, its report.
//!
//! A program that was started plainly checks everything it can, then starts itself once per rank; each rank
//! checks again, which costs nothing, and takes part. Only rank 0 writes to the standard output.
//!
//! argh splits the arguments into options and writes the help; [`values`] checks every value. Reading them touches no file
//! and starts nothing: whether files can be read and written is for
//! [`OutputFiles`](crate::report::outputs::OutputFiles) to say.

pub mod bench;
pub mod faults;
pub mod links;
mod normalize;
pub mod soak;
pub(crate) mod values;
pub mod verify;

use std::{env, ffi::OsString, path::PathBuf, process::ExitCode};

#[cfg(test)]
use argh::FlagInfo;
use argh::{ArgsInfo, FlagInfoKind, FromArgs, Optionality};

use crate::{
    exit::{self, Failure, complain, print},
    job::launch,
    usage::{PROGRAM, UsageError},
};
use normalize::{Takes, normalize};

/// Runs the program with the process's arguments and environment.
pub fn main() -> ExitCode {
    if let Err(error) = launch::tie_to_parent() {
        complain(&error);
        return ExitCode::from(exit::FAILURE);
    }
    let status = match run() {
        Ok(status) => status,
        Err(Failure::Usage(line)) => {
            complain(&line);
            exit::USAGE
        }
        Err(Failure::Failed(line)) => {
            if !line.is_empty() {
                complain(&line);
            }
            exit::FAILURE
        }
        Err(Failure::Elsewhere) => exit::SECONDARY,
    };
    ExitCode::from(status)
}

fn run() -> Result<u8, Failure> {
    match parse(env::args_os().skip(1))? {
        Invocation::Print(text) => {
            print(&text)?;
            Ok(exit::SUCCESS)
        }
        Invocation::Bench(settings) => bench::Bench::new(*settings)?.run(),
        Invocation::Verify(settings) => verify::Verify::new(settings)?.run(),
        Invocation::Links(settings, json) => links::Links::new(settings, json)?.run(),
        Invocation::Soak(settings) => soak::Soak::new(settings)?.run(),
        Invocation::Faults(settings) => faults::Faults::new(settings)?.run(),
    }
}

/// What the arguments ask for.
#[derive(Clone, Debug, PartialEq)]
pub enum Invocation {
    /// Run the benchmark.
    Bench(Box<bench::settings::Settings>),
    /// Run the verification matrix.
    Verify(verify::Settings),
    /// Measure the links between ranks, and write every figure to the file, if there is one.
    Links(links::Settings, Option<PathBuf>),
    /// Run random operations.
    Soak(soak::Settings),
    /// Make ranks fail.
    Faults(faults::Settings),
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
