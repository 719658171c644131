//! `fused-collective verify`: fused operations in every element type, quantization, mode and kind of shape, checked in full.

pub(crate) mod args;
pub mod conversions;
pub mod dependents;
pub mod late;
pub mod run;
pub mod settings;
pub mod verdicts;

use std::fmt::Write as _;

use fused_collective::group::rendezvous::Group;

use crate::{
    backend::{
        collective::Collective,
        problem::{Problem, Tensor},
    },
    exit::{self, Failure, print},
    job::{Job, Request, ranks::Error, screen::Screen},
    report::progress::Progress,
    wire::Wire,
};
use conversions::{CONVERSION_BLOCKS, run_conversions};
use dependents::run_dependents;
use late::run_late_ranks;
use settings::Settings;
use verdicts::{Place, Tally};

/// A verification whose settings have been checked.
pub(crate) struct Verify {
    settings: Settings,
    job: Job,
    /// Ranks of a group, one size after the other.
    sizes: Vec<u32>,
}

impl Verify {
    /// Checks everything that can be checked before the run.
    pub(crate) fn new(settings: Settings) -> Result<Self, Failure> {
        let job = Job::new(Request {
            problems: settings.problems().collect(),
            held,
            ..Request::new(settings.job.clone())
        })?;
        job.check_memory()?;
        let sizes = sizes(&settings, &job);
        Ok(Verify { settings, job, sizes })
    }

    pub(crate) fn run(self) -> Result<u8, Failure> {
        self.job.run_ranks(
            &self.settings,
            |world| self.verify(world),
            |total| {
                print(&format!("{}\n", closing(&total)))?;
                Ok(if total.failed == 0 { exit::SUCCESS } else { exit::FAILURE })
            },
        )
    }

    /// Runs the matrix in groups of every size. Rank 0 shows the results of each part.
    fn verify(&self, world: &Group) -> Result<Tally, Error> {
        let mut screen = Screen::new(world);
        let mut total = Tally::default();
        if self.job.spans_hosts() {
            // One group, which has met.
            let size = world.world_size();
            total.add(self.verify_groups(world, Some(world), size, &mut screen)?);
            return screen.finish().map(|()| total);
        }
        for &size in &self.sizes {
            let number = world.rank() / size;
            let own = world.split((number < self.settings.job.groups).then_some(number))?;
            let tally = self.verify_groups(world, own.as_ref(), size, &mut screen)?;
            if self.sizes.len() > 1 {
                screen
                    .show(&Progress::hidden(), &format!("{}: {}\n\n", self.groups_of(size), closing(&tally)));
            }
            total.add(tally);
            if let Some(group) = own {
                group.farewell()?;
            }
        }
        screen.finish().map(|()| total)
    }

    /// Runs the matrix in all groups of one size. A rank that is in no group has no `own`.
    fn verify_groups(
        &self,
        world: &Group,
        own: Option<&Group>,
        size: u32,
        screen: &mut Screen,
    ) -> Result<Tally, Error> {
        let settings = &self.settings;
        let mut backend = own.map(|group| self.job.join(group, self.job.deadline())).transpose()?;
        let progress = screen.progress(settings.count(&Wire::ALL));
        let mut heading = format!(
            "{} backend, {}, {} cases, seed {}\n",
            self.job.backend_name(),
            self.groups_of(size),
            settings.count(&Wire::ALL) * u64::from(settings.job.groups),
            settings.seed
        );
        for note in backend.iter().flat_map(|backend| backend.notes()) {
            let _ = writeln!(heading, "note: {note}");
        }
        screen.show(&progress, &heading);
        let mut place = Place { world, own: None };
        if let (Some(group), Some(backend)) = (own, &mut backend) {
            let backend: &mut dyn Collective = &mut **backend;
            place.own = Some((group, backend));
        }
        let mut tell = |line: &str| screen.show(&progress, &format!("{line}\n"));
        let mut tally = run::run(settings, &Wire::ALL, &mut place, &progress, &mut tell)?;
        if settings.conversions && size == self.job.group_size() {
            let blocks = 0..CONVERSION_BLOCKS;
            tally.add(run_conversions(settings, blocks, &mut place, &progress, &mut tell)?);
        }
        if settings.dependents > 0 {
            tally.add(run_dependents(settings, &mut place, &progress, &mut tell)?);
        }
        if let Some(mut backend) = backend {
            backend.leave()?;
        }
        if settings.faults && self.job.spans_hosts() {
            tell(
                "note: no rank is withheld between hosts, as NCCL connects more slowly than such waits end: see faults",
            );
            return Ok(tally);
        }
        if let Some(group) = own.filter(|_| settings.faults && size == self.job.group_size()) {
            let found = run_late_ranks(
                settings,
                world,
                group,
                |group, deadline| self.job.join(group, deadline),
                &progress,
                &mut tell,
            )?;
            tally.add(found);
        }
        Ok(tally)
    }

    fn groups_of(&self, size: u32) -> String {
        match self.settings.job.groups {
            1 => format!("{size} ranks"),
            groups => format!("{groups} groups of {size} ranks"),
        }
    }
}

fn closing(tally: &Tally) -> String {
    format!("{} cases verified, {} FAILED", tally.verified, tally.failed)
}

/// Bytes that a rank holds of a problem: copies of its inputs, and of the outputs of three runs.
fn held(problem: &Problem) -> Option<u64> {
    let outputs = problem.bytes_of(&Tensor::OUTPUTS)?.checked_mul(3)?;
    let inputs = [Tensor::Input, Tensor::Residual, Tensor::Gamma, Tensor::PostGamma];
    let experts = [Tensor::ExpertRows, Tensor::ExpertIndex, Tensor::ExpertScales];
    problem.bytes_of(&inputs)?.checked_add(problem.bytes_of(&experts)?)?.checked_add(outputs)
}

/// The group sizes asked for. By default one size: all ranks of a group. If this program starts the ranks on GPUs, also 2,
/// 3 and 4.
fn sizes(settings: &Settings, job: &Job) -> Vec<u32> {
    if !settings.group_sizes.is_empty() {
        return settings.group_sizes.clone();
    }
    let most = job.group_size();
    let mut sizes = vec![most];
    if job.starts_ranks_on_gpus() {
        sizes.splice(0..0, (2..=4).filter(|&size| size < most));
    }
    sizes
}
