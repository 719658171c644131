//! Builds, tests and benchmarks fused-collective: one file for each task, and `cmd` to run programs.

mod bench;
mod cmd;
mod cross;
mod dist;
mod doctor;
mod embedded;
mod gnu_ld;
mod kernels;
mod library;
mod modules;
mod packages;
mod races;
mod select;
mod structure;
mod test;
mod wheel;

use std::{
    env,
    ffi::OsString,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Result, bail};
use argh::{EarlyExit, FromArgs};
use fused_collective_build::{Assembly, Processor};

use crate::{cross::Target, test::Scope};

/// Builds, tests and benchmarks fused-collective.
#[derive(FromArgs)]
struct Args {
    #[argh(subcommand)]
    task: Task,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum Task {
    Bench(Bench),
    Dist(Dist),
    Doctor(Doctor),
    Kernels(Kernels),
    Ptx(Ptx),
    Test(Test),
    Wheel(Wheel),
}

/// Benchmark fused against separate operations; takes the options of `fused-collective bench`, --help included.
#[derive(FromArgs)]
#[argh(subcommand, name = "bench")]
struct Bench {
    /// options of `fused-collective bench`
    #[argh(positional, greedy)]
    options: Vec<String>,
}

/// Make a folder, and an archive of it, that runs on a machine with NVIDIA's driver and nothing else.
#[derive(FromArgs)]
#[argh(subcommand, name = "dist")]
struct Dist {
    /// where to put both (default: target/distribution)
    #[argh(option, arg_name = "folder")]
    output: Option<PathBuf>,

    /// a processor to have kernels for: sm_80, sm_90, sm_100a or sm_120a; may be repeated (default: all)
    #[argh(option, long = "cpu", arg_name = "cpu")]
    processors: Vec<Processor>,

    /// the architecture to build the program for: aarch64 (default: this machine's)
    #[argh(option, arg_name = "arch")]
    target: Option<Target>,
}

/// Show what this machine has of what the project can use, and what each missing thing would enable.
#[derive(FromArgs)]
#[argh(subcommand, name = "doctor")]
struct Doctor {}

/// Build the kernels as PTX and machine code, and put them into the library, which then carries them.
#[derive(FromArgs)]
#[argh(subcommand, name = "kernels")]
struct Kernels {
    /// a processor to have kernels for: sm_80, sm_90, sm_100a or sm_120a; may be repeated (default: all)
    #[argh(option, long = "cpu", arg_name = "cpu")]
    processors: Vec<Processor>,
}

/// Build and check the kernels as PTX in target/ptx, and show the registers of each.
#[derive(FromArgs)]
#[argh(subcommand, name = "ptx")]
struct Ptx {
    /// a processor to build for: sm_80, sm_90, sm_100a or sm_120a; may be repeated (default: all)
    #[argh(option, long = "cpu", arg_name = "cpu")]
    processors: Vec<Processor>,
}

/// Run every check and test; the last line says how many passed and failed.
#[derive(FromArgs)]
#[argh(subcommand, name = "test")]
struct Test {
    /// only format, lints, structure and the tests that are fast
    #[argh(switch)]
    quick: bool,

    /// only the build and the tests for aarch64, which run under emulation
    #[argh(option, arg_name = "arch")]
    target: Option<Target>,

    /// only the specification's digest: on this machine, aarch64 and a Cortex-M under emulation, as WebAssembly and as PTX
    #[argh(switch)]
    embedded: bool,
}

/// Build the Python package as a wheel that carries the kernels.
#[derive(FromArgs)]
#[argh(subcommand, name = "wheel")]
struct Wheel {
    /// only build it for tests, and test it on CPUs
    #[argh(switch)]
    test: bool,

    /// where to put it (default: target/wheels)
    #[argh(option, arg_name = "folder")]
    output: Option<PathBuf>,

    /// a processor to have kernels for: sm_80, sm_90, sm_100a or sm_120a; may be repeated (default: all)
    #[argh(option, long = "cpu", arg_name = "cpu")]
    processors: Vec<Processor>,

    /// the architecture to build it for: aarch64 (default: this machine's)
    #[argh(option, arg_name = "arch")]
    target: Option<Target>,
}

fn main() -> ExitCode {
    let text = |argument: OsString| {
        argument.into_string().map_err(|bytes| EarlyExit::from(format!("{bytes:?} is not valid UTF-8")))
    };
    match env::args_os().skip(1).map(text).collect::<Result<_, _>>().and_then(parse) {
        Ok(task) => run(task).unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }),
        Err(EarlyExit { output, status: Ok(()) }) => {
            // A reader that closes the pipe early, as `head` does, has what it wants.
            let _ = writeln!(io::stdout(), "{output}");
            ExitCode::SUCCESS
        }
        Err(EarlyExit { output, status: Err(()) }) => {
            eprintln!("{output}");
            ExitCode::from(2)
        }
    }
}

/// The task that `args` (without the program's name) ask for.
fn parse(mut args: Vec<String>) -> Result<Task, EarlyExit> {
    if args.first().is_some_and(|task| task == "bench") {
        // What follows is for the program to read, `--help` and `--` included.
        args.insert(1, "--".to_owned());
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    Args::from_args(&["cargo", "xtask"], &args).map(|args| args.task)
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Bench(Bench { options }) => Err(bench::exec(&options)),
        Task::Dist(Dist { output, processors, target }) => {
            done(dist::make(output, &chosen(processors), target))
        }
        Task::Doctor(Doctor {}) => done(doctor::run()),
        Task::Kernels(Kernels { processors }) => done(kernels::embed(&chosen(processors)).map(drop)),
        Task::Ptx(Ptx { processors }) => {
            let processors = chosen(processors);
            for build in [kernels::build, kernels::build_examples] {
                build(&processors, Assembly::Check)?.iter().for_each(|module| print!("{module}"));
            }
            Ok(ExitCode::SUCCESS)
        }
        Task::Wheel(Wheel { test: true, .. }) => {
            done(wheel::tests().and_then(|mut tests| cmd::run(&mut tests)))
        }
        Task::Wheel(Wheel { output, processors, target, .. }) => {
            done(wheel::make(output, &chosen(processors), target))
        }
        Task::Test(Test { quick, target, embedded }) => match (quick, target, embedded) {
            (false, None, false) => Ok(test::run(Scope::All)),
            (true, None, false) => Ok(test::run(Scope::Quick)),
            (false, Some(target), false) => Ok(test::run(Scope::Target(target))),
            (false, None, true) => Ok(test::run(Scope::Embedded)),
            _ => bail!("--quick, --target and --embedded are parts of the tests: choose one"),
        },
    }
}

fn done(result: Result<()>) -> Result<ExitCode> {
    result.map(|()| ExitCode::SUCCESS)
}

/// The processors that were named, or all.
fn chosen(processors: Vec<Processor>) -> Vec<Processor> {
    if processors.is_empty() { Processor::ALL.to_vec() } else { processors }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(words: &[&str]) -> Result<Task, EarlyExit> {
        parse(words.iter().map(|&word| word.to_owned()).collect())
    }

    #[test]
    fn the_options_of_bench_reach_the_program_as_they_are() {
        for options in
            [&[][..], &["--help"], &["--num-tokens", "1", "512", "--x=y", "-h"], &["--", "a", "--", "b"]]
        {
            let Ok(Task::Bench(bench)) = parse_words(&[&["bench"], options].concat()) else {
                panic!("{options:?} is not taken");
            };
            assert_eq!(bench.options, options);
        }
    }

    #[test]
    fn help_names_every_task_and_an_unknown_one_is_an_error() {
        let Err(help) = parse_words(&["--help"]) else { panic!("--help is taken for a task") };
        assert!(help.status.is_ok());
        for task in ["bench", "dist", "doctor", "kernels", "ptx", "test", "wheel"] {
            assert!(help.output.contains(task), "{}", help.output);
        }
        let Err(error) = parse_words(&["tset"]) else { panic!("tset is taken for a task") };
        assert!(error.status.is_err());
        assert!(error.output.contains("tset"), "{}", error.output);
    }

    #[test]
    fn a_target_that_there_is_not_is_an_error() {
        for task in ["test", "dist"] {
            assert!(parse_words(&[task, "--target", "aarch64"]).is_ok());
            let Err(error) = parse_words(&[task, "--target", "arm"]) else {
                panic!("arm is taken for a target")
            };
            assert!(error.output.contains("arm is no target: aarch64 is"), "{}", error.output);
        }
    }
}
