//! Groups whose ranks are processes: what the others see of one that is killed, stopped, or exits.
//!
//! The ranks are this very test program, started again to run `rank_process` alone.

use std::{
    env,
    io::{BufRead as _, BufReader, Lines},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use fused_collective::group::{
    How,
    rendezvous::{Error, Group, Membership},
};
use rustix::process::{Pid, Signal, kill_process};

/// Tells a rank process who it is: `rank/world size/deadline in ms/what it does/key`.
const ROLE: &str = "RANK_PROCESS_ROLE";

#[test]
#[ignore = "a rank, which the other tests start"]
fn rank_process() {
    let role = env::var(ROLE).expect("started by another test");
    let [rank, world_size, deadline, work, key] = role.splitn(5, '/').collect::<Vec<_>>()[..] else {
        panic!("{role:?} is no role")
    };
    let number = |text: &str| text.parse::<u32>().expect("a number");
    let group = Group::join(&Membership {
        rank: number(rank),
        world_size: number(world_size),
        key,
        config: b"",
        deadline: Duration::from_millis(number(deadline).into()),
    })
    .expect("the group comes together");
    println!("\njoined");
    let lost = match work {
        "exit" => std::process::exit(0),
        "sleep" => loop {
            thread::sleep(Duration::from_secs(1));
        },
        "spin" => {
            let alarm = group.alarm();
            while alarm.lost_rank().is_none() {
                thread::yield_now();
            }
            group.lost()
        }
        "barrier" => match group.barrier() {
            Err(Error::Lost(lost)) => Some(lost),
            other => panic!("a lost rank, not {other:?}"),
        },
        "idle" => {
            let before = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
            thread::sleep(Duration::from_millis(500));
            let after = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
            group.farewell().expect("farewell");
            return println!("used {}", (after - before).tv_nsec);
        }
        other => panic!("{other:?} is no work"),
    };
    let lost = lost.expect("a lost rank");
    println!("{} {:?} {lost}", lost.rank, lost.how);
}

/// A rank's process, killed at the latest when the test is done with it.
struct Rank {
    process: Child,
    output: Lines<BufReader<ChildStdout>>,
}

impl Rank {
    fn start(role: String) -> Self {
        let mut process = Command::new(env::current_exe().expect("this program"))
            .args(["--ignored", "--exact", "rank_process", "--nocapture"])
            .env(ROLE, role)
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let output = BufReader::new(process.stdout.take().expect("its output")).lines();
        Rank { process, output }
    }

    /// The rest of the first line that starts with `start`.
    fn line(&mut self, start: &str) -> String {
        self.output
            .find_map(|line| line.expect("a line").strip_prefix(start).map(str::to_owned))
            .unwrap_or_else(|| panic!("the rank ended and said nothing of {start:?}"))
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).expect("a signal sent");
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Starts a group and waits until it is together.
fn start(works: &[&str], deadline: Duration, name: &str) -> Vec<Rank> {
    let roles = (0..).zip(works).map(|(rank, work)| {
        format!("{rank}/{}/{}/{work}/{name} {}", works.len(), deadline.as_millis(), std::process::id())
    });
    let mut ranks: Vec<_> = roles.map(Rank::start).collect();
    for rank in &mut ranks {
        rank.line("joined");
    }
    ranks
}

/// Every rank but `lost` says that `lost` was lost in this way, at most `within` after now.
fn assert_seen_by_all(ranks: &mut [Rank], lost: usize, how: How, within: Duration) {
    let started = Instant::now();
    for (number, rank) in ranks.iter_mut().enumerate().filter(|(number, _)| *number != lost) {
        rank.line(&format!("{lost} {how:?}"));
        assert!(started.elapsed() < within, "rank {number} after {:?}", started.elapsed());
    }
}

/// Ranks that wait for others in every way, except `lost`, which does `work`.
fn works(world_size: usize, lost: usize, work: &str) -> Vec<&str> {
    let waits = ["barrier", "spin", "barrier"];
    (0..world_size).map(|rank| if rank == lost { work } else { waits[rank % 3] }).collect()
}

#[test]
fn a_killed_rank_is_seen_by_all_within_a_second() {
    for (world_size, lost) in [(2, 0), (2, 1), (3, 0), (3, 2), (16, 0), (16, 9)] {
        let mut ranks = start(
            &works(world_size, lost, "sleep"),
            Duration::from_secs(60),
            &format!("kill {world_size} {lost}"),
        );
        ranks[lost].signal(Signal::KILL);
        assert_seen_by_all(&mut ranks, lost, How::Ended, Duration::from_secs(1));
    }
}

#[test]
fn a_rank_that_exits_without_a_farewell_is_seen_by_all() {
    let mut ranks = start(&works(3, 1, "exit"), Duration::from_secs(60), "exit");
    assert_seen_by_all(&mut ranks, 1, How::Ended, Duration::from_secs(1));
}

#[test]
fn a_stopped_rank_is_seen_by_all_at_the_deadline() {
    let deadline = Duration::from_millis(1500);
    for lost in [0, 1] {
        let mut works = vec!["barrier"; 3];
        works[lost] = "sleep";
        let mut ranks = start(&works, deadline, &format!("stop {lost}"));
        ranks[lost].signal(Signal::STOP);
        assert_seen_by_all(&mut ranks, lost, How::Late, deadline + Duration::from_secs(1));
    }
}

#[test]
fn watching_the_others_costs_no_processor_time() {
    let mut ranks = start(&["idle"; 2], Duration::from_secs(60), "idle");
    for rank in &mut ranks {
        let nanoseconds: u64 = rank.line("used ").parse().expect("a number");
        assert!(nanoseconds < 20_000_000, "{nanoseconds} ns of 500 ms");
    }
}
