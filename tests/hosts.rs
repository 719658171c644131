//! Ranks of two hosts, each a network namespace with a cable to the other. A test is skipped, and says so, where these cannot be
//! made.

use std::{
    env,
    ffi::OsStr,
    io::{Read as _, Write as _},
    net::TcpStream,
    process::{Command, exit},
    thread,
    time::{Duration, Instant},
};

use fused_collective::group::rendezvous::{Group, Membership, Network, Secret};
use fused_collective_tests::{LIMIT, Outcome, Running, bench, command as of_program, run, skip};

const OPTIONS: &str = "--num-tokens 3 --hidden-dim 96 --trials 2 --warmup 0";
const SECRET: &str = "0123456789abcdef0123456789abcdef";
const OTHER_SECRET: &str = "fedcba9876543210fedcba9876543210";
/// The address of rank 0, with the port after that of the variables.
const ADDRESS: &str = "10.77.0.1:29501";
const NAMES: [&str; 2] = ["a", "b"];
/// Time for a busy machine.
const SLACK: Duration = Duration::from_secs(3);

/// Two hosts, of which each lives as long as a process in its namespace.
struct Hosts {
    processes: [Running; 2],
    /// The options by which others enter the user namespace of the hosts.
    user: &'static [&'static str],
}

impl Hosts {
    /// `None`, with a line that says so, where they cannot be made.
    fn make() -> Option<Self> {
        // Users other than root need a user namespace.
        let ways: [(&[&str], &[&str]); 2] = [
            (&["unshare"], &[]),
            (&["unshare", "--user", "--map-root-user"], &["--user", "--preserve-credentials"]),
        ];
        let works = |(way, _): &(&[&str], &[&str])| {
            let made = command(way, &["--net", "ip", "link", "set", "lo", "up"]).output();
            made.is_ok_and(|made| made.status.success())
        };
        let Some((way, user)) = ways.into_iter().find(works) else {
            skip("unshare and ip cannot make a network namespace here");
            return None;
        };
        let live = ["--net", "sh", "-c", "echo ready; exec sleep 300"];
        let live_in = |mut command: Command| {
            let running = Running::start(&mut command);
            running.wait_for_stdout("ready", LIMIT);
            running
        };
        let first = live_in(command(way, &live));
        // In the user namespace of the first.
        let second = live_in(command(&enter(&first, user), &[&["unshare"][..], &live].concat()));
        let hosts = Hosts { processes: [first, second], user };
        let pid = hosts.processes[1].pid();
        let cables = [
            hosts.set_up(0, &format!("ip link add cable type veth peer name cable netns {pid}")),
            hosts.set_up(
                0,
                "ip link set lo up && ip link set cable up && ip address add 10.77.0.1/24 dev cable",
            ),
            hosts.set_up(
                1,
                "ip link set lo up && ip link set cable up && ip address add 10.77.0.2/24 dev cable",
            ),
        ];
        if cables.contains(&false) {
            skip("ip cannot connect two network namespaces here");
            return None;
        }
        Some(hosts)
    }

    /// Runs a line of the shell on a host, and returns whether it succeeds.
    fn set_up(&self, host: usize, line: &str) -> bool {
        let done = command(&enter(&self.processes[host], self.user), &["sh", "-c", line]).output();
        done.is_ok_and(|done| done.status.success())
    }

    /// Takes the cable out, after which nothing is heard of either host.
    fn part(&self) {
        assert!(self.set_up(0, "ip link set cable down"));
    }

    /// `inner` on a host.
    fn on(&self, host: usize, inner: &Command) -> Command {
        let mut words: Vec<&OsStr> = vec![inner.get_program()];
        words.extend(inner.get_args());
        let mut outer = command(&enter(&self.processes[host], self.user), &words);
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => outer.env(name, value),
                None => outer.env_remove(name),
            };
        }
        outer
    }

    /// The program as a rank of four, two on each host, as `torchrun` starts it.
    fn rank(&self, rank: u32, options: &str, secret: Option<&str>) -> Running {
        let host = rank as usize / 2;
        let mut rank_of_four = bench(options);
        rank_of_four
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", "4")
            .env("LOCAL_RANK", (rank % 2).to_string())
            .env("LOCAL_WORLD_SIZE", "2")
            .env("MASTER_ADDR", "10.77.0.1")
            .env("MASTER_PORT", "29500")
            .env("NCCL_HOSTID", NAMES[host]);
        if let Some(secret) = secret {
            rank_of_four.env("FUSED_COLLECTIVE_SECRET", secret);
        }
        Running::start(&mut self.on(host, &rank_of_four))
    }

    /// A rank of this program's own, which does what `part` says in a group of the library.
    fn group_rank(&self, rank: u32, part: &str) -> Running {
        let mut own = Command::new(env::current_exe().unwrap());
        own.args(["--ignored", "--exact", "rank_process", "--nocapture"]);
        own.env(PART, part).env("RANK", rank.to_string());
        Running::start(&mut self.on(rank as usize / 2, &own))
    }
}

/// The start of a command line that runs what follows it in the namespaces of a process.
fn enter(process: &Running, user: &[&'static str]) -> Vec<String> {
    let words = ["nsenter", "--net", "--target"].map(str::to_owned);
    [
        &words[..],
        &[process.pid().to_string()],
        &user.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>(),
    ]
    .concat()
}

fn command<W: AsRef<OsStr>, A: AsRef<OsStr>>(words: &[W], more: &[A]) -> Command {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).args(more);
    command
}

fn ends(ranks: Vec<Running>) -> Vec<Outcome> {
    ranks.into_iter().map(|rank| rank.wait(LIMIT)).collect()
}

/// Asserts that the ranks of a job failed with this status, that the one line of all is rank 0's, and that it came `within`
/// this time.
#[track_caller]
fn assert_one_line(outcomes: &[Outcome], line: &str, within: Duration) {
    outcomes[0].assert_failure(1, line);
    for outcome in outcomes {
        assert_eq!(outcome.code, Some(1), "{outcome}");
        assert!(outcome.time < within + SLACK, "{outcome}");
    }
    assert!(outcomes[1..].iter().all(|outcome| outcome.stderr.is_empty()), "{outcomes:?}");
}

const REFUSED: &str = "rank 0: the CPU backend is for ranks of one host, and these are on 2: a, b";

#[test]
fn ranks_of_two_hosts_meet_and_are_told_what_the_cpu_backend_is_for() {
    let Some(hosts) = Hosts::make() else { return };
    let ranks = (0..4).map(|rank| hosts.rank(rank, OPTIONS, Some(SECRET)));
    assert_one_line(&ends(ranks.collect()), REFUSED, Duration::ZERO);
}

/// Without a network of their own, and without a launcher.
#[test]
fn hosts_that_one_host_simulates_meet_as_others_do() {
    for ranks in ["1", "2"] {
        let ranks = &format!("--nproc-per-node={ranks}");
        let outcome = run(&mut of_program(&["verify", "--quick", "--backend", "cpu", "--hosts", "2", ranks]));
        assert_eq!(
            outcome.stderr.trim_end(),
            "fused-collective: rank 0: the CPU backend is for ranks of one host, and these are on 2: simulated-host-0, \
             simulated-host-1"
        );
        assert_eq!(outcome.code, Some(1));
    }
    let args = ["faults", "--backend", "cpu", "--hosts", "2", "--nproc-per-node", "1"];
    let outcome = run(&mut of_program(&args));
    assert_eq!(
        outcome.stderr.trim_end(),
        "fused-collective: --hosts: the CPU backend is for ranks of one host: use --backend cuda, or leave the option out"
    );
}

#[test]
fn a_host_that_comes_late_is_waited_for() {
    let Some(hosts) = Hosts::make() else { return };
    // Rank 0 first, and then last.
    for order in [[0, 1, 2, 3], [2, 3, 0, 1]] {
        let mut ranks: Vec<(u32, Running)> = Vec::new();
        for (place, rank) in order.into_iter().enumerate() {
            if place == 2 {
                thread::sleep(Duration::from_secs(1));
            }
            ranks.push((rank, hosts.rank(rank, OPTIONS, Some(SECRET))));
        }
        ranks.sort_by_key(|(rank, _)| *rank);
        let ranks = ranks.into_iter().map(|(_, running)| running).collect();
        assert_one_line(&ends(ranks), REFUSED, Duration::from_secs(1));
    }
}

#[test]
fn a_host_that_never_comes_is_named_at_the_deadline() {
    let Some(hosts) = Hosts::make() else { return };
    let options = format!("{OPTIONS} --deadline 2");
    let here = [0, 1].map(|rank| hosts.rank(rank, &options, Some(SECRET)));
    let line = format!(
        "rank 2 did not come to the rendezvous within 2.0s, nor did rank 3: rank 0 on host a listened at {ADDRESS} under \
         the key 'torchrun/10.77.0.1/29500//' (the variable FUSED_COLLECTIVE_ADDRESS sets the address)"
    );
    assert_one_line(&ends(here.into()), &line, Duration::from_secs(2));
    // Without rank 0 the hosts do not hear of each other: the first rank of each says so.
    let there = ends([2, 3].map(|rank| hosts.rank(rank, &options, Some(SECRET))).into());
    let line = format!(
        "rank 0 did not come to the rendezvous within 2.0s: rank 2 on host b looked for rank 0 at {ADDRESS} under the key \
         'torchrun/10.77.0.1/29500//' (Connection refused (os error 111)) (the variable FUSED_COLLECTIVE_ADDRESS sets the \
         address)"
    );
    assert_one_line(&there, &line, Duration::from_secs(2));
}

#[test]
fn a_host_with_another_secret_is_no_part_of_the_job() {
    let Some(hosts) = Hosts::make() else { return };
    let options = format!("{OPTIONS} --deadline 2");
    let secret = |rank| if rank < 2 { SECRET } else { OTHER_SECRET };
    let outcomes = ends((0..4).map(|rank| hosts.rank(rank, &options, Some(secret(rank)))).collect());
    let line = format!(
        "rank 2 did not come to the rendezvous within 2.0s, nor did rank 3: rank 0 on host a listened at {ADDRESS} under \
         the key 'torchrun/10.77.0.1/29500//' (2 connections were turned away, the last from 10.77.0.2: it does not have \
         this rank's secret) (the variable FUSED_COLLECTIVE_ADDRESS sets the address)"
    );
    assert_one_line(&outcomes[..2], &line, Duration::from_secs(2));
    let line = format!(
        "rank 2: rendezvous: the process that listens at {ADDRESS} has another secret than this rank: give all ranks of \
         the job the same one, and no other program this address"
    );
    assert_one_line(&outcomes[2..], &line, Duration::ZERO);
    let all: String =
        outcomes.iter().map(|outcome| format!("{}{}", outcome.stdout, outcome.stderr)).collect();
    assert!(!all.contains(SECRET) && !all.contains(OTHER_SECRET), "{all}");
}

#[test]
fn hosts_without_a_secret_are_refused_at_once_and_told_how_to_make_one() {
    let Some(hosts) = Hosts::make() else { return };
    let outcomes = ends((0..4).map(|rank| hosts.rank(rank, OPTIONS, None)).collect());
    for (rank, outcome) in outcomes.iter().enumerate() {
        let line = format!(
            "fused-collective: rank {rank}: LOCAL_WORLD_SIZE=2 says that the job has ranks on several hosts, and these meet \
             only if they have a secret in common: set FUSED_COLLECTIVE_SECRET on all ranks to the same random text, such as \
             that of `openssl rand -hex 32`, or start all ranks on one host\n"
        );
        // One line on each host.
        assert_eq!(outcome.stderr, if rank % 2 == 0 { line } else { String::new() });
        assert_eq!(outcome.code, Some(2), "{outcome}");
        assert!(outcome.time < SLACK, "{outcome}");
    }
    let outcome = hosts.rank(2, OPTIONS, Some("hunter2")).wait(LIMIT);
    assert!(
        outcome.stderr.contains("rank 2: FUSED_COLLECTIVE_SECRET: 7 characters are no secret"),
        "{outcome}"
    );
    assert!(outcome.code == Some(2) && !outcome.stderr.contains("hunter2"), "{outcome}");
}

#[test]
fn hosts_with_different_numbers_of_ranks_are_refused_by_their_numbers() {
    let Some(hosts) = Hosts::make() else { return };
    let start = |rank: u32| {
        let host = usize::from(rank == 2);
        let mut bench = bench(OPTIONS);
        let variables = [("RANK", rank.to_string()), ("LOCAL_RANK", (rank % 2).to_string())];
        bench
            .envs(variables)
            .env("WORLD_SIZE", "3")
            .env("LOCAL_WORLD_SIZE", if rank == 2 { "1" } else { "2" });
        bench.env("FUSED_COLLECTIVE_ADDRESS", "10.77.0.1:7000").env("FUSED_COLLECTIVE_KEY", "numbers");
        bench.env("FUSED_COLLECTIVE_SECRET", SECRET).env("NCCL_HOSTID", NAMES[host]);
        Running::start(&mut hosts.on(host, &bench))
    };
    let line = "rank 0: the hosts have different numbers of ranks, 2 on a, 1 on b: start as many on each";
    assert_one_line(&ends((0..3).map(start).collect()), line, Duration::ZERO);
}

#[test]
fn a_stranger_s_noise_neither_ends_nor_delays_the_job() {
    let Some(hosts) = Hosts::make() else { return };
    let first = hosts.rank(0, OPTIONS, Some(SECRET));
    let noise = hosts.group_rank(2, "noise");
    noise.wait_for_stdout("connected", LIMIT);
    let began = Instant::now();
    let others = (1..4).map(|rank| hosts.rank(rank, OPTIONS, Some(SECRET)));
    let outcomes = ends([first].into_iter().chain(others).collect());
    // The noise does not end, so whoever waited for its end would come to the deadline.
    let most = Duration::from_secs(8);
    assert!(began.elapsed() < most, "{:?}", began.elapsed());
    assert_one_line(&outcomes, REFUSED, most);
}

#[test]
fn a_host_that_vanishes_while_ranks_gather_is_named_within_the_deadline() {
    let Some(hosts) = Hosts::make() else { return };
    let options = format!("{OPTIONS} --deadline 8");
    let ranks = [0, 1, 2].map(|rank| hosts.rank(rank, &options, Some(SECRET)));
    // Rank 3 does not come, so the others wait. They are given the time to come.
    let before = Duration::from_secs(3);
    thread::sleep(before);
    hosts.part();
    let outcomes = ends(ranks.into());
    let line = "rank 2 was lost: nothing was heard from it for 4.0s (host b)";
    assert_one_line(&outcomes[..2], line, before + Duration::from_secs(5));
    let there = &outcomes[2];
    assert!(there.stderr.starts_with("fused-collective: rank 0 did not come to the rendezvous"), "{there}");
    assert!(there.code == Some(1) && there.time < Duration::from_secs(8) + SLACK, "{there}");
}

/// The variable with the part of a [`rank_process`].
const PART: &str = "HOSTS_TEST_PART";
const DEADLINE: Duration = Duration::from_secs(6);

#[test]
#[ignore = "the program that the other tests start"]
fn rank_process() {
    let part = env::var(PART).expect("started by another test");
    if part == "noise" {
        make_noise();
    }
    let rank: u32 = env::var("RANK").unwrap().parse().unwrap();
    let network = Network {
        address: ADDRESS.parse().unwrap(),
        secret: Secret::new(SECRET).unwrap(),
        host: NAMES[rank as usize / 2].to_owned(),
    };
    let membership = Membership { rank, world_size: 4, key: "a group", config: b"", deadline: DEADLINE };
    let group = Group::join_over(&membership, &network).unwrap();
    group.barrier().unwrap();
    say("joined");
    let began = Instant::now();
    if part == "wait" && rank > 0 {
        say(&format!("lost: {}", group.barrier().unwrap_err()));
    } else {
        // Nothing is under way on this rank: the group's own thread notices.
        while group.lost().is_none() {
            assert!(began.elapsed() < LIMIT, "nobody was lost");
            thread::sleep(Duration::from_millis(1));
        }
        say(&format!("lost: {}", group.lost().unwrap()));
    }
    exit(0);
}

fn say(line: &str) {
    // Whoever reads a line may end this process.
    println!("\n{line}");
}

/// Connects to rank 0 as often as it can and sends anything, and reads nothing.
fn make_noise() -> ! {
    let mut noise = vec![0; 1 << 16];
    std::fs::File::open("/dev/urandom").unwrap().read_exact(&mut noise).unwrap();
    let mut open = Vec::new();
    loop {
        match TcpStream::connect(ADDRESS) {
            Ok(mut connected) => {
                connected.set_nonblocking(true).unwrap();
                let _ = connected.write(&noise[..open.len() % 64 * 1000]);
                open.push(connected);
                if open.len() == 100 {
                    say("connected");
                }
            }
            Err(_) => thread::sleep(Duration::from_millis(1)),
        }
        if open.len() > 500 {
            open.drain(..250);
        }
    }
}

/// Starts a group in which ranks wait, or have nothing to do, and parts the hosts. Each side names the first rank of the other.
fn vanish(part: &str) {
    let Some(hosts) = Hosts::make() else { return };
    let ranks: Vec<Running> = (0..4).map(|rank| hosts.group_rank(rank, part)).collect();
    ranks.iter().for_each(|rank| rank.wait_for_stdout("joined", LIMIT));
    let began = Instant::now();
    hosts.part();
    for (rank, outcome) in ends(ranks).into_iter().enumerate() {
        let others = if rank < 2 { [2, 3].map(|rank| (rank, "b")).to_vec() } else { vec![(0, "a")] };
        let line = outcome.stdout.lines().find_map(|line| line.strip_prefix("lost: "));
        let expected = others.iter().map(|(rank, host)| {
            format!("rank {rank} was lost: nothing was heard from it for 3.0s (host {host})")
        });
        assert!(expected.into_iter().any(|expected| line == Some(&*expected)), "rank {rank}: {outcome}");
    }
    assert!(began.elapsed() < DEADLINE, "{:?}", began.elapsed());
}

#[test]
fn a_host_that_vanishes_from_a_group_at_rest_is_named_within_the_deadline() {
    vanish("rest");
}

#[test]
fn a_host_that_vanishes_during_an_operation_is_named_within_the_deadline() {
    vanish("wait");
}

#[test]
fn ranks_that_name_one_host_are_a_group_of_it_wherever_they_met() {
    let ranks = (0..2).map(|rank: u32| {
        let mut bench = bench(OPTIONS);
        bench.env("RANK", rank.to_string()).env("WORLD_SIZE", "2");
        bench.env("LOCAL_RANK", "0").env("LOCAL_WORLD_SIZE", "1");
        bench.env("FUSED_COLLECTIVE_ADDRESS", format!("127.0.0.1:{}", 9000 + std::process::id() % 1000));
        bench.env("FUSED_COLLECTIVE_KEY", "one host").env("FUSED_COLLECTIVE_SECRET", SECRET);
        Running::start(&mut bench)
    });
    for outcome in ends(ranks.collect()) {
        outcome.assert_success();
    }
}

#[test]
fn the_help_names_the_variables() {
    let outcome = run(&mut fused_collective_tests::command(&["--help"]));
    assert!(outcome.stdout.contains("FUSED_COLLECTIVE_SECRET"), "{outcome}");
}
