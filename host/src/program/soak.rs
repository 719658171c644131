//! `fused-collective soak`.

use std::{fmt::Write as _, time::Instant};

use super::{
    Failure,
    job::{Job, Request, Screen},
    print,
};
use crate::{
    bench::Error,
    collective::{Collective, Tensor},
    launch,
    rendezvous::Group,
    report::progress::Progress,
    settings::AllReduceChoice,
    soak::{self, Settings, Tally},
};

/// A soak that has been asked for and can be run.
pub(super) struct Soak {
    settings: Settings,
    job: Job,
}

impl Soak {
    /// Checks all that can be checked before anything runs.
    pub(super) fn new(settings: Settings) -> Result<Self, Failure> {
        let job = Job::new(Request {
            backend: settings.backend,
            nproc_per_node: settings.nproc_per_node,
            all_reduces: vec![AllReduceChoice::Custom],
            groups: 1,
            oversubscribe: settings.oversubscribe,
            cold: false,
            deadline: settings.deadline(),
            problems: soak::largest_problems(),
            held: |problem| problem.bytes_of(&Tensor::OUTPUTS)?.checked_mul(2),
        })?;
        job.check_memory()?;
        Ok(Soak { settings, job })
    }

    pub(super) fn run(self) -> Result<u8, Failure> {
        let began = Instant::now();
        let soak = |group: &Group, backend: &mut dyn Collective| self.soak(group, backend);
        self.job.run(&self.settings, soak, |tally| {
            let Tally { operations, results, problems, repetitions, failed } = tally;
            let seconds = began.elapsed().as_secs_f64();
            print(&format!(
                "{operations} operations on {problems} problems and {repetitions} repetitions in {seconds:.0} s: {results} results compared, {failed} FAILED\n"
            ))?;
            Ok(if failed == 0 { launch::SUCCESS } else { launch::FAILURE })
        })
    }

    /// Soaks, and on rank 0 shows how it goes.
    fn soak(&self, group: &Group, backend: &mut dyn Collective) -> Result<Tally, Error> {
        let mut screen = Screen::new(group);
        let mut heading = format!(
            "{} backend, {} ranks, seed {}\n",
            self.job.backend_name(),
            self.job.world_size(),
            self.settings.seed
        );
        for note in backend.notes() {
            let _ = writeln!(heading, "note: {note}");
        }
        screen.show(&Progress::hidden(), &heading);
        let tally = soak::run(&self.settings, group, backend, |line| {
            screen.show(&Progress::hidden(), &format!("{line}\n"));
        })?;
        screen.finish().map(|()| tally)
    }
}
