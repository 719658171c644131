//! `cargo xtask bench`: the release program's benchmark, with the options as they were given.

use std::{
    env,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Error, Result, anyhow};

use crate::{cmd, ptx};

/// Tells the program where its kernels are.
const KERNELS: &str = "FUSED_COLLECTIVE_PTX";

/// Becomes `fused-collective bench OPTIONS`, built if need be, so that signals, the exit status and relative paths
/// are the program's own (`cargo run` hands over its process in the same way). Returns only an error.
///
/// On a machine with NVIDIA GPUs the kernels for them are built first.
pub(crate) fn exec(options: &[String]) -> Error {
    let mut cargo = cmd::cargo("run");
    cargo
        .args(["--release", "--package", "fused-collective", "--bin", "fused-collective", "--", "bench"])
        .args(options);
    let gpus = if env::var_os(KERNELS).is_none() && uses_gpus(options) { gpus_here() } else { Vec::new() };
    if !gpus.is_empty() {
        match kernels(&gpus) {
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

/// The kinds of the GPUs that the driver's own program lists; none where there is no such program.
fn gpus_here() -> Vec<&'static ptx::Gpu> {
    let mut list = Command::new("nvidia-smi");
    list.args(["--query-gpu=compute_cap", "--format=csv,noheader"])
        .stdin(Stdio::null())
        .stderr(Stdio::null());
    let Ok(output) = list.output() else { return Vec::new() };
    kinds(&String::from_utf8_lossy(&output.stdout))
}

/// The kinds of GPUs with these compute capabilities, one a line, each kind once.
fn kinds(capabilities: &str) -> Vec<&'static ptx::Gpu> {
    let mut kinds = Vec::new();
    for line in capabilities.lines() {
        let capability = line.trim().replace('.', "").parse().ok();
        if let Some(gpu) = capability.and_then(ptx::gpu_for)
            && !kinds.contains(&gpu)
        {
            kinds.push(gpu);
        }
    }
    kinds
}

fn kernels(gpus: &[&ptx::Gpu]) -> Result<PathBuf> {
    eprintln!("building the kernels (a few minutes the first time)");
    ptx::Compiler::new()?.build(gpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_gpu_is_built_for_once() {
        let cpus = |text| kinds(text).iter().map(|gpu| gpu.cpu).collect::<Vec<_>>();
        assert_eq!(cpus("9.0\n9.0\n"), ["sm_90"]);
        assert_eq!(cpus("8.0\n12.0\n8.6\n"), ["sm_80", "sm_120a"]);
        assert_eq!(cpus("7.5\n[N/A]\n\n"), [""; 0]);
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
