//! The processes of a case, observed from outside.

use std::{
    process::{Child, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use fused_collective::group::rendezvous;

use super::{
    case::Case,
    judge::{Observed, SLACK},
    run::{AGAIN, MARK, OUTCOME, again_key},
    settings::Settings,
};
use crate::{
    bounded::for_each_line,
    exit::Failure,
    job::{Job, launch},
};

/// Time from the start of a case to its fault, in which processes start and set up their devices.
const SET_UP: Duration = Duration::from_secs(120);
/// Time from a rank's report to its end, which may include a new group.
const WRAP_UP: Duration = Duration::from_secs(120);
/// Bytes of a rank's line that are read; the rest of a longer line is skipped.
const MAX_LINE: u64 = 64 << 10;

/// Runs one case on processes of its own. Returns the observations of each rank, and a description of anything that was left
/// behind.
pub(super) fn watch(
    case: &Case,
    job: &Job,
    settings: &Settings,
) -> Result<(Vec<Observed>, Option<String>), Failure> {
    let failed = |error: launch::Error| Failure::Failed(error.to_string());
    let (key, program) = (launch::new_key().map_err(failed)?, launch::program().map_err(failed)?);
    let deadline = case.deadline(settings.job.deadline());
    let world_size = job.world_size();
    let arguments = [
        "faults".to_owned(),
        format!("--backend={}", job.backend_name()),
        format!("--deadline={}", deadline.as_secs_f64()),
        format!("--cases={case}"),
    ];
    let oversubscribe = settings.job.oversubscribe.then_some("--oversubscribe");
    let hosts = launch::SimulatedHosts::new(settings.job.hosts).map_err(failed)?;
    let of_hosts = hosts.as_ref().map(|_| {
        let ranks = world_size / settings.job.hosts;
        [format!("--hosts={}", settings.job.hosts), format!("--nproc-per-node={ranks}")]
    });
    let mut ranks = Vec::new();
    for rank in 0..world_size {
        let mut command = launch::rank_command(&program, rank, world_size, &key, hosts.as_ref());
        command.args(&arguments).args(of_hosts.iter().flatten()).args(oversubscribe).stdout(Stdio::piped());
        let child = command.spawn().map_err(|source| failed(launch::Error::Start { rank, source }))?;
        ranks.push(Rank::watch(child));
    }
    let mut fault: Option<Instant> = None;
    let mut end = Instant::now() + SET_UP;
    // A rank that has reported must still end; the faulty one may never end.
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
    for key in [key.clone(), again_key(&key)] {
        if rendezvous::is_taken(&key) {
            left = Some(format!("the socket of the key '{key}' is still there"));
        }
    }
    // Ranks may have ended before the mark of the fault was read.
    let fault = fault.or_else(|| ranks.get(case.rank as usize).and_then(|rank| rank.marked));
    let observed = |rank: &mut Rank| Observed {
        after: rank.reported.zip(fault).map(|(reported, fault)| reported.saturating_duration_since(fault)),
        outcome: rank.outcome.take(),
        again: rank.again.take(),
    };
    Ok((ranks.iter_mut().map(observed).collect(), left))
}

/// A rank's process, with the lines that it wrote. It does not outlive this value.
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

    /// Reads the lines that it has written.
    fn listen(&mut self) {
        // The output of an ended process ends soon, so waiting for that end misses no line.
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

    /// Ends the process, if it still runs.
    fn end(&mut self) {
        self.reap();
        if !self.ended {
            self.survived_its_end = true;
            // Fails only if the process has ended meanwhile.
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
