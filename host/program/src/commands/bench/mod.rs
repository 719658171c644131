//! `fused-collective bench`: every variant of every configuration, verified, timed and reported.

mod across;
pub(crate) mod args;
pub mod report;
pub mod run;
pub mod settings;
mod wires;

use std::path::Path;

use fused_collective::group::rendezvous::Group;

use super::arguments::arguments;
use crate::{
    backend::{
        collective::Collective,
        problem::{Problem, Tensor},
    },
    bounded::one_line,
    exit::{self, Failure, Stream, complain},
    job::{
        Job, Request, launch,
        rank_env::RankEnv,
        ranks::Error,
        screen::{Screen, show, width},
    },
    peers::{PeerOptions, Peers},
};
use report::{compare, data::Report, files::Files, json::Source, table};
use settings::Settings;

/// Tells a rank the path of the report that `--compare` names.
const EARLIER: &str = "FUSED_COLLECTIVE_EARLIER";

/// A benchmark whose settings have been checked.
pub(crate) struct Bench {
    settings: Settings,
    origin: Origin,
    files: Files,
    earlier: Option<Report>,
}

/// The origin of the figures.
enum Origin {
    /// Ranks measure them.
    Job(Box<Job>),
    /// An earlier run did. Under a launcher rank 0 alone reads its report: a pipe can be read once.
    File(Option<Box<Report>>),
}

impl Bench {
    /// Checks everything that can be checked before the run.
    pub(crate) fn new(settings: Settings) -> Result<Self, Failure> {
        let compare = settings.outputs.compare.as_deref().map(|path| source("--compare", path, &settings));
        if let Some(path) = &settings.outputs.from {
            let environment = RankEnv::from_env().map_err(|error| Failure::Usage(error.to_string()))?;
            if environment.is_some_and(|environment| environment.rank > 0) {
                return Ok(Bench {
                    origin: Origin::File(None),
                    files: Files::default(),
                    earlier: None,
                    settings,
                });
            }
            let files = Files::check(&settings.outputs)?;
            let read = |source: Source<'_>| source.report(&source.text(None)?);
            let report = read(source("--from", path, &settings))?;
            let earlier = compare.map(read).transpose()?;
            if let Some(earlier) = &earlier {
                compare::check(earlier, &report.settings, &report.backend, report.world_size)?;
            }
            return Ok(Bench { origin: Origin::File(Some(Box::new(report))), files, earlier, settings });
        }
        let mut job = Job::new(Request {
            all_reduces: settings.all_reduces.clone(),
            problems: settings.cases().map(|case| run::problem(&settings, case)).collect(),
            cold: settings.cold,
            // A copy of the outputs while they are verified.
            held: if settings.in_place { held_in_place } else { held },
            timed: true,
            ..Request::new(settings.job.clone())
        })?;
        let files = Files::check(&settings.outputs)?;
        let earlier = match compare {
            Some(source) => earlier(source, &settings, &mut job)?,
            None => None,
        };
        job.check_memory()?;
        Ok(Bench { origin: Origin::Job(Box::new(job)), files, earlier, settings })
    }

    pub(crate) fn run(self) -> Result<u8, Failure> {
        match &self.origin {
            Origin::Job(job) => {
                let measure = |group: &Group, backend: &mut dyn Collective| self.measure(job, group, backend);
                job.run(&self.settings, measure, |(report, shown)| self.conclude(&report, shown))
            }
            Origin::File(None) => Ok(exit::SUCCESS),
            Origin::File(Some(report)) => {
                let width = width(self.stream());
                let tables = report.configurations.iter().map(|one| table::configuration(one, width));
                let text = [table::heading(report)].into_iter().chain(tables).collect::<Vec<_>>().join("\n");
                self.conclude(report, show(self.stream(), &text))
            }
        }
    }

    /// The stream for what a person reads.
    fn stream(&self) -> Stream {
        Stream::beside(self.files.take_stdout())
    }

    /// Runs the benchmark. Rank 0 shows each configuration when it is measured. Returns also the failure to show one.
    fn measure(
        &self,
        job: &Job,
        group: &Group,
        backend: &mut dyn Collective,
    ) -> Result<(Report, Result<(), Failure>), Error> {
        let settings = &self.settings;
        let (name, world_size) = (job.backend_name(), job.world_size());
        let mut report = Report::new(arguments(), name, world_size, settings.clone());
        report.machine.set_gpus(backend.gpus());
        report.machine.rank_cpus = backend.cpus();
        let mut screen = Screen::on(self.stream(), group);
        let progress = screen.progress(run::count(settings, backend.all_reduces().len()));
        screen.show(&progress, &table::heading(&report));
        let peers = PeerOptions {
            choices: &settings.peers,
            python: &settings.python,
            deadline: settings.peer_deadline(),
            max_tokens: settings.num_tokens.iter().copied().max().unwrap_or(1),
            hidden_dim: settings.hidden_dim,
            cuda: job.cuda(),
        };
        progress.doing("starting peers");
        let mut peers = Peers::start(&peers, group)?;
        run::run(settings, group, backend, &mut peers, &progress, |measured| {
            report.push_gb_s = measured.put_gb_s;
            report.push(measured.case, measured.notes, measured.variants);
            if let Some(configuration) = report.configurations.last() {
                let table = table::configuration(configuration, width(self.stream()));
                screen.show(&progress, &format!("\n{table}"));
            }
        })?;
        Ok((report, screen.shown()))
    }

    /// Writes the files, shows the conclusion, failures and the comparison, and returns the exit status. A reader of the
    /// tables that has gone away costs the files nothing, which `shown` tells of, and a file that cannot be written costs the
    /// conclusion nothing. Rank 0 calls this.
    fn conclude(&self, report: &Report, shown: Result<(), Failure>) -> Result<u8, Failure> {
        let failures = report.failures().count();
        let compare = |earlier| compare::compare(earlier, report, self.settings.tolerance_percent);
        let comparison = self.earlier.as_ref().map(compare);
        let slower = comparison.as_ref().is_some_and(|comparison| comparison.regressions().next().is_some());
        let failed = failures > 0 || slower;
        // The other ranks wait for the files, and should not give up first.
        let patience = self.settings.job.deadline() / 2;
        let written =
            self.files.write(report, failed, patience).map_err(|error| Failure::Failed(error.to_string()));
        if failures > 0 {
            let rows: usize = report.configurations.iter().map(|case| case.rows.len()).sum();
            complain(&format_args!("{failures} of {rows} variants FAILED"));
        }
        if let Ok(Some(beside)) = &written {
            complain(&format_args!(
                "the earlier report stays as it is, and this one is in '{}'",
                one_line(&beside.display().to_string())
            ));
        }
        let width = width(self.stream());
        let mut text = format!("\n{}", table::conclusion(&report.conclusion, width));
        if let Some(comparison) = comparison {
            text += &format!("\n{}", comparison.render(width));
        }
        let shown = shown.and_then(|()| show(self.stream(), &text));
        written.map(drop).and(shown)?;
        Ok(if failed { exit::FAILURE } else { exit::SUCCESS })
    }
}

/// Bytes of a copy of the outputs while they are verified.
fn held(problem: &Problem) -> Option<u64> {
    problem.bytes_of(&Tensor::OUTPUTS)
}

/// Bytes of copies of the outputs and, twice, of the inputs that are overwritten.
fn held_in_place(problem: &Problem) -> Option<u64> {
    let inputs = problem.bytes_of(&[Tensor::Input, Tensor::Residual, Tensor::ResidualShard])?;
    inputs.checked_mul(2)?.checked_add(held(problem)?)
}

/// The file of an earlier report. A rank waits for no pipe longer than for another rank.
fn source<'a>(option: &'static str, named: &'a Path, settings: &Settings) -> Source<'a> {
    Source { option, named, patience: settings.job.deadline() }
}

/// Reads the report to compare with, and checks that it is comparable.
///
/// A pipe can be read once. So a process that starts ranks reads the report for them. If another launcher started the
/// ranks, rank 0 alone reads a file that is not a regular one.
fn earlier(source: Source<'_>, settings: &Settings, job: &mut Job) -> Result<Option<Report>, Failure> {
    let handed_over = launch::handed_over(EARLIER);
    let is_file = || source.path().metadata().is_ok_and(|metadata| metadata.is_file());
    if handed_over.is_none() && job.rank().is_some_and(|rank| rank > 0) && !is_file() {
        return Ok(None);
    }
    let text = source.text(handed_over.as_deref())?;
    let earlier = source.report(&text)?;
    compare::check(&earlier, settings, job.backend_name(), job.world_size())?;
    if job.rank().is_none() {
        job.hand_over(EARLIER, text.into_bytes());
    }
    Ok(Some(earlier))
}
