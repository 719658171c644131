//! `fused-collective bench`.

pub(crate) mod args;
pub mod run;
pub mod settings;

use std::{env, path::Path};

use fused_collective::group::rendezvous::Group;

use crate::{
    backend::{collective::Collective, problem::Tensor},
    commands::bench::{run as bench, settings::Settings},
    exit::{self, Failure, complain, print},
    job::{
        Job, Request, launch,
        ranks::Error,
        screen::{Screen, width},
    },
    peers::Peers,
    report::{Report, compare, outputs::OutputFiles, table},
};

/// A benchmark that has been asked for and can be run.
pub(crate) struct Bench {
    settings: Settings,
    job: Job,
    outputs: OutputFiles,
    earlier: Option<Report>,
}

impl Bench {
    /// Checks all that can be checked before anything runs.
    pub(crate) fn new(settings: Settings) -> Result<Self, Failure> {
        let mut job = Job::new(Request {
            backend: settings.backend,
            nproc_per_node: settings.nproc_per_node,
            groups: 1,
            oversubscribe: settings.oversubscribe,
            all_reduces: settings.all_reduces.clone(),
            deadline: settings.deadline(),
            problems: settings.cases().map(|case| bench::problem(&settings, case)).collect(),
            cold: settings.cold,
            // A copy of the outputs while they are verified.
            held: |problem| problem.bytes_of(&Tensor::OUTPUTS),
        })?;
        let outputs = OutputFiles::check(&settings.outputs)?;
        let earlier = match &settings.outputs.compare {
            Some(path) => earlier(path, &settings, &mut job)?,
            None => None,
        };
        job.check_memory()?;
        Ok(Bench { settings, job, outputs, earlier })
    }

    pub(crate) fn run(self) -> Result<u8, Failure> {
        let measure = |group: &Group, backend: &mut dyn Collective| self.measure(group, backend);
        self.job.run(&self.settings, measure, |report| self.conclude(&report))
    }

    /// Runs the benchmark, and on rank 0 shows it as it goes.
    fn measure(&self, group: &Group, backend: &mut dyn Collective) -> Result<Report, Error> {
        let settings = &self.settings;
        let (name, world_size) = (self.job.backend_name(), self.job.world_size());
        let mut report = Report::new(env::args().skip(1).collect(), name, world_size, settings.clone());
        report.machine.set_gpus(backend.gpus());
        let mut peers = Peers::start(settings, group, self.job.cuda())?;
        let mut screen = Screen::new(group);
        let progress = screen.progress(bench::count(settings, backend.all_reduces().len()));
        screen.show(&progress, &table::heading(&report));
        bench::run(settings, group, backend, &mut peers, &progress, |measured| {
            report.push_gb_s = measured.push_gb_s;
            report.push(measured.case, measured.notes, measured.variants);
            if let Some(configuration) = report.configurations.last() {
                screen.show(&progress, &format!("\n{}", table::configuration(configuration, width())));
            }
        })?;
        screen.finish().map(|()| report)
    }

    /// On rank 0: writes the files and says how it went.
    fn conclude(&self, report: &Report) -> Result<u8, Failure> {
        self.outputs.write(report).map_err(|error| Failure::Failed(error.to_string()))?;
        let mut status = exit::SUCCESS;
        let failures = report.failures().count();
        if failures > 0 {
            let rows: usize = report.configurations.iter().map(|case| case.rows.len()).sum();
            complain(&format_args!("{failures} of {rows} variants FAILED"));
            status = exit::FAILURE;
        }
        if let Some(earlier) = &self.earlier {
            let comparison = compare::compare(earlier, report, self.settings.tolerance_percent);
            print(&format!("\n{}", comparison.render(width())))?;
            if comparison.regressions().next().is_some() {
                status = exit::FAILURE;
            }
        }
        Ok(status)
    }
}

/// The report to compare with, which must be of such a run. A pipe can be read once: whoever starts ranks reads it for
/// them, and where nobody does rank 0 alone reads what is no ordinary file.
fn earlier(path: &Path, settings: &Settings, job: &mut Job) -> Result<Option<Report>, Failure> {
    let handed_over = launch::handed_over(EARLIER);
    let is_file = || path.metadata().is_ok_and(|metadata| metadata.is_file());
    if handed_over.is_none() && job.rank().is_some_and(|rank| rank > 0) && !is_file() {
        return Ok(None);
    }
    let text = compare::read_text(handed_over.as_deref().unwrap_or(path), path)?;
    let earlier = compare::parse(&text, path)?;
    compare::check(&earlier, settings, job.backend_name(), job.world_size())?;
    if job.rank().is_none() {
        job.hand_over(EARLIER, text.into_bytes());
    }
    Ok(Some(earlier))
}

/// Tells a rank where it finds the report that `--compare` names.
const EARLIER: &str = "FUSED_COLLECTIVE_EARLIER";
