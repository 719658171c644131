//! `fused-collective faults`: one fault of one rank at a time, which all other ranks must report in time.

pub(crate) mod args;
pub mod case;
pub mod judge;
pub mod run;
pub mod settings;
mod watch;

use std::time::Duration;

use fused_collective::{cuda, group::rendezvous::Group};

use crate::backend::all_reduce_choice::AllReduceChoice;
use crate::{
    backend::{self, collective::Collective, cuda::free_memory::FreeMemory, problem::Tensor},
    exit::{self, Failure, print},
    job::{Job, Request, launch, ranks::Error},
};
use case::{Case, Fault, Phase};
use judge::judge;
use run::{Script, again_key};
use settings::Settings;
use watch::watch;

/// The time in which the driver must give back the GPU memory of processes that have ended.
const GIVEN_BACK: Duration = Duration::from_secs(10);

/// A test of faults whose settings have been checked.
pub(crate) struct Faults {
    settings: Settings,
    cases: Vec<Case>,
    job: Job,
    /// The reason why cases were left out.
    note: Option<String>,
}

impl Faults {
    /// Checks everything that can be checked before the run.
    pub(crate) fn new(settings: Settings) -> Result<Self, Failure> {
        let mut cases =
            settings.cases.clone().unwrap_or_else(|| [0, 1].into_iter().flat_map(Case::all).collect());
        let is_nccl = |case: &Case| case.phase == Phase::Nccl;
        if settings.job.hosts > 1 {
            let of_one_host = |case: &Case| matches!(case.fault, Fault::OtherMode | Fault::OtherOrder);
            if let Some(case) = settings.cases.iter().flatten().find(|case| of_one_host(case)) {
                return Err(Failure::Usage(format!(
                    "--cases: {case}: there is one mode between hosts, so no other one or order: leave it out"
                )));
            }
            cases.retain(|case| !of_one_host(case));
        }
        // The process of a rank has one case.
        let rank_runs_nccl = launch::is_launched() && cases.iter().any(is_nccl);
        let all_reduce = if rank_runs_nccl { AllReduceChoice::Nccl } else { AllReduceChoice::Custom };
        let job = Job::new(Request {
            all_reduces: vec![all_reduce],
            problems: vec![run::problem()],
            held: |problem| problem.bytes_of(&Tensor::OUTPUTS),
            ..Request::new(settings.job.clone())
        })?;
        if settings.job.hosts > 1 && job.backend_name() == "cpu" {
            return Err(Failure::Usage(
                "--hosts: the CPU backend is for ranks of one host: use --backend cuda, or leave the option out"
                    .to_owned(),
            ));
        }
        if let Some(case) = cases.iter().find(|case| case.rank >= job.world_size()) {
            return Err(Failure::Usage(format!(
                "--cases: {case}: there is no rank {} in a group of {}",
                case.rank,
                job.world_size()
            )));
        }
        if job.rank().is_some() && (cases.len() != 1 || !launch::is_launched()) {
            return Err(Failure::Usage(
                "faults starts its own ranks, to watch how they end: start it plainly, not as a rank"
                    .to_owned(),
            ));
        }
        let mut note = None;
        if job.rank().is_none()
            && let Some(case) = cases.iter().find(|case| is_nccl(case)).copied()
            && let Err(why) = check_nccl(&job)
        {
            if settings.cases.is_some() {
                return Err(Failure::Usage(format!("--cases: {case}: {why}: leave it out")));
            }
            cases.retain(|case| !is_nccl(case));
            // On the CPU nobody expects them.
            note = (job.backend_name() != "cpu").then(|| format!("note: no cases of phase nccl: {why}\n"));
        }
        Ok(Faults { settings, cases, job, note })
    }

    pub(crate) fn run(self) -> Result<u8, Failure> {
        match (self.job.rank(), &self.cases[..]) {
            (Some(rank), [case]) => self.be_rank(rank, case),
            _ => self.supervise(),
        }
    }

    /// Plays one rank's part, and prints its result.
    fn be_rank(&self, rank: u32, case: &Case) -> Result<u8, Failure> {
        run::play(case, rank, &self.job, |line| print(&format!("{line}\n")))?;
        Ok(exit::SUCCESS)
    }

    /// Runs every case, and prints the verdicts.
    fn supervise(&self) -> Result<u8, Failure> {
        let (cases, deadline) = (&self.cases, self.settings.job.deadline());
        let ranks = match self.settings.job.hosts {
            1 => format!("{} ranks", self.job.world_size()),
            hosts => format!("{hosts} hosts of {} ranks", self.job.world_size() / hosts),
        };
        print(&format!(
            "{} backend, {ranks}, {} cases, deadline {:.1} s\n",
            self.job.backend_name(),
            cases.len(),
            deadline.as_secs_f64()
        ))?;
        if let Some(note) = &self.note {
            print(note)?;
        }
        let mut memory = None;
        if self.job.backend_name() == "cuda" {
            match FreeMemory::watch(self.job.world_size()) {
                Ok(watched) => memory = Some(watched),
                Err(error) => print(&format!("note: GPU memory is not watched: {error}\n"))?,
            }
        }
        let mut failed = 0;
        for case in cases {
            if let Some(memory) = &mut memory {
                // Memory that other processes have taken since the last case is not this case's.
                memory.note().map_err(|error| Failure::Failed(error.to_string()))?;
            }
            let (observed, left) = watch(case, &self.job, &self.settings)?;
            let left = left.or_else(|| {
                let missing = memory.as_ref()?.missing(GIVEN_BACK);
                missing.unwrap_or_else(|error| Some(error.to_string()))
            });
            let judged = judge(case, case.deadline(deadline), &observed);
            let verdict = judged.and_then(|after| left.map_or(Ok(after), Err));
            let name = case.to_string();
            let line = match verdict {
                Ok(after) => {
                    let other = if case.rank == 0 { 1 } else { 0 };
                    let said =
                        observed.get(other).and_then(|seen| seen.outcome.as_deref()).unwrap_or_default();
                    format!("{name:<24} {:>5.2} s  rank {other}: {said}\n", after.as_secs_f64())
                }
                Err(why) => {
                    failed += 1;
                    format!("{name:<24} FAILED: {why}\n")
                }
            };
            print(&line)?;
        }
        print(&format!("{} cases, {failed} FAILED\n", cases.len()))?;
        Ok(if failed == 0 { exit::SUCCESS } else { exit::FAILURE })
    }
}

/// Returns the reason if cases of NCCL's all-reduce cannot run.
fn check_nccl(job: &Job) -> Result<(), String> {
    if job.backend_name() != "cuda" {
        return Err("NCCL needs the cuda backend".to_owned());
    }
    if cuda::count().map_err(|error| error.to_string())? < job.world_size() {
        return Err("NCCL refuses ranks that share a GPU".to_owned());
    }
    backend::cuda::check_nccl().map_err(|error| error.to_string())
}

impl Script for Job {
    fn meet(&self, is_again: bool) -> Result<Group, Error> {
        Ok(self.meet(|key| if is_again { again_key(key) } else { key.to_owned() })?)
    }

    fn join<'a>(&self, group: &'a Group) -> Result<Box<dyn Collective + 'a>, Error> {
        self.join(group, self.deadline())
    }
}
