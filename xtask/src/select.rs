//! The tests of a part of the project's checks. What a part leaves out is named here, with the reason: a new test runs.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

use crate::cmd;

/// The tests that a run has: all but those that are named, each with the reason.
pub(crate) struct Selection {
    /// The packages whose tests run; all, if none is named.
    packages: &'static [&'static str],
    /// Unit tests run, and not only integration tests.
    units: bool,
    /// Integration tests that do not run, by the names of their programs.
    programs: &'static [(&'static str, &'static str)],
    /// Tests that do not run, by a part of their names.
    tests: &'static [(&'static str, &'static str)],
}

/// The inner loop's: `cargo xtask test --quick`.
pub(crate) const QUICK: Selection = Selection {
    packages: &[],
    units: true,
    programs: &[
        ("faults", "27 s: waits for deadlines"),
        ("hosts", "11 s: waits for deadlines"),
        ("lost_ranks", "10 s: waits for deadlines"),
        ("soak", "18 s"),
        ("verify", "13 s"),
    ],
    tests: &[
        ("every_f32", "24 s: 2^32 conversions each"),
        ("an_activation_of_many_rounds", "24 s"),
        ("versions::", "15 s: every entry point"),
        ("rounds::every_fusion", "5 s"),
        ("operations_may_follow_each_other_on_any_schedule", "6 s"),
        ("values_are_rounded_as_core_does", "6 s"),
        ("cpu::model::", "5 s: many schedules"),
    ],
};

/// An emulated processor's: `cargo xtask test --target`.
pub(crate) const EMULATED: Selection = Selection {
    packages: &["fused-collective-core", "fused-collective", "fused-collective-cli"],
    units: false,
    programs: &[
        // qemu-user leaves a program that another starts to the kernel, which knows of it by binfmt_misc only.
        ("launcher", "starts processes"),
        ("rank_processes", "starts processes"),
        ("gpus_of_one_process", "needs GPUs"),
    ],
    tests: &[("every_f32", "2^32 conversions each, which take minutes")],
};

impl Selection {
    /// The arguments of `cargo test` that choose the programs of tests.
    ///
    /// # Errors
    /// Cargo does not say what the workspace has, or it lacks a program that is named here.
    pub(crate) fn arguments(&self) -> Result<Vec<String>> {
        let metadata = cmd::metadata()?;
        let is_meant = |package: &str| self.packages.is_empty() || self.packages.contains(&package);
        let packages = metadata.packages.iter().filter(|package| is_meant(package.name.as_str()));
        let programs = packages.flat_map(|it| &it.targets).filter(|it| it.is_test() && it.test);
        let programs: BTreeSet<&str> = programs.map(|program| program.name.as_str()).collect();
        let left_out: BTreeSet<&str> = self.programs.iter().map(|(program, _)| *program).collect();
        let unknown: Vec<_> = left_out.difference(&programs).copied().collect();
        ensure!(unknown.is_empty(), "there are no tests {} to leave out", unknown.join(", "));
        for (name, why) in self.programs.iter().chain(self.tests) {
            eprintln!("left out: {name} ({why})");
        }
        let mut arguments = Vec::new();
        if self.units {
            arguments.extend(["--lib".to_owned(), "--bins".to_owned()]);
        }
        if self.packages.is_empty() {
            arguments.push("--workspace".to_owned());
        }
        arguments.extend(self.packages.iter().map(|package| format!("--package={package}")));
        arguments.extend(programs.difference(&left_out).map(|program| format!("--test={program}")));
        Ok(arguments)
    }

    /// The arguments of every program of tests that leave out tests.
    pub(crate) fn skips(&self) -> impl Iterator<Item = String> {
        self.tests.iter().map(|(test, _)| format!("--skip={test}"))
    }
}
