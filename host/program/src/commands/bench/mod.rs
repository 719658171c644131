//! `fused-collective bench`: every variant of every configuration, verified, timed and reported.

pub(crate) mod args;
pub mod report;
pub mod run;
pub mod settings;

use std::path::Path;

use fused_collective::group::rendezvous::Group;

use super::arguments::arguments;
use crate::{
    backend::{collective::Collective, problem::Tensor},
    exit::{self, Failure, complain, print},
    job::{
        Job, Request, launch,
        ranks::Error,
        screen::{Screen, width},
    },
    peers::{PeerOptions, Peers},
};
use report::{compare, data::Report, files::Files, table};
use settings::Settings;

/// Tells a rank the path of the report that `--compare` names.
const EARLIER: &str = "FUSED_COLLECTIVE_EARLIER";

/// A benchmark whose settings have been checked.
pub(crate) struct Bench {
    settings: Settings,
    job: Job,
    files: Files,
    earlier: Option<Report>,
}

impl Bench {
    /// Checks everything that can be checked before the run.
    pub(crate) fn new(settings: Settings) -> Result<Self, Failure> {
        let mut job = Job::new(Request {
            all_reduces: settings.all_reduces.clone(),
            problems: settings.cases().map(|case| run::problem(&settings, case)).collect(),
            cold: settings.cold,
            // A copy of the outputs while they are verified.
            held: |problem| problem.bytes_of(&Tensor::OUTPUTS),
            timed: true,
            ..Request::new(settings.job.clone())
        })?;
        let files = Files::check(&settings.outputs)?;
        let earlier = match &settings.outputs.compare {
            Some(path) => earlier(path, &settings, &mut job)?,
            None => None,
        };
        job.check_memory()?;
        Ok(Bench { settings, job, files, earlier })
    }

    pub(crate) fn run(self) -> Result<u8, Failure> {
        let measure = |group: &Group, backend: &mut dyn Collective| self.measure(group, backend);
        self.job.run(&self.settings, measure, |report| self.conclude(&report))
    }

    /// Runs the benchmark. Rank 0 shows each configuration when it is measured.
    fn measure(&self, group: &Group, backend: &mut dyn Collective) -> Result<Report, Error> {
        let settings = &self.settings;
        let (name, world_size) = (self.job.backend_name(), self.job.world_size());
        let mut report = Report::new(arguments(), name, world_size, settings.clone());
        report.machine.set_gpus(backend.gpus());
        report.machine.rank_cpus = backend.cpus();
        let mut screen = Screen::new(group);
        let progress = screen.progress(run::count(settings, backend.all_reduces().len()));
        screen.show(&progress, &table::heading(&report));
        let peers = PeerOptions {
            choices: &settings.peers,
            python: &settings.python,
            deadline: settings.peer_deadline(),
            max_tokens: settings.num_tokens.iter().copied().max().unwrap_or(1),
            hidden_dim: settings.hidden_dim,
            cuda: self.job.cuda(),
        };
        progress.doing("starting peers");
        let mut peers = Peers::start(&peers, group)?;
        run::run(settings, group, backend, &mut peers, &progress, |measured| {
            report.push_gb_s = measured.put_gb_s;
            report.push(measured.case, measured.notes, measured.variants);
            if let Some(configuration) = report.configurations.last() {
                screen.show(&progress, &format!("\n{}", table::configuration(configuration, width())));
            }
        })?;
        screen.finish().map(|()| report)
    }

    /// Writes the files, shows failures and the comparison, and returns the exit status. Rank 0 calls this.
    fn conclude(&self, report: &Report) -> Result<u8, Failure> {
        self.files.write(report).map_err(|error| Failure::Failed(error.to_string()))?;
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

/// Reads the report to compare with, and checks that it is comparable.
///
/// A pipe can be read once. So a process that starts ranks reads the report for them. If another launcher started the
/// ranks, rank 0 alone reads a file that is not a regular one.
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
