//! The tests of a part of the project's checks: all but those that are named here, each with the reason.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};

use crate::cmd;

/// The tests that a run leaves out.
pub(crate) struct LeftOut {
    /// The packages whose tests run; all, if none is named.
    packages: &'static [&'static str],
    /// Unit tests run too, and not integration tests alone.
    units: bool,
    /// Integration tests, by the names of their programs.
    programs: &'static [(&'static str, &'static str)],
    /// Tests, by a part of their names.
    tests: &'static [(&'static str, &'static str)],
}

/// The inner loop's: `cargo xtask test --quick`.
pub(crate) const QUICK: LeftOut = LeftOut { packages: &[], units: true, programs: &[], tests: &[] };

/// An emulated processor's: `cargo xtask test --target`.
pub(crate) const EMULATED: LeftOut = LeftOut {
    packages: &["fused-collective-core", "fused-collective", "fused-collective-cli"],
    units: false,
    programs: &[
        // qemu-user leaves a program that another starts to the kernel, which knows of it by binfmt_misc only.
        ("rank_processes", "starts processes"),
        ("launcher", "starts processes"),
        ("gpus_of_one_process", "needs GPUs"),
    ],
    tests: &[("every_f32", "2^32 conversions take minutes")],
};

impl LeftOut {
    /// The arguments of `cargo test` that choose the other programs of tests: those of libraries, programs and integration.
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

    /// The arguments of every program of tests that leave out the others' tests.
    pub(crate) fn skips(&self) -> impl Iterator<Item = String> {
        self.tests.iter().map(|(test, _)| format!("--skip={test}"))
    }
}
