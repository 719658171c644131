//! Builds, tests and benchmarks fused-collective: one file for each task, and `cmd` to run programs.

mod bench;
mod cmd;
mod dist;
mod doctor;
mod modules;
mod ptx;
mod ptxas;
mod structure;
mod test;
mod toolchain;

use std::{
    env,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Result;
use argh::{EarlyExit, FromArgs};

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
    Ptx(Ptx),
    Test(Test),
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
    #[argh(option, long = "cpu", arg_name = "cpu", from_str_fn(ptx::parse_gpu))]
    gpus: Vec<&'static ptx::Gpu>,
}

/// Show what this machine has of what the project can use, and what each missing thing would enable.
#[derive(FromArgs)]
#[argh(subcommand, name = "doctor")]
struct Doctor {}

/// Build the kernels as PTX into target/ptx, and show the registers of each.
#[derive(FromArgs)]
#[argh(subcommand, name = "ptx")]
struct Ptx {
    /// a processor to build for: sm_80, sm_90, sm_100a or sm_120a; may be repeated (default: all)
    #[argh(option, long = "cpu", arg_name = "cpu", from_str_fn(ptx::parse_gpu))]
    gpus: Vec<&'static ptx::Gpu>,
}

/// Run every check and test; the last line says how many passed and failed.
#[derive(FromArgs)]
#[argh(subcommand, name = "test")]
struct Test {}

fn main() -> ExitCode {
    match parse(env::args().skip(1).collect()) {
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
        Task::Dist(Dist { output, gpus }) => dist::make(output, &chosen(gpus)).map(|()| ExitCode::SUCCESS),
        Task::Doctor(Doctor {}) => doctor::run().map(|()| ExitCode::SUCCESS),
        Task::Ptx(Ptx { gpus }) => {
            let gpus = chosen(gpus);
            let mut code = ExitCode::SUCCESS;
            for (gpu, result) in ptx::Builder::new()?.build(&gpus) {
                match result {
                    Ok(report) => print!("{report}"),
                    Err(error) => {
                        eprintln!("error: {}: {error:#}", gpu.cpu);
                        code = ExitCode::FAILURE;
                    }
                }
            }
            Ok(code)
        }
        Task::Test(Test {}) => Ok(test::run()),
    }
}

/// The processors that were named, or all.
fn chosen(gpus: Vec<&'static ptx::Gpu>) -> Vec<&'static ptx::Gpu> {
    if gpus.is_empty() { ptx::GPUS.iter().collect() } else { gpus }
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
        for task in ["bench", "dist", "doctor", "ptx", "test"] {
            assert!(help.output.contains(task), "{}", help.output);
        }
        let Err(error) = parse_words(&["tset"]) else { panic!("tset is taken for a task") };
        assert!(error.status.is_err());
        assert!(error.output.contains("tset"), "{}", error.output);
    }
}
