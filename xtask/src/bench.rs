//! `cargo xtask bench`: the release program's benchmark, with the options as they were given.

use std::{
    env,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Error, Result, anyhow};
use fused_collective_build::{Assembly, Processor};

use crate::{cmd, kernels};

/// Tells the program where its kernels are.
const KERNELS: &str = "FUSED_COLLECTIVE_PTX";

/// Becomes `fused-collective bench OPTIONS`, built if need be, so that signals, the exit status and relative paths
/// are the program's own (`cargo run` hands over its process in the same way). Returns only an error.
///
/// On a machine with NVIDIA GPUs the kernels for them are built first.
pub(crate) fn exec(options: &[String]) -> Error {
    let mut cargo = cmd::cargo("run");
    cargo
        .args(["--release", "--package", "fused-collective-cli", "--bin", "fused-collective", "--", "bench"])
        .args(options);
    let processors =
        if env::var_os(KERNELS).is_none() && uses_gpus(options) { processors_here() } else { Vec::new() };
    if !processors.is_empty() {
        match build(&processors) {
            Ok(folder) => drop(cargo.env(KERNELS, folder)),
            Err(error) => eprintln!("warning: no kernels for the GPUs of this machine: {error:#}"),
        }
    }
    anyhow!(cargo.exec()).context("cannot start cargo")
}

/// Whether a benchmark with these options may run on GPUs.
fn uses_gpus(options: &[String]) -> bool {
    let cpu = |pair: &[String]| pair[0] == "--backend" && pair[1] == "cpu";
    !options.windows(2).any(cpu)
        && !options.iter().any(|option| option == "--backend=cpu" || option == "--help")
}

/// The processors of the GPUs that the driver's own program lists; none where there is no such program.
fn processors_here() -> Vec<Processor> {
    let mut list = Command::new("nvidia-smi");
    list.args(["--query-gpu=compute_cap", "--format=csv,noheader"])
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    let Ok(output) = list.output() else { return Vec::new() };
    processors(&String::from_utf8_lossy(&output.stdout))
}

/// The processors of GPUs with these compute capabilities, one a line, each processor once.
fn processors(capabilities: &str) -> Vec<Processor> {
    let mut processors = Vec::new();
    for line in capabilities.lines() {
        let capability = line.trim().replace('.', "").parse().ok();
        if let Some(processor) = capability.and_then(kernels::processor_for)
            && !processors.contains(&processor)
        {
            processors.push(processor);
        }
    }
    processors
}

fn build(processors: &[Processor]) -> Result<PathBuf> {
    eprintln!("a few minutes the first time");
    kernels::build(processors, Assembly::Skip)?;
    kernels::folder()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_processor_is_built_for_once() {
        let names = |text| processors(text).into_iter().map(Processor::name).collect::<Vec<_>>();
        assert_eq!(names("9.0\n9.0\n"), ["sm_90"]);
        assert_eq!(names("8.0\n12.0\n8.6\n"), ["sm_80", "sm_120a"]);
        assert_eq!(names("7.5\n[N/A]\n\n"), [""; 0]);
    }

    #[test]
    fn kernels_are_not_built_for_the_cpu_backend() {
        let uses = |words: &[&str]| uses_gpus(&words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>());
        assert!(uses(&[]) && uses(&["--backend", "auto"]) && uses(&["--num-tokens", "1"]));
        assert!(
            !uses(&["--backend", "cpu"]) && !uses(&["--seed", "1", "--backend=cpu"]) && !uses(&["--help"])
        );
    }
}
