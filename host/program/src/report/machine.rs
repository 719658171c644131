//! The machine of a measurement.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

use crate::bounded::{self, PATIENCE};

/// The facts about a machine that a reader needs to judge figures. None of them identifies the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// The processor's name.
    pub cpu: String,
    /// Processors that this process may run on.
    pub cores: usize,
    /// Main memory in bytes.
    pub memory_bytes: u64,
    /// Operating system and its version.
    pub os: String,
    /// Kernel version.
    pub kernel: String,
    /// Processor architecture, as `x86_64` or `aarch64`.
    pub arch: String,
    /// The ranks' GPUs by name, in rank order; none if the ranks ran on the processor.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<String>,
    /// The CPUs that each rank may run on while it is timed, in rank order, as `0` or `0-3,8`; none if the ranks ran on GPUs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rank_cpus: Vec<String>,
    /// The version of the GPUs' driver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
}

/// The file in which the driver has its version.
const DRIVER_VERSION: &str = "/proc/driver/nvidia/version";
/// The most bytes of that file that are read. It has a few lines.
const MAX_VERSION: u64 = 64 << 10;

impl Machine {
    /// This machine. Facts that the system does not give are `unknown`, or 0.
    pub fn here() -> Machine {
        let wanted = RefreshKind::nothing()
            .with_cpu(CpuRefreshKind::nothing())
            .with_memory(MemoryRefreshKind::nothing().with_ram());
        let system = System::new_with_specifics(wanted).ok();
        let cpu =
            system.as_ref().and_then(|system| system.cpus().first()).map(|cpu| cpu.brand().trim().to_owned());
        let or_unknown =
            |text: Option<String>| text.filter(|t| !t.is_empty()).unwrap_or_else(|| "unknown".to_owned());
        Machine {
            cpu: or_unknown(cpu),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: system.map_or(0, |system| system.total_memory()),
            os: or_unknown(System::long_os_version().ok()),
            kernel: or_unknown(System::kernel_version().ok()),
            arch: std::env::consts::ARCH.to_owned(),
            gpus: Vec::new(),
            rank_cpus: Vec::new(),
            driver: None,
        }
    }

    /// Sets the ranks' GPUs, and reads the version of their driver.
    pub fn set_gpus(&mut self, gpus: Vec<String>) {
        self.driver = (!gpus.is_empty())
            .then(|| bounded::read_to_string(Path::new(DRIVER_VERSION), MAX_VERSION, PATIENCE).ok())
            .flatten()
            .and_then(|text| driver_version(&text));
        self.gpus = gpus;
    }

    /// The facts in which this machine is not the `earlier` one, as `2 cores then, 4 cores now`. Main memory does not count,
    /// since what a system has of it changes a little with its kernel, and neither do the CPUs that ranks were on.
    pub fn differences(&self, earlier: &Machine) -> Vec<String> {
        let facts = |machine: &Machine| {
            let Machine { cpu, cores, memory_bytes: _, os, kernel, arch, gpus, rank_cpus: _, driver } =
                machine;
            let gpus = if gpus.is_empty() { "no GPU".to_owned() } else { gpus.join(", ") };
            [
                cpu.clone(),
                format!("{cores} cores"),
                arch.clone(),
                os.clone(),
                format!("kernel {kernel}"),
                gpus,
                format!("driver {}", driver.as_deref().unwrap_or("none")),
            ]
        };
        let pairs = facts(earlier).into_iter().zip(facts(self));
        pairs.filter(|(then, now)| then != now).map(|(then, now)| format!("{then} then, {now} now")).collect()
    }

    /// `Some CPU, 8 cores, 31.3 GiB, Some Linux 1.2 (kernel 6.1.0, x86_64)`, and `, 2 ranks on CPUs 0 / 1` or
    /// `, 2 x NVIDIA H200 (driver 580.95.05)`.
    pub fn summary(&self) -> String {
        let Machine { cpu, cores, memory_bytes, os, kernel, arch, gpus, rank_cpus, driver } = self;
        let plural = if *cores == 1 { "" } else { "s" };
        let gib = *memory_bytes as f64 / f64::from(1 << 30);
        let mut line = format!("{cpu}, {cores} core{plural}, {gib:.1} GiB, {os} (kernel {kernel}, {arch})");
        match &rank_cpus[..] {
            [] => {}
            [first, rest @ ..] if !rest.is_empty() && rest.iter().all(|cpus| cpus == first) => {
                let plural = if first.contains(['-', ',']) { "s" } else { "" };
                line += &format!(", {} ranks share CPU{plural} {first}", rank_cpus.len());
            }
            each => line += &format!(", {} ranks on CPUs {}", each.len(), each.join(" / ")),
        }
        for alike in gpus.chunk_by(|a, b| a == b) {
            line += &format!(", {} x {}", alike.len(), alike[0]);
        }
        if let Some(driver) = driver {
            line += &format!(" (driver {driver})");
        }
        line
    }
}

/// The `580.95.05` of `NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build ...`.
fn driver_version(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with("NVRM version:"))?;
    let is_version =
        |word: &&str| word.contains('.') && word.split('.').all(|part| part.parse::<u32>().is_ok());
    line.split_whitespace().find(is_version).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_a_processor_and_memory() {
        let here = Machine::here();
        assert!(here.cores >= 1);
        assert!(here.memory_bytes > 1 << 20);
        assert_ne!(here.kernel, "unknown");
    }

    #[test]
    fn a_summary_is_one_line() {
        let machine = Machine {
            cpu: "Test CPU".to_owned(),
            cores: 1,
            memory_bytes: 3 << 29,
            os: "Linux 1".to_owned(),
            kernel: "6.1".to_owned(),
            arch: "x86_64".to_owned(),
            gpus: Vec::new(),
            rank_cpus: Vec::new(),
            driver: None,
        };
        let expected = "Test CPU, 1 core, 1.5 GiB, Linux 1 (kernel 6.1, x86_64)";
        assert_eq!(machine.summary(), expected);
        let on = |cpus: &[&str]| {
            let rank_cpus = cpus.iter().map(|cpus| (*cpus).to_owned()).collect();
            Machine { rank_cpus, ..machine.clone() }.summary()
        };
        assert_eq!(on(&["0", "1", "4-5"]), format!("{expected}, 3 ranks on CPUs 0 / 1 / 4-5"));
        assert_eq!(on(&["0-1", "0-1", "0-1"]), format!("{expected}, 3 ranks share CPUs 0-1"));
        assert_eq!(on(&["5", "5"]), format!("{expected}, 2 ranks share CPU 5"));
        let gpus = ["GPU A", "GPU A", "GPU B"].map(str::to_owned).to_vec();
        let machine = Machine { gpus, driver: Some("580.1".to_owned()), ..machine };
        assert_eq!(machine.summary(), format!("{expected}, 2 x GPU A, 1 x GPU B (driver 580.1)"));
    }

    #[test]
    fn another_machine_differs_in_what_it_is() {
        let here = Machine::here();
        assert_eq!(here.differences(&here), [""; 0]);
        let other = Machine {
            cores: here.cores + 1,
            memory_bytes: here.memory_bytes + 1,
            gpus: vec!["GPU A".to_owned()],
            driver: Some("580.1".to_owned()),
            ..here.clone()
        };
        let expected = [
            format!("{} cores then, {} cores now", here.cores, other.cores),
            "no GPU then, GPU A now".to_owned(),
            "driver none then, driver 580.1 now".to_owned(),
        ];
        assert_eq!(other.differences(&here), expected);
    }

    #[test]
    fn the_version_of_the_driver_is_read_from_its_file() {
        let text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root@a)\n\
                    GCC version:  gcc version 13.3.0\n";
        assert_eq!(driver_version(text).as_deref(), Some("580.95.05"));
        assert_eq!(driver_version("GCC version:  gcc version 13.3.0\n"), None);
        assert_eq!(driver_version("NVRM version: unknown\n"), None);
    }
}
