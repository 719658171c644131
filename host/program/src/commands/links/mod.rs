//! `fused-collective links`: the latency and bandwidth of the links between ranks.

pub(crate) mod args;
pub mod report;
pub mod run;
pub mod settings;

use std::fmt::Write as _;

use fused_collective::group::rendezvous::Group;

use super::arguments::arguments;
use crate::{
    backend::collective::Collective,
    exit::{Failure, Stream, complain},
    job::{
        Job, Request,
        ranks::Error,
        screen::{Screen, show, width},
    },
    report::{machine::Machine, output_file::OutputFile},
};
use report::{Report, Verdict};
use settings::Settings;

/// A measurement of links whose settings have been checked.
pub(crate) struct Links {
    settings: Settings,
    job: Job,
    file: Option<OutputFile>,
}

impl Links {
    /// Checks everything that can be checked before the run.
    pub(crate) fn new(settings: Settings) -> Result<Self, Failure> {
        // Links are measured in memory of their own, so there are no problems.
        let job = Job::new(Request { timed: true, ..Request::new(settings.job.clone()) })?;
        let file = settings.json.as_deref().map(|path| OutputFile::check("--json", path)).transpose()?;
        Ok(Links { settings, job, file })
    }

    pub(crate) fn run(self) -> Result<u8, Failure> {
        let measure = |group: &Group, backend: &mut dyn Collective| self.measure(group, backend);
        self.job.run(&self.settings, measure, |(report, shown)| self.conclude(&report, shown))
    }

    /// The stream for what a person reads.
    fn stream(&self) -> Stream {
        Stream::beside(self.file.as_ref().is_some_and(OutputFile::is_stdout))
    }

    /// Runs the measurement. Rank 0 shows its progress. Returns also the failure to show it.
    fn measure(
        &self,
        group: &Group,
        backend: &mut dyn Collective,
    ) -> Result<(Report, Result<(), Failure>), Error> {
        let (name, world_size) = (self.job.backend_name(), self.job.world_size());
        let mut screen = Screen::on(self.stream(), group);
        let progress = screen.progress(run::most_steps(world_size));
        let mut machine = Machine::here();
        machine.set_gpus(backend.gpus());
        machine.rank_cpus = backend.cpus();
        let notes = backend.notes().to_vec();
        let mut heading = format!("{name} backend, {world_size} ranks\n{}\n", machine.summary());
        for note in &notes {
            let _ = writeln!(heading, "note: {note}");
        }
        screen.show(&progress, &heading);
        let measured = run::run(group, backend, &progress)?;
        let report =
            Report::new(arguments(), name, world_size, &self.settings.job, machine, notes, &measured);
        Ok((report, screen.shown()))
    }

    /// Writes the file, shows the report, and returns the exit status. Neither costs the other anything: not a reader of the
    /// tables that has gone away, nor a file that cannot be written. Rank 0 calls this.
    fn conclude(&self, report: &Report, shown: Result<(), Failure>) -> Result<u8, Failure> {
        let written = self.file.as_ref().map_or(Ok(()), |file| {
            // The other ranks wait for the file, and should not give up first.
            file.write(report.to_json().map_err(Into::into), self.settings.job.deadline() / 2)
                .map_err(|error| Failure::Failed(error.to_string()))
        });
        let tables = format!("\n{}", report.render(width(self.stream())));
        let shown = shown.and_then(|()| show(self.stream(), &tables));
        let Verdict { broken, .. } = &report.verdict;
        let failures = report.failures().len();
        if !broken.is_empty() {
            let pairs: Vec<String> =
                broken.iter().map(|pair| format!("{} to {}", pair.from, pair.to)).collect();
            complain(&format_args!("FAILED between ranks {}", pairs.join(", ")));
        } else if failures > 0 {
            let all = report.pairs.len() + report.together.len();
            complain(&format_args!("{failures} of {all} measurements FAILED"));
        }
        written.and(shown)?;
        Ok(report.verdict.status())
    }
}
