//! After any end of a rank or of the program, all processes end soon, one line gives the reason, and nothing is left: no
//! process, no shared memory, no file.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    fs,
    os::unix::process::CommandExt,
    path::Path,
    time::{Duration, Instant},
};

use fused_collective_tests::{LIMIT, Outcome, Running, bench};
use rustix::process::{Pid, Signal, kill_process_group};
use tempfile::TempDir;

/// Longest wait of a rank for another, if nothing else shows that it is lost.
const DEADLINE: Duration = Duration::from_secs(2);
/// A deadline for ends that must be noticed at once. A run that waits for it would not end in time.
const LONG_DEADLINE: Duration = Duration::from_secs(60);
/// Time for the kernel and a busy machine.
const SLACK: Duration = Duration::from_secs(6);
const OUTPUTS: [(&str, &str); 3] =
    [("--output-file", "report.md"), ("--json", "report.json"), ("--plot", "report.svg")];

/// A run that is far longer than any test.
struct Job {
    running: Running,
    folder: TempDir,
    shared_memory: BTreeSet<OsString>,
}

impl Job {
    /// A run whose ranks are starting. Its first configuration is short, and the next ones move megabytes.
    fn begun(ranks: u32, deadline: Duration) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut command = bench(&format!(
            "--num-tokens 1 2048 2049 2050 2051 --hidden-dim 4096 --quant-modes none --trials 100 --warmup 0 \
             --nproc-per-node {ranks} --deadline {}",
            deadline.as_secs()
        ));
        for (option, name) in OUTPUTS {
            fs::write(folder.path().join(name), name).unwrap();
            command.args([option, name]);
        }
        fs::create_dir(folder.path().join("tmp")).unwrap();
        // A process group of its own, as from a shell, so that a test can send Ctrl-C.
        command.current_dir(folder.path()).env("TMPDIR", folder.path().join("tmp")).process_group(0);
        let shared_memory = shared_memory();
        Job { running: Running::start(&mut command), folder, shared_memory }
    }

    /// A run in the middle of operations on megabytes.
    fn under_way(ranks: u32, deadline: Duration) -> Self {
        let job = Job::begun(ranks, deadline);
        job.running.wait_for_stdout("num_tokens=1, dtype=bfloat16", LIMIT);
        std::thread::sleep(Duration::from_millis(300));
        job
    }

    fn signal_rank(&self, rank: u32, signal: Signal) {
        self.running.signal(self.running.wait_for_rank(rank, LIMIT), signal);
    }

    /// Waits for the end of the run, at most `within` and some slack. Nothing of it must be left.
    fn end(self, within: Duration) -> Outcome {
        let began = Instant::now();
        let outcome = self.running.wait(LIMIT);
        assert!(began.elapsed() < within + SLACK, "after {:?}: {outcome}", began.elapsed());
        assert!(outcome.survivors.is_empty(), "{outcome}");
        assert_eq!(names(&self.folder.path().join("tmp")), BTreeSet::new(), "in the temporary folder");
        let mut expected = BTreeSet::from([OsString::from("tmp")]);
        for (_, name) in OUTPUTS {
            expected.insert(name.into());
            assert_eq!(fs::read_to_string(self.folder.path().join(name)).unwrap(), name);
        }
        assert_eq!(names(self.folder.path()), expected);
        let left: Vec<_> = shared_memory().difference(&self.shared_memory).cloned().collect();
        assert_eq!(left, [""; 0], "in /dev/shm");
        outcome
    }
}

fn names(folder: &Path) -> BTreeSet<OsString> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name()).collect()
}

/// The names of shared memory.
fn shared_memory() -> BTreeSet<OsString> {
    let folder = Path::new("/dev/shm");
    if folder.exists() { names(folder) } else { BTreeSet::new() }
}

#[test]
fn a_killed_rank_ends_the_run_at_once_whichever_it_is() {
    for rank in [0, 1, 2] {
        let job = Job::under_way(3, LONG_DEADLINE);
        job.signal_rank(rank, Signal::KILL);
        let line = format!("rank {rank} was killed by signal 9 (SIGKILL)");
        job.end(Duration::ZERO).assert_failure(1, &line);
    }
}

#[test]
fn a_rank_that_crashes_is_named_with_its_signal() {
    let job = Job::under_way(2, LONG_DEADLINE);
    job.signal_rank(1, Signal::ABORT);
    job.end(Duration::ZERO).assert_failure(1, "rank 1 was killed by signal 6 (SIGABRT)");
}

#[test]
fn a_rank_that_dies_while_the_others_still_start_is_named_once() {
    let job = Job::begun(16, LONG_DEADLINE);
    job.signal_rank(1, Signal::KILL);
    job.end(Duration::ZERO).assert_failure(1, "rank 1 was killed by signal 9 (SIGKILL)");
}

#[test]
fn a_stopped_rank_ends_the_run_after_the_deadline() {
    for rank in [0, 1] {
        let job = Job::under_way(2, DEADLINE);
        job.signal_rank(rank, Signal::STOP);
        // It cannot end when it is asked to, so it has a second to be asked and one until it is ended.
        let outcome = job.end(DEADLINE + Duration::from_secs(2));
        assert_eq!(outcome.code, Some(1), "{outcome}");
        let named = outcome.stderr.starts_with("fused-collective: ")
            && outcome.stderr.contains(&format!("rank {rank}"));
        assert!(named && outcome.stderr.lines().count() == 1, "{outcome}");
    }
}

#[test]
fn no_rank_outlives_a_killed_program() {
    let job = Job::under_way(3, LONG_DEADLINE);
    job.running.signal(job.running.pid(), Signal::KILL);
    let outcome = job.end(Duration::ZERO);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (None, ""), "{outcome}");
}

#[test]
fn an_interrupted_or_terminated_program_ends_with_its_ranks() {
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let job = Job::under_way(3, LONG_DEADLINE);
        job.running.signal(job.running.pid(), signal);
        job.end(Duration::ZERO).assert_failure(status, "interrupted");
    }
}

#[test]
fn ctrl_c_which_reaches_every_process_is_one_interruption() {
    let job = Job::under_way(3, LONG_DEADLINE);
    kill_process_group(Pid::from_raw(job.running.pid()).unwrap(), Signal::INT).unwrap();
    job.end(Duration::ZERO).assert_failure(130, "interrupted");
}

#[test]
fn ctrl_c_while_ranks_start_leaves_nothing_either() {
    let job = Job::begun(16, LONG_DEADLINE);
    job.running.wait_for_rank(3, LIMIT);
    kill_process_group(Pid::from_raw(job.running.pid()).unwrap(), Signal::INT).unwrap();
    job.end(Duration::ZERO).assert_failure(130, "interrupted");
}
