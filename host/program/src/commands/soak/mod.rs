//! `fused-collective soak`: random operations for a given time, every result checked.

pub(crate) mod args;
pub mod groups;
pub mod run;
pub mod settings;

use std::{fmt::Write as _, time::Instant};

use fused_collective::group::rendezvous::Group;

use crate::{
    backend::{
        collective::Collective,
        problem::{Problem, Tensor},
    },
    exit::{self, Failure, print},
    job::{Job, Request, ranks::Error, screen::Screen},
    report::progress::Progress,
};
use groups::{group_seed, run_groups};
use run::Tally;
use settings::Settings;

/// A soak whose settings have been checked.
pub(crate) struct Soak {
    settings: Settings,
    job: Job,
}

impl Soak {
    /// Checks everything that can be checked before the run.
    pub(crate) fn new(settings: Settings) -> Result<Self, Failure> {
        let job = Job::new(Request {
            problems: run::largest_problems(),
            held,
            ..Request::new(settings.job.clone())
        })?;
        job.check_memory()?;
        Ok(Soak { settings, job })
    }

    pub(crate) fn run(self) -> Result<u8, Failure> {
        let began = Instant::now();
        self.job.run_ranks(
            &self.settings,
            |world| self.soak(world),
            |tallies| {
                let seconds = began.elapsed().as_secs_f64();
                if tallies.len() > 1 {
                    for (number, tally) in tallies.iter().enumerate() {
                        print(&format!("group {number}: {}\n", closing(tally, seconds)))?;
                    }
                }
                let total: Tally = tallies.into_iter().sum();
                print(&format!("{}\n", closing(&total, seconds)))?;
                Ok(if total.failed == 0 { exit::SUCCESS } else { exit::FAILURE })
            },
        )
    }

    /// Soaks in all groups, and returns the tally of each. Rank 0 shows the progress.
    fn soak(&self, world: &Group) -> Result<Vec<Tally>, Error> {
        let settings = &self.settings;
        let mut screen = Screen::new(world);
        let number = world.rank() / self.job.group_size();
        // One group is all ranks, which have met already.
        let own = if settings.job.groups > 1 { world.split(Some(number))? } else { None };
        let mut backend = self.job.join(own.as_ref().unwrap_or(world), self.job.deadline())?;
        screen.show(&Progress::hidden(), &self.heading(&*backend));
        let tell = |line: &str| screen.show(&Progress::hidden(), &format!("{line}\n"));
        let tallies = match &own {
            Some(own) => run_groups(settings, world, number, own, &mut *backend, tell)?,
            None => vec![run::run(settings, world, &mut *backend, tell)?],
        };
        backend.leave()?;
        drop(backend);
        if let Some(own) = own {
            own.farewell()?;
        }
        screen.finish().map(|()| tallies)
    }

    fn heading(&self, backend: &dyn Collective) -> String {
        let seed = self.settings.seed;
        let ranks = match self.settings.job.groups {
            1 => format!("{} ranks, seed {seed}", self.job.world_size()),
            groups => {
                let seeds: Vec<String> =
                    (0..groups).map(|number| group_seed(seed, number).to_string()).collect();
                format!("{groups} groups of {} ranks, seeds {}", self.job.group_size(), seeds.join(", "))
            }
        };
        let mut heading = format!("{} backend, {ranks}\n", self.job.backend_name());
        for note in backend.notes() {
            let _ = writeln!(heading, "note: {note}");
        }
        heading
    }
}

/// Bytes of a copy of the inputs, of the outputs of each kind of call, and of one more while they are verified.
fn held(problem: &Problem) -> Option<u64> {
    let inputs = problem.bytes_of(&[Tensor::Input, Tensor::Residual, Tensor::ResidualShard])?;
    problem.bytes_of(&Tensor::OUTPUTS)?.checked_mul(4)?.checked_add(inputs)
}

fn closing(tally: &Tally, seconds: f64) -> String {
    let Tally { operations, results, problems, in_place, chunks, repetitions, failed } = tally;
    format!(
        "{operations} operations on {problems} problems, {in_place} turns in place, {chunks} calls of some rows and {repetitions} repetitions in {seconds:.0} s: {results} results compared, {failed} FAILED"
    )
}
