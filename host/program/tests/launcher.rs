//! The launcher with real ranks. After any end of a rank the user gets one line and the right status, and no process is
//! left.
//!
//! Launcher and ranks are this test program, started again to run `launched_program` only.

use std::{
    env, fs,
    io::{self, Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio, exit},
    thread,
    time::{Duration, Instant},
};

use fused_collective::group::rendezvous::{Error, Group, Membership};
use fused_collective_cli::{
    exit::{FAILURE, SECONDARY, USAGE},
    job::{
        launch::{self, Launcher},
        rank_env::RankEnv,
    },
    report::memory::available_memory,
};
use rustix::process::{Pid, Signal, getpid, kill_process};

/// The variable with the work of the ranks.
const WORK: &str = "LAUNCHER_TEST_WORK";
const RANKS: u32 = 3;

#[test]
#[ignore = "the program that the other tests start"]
fn launched_program() {
    launch::tie_to_parent().expect("a parent");
    let work = env::var(WORK).expect("started by another test");
    if work == "free memory" {
        println!("\nfree {}", available_memory().expect("a figure"));
        exit(0);
    }
    if let Some(rank) = RankEnv::from_env().expect("a valid environment") {
        rank_main(&rank, &work);
    }
    let launcher = Launcher::new(RANKS).expect("a launcher").grace(Duration::from_millis(800));
    let end = launcher.run().expect("ranks");
    if let Some(message) = end.message {
        eprintln!("{message}");
    }
    exit(end.status.into());
}

/// A rank by the launcher's convention, with a mishap if `work` has one.
fn rank_main(environment: &RankEnv, work: &str) -> ! {
    let &RankEnv { rank, world_size, .. } = environment;
    let mut input = Vec::new();
    io::stdin().read_to_end(&mut input).expect("an empty input");
    if (work, rank) == ("crash at start", 1) {
        end_here(Signal::KILL);
    }
    let short = matches!(work, "stop" | "crash at start");
    let deadline = Duration::from_millis(if short { 500 } else { 20_000 });
    let membership = Membership { rank, world_size, key: &environment.key, config: b"", deadline };
    let group = Group::join(&membership).expect("the group comes together");
    println!("\npid {}", getpid());
    // A mishap ends the others at once, and the tests want to know all numbers. A loss shows again below.
    drop(group.barrier());
    match (work, rank) {
        ("kill", 2) => end_here(Signal::KILL),
        ("stop", 1) => end_here(Signal::STOP),
        ("status 3", 1) => exit(3),
        ("leave", 1) => exit(0),
        ("wrong option", 1) => {
            eprintln!("that option is wrong");
            group.abort("a wrong option");
            exit(USAGE.into());
        }
        ("hoard", 2) => hoard(),
        ("linger", 1) | ("sleep", _) => sleep(),
        ("linger", _) => exit(SECONDARY.into()),
        _ => {}
    }
    match group.barrier().and_then(|()| group.farewell()) {
        Ok(()) => exit(0),
        Err(Error::Lost(lost)) if !launch::reports(&lost, rank, launch::is_launched()) => {
            exit(SECONDARY.into())
        }
        Err(error) => {
            eprintln!("{error}");
            exit(FAILURE.into());
        }
    }
}

/// A signal may reach another thread of this process first, and this one a little later.
fn end_here(signal: Signal) -> ! {
    kill_process(getpid(), signal).expect("a signal sent");
    sleep()
}

fn sleep() -> ! {
    loop {
        thread::sleep(Duration::from_secs(1));
    }
}

/// Takes memory until there is none.
fn hoard() -> ! {
    let mut hoarded = Vec::new();
    loop {
        hoarded.push(vec![1_u8; 1 << 20]);
    }
}

fn start(work: &str) -> Child {
    start_by(Command::new(env::current_exe().expect("this program")), work)
}

/// Starts this program again by a command that ends with its path.
fn start_by(mut command: Command, work: &str) -> Child {
    command.args(["--ignored", "--exact", "launched_program", "--nocapture"]);
    // The test's own environment may make it a rank.
    for variable in
        ["RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMI_SIZE"]
    {
        command.env_remove(variable);
    }
    command.env_remove("SLURM_PROCID").env(WORK, work);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("a process")
}

/// Runs a job to its end. Returns the status, the standard error, and the ranks' process numbers.
fn run(work: &str) -> (Option<i32>, String, Vec<u32>) {
    let (code, printed, errors) = outputs(start(work));
    let pids = printed.lines().filter_map(|line| line.strip_prefix("pid ")?.parse().ok()).collect();
    (code, errors, pids)
}

/// Runs a job to its end. Returns the status, and what it wrote to both outputs.
fn outputs(mut launcher: Child) -> (Option<i32>, String, String) {
    // A rank that reads the launcher's input would wait for ever.
    let mut input = launcher.stdin.take().expect("an input");
    input.write_all(b"x").expect("written");
    let output = launcher.wait_with_output().expect("ended");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// True if the process has ended, even if its parent has not collected it yet.
fn is_gone(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    status
        .rsplit(')')
        .next()
        .is_none_or(|rest| rest.trim_start().is_empty() || rest.trim_start().starts_with('Z'))
}

fn assert_gone(pids: &[u32]) {
    let until = Instant::now() + Duration::from_secs(2);
    while !pids.iter().all(|&pid| is_gone(pid)) {
        assert!(Instant::now() < until, "some of {pids:?} are left");
        thread::sleep(Duration::from_millis(5));
    }
}

fn assert_outcome(work: &str, status: u8, message: &str) {
    let (code, errors, pids) = run(work);
    assert_eq!((code, errors.as_str()), (Some(status.into()), message));
    assert_eq!(pids.len(), RANKS as usize);
    assert_gone(&pids);
}

#[test]
fn a_job_that_succeeds_says_nothing() {
    assert_outcome("well", 0, "");
}

#[test]
fn a_killed_rank_is_named_once() {
    assert_outcome("kill", 1, "rank 2 was killed by signal 9 (SIGKILL)\n");
}

#[test]
fn a_rank_that_dies_before_the_others_met_it_is_named_once() {
    let (code, errors, _) = run("crash at start");
    assert_eq!((code, errors.as_str()), (Some(1), "rank 1 was killed by signal 9 (SIGKILL)\n"));
}

#[test]
fn a_rank_that_exits_with_a_status_of_its_own_is_named_once() {
    assert_outcome("status 3", 1, "rank 1 exited with status 3\n");
}

#[test]
fn a_rank_that_told_the_user_has_its_status_passed_on() {
    assert_outcome("wrong option", 2, "that option is wrong\n");
}

#[test]
fn a_rank_that_leaves_early_is_named_once() {
    assert_outcome("leave", 1, "rank 1 ended before the others were done\n");
}

#[test]
fn a_stopped_rank_is_named_once_and_ended() {
    assert_outcome("stop", 1, "rank 1 did not come to the barrier within 500.0ms\n");
}

#[test]
fn a_rank_that_lingers_is_ended_after_the_grace_period() {
    let started = Instant::now();
    assert_outcome("linger", 1, "rank 1 did not end when the others did, and was ended\n");
    assert!(started.elapsed() >= Duration::from_millis(800));
}

/// Starts a job whose ranks sleep, waits for them, and sends the launcher a signal.
fn signalled(signal: Signal) -> (Option<i32>, String) {
    use io::BufRead as _;

    let mut launcher = start("sleep");
    drop(launcher.stdin.take());
    let output = io::BufReader::new(launcher.stdout.take().expect("its output"));
    let pid = |line: io::Result<String>| line.expect("a line").strip_prefix("pid ")?.parse().ok();
    let pids: Vec<u32> = output.lines().filter_map(pid).take(RANKS as usize).collect();
    assert_eq!(pids.len(), RANKS as usize);
    assert!(pids.iter().all(|&pid| !is_gone(pid)));
    kill_process(Pid::from_child(&launcher), signal).expect("a signal sent");
    let output = launcher.wait_with_output().expect("ended");
    assert_gone(&pids);
    (output.status.code(), String::from_utf8(output.stderr).expect("text"))
}

#[test]
fn an_interrupted_job_ends_with_all_its_ranks() {
    assert_eq!(signalled(Signal::INT), (Some(130), "interrupted\n".to_owned()));
    assert_eq!(signalled(Signal::TERM), (Some(143), "interrupted\n".to_owned()));
}

#[test]
fn no_rank_outlives_a_killed_launcher() {
    assert_eq!(signalled(Signal::KILL), (None, String::new()));
}

/// The most memory of a control group, in bytes: enough for the processes of a job.
const GROUP_BYTES: u64 = 256 << 20;

/// A control group of this test's own, with [`GROUP_BYTES`] of memory.
struct ControlGroup(PathBuf);

impl ControlGroup {
    /// `None`, with a line that says so, if this process may not make one.
    fn make(name: &str) -> Option<Self> {
        let name = format!("fused-collective-{name}-{}", std::process::id());
        // Version 1, or version 2 where memory is controlled below the root.
        let ways = [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")];
        let made = ways.iter().find_map(|(root, limit)| {
            let group = ControlGroup(Path::new(root).join(&name));
            fs::create_dir(&group.0).ok()?;
            fs::write(group.0.join(limit), GROUP_BYTES.to_string()).is_ok().then_some(group)
        });
        if made.is_none() {
            // Not `println!`, whose text the test harness keeps.
            let _ = writeln!(io::stdout(), "skipped: a control group of memory cannot be made here");
        }
        made
    }

    /// Starts this program in the group.
    fn start(&self, work: &str) -> Child {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $$ > \"$0\"/cgroup.procs && exec \"$@\""]).arg(&self.0);
        command.arg(env::current_exe().expect("this program"));
        start_by(command, work)
    }
}

impl Drop for ControlGroup {
    fn drop(&mut self) {
        // The kernel takes a moment to part with the processes that have ended.
        let until = Instant::now() + Duration::from_secs(10);
        while fs::remove_dir(&self.0).is_err() && self.0.exists() && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn free_memory_is_that_of_the_control_group() {
    let Some(group) = ControlGroup::make("free") else { return };
    let (code, printed, errors) = outputs(group.start("free memory"));
    let free = printed.lines().find_map(|line| line.strip_prefix("free ")?.parse::<u64>().ok());
    assert_eq!((code, errors.as_str()), (Some(0), ""));
    assert!(free.is_some_and(|free| free > GROUP_BYTES / 2 && free <= GROUP_BYTES), "{printed}");
}

#[test]
fn a_rank_that_is_killed_for_memory_is_named_with_the_cause() {
    let Some(group) = ControlGroup::make("hoard") else { return };
    // The kernel would swap, where it may.
    let (code, _, errors) = outputs(group.start("hoard"));
    let line = "rank 2 was killed by signal 9 (SIGKILL): its control group ran out of memory\n";
    assert_eq!((code, errors.as_str()), (Some(1), line));
}
