//! Ranks that real launchers start, or that live in namespaces of their own. A test is skipped, and says so, where the
//! launcher is not installed or the kernel does not allow the namespace.

use std::{ffi::OsStr, fs, process::Command, time::Duration};

use fused_collective_tests::{LIMIT, Outcome, Running, bench, skip};
use tempfile::TempDir;

const OPTIONS: &str = "--num-tokens 3 --hidden-dim 96 --trials 2 --warmup 0";
/// A variant with a long name.
const VARIANT: &str = "standard_allreduce_rmsnorm_fp8_quant_native_compiled";

/// The start of a command line that runs what follows it, and what its first program calls itself.
type Launcher = (&'static [&'static str], &'static str);

const OPEN_MPI: [Launcher; 2] = [
    (&["mpirun.openmpi", "--oversubscribe", "-n"], "Open MPI"),
    (&["mpirun", "--oversubscribe", "-n"], "Open MPI"),
];
const HYDRA: [Launcher; 2] = [(&["mpiexec.hydra", "-n"], "HYDRA"), (&["mpiexec", "-n"], "HYDRA")];

/// The first of `launchers` that is installed.
fn installed(launchers: &[Launcher], package: &str) -> Option<&'static [&'static str]> {
    let is_it = |(command, name): &&Launcher| {
        let version = Command::new(command[0]).arg("--version").output();
        version.is_ok_and(|version| String::from_utf8_lossy(&version.stdout).contains(name))
    };
    let found = launchers.iter().find(is_it).map(|(command, _)| *command);
    if found.is_none() {
        skip(&format!("the launcher of the package {package} is not installed"));
    }
    found
}

/// A command that has `launcher` start `ranks` ranks of `command`.
fn launch(launcher: &[&str], ranks: u32, command: &Command) -> Command {
    let mut launched = Command::new(launcher[0]);
    launched.args(&launcher[1..]).arg(ranks.to_string()).arg(command.get_program()).args(command.get_args());
    // Open MPI asks root for them.
    launched.envs(["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"].map(|name| (name, "1")));
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => launched.env(name, value),
            None => launched.env_remove(name),
        };
    }
    launched
}

/// `command` in a shell that does not replace itself by it.
fn wrapped(command: &Command) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", "\"$@\"; exit $?", "sh"]).arg(command.get_program()).args(command.get_args());
    shell
}

/// Asserts success, and that the table was shown once, with no name broken. What launchers say of their own is let be.
#[track_caller]
fn assert_shown_once(outcome: &Outcome) {
    assert_eq!(outcome.code, Some(0), "{outcome}");
    assert_eq!(outcome.stdout.matches(VARIANT).count(), 1, "{outcome}");
    assert!(!outcome.stderr.contains("fused-collective: "), "{outcome}");
}

#[test]
fn open_mpi_starts_ranks_and_its_terminal_does_not_make_tables_narrow() {
    let Some(mpirun) = installed(&OPEN_MPI, "openmpi-bin") else { return };
    assert_shown_once(&Running::start(&mut launch(mpirun, 2, &bench(OPTIONS))).wait(LIMIT));
    assert_shown_once(&Running::start(&mut launch(mpirun, 1, &bench(OPTIONS))).wait(LIMIT));
}

#[test]
fn hydra_starts_ranks_through_wrappers_that_do_not_exec() {
    let Some(mpiexec) = installed(&HYDRA, "mpich") else { return };
    for command in [bench(OPTIONS), wrapped(&bench(OPTIONS)), wrapped(&wrapped(&bench(OPTIONS)))] {
        assert_shown_once(&Running::start(&mut launch(mpiexec, 2, &command)).wait(LIMIT));
    }
    // A job of one rank starts its own, and one within it is another job.
    assert_shown_once(&Running::start(&mut launch(mpiexec, 1, &bench(OPTIONS))).wait(LIMIT));
    let inner = launch(mpiexec, 2, &wrapped(&bench(OPTIONS)));
    assert_shown_once(&Running::start(&mut launch(mpiexec, 1, &wrapped(&inner))).wait(LIMIT));
}

#[test]
fn hydra_shows_one_line_of_one_failure_and_the_documented_status() {
    let Some(mpiexec) = installed(&HYDRA, "mpich") else { return };
    let outcome = Running::start(&mut launch(mpiexec, 3, &bench("--num-tokens 0"))).wait(LIMIT);
    let ours: Vec<&str> =
        outcome.stderr.lines().filter(|line| line.starts_with("fused-collective: ")).collect();
    assert!(matches!(ours[..], [line] if line.contains("rank 0: --num-tokens: '0'")), "{outcome}");
    assert_eq!(outcome.code, Some(2), "{outcome}");
}

#[test]
fn slurm_starts_ranks_with_and_without_pmi() {
    let runs = Command::new("srun").args(["--immediate=10", "-n", "2", "true"]).output();
    if !runs.is_ok_and(|runs| runs.status.success()) {
        return skip("there is no Slurm (package slurm-wlm) that runs two tasks");
    }
    for (mpi, ranks) in [("--mpi=none", 2), ("--mpi=pmi2", 2), ("--mpi=none", 1), ("--mpi=pmi2", 1)] {
        let srun = ["srun", mpi, "-n"];
        assert_shown_once(&Running::start(&mut launch(&srun, ranks, &wrapped(&bench(OPTIONS)))).wait(LIMIT));
    }
}

/// The start of a command line that runs what follows it in a new namespace of this kind.
fn unshare(namespace: &[&'static str]) -> Option<Vec<&'static str>> {
    let works = |command: &Vec<&str>| {
        let run = Command::new(command[0]).args(&command[1..]).arg("true").output();
        run.is_ok_and(|run| run.status.success())
    };
    // Users other than root need a user namespace.
    let ways: [&[&str]; 2] = [&["unshare"], &["unshare", "--user", "--map-current-user"]];
    let found = ways.iter().map(|way| [way, namespace].concat()).find(works);
    if found.is_none() {
        skip(&format!("unshare cannot make a namespace here ({})", namespace.join(" ")));
    }
    found
}

/// Starts two ranks of a job, each behind the words of its `ways`.
fn ranks_behind(options: &str, folder: &TempDir, ways: [&[&str]; 2]) -> Vec<Outcome> {
    let key = folder.path().to_str().unwrap();
    let start = |(rank, way): (usize, &&[&str])| {
        let bench = bench(options);
        let mut words: Vec<&OsStr> = way.iter().map(OsStr::new).collect();
        words.push(bench.get_program());
        words.extend(bench.get_args());
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).env("RANK", rank.to_string()).env("WORLD_SIZE", "2");
        Running::start(command.env("FUSED_COLLECTIVE_KEY", key))
    };
    let ranks: Vec<Running> = ways.iter().enumerate().map(start).collect();
    ranks.into_iter().map(|rank| rank.wait(LIMIT)).collect()
}

#[test]
fn ranks_in_pid_namespaces_of_their_own_meet() {
    let Some(apart) = unshare(&["--pid", "--fork", "--mount-proc"]) else { return };
    let folder = tempfile::tempdir().unwrap();
    for ways in [[&[][..], &apart], [&apart, &[]], [&apart, &apart]] {
        let outcomes = ranks_behind(OPTIONS, &folder, ways);
        assert_shown_once(&outcomes[0]);
        outcomes[1].assert_success();
    }
}

#[test]
fn ranks_in_network_namespaces_of_their_own_are_told_what_keeps_them_apart() {
    let Some(apart) = unshare(&["--net"]) else { return };
    let folder = tempfile::tempdir().unwrap();
    let outcomes = ranks_behind(&format!("{OPTIONS} --deadline 2"), &folder, [&[], &apart]);
    let here = fs::read_link("/proc/self/ns/net").unwrap();
    for ((rank, other), outcome) in [(0, 1), (1, 0)].into_iter().zip(&outcomes) {
        let line = outcome.stderr.trim_end();
        let start = format!(
            "fused-collective: rank {other} did not come to the rendezvous within 2.0s: rank {rank} waited"
        );
        assert!(line.starts_with(&start) && !line.contains('\n'), "{outcome}");
        assert!(line.contains("in the network namespace net:["), "{outcome}");
        assert_eq!(line.contains(here.to_str().unwrap()), rank == 0, "{outcome}");
        assert_eq!(outcome.code, Some(1), "{outcome}");
    }
    assert!(outcomes[1].time < Duration::from_secs(30), "{}", outcomes[1]);
}
