//! `fused-collective bench`.

use std::{env, io};

use super::{
    Failure, complain,
    job::{Job, Request, Screen},
    print,
};
use crate::{
    bench,
    collective::Collective,
    launch,
    rendezvous::Group,
    report::{Report, compare, outputs::OutputFiles, table},
    settings::Settings,
};

/// A benchmark that has been asked for and can be run.
pub(super) struct Bench {
    settings: Settings,
    job: Job,
    outputs: OutputFiles,
    earlier: Option<Report>,
}

impl Bench {
    /// Checks all that can be checked before anything runs.
    pub(super) fn new(settings: Settings) -> Result<Self, Failure> {
        let job = Job::new(Request {
            backend: settings.backend,
            nproc_per_node: settings.nproc_per_node,
            all_reduces: settings.all_reduces.clone(),
            deadline: settings.deadline(),
            problems: settings.cases().map(|case| bench::problem(&settings, case)).collect(),
        })?;
        let outputs = OutputFiles::check(&settings.outputs)?;
        let earlier = match &settings.outputs.compare {
            Some(path) => {
                let earlier = compare::read(path)?;
                compare::check(&earlier, &settings, job.backend_name(), job.world_size())?;
                Some(earlier)
            }
            None => None,
        };
        job.check_memory()?;
        Ok(Bench { settings, job, outputs, earlier })
    }

    pub(super) fn run(self) -> Result<u8, Failure> {
        let measure = |group: &Group, backend: &mut dyn Collective| self.measure(group, backend);
        self.job.run(&self.settings, measure, |report| self.conclude(&report))
    }

    /// Runs the benchmark, and on rank 0 shows it as it goes.
    fn measure(&self, group: &Group, backend: &mut dyn Collective) -> Result<Report, bench::Error> {
        let settings = &self.settings;
        let (name, world_size) = (self.job.backend_name(), self.job.world_size());
        let mut report = Report::new(env::args().skip(1).collect(), name, world_size, settings.clone());
        let mut screen = Screen::new(group);
        let progress = screen.progress(bench::count(settings, backend.all_reduces().len()));
        screen.show(&progress, &table::heading(&report));
        bench::run(settings, group, backend, &progress, |measured| {
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
        let mut status = launch::SUCCESS;
        let failures = report.failures().count();
        if failures > 0 {
            let rows: usize = report.configurations.iter().map(|case| case.rows.len()).sum();
            complain(&format_args!("{failures} of {rows} variants FAILED"));
            status = launch::FAILURE;
        }
        if let Some(earlier) = &self.earlier {
            let comparison = compare::compare(earlier, report, self.settings.tolerance_percent);
            print(&format!("\n{}", comparison.render(width())))?;
            if comparison.regressions().next().is_some() {
                status = launch::FAILURE;
            }
        }
        Ok(status)
    }
}

/// Columns of the terminal, or of the tables where there is none.
fn width() -> u16 {
    rustix::termios::tcgetwinsize(io::stdout()).map_or(table::WIDTH, |size| size.ws_col.max(40))
}
