//! `fused-collective faults`.

pub(crate) mod args;
pub mod case;
pub mod judge;
pub mod run;

use std::{
    process::{Child, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use fused_collective::{
    cuda,
    group::rendezvous::{self, Group},
};

use crate::{
    backend::{
        collective::Collective,
        cuda::{self as cuda_backend, free_memory::FreeMemory},
        problem::Tensor,
    },
    bounded::for_each_line,
    commands::faults::{
        case::{Case, Phase},
        judge::{Observed, SLACK},
        run as faults,
        run::{AGAIN, MARK, OUTCOME, Script},
    },
    exit::{self, Failure, print},
    job::{Job, Request, launch, options::AllReduceChoice, ranks::Error},
};
pub use run::Settings;

/// A test of faults that has been asked for and can be run.
pub(crate) struct Faults {
    settings: Settings,
    cases: Vec<Case>,
    job: Job,
    /// Why cases were left out.
    note: Option<String>,
}

/// From the start of a case to its fault: for processes to start and to set up their devices.
const SET_UP: Duration = Duration::from_secs(120);
/// From a rank's report to its end, with a new group in between where there is one.
const WRAP_UP: Duration = Duration::from_secs(120);
/// For the driver to give back the GPU memory of processes that have ended.
const GIVEN_BACK: Duration = Duration::from_secs(10);
/// The longest line of a rank of which more than the start is read.
const MAX_LINE: u64 = 64 << 10;

impl Faults {
    /// Checks all that can be checked before anything runs.
    pub(crate) fn new(settings: Settings) -> Result<Self, Failure> {
        let mut cases =
            settings.cases.clone().unwrap_or_else(|| [0, 1].into_iter().flat_map(Case::all).collect());
        let is_nccl = |case: &Case| case.phase == Phase::Nccl;
        // A rank has one case.
        let rank_runs_nccl = launch::is_launched() && cases.iter().any(is_nccl);
        let all_reduce = if rank_runs_nccl { AllReduceChoice::Nccl } else { AllReduceChoice::Custom };
        let job = Job::new(Request {
            backend: settings.backend,
            nproc_per_node: settings.nproc_per_node,
            all_reduces: vec![all_reduce],
            groups: 1,
            oversubscribe: settings.oversubscribe,
            cold: false,
            deadline: settings.deadline(),
            problems: vec![faults::problem()],
            held: |problem| problem.bytes_of(&Tensor::OUTPUTS),
        })?;
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
            // Nobody expects them on the CPU.
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

    /// Plays one rank's part, and says on the standard output how it went.
    fn be_rank(&self, rank: u32, case: &Case) -> Result<u8, Failure> {
        faults::play(case, rank, &self.job, |line| print(&format!("{line}\n")))?;
        Ok(exit::SUCCESS)
    }

    /// Runs every case on processes of its own, and says how each went.
    fn supervise(&self) -> Result<u8, Failure> {
        let (cases, deadline) = (&self.cases, self.settings.deadline());
        print(&format!(
            "{} backend, {} ranks, {} cases, deadline {:.1} s\n",
            self.job.backend_name(),
            self.job.world_size(),
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
                // What other processes have taken since the last case is not this one's.
                memory.note().map_err(|error| Failure::Failed(error.to_string()))?;
            }
            let (observed, left) = self.watch(case)?;
            let left = left.or_else(|| {
                let missing = memory.as_ref()?.missing(GIVEN_BACK);
                missing.unwrap_or_else(|error| Some(error.to_string()))
            });
            let judged = judge::judge(case, case.deadline(deadline), &observed);
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

    /// Runs one case and tells what was seen of each rank, and what was left behind.
    fn watch(&self, case: &Case) -> Result<(Vec<Observed>, Option<String>), Failure> {
        let failed = |error: launch::Error| Failure::Failed(error.to_string());
        let (key, program) = (launch::new_key().map_err(failed)?, launch::program().map_err(failed)?);
        let deadline = case.deadline(self.settings.deadline());
        let world_size = self.job.world_size();
        let arguments = [
            "faults".to_owned(),
            format!("--backend={}", self.job.backend_name()),
            format!("--deadline={}", deadline.as_secs_f64()),
            format!("--cases={case}"),
        ];
        let oversubscribe = self.settings.oversubscribe.then_some("--oversubscribe");
        let mut ranks = Vec::new();
        for rank in 0..world_size {
            let mut command = launch::rank_command(&program, rank, world_size, &key);
            command.args(&arguments).args(oversubscribe).stdout(Stdio::piped());
            let child = command.spawn().map_err(|source| failed(launch::Error::Start { rank, source }))?;
            ranks.push(Rank::watch(child));
        }
        let mut fault: Option<Instant> = None;
        let mut end = Instant::now() + SET_UP;
        // A rank that has reported has still to end; the faulty one may never.
        loop {
            for (number, rank) in (0..).zip(&mut ranks) {
                rank.listen();
                if number == case.rank && fault.is_none() && rank.marked.is_some() {
                    fault = rank.marked;
                    end = Instant::now() + deadline + SLACK + WRAP_UP;
                }
                rank.reap();
            }
            let all_ended = (0..)
                .zip(&ranks)
                .all(|(number, rank)| rank.ended || number == case.rank && !case.fault.is_survived());
            if all_ended || Instant::now() >= end {
                break;
            }
            thread::sleep(Duration::from_millis(2));
        }
        let mut left = None;
        for (number, rank) in (0..).zip(&mut ranks) {
            rank.end();
            rank.listen();
            if rank.survived_its_end && number != case.rank {
                left = Some(format!("rank {number}'s process did not end by itself"));
            }
        }
        for key in [key.clone(), again(&key)] {
            if rendezvous::is_taken(&key) {
                left = Some(format!("the socket of the key '{key}' is still there"));
            }
        }
        // Ranks may have ended before the fault's mark was read.
        let fault = fault.or_else(|| ranks.get(case.rank as usize).and_then(|rank| rank.marked));
        let observed = |rank: &mut Rank| Observed {
            after: rank
                .reported
                .zip(fault)
                .map(|(reported, fault)| reported.saturating_duration_since(fault)),
            outcome: rank.outcome.take(),
            again: rank.again.take(),
        };
        Ok((ranks.iter_mut().map(observed).collect(), left))
    }
}

/// Why there can be no cases of NCCL's all-reduce, if there can be none.
fn check_nccl(job: &Job) -> Result<(), String> {
    if job.backend_name() != "cuda" {
        return Err("NCCL needs the cuda backend".to_owned());
    }
    if cuda::count().map_err(|error| error.to_string())? < job.world_size() {
        return Err("NCCL refuses ranks that share a GPU".to_owned());
    }
    cuda_backend::check_nccl().map_err(|error| error.to_string())
}

/// The key of the group that the same processes form when the first is over.
fn again(key: &str) -> String {
    format!("{key}/again")
}

impl Script for Job {
    fn meet(&self, is_again: bool) -> Result<Group, Error> {
        Ok(self.meet(|key| if is_again { again(key) } else { key.to_owned() })?)
    }

    fn join<'a>(&self, group: &'a Group) -> Result<Box<dyn Collective + 'a>, Error> {
        self.join(group, self.deadline())
    }
}

/// A rank's process and what it has said. It does not outlive this value.
struct Rank {
    child: Child,
    lines: Receiver<(Instant, String)>,
    marked: Option<Instant>,
    reported: Option<Instant>,
    outcome: Option<String>,
    again: Option<String>,
    ended: bool,
    survived_its_end: bool,
}

impl Rank {
    fn watch(mut child: Child) -> Rank {
        let (sender, lines) = mpsc::channel();
        if let Some(output) = child.stdout.take() {
            thread::spawn(move || {
                for_each_line(output, MAX_LINE, |line| sender.send((Instant::now(), line.text)).is_ok());
            });
        }
        Rank {
            child,
            lines,
            marked: None,
            reported: None,
            outcome: None,
            again: None,
            ended: false,
            survived_its_end: false,
        }
    }

    /// Takes in what it has said.
    fn listen(&mut self) {
        // Once it has ended, its output ends, and nothing is missed by waiting for that.
        let patience = if self.ended { Duration::from_secs(1) } else { Duration::ZERO };
        while let Ok((at, line)) = self.lines.recv_timeout(patience) {
            if line == MARK {
                self.marked.get_or_insert(at);
            } else if let Some(outcome) = line.strip_prefix(OUTCOME) {
                self.reported = Some(at);
                self.outcome = Some(outcome.to_owned());
            } else if let Some(again) = line.strip_prefix(AGAIN) {
                self.again = Some(again.to_owned());
            }
        }
    }

    fn reap(&mut self) {
        self.ended = self.ended || !matches!(self.child.try_wait(), Ok(None));
    }

    /// Ends it, if it has not.
    fn end(&mut self) {
        self.reap();
        if !self.ended {
            self.survived_its_end = true;
            // Fails only if it has ended meanwhile.
            let _ = self.child.kill();
            let _ = self.child.wait();
            self.ended = true;
        }
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        self.end();
    }
}
