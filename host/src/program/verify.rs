//! `fused-collective verify`.

use std::fmt::Write as _;

use super::{
    Failure,
    job::{Job, Request, Screen},
    print,
};
use crate::{
    bench::Error,
    collective::Collective,
    launch,
    rendezvous::Group,
    settings::AllReduceChoice,
    verify::{self, Settings, Tally},
};

/// A verification that has been asked for and can be run.
pub(super) struct Verify {
    settings: Settings,
    job: Job,
}

impl Verify {
    /// Checks all that can be checked before anything runs.
    pub(super) fn new(settings: Settings) -> Result<Self, Failure> {
        let job = Job::new(Request {
            backend: settings.backend,
            nproc_per_node: settings.nproc_per_node,
            // Fused operations bring their own.
            all_reduces: vec![AllReduceChoice::Custom],
            deadline: settings.deadline(),
            problems: settings.problems().collect(),
            cold: false,
        })?;
        job.check_memory()?;
        Ok(Verify { settings, job })
    }

    pub(super) fn run(self) -> Result<u8, Failure> {
        let verify = |group: &Group, backend: &mut dyn Collective| self.verify(group, backend);
        self.job.run(&self.settings, verify, |total| {
            print(&format!("{} cases verified, {} FAILED\n", total.verified, total.failed))?;
            Ok(if total.failed == 0 { launch::SUCCESS } else { launch::FAILURE })
        })
    }

    /// Runs the matrix, and on rank 0 shows it as it goes.
    fn verify(&self, group: &Group, backend: &mut dyn Collective) -> Result<Tally, Error> {
        let cases = self.settings.count();
        let mut screen = Screen::new(group);
        let progress = screen.progress(cases);
        let mut heading = format!(
            "{} backend, {} ranks, {cases} cases, seed {}\n",
            self.job.backend_name(),
            self.job.world_size(),
            self.settings.seed
        );
        for note in backend.notes() {
            let _ = writeln!(heading, "note: {note}");
        }
        screen.show(&progress, &heading);
        let total = verify::run(&self.settings, group, backend, &progress, |line| {
            screen.show(&progress, &format!("{line}\n"));
        })?;
        screen.finish().map(|()| total)
    }
}
