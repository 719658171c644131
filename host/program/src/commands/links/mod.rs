//! `fused-collective links`.

pub(crate) mod args;
pub mod report;
pub mod run;

use std::{env, fmt::Write as _, path::PathBuf};

use fused_collective::group::rendezvous::Group;

use crate::{
    backend::collective::Collective,
    commands::{bench::settings::Outputs, links::run as links},
    exit::{self, Failure, complain, print},
    job::{
        Job, Request,
        options::AllReduceChoice,
        ranks::Error,
        screen::{Screen, width},
    },
    report::{machine::Machine, outputs::OutputFiles},
};
use report::Report;
pub use run::Settings;

/// A measurement of links that has been asked for and can be run.
pub(crate) struct Links {
    settings: Settings,
    job: Job,
    outputs: OutputFiles,
}

impl Links {
    /// Checks all that can be checked before anything runs.
    pub(crate) fn new(settings: Settings, json: Option<PathBuf>) -> Result<Self, Failure> {
        let job = Job::new(Request {
            backend: settings.backend,
            nproc_per_node: settings.nproc_per_node,
            groups: 1,
            oversubscribe: settings.oversubscribe,
            all_reduces: vec![AllReduceChoice::Custom],
            deadline: settings.deadline(),
            // Links are measured in memory of their own.
            problems: Vec::new(),
            cold: false,
            held: |_| Some(0),
        })?;
        let outputs = OutputFiles::check(&Outputs { json, ..Outputs::default() })?;
        Ok(Links { settings, job, outputs })
    }

    pub(crate) fn run(self) -> Result<u8, Failure> {
        let measure = |group: &Group, backend: &mut dyn Collective| self.measure(group, backend);
        self.job.run(&self.settings, measure, |report| self.conclude(&report))
    }

    /// Measures, and on rank 0 shows what is being measured.
    fn measure(&self, group: &Group, backend: &mut dyn Collective) -> Result<Report, Error> {
        let (name, world_size) = (self.job.backend_name(), self.job.world_size());
        let mut screen = Screen::new(group);
        let progress = screen.progress(links::most_steps(world_size));
        let mut machine = Machine::here();
        machine.set_gpus(backend.gpus());
        let notes = backend.notes().to_vec();
        let mut heading = format!("{name} backend, {world_size} ranks\n{}\n", machine.summary());
        for note in &notes {
            let _ = writeln!(heading, "note: {note}");
        }
        screen.show(&progress, &heading);
        let measured = links::run(group, backend, &progress)?;
        drop(progress);
        screen.finish()?;
        let command = env::args().skip(1).collect();
        Ok(Report::new(command, name, world_size, self.settings.clone(), machine, notes, &measured))
    }

    /// On rank 0: shows what was found, and writes the file.
    fn conclude(&self, report: &Report) -> Result<u8, Failure> {
        print(&format!("\n{}", report.render(width())))?;
        let failed = |error: &dyn std::fmt::Display| Failure::Failed(error.to_string());
        let json = report.to_json().map_err(|error| failed(&error))?;
        self.outputs.write_json(&json).map_err(|error| failed(&error))?;
        let failures = report.failures().len();
        if failures > 0 {
            let all = report.pairs.len() + report.together.len();
            complain(&format_args!("{failures} of {all} measurements FAILED"));
            return Ok(exit::FAILURE);
        }
        Ok(exit::SUCCESS)
    }
}
