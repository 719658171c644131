//! Ranks that another program starts. They need only the variables of `torchrun`, Open MPI's `mpirun` or Slurm's `srun`,
//! which are checked. `launchers` has the tests with these programs themselves.

use std::{
    fs,
    process::{Command, id},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use fused_collective_tests::{LIMIT, Outcome, Running, bench, measure, report::Report};
use rustix::process::{Signal, geteuid};
use tempfile::TempDir;

const RANKS: u32 = 3;
const OPTIONS: &str = "--num-tokens 3 --hidden-dim 96 --trials 2 --warmup 0";

/// A number for the name of a job, unique on this host.
fn job_number() -> u32 {
    static JOBS: AtomicU32 = AtomicU32::new(0);
    id() * 100 + JOBS.fetch_add(1, Ordering::Relaxed)
}

/// The variables that give a process its rank.
type Variables = Vec<(&'static str, String)>;

fn torchrun(job: u32, rank: u32, ranks: u32) -> Variables {
    vec![
        ("RANK", rank.to_string()),
        ("WORLD_SIZE", ranks.to_string()),
        ("LOCAL_RANK", rank.to_string()),
        ("LOCAL_WORLD_SIZE", ranks.to_string()),
        ("MASTER_ADDR", "127.0.0.1".to_owned()),
        ("MASTER_PORT", "29500".to_owned()),
        ("TORCHELASTIC_RUN_ID", job.to_string()),
        ("TORCHELASTIC_RESTART_COUNT", "0".to_owned()),
    ]
}

fn mpirun(job: u32, rank: u32, ranks: u32) -> Variables {
    vec![
        ("OMPI_COMM_WORLD_RANK", rank.to_string()),
        ("OMPI_COMM_WORLD_SIZE", ranks.to_string()),
        ("OMPI_COMM_WORLD_LOCAL_RANK", rank.to_string()),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", ranks.to_string()),
        ("PMIX_NAMESPACE", format!("prterun-host-{job}@1")),
    ]
}

fn srun(job: u32, rank: u32, ranks: u32) -> Variables {
    vec![
        ("SLURM_JOB_ID", job.to_string()),
        ("SLURM_STEP_ID", "0".to_owned()),
        ("SLURM_PROCID", rank.to_string()),
        ("SLURM_LOCALID", rank.to_string()),
        ("SLURM_NTASKS", ranks.to_string()),
        ("SLURM_STEP_NUM_TASKS", ranks.to_string()),
        ("SLURM_STEP_NUM_NODES", "1".to_owned()),
    ]
}

/// `srun --mpi=pmi2`, which says all twice.
fn srun_pmi2(job: u32, rank: u32, ranks: u32) -> Variables {
    let mut variables = srun(job, rank, ranks);
    variables.push(("PMI_JOBID", format!("{job}.0")));
    variables.push(("PMI_RANK", rank.to_string()));
    variables.push(("PMI_SIZE", ranks.to_string()));
    variables
}

/// Starts a rank of a job whose other ranks may be started later, or never.
fn start(command: &mut Command, variables: Variables) -> Running {
    Running::start(command.envs(variables))
}

/// A whole job that writes a JSON report.
struct Job {
    folder: TempDir,
    ranks: Vec<Running>,
}

impl Job {
    fn start(starter: fn(u32, u32, u32) -> Variables) -> Self {
        let (folder, number) = (tempfile::tempdir().unwrap(), job_number());
        let rank = |rank| {
            let mut command = bench(OPTIONS);
            command.current_dir(folder.path()).args(["--json", "report.json"]);
            start(&mut command, starter(number, rank, RANKS))
        };
        // Ranks come in any order: rank 0 last.
        let mut ranks: Vec<Running> = (0..RANKS).rev().map(rank).collect();
        ranks.reverse();
        Job { folder, ranks }
    }

    /// Asserts that all ranks succeed and that only rank 0 writes. Returns the report.
    fn report(self) -> Report {
        for (rank, running) in self.ranks.into_iter().enumerate() {
            let outcome = running.wait(LIMIT);
            outcome.assert_success();
            assert_eq!(outcome.stdout.contains("fused_allreduce"), rank == 0, "rank {rank}: {outcome}");
            assert!(rank == 0 || outcome.stdout.is_empty(), "rank {rank}: {outcome}");
        }
        Report::read(&self.folder.path().join("report.json"))
    }
}

/// The facts that are the same in every run: every variant and its error.
fn results(report: &Report) -> Vec<(String, String, f64)> {
    let rows = report.configurations.iter().flat_map(|configuration| {
        let row = |row: &fused_collective_tests::report::Row| {
            (configuration.title(), row.variant.clone(), row.verified().max_error)
        };
        configuration.rows.iter().map(row).collect::<Vec<_>>()
    });
    rows.collect()
}

/// Asserts that a job started by `starter` has the results of the program's own ranks.
fn check(starter: fn(u32, u32, u32) -> Variables) {
    let own = measure(&format!("{OPTIONS} --nproc-per-node {RANKS}"));
    let theirs = Job::start(starter).report();
    assert_eq!((theirs.world_size, theirs.settings.nproc_per_node), (RANKS, None));
    assert_eq!(results(&theirs), results(&own));
}

#[test]
fn ranks_of_torchrun_give_the_same_results() {
    check(torchrun);
}

#[test]
fn ranks_of_mpirun_give_the_same_results() {
    check(mpirun);
}

#[test]
fn ranks_of_srun_give_the_same_results() {
    check(srun);
    check(srun_pmi2);
}

#[test]
fn several_jobs_on_one_host_do_not_meet() {
    let jobs = [Job::start(torchrun), Job::start(torchrun), Job::start(srun_pmi2)];
    for job in jobs {
        assert_eq!(job.report().world_size, RANKS);
    }
}

/// Asserts that a single rank is refused with this line, before it looks for the others.
#[track_caller]
fn refused(options: &str, variables: Variables, line: &str) {
    let outcome = start(&mut bench(options), variables).wait(LIMIT);
    outcome.assert_failure(2, line);
    assert_eq!(outcome.stdout, "");
}

/// Asserts that all ranks of a job are refused, and that one line says so.
#[track_caller]
fn all_refused(options: &str, ranks: u32, variables: impl Fn(u32) -> Variables, line: &str) {
    let ranks = (0..ranks).map(|rank| start(&mut bench(options), variables(rank)));
    let (codes, said) = ends(ranks.collect());
    assert_eq!(said, format!("fused-collective: {line}\n"));
    assert!(codes.iter().all(|code| *code == Some(2)), "{codes:?}");
}

#[test]
fn a_world_size_that_disagrees_with_nproc_per_node_is_refused_once() {
    let job = job_number();
    all_refused(
        "--nproc-per-node 2",
        RANKS,
        |rank| torchrun(job, rank, RANKS),
        "rank 0: --nproc-per-node: 2 disagrees with the launcher's WORLD_SIZE, 3: leave it out or use 3",
    );
}

#[test]
fn a_rank_without_a_world_size_or_the_other_way_round_is_refused() {
    let hint = "set both, or neither to start without a launcher";
    for (set, missing) in [("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")] {
        let variables = vec![(set, "1".to_owned()), ("MASTER_PORT", "29500".to_owned())];
        refused("", variables, &format!("{set} is set without {missing}: {hint}"));
    }
}

#[test]
fn a_rank_that_is_not_below_the_world_size_is_refused() {
    let line = "RANK=\"2\" is not valid: use a number from 0 to 1, as WORLD_SIZE is 2";
    refused("", torchrun(job_number(), 2, 2), line);
}

#[test]
fn a_job_of_too_many_ranks_is_refused_once_by_the_variable_that_says_so() {
    let job = job_number();
    all_refused(
        "",
        17,
        |rank| mpirun(job, rank, 17),
        "rank 0: OMPI_COMM_WORLD_SIZE: 17 ranks cannot form a group: use 2 to 16",
    );
}

#[test]
fn the_only_rank_of_a_job_starts_its_own() {
    for starter in [torchrun, mpirun, srun_pmi2] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("report.json");
        let mut command = bench(OPTIONS);
        command.arg("--json").arg(&file);
        start(&mut command, starter(job_number(), 0, 1)).wait(LIMIT).assert_success();
        assert_eq!(Report::read(&file).world_size, 2);
    }
}

#[test]
fn ranks_on_several_hosts_without_a_secret_or_an_address_are_told_what_to_set() {
    let job = job_number();
    let slurm = |starter: fn(u32, u32, u32) -> Variables| {
        let mut variables = starter(job, 0, 4);
        variables.retain(|(name, _)| *name != "SLURM_STEP_NUM_NODES");
        variables.push(("SLURM_STEP_NUM_NODES", "2".to_owned()));
        variables
    };
    let mut open_mpi = mpirun(job, 0, 4);
    open_mpi.retain(|(name, _)| *name != "OMPI_COMM_WORLD_LOCAL_SIZE");
    open_mpi.push(("OMPI_COMM_WORLD_LOCAL_SIZE", "2".to_owned()));
    let secret = ("FUSED_COLLECTIVE_SECRET", "0123456789abcdef".repeat(4));
    for (variables, said) in [
        (slurm(srun), "SLURM_STEP_NUM_NODES=2"),
        (slurm(srun_pmi2), "SLURM_STEP_NUM_NODES=2"),
        (open_mpi, "OMPI_COMM_WORLD_LOCAL_SIZE=2"),
    ] {
        let line = format!(
            "rank 0: {said} says that the job has ranks on several hosts, and these meet only if they have a secret in common: \
             set FUSED_COLLECTIVE_SECRET on all ranks to the same random text, such as that of `openssl rand -hex 32`, or start \
             all ranks on one host"
        );
        refused("", variables.clone(), &line);
        let line = format!(
            "rank 0: {said} says that the job has ranks on several hosts, and nothing says where these meet: set MASTER_ADDR to \
             the host of rank 0 and MASTER_PORT, or FUSED_COLLECTIVE_ADDRESS to HOST:PORT of a free port there"
        );
        refused("", [variables, vec![secret.clone()]].concat(), &line);
    }
}

#[test]
fn a_rank_with_a_wrong_option_is_the_one_that_is_named_and_keeps_nobody_waiting() {
    let (job, began) = (job_number(), Instant::now());
    let ranks = ["", "--seed x", ""]
        .into_iter()
        .zip(0..)
        .map(|(more, rank)| start(&mut bench(&format!("{OPTIONS} {more}")), torchrun(job, rank, RANKS)));
    let (codes, said) = ends(ranks.collect());
    assert!(said.starts_with("fused-collective: rank 1: --seed: 'x'"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(codes, [Some(1), Some(2), Some(1)]);
    // Their deadline is a minute.
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
}

#[test]
fn a_rank_without_memory_is_named_once_and_all_fail_with_status_1() {
    let job = job_number();
    // Tensors of 32 MiB and more.
    let options = "--num-tokens 4096 --hidden-dim 4096 --quant-modes none --trials 1 --warmup 0";
    let ranks = (0..2).map(|rank| {
        let bench = bench(options);
        let mut limited = Command::new("sh");
        // In KiB: enough to start, and too little for all of them.
        limited.args(["-c", "[ $RANK = 0 ] || ulimit -v 200000; exec \"$@\"", "sh"]).arg(bench.get_program());
        limited.args(bench.get_args());
        start(&mut limited, torchrun(job, rank, 2))
    });
    let (codes, said) = ends(ranks.collect());
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.starts_with("fused-collective: rank 1"), "{said}");
    assert_eq!(codes, [Some(1), Some(1)], "{said}");
}

/// Rust's allocator aborts where it has no memory, and a launcher then says that the rank crashed. Whatever the limit, both
/// ranks end in time with status 1, and under some of them it is the allocator that fails.
#[test]
fn a_rank_whose_allocator_fails_says_so_and_ends_with_status_1() {
    let options = "--num-tokens 512 --hidden-dim 4096 --quant-modes none --trials 1 --warmup 0 --deadline 5";
    let mut named = 0;
    // In KiB: less than the tensors take, and from there on in steps, each of less than a tensor, until it is enough for all.
    for limit in (40_000..600_000).step_by(3_000) {
        let job = job_number();
        let ranks = (0..2).map(|rank| {
            let bench = bench(options);
            let mut limited = Command::new("sh");
            limited.args(["-c", &format!("[ $RANK = 0 ] || ulimit -v {limit}; exec \"$@\""), "sh"]);
            limited.arg(bench.get_program()).args(bench.get_args());
            // Arenas would take address space, as many as there are processors.
            limited.env("MALLOC_ARENA_MAX", "1");
            start(&mut limited, torchrun(job, rank, 2))
        });
        let (codes, said) = ends(ranks.collect());
        if codes == [Some(0), Some(0)] {
            break;
        }
        assert_eq!(codes, [Some(1), Some(1)], "limit {limit}: {said}");
        let own: Vec<&str> = said.lines().filter(|line| line.contains("rank 1: ")).collect();
        if own.iter().any(|line| line.contains("out of memory: no ")) {
            let [line] = own[..] else { panic!("limit {limit}: {said}") };
            assert!(line.starts_with("fused-collective: rank 1: out of memory: no "), "{said}");
            assert!(line.contains("The likely cause is a limit (ulimit -v, "), "{said}");
            named += 1;
        }
    }
    assert!(named > 0, "the allocator failed under no limit");
}

/// The ranks' exit statuses, and their standard error.
fn ends(ranks: Vec<Running>) -> (Vec<Option<i32>>, String) {
    let outcomes: Vec<Outcome> = ranks.into_iter().map(|rank| rank.wait(LIMIT)).collect();
    let said = outcomes.iter().map(|outcome| outcome.stderr.as_str()).collect();
    (outcomes.iter().map(|outcome| outcome.code).collect(), said)
}

#[test]
fn a_rank_that_never_comes_is_named_once_when_the_deadline_has_passed() {
    let (job, began) = (job_number(), Instant::now());
    let options = format!("{OPTIONS} --deadline 2");
    let ranks = [0, 2].map(|rank| start(&mut bench(&options), torchrun(job, rank, RANKS)));
    let (codes, said) = ends(ranks.into());
    let network = fs::read_link("/proc/self/ns/net").unwrap();
    let expected = format!(
        "fused-collective: rank 1 did not come to the rendezvous within 2.0s: rank 0 waited under the key \
         'torchrun/127.0.0.1/29500/{job}/0', as user {}, in the network namespace {}, and all ranks must have these in \
         common (the variable FUSED_COLLECTIVE_KEY sets the key)\n",
        geteuid().as_raw(),
        network.display()
    );
    assert_eq!(said, expected);
    assert_eq!(codes, [Some(1), Some(1)]);
    assert!(began.elapsed() < Duration::from_secs(2 + 2), "{:?}", began.elapsed());
}

#[test]
fn ranks_with_other_options_are_named_and_do_not_run() {
    let job = job_number();
    let ranks = ["", "--seed 1"]
        .into_iter()
        .zip(0..)
        .map(|(more, rank)| start(&mut bench(&format!("{OPTIONS} {more}")), torchrun(job, rank, 2)));
    let (codes, said) = ends(ranks.collect());
    let why = "it was started with other settings than rank 0: give every rank the same options";
    assert_eq!(said, format!("fused-collective: rank 1 cannot join the group: {why}\n"));
    assert_eq!(codes, [Some(1), Some(1)]);
}

#[test]
fn a_killed_rank_is_named_once_by_the_others() {
    let job = job_number();
    let options =
        "--num-tokens 1 2048 2049 2050 --hidden-dim 4096 --quant-modes none --trials 100 --warmup 0";
    let mut ranks: Vec<Running> =
        (0..RANKS).map(|rank| start(&mut bench(options), torchrun(job, rank, RANKS))).collect();
    ranks[0].wait_for_stdout("num_tokens=1, dtype=bfloat16", LIMIT);
    let killed = ranks.remove(1);
    killed.signal(killed.pid(), Signal::KILL);
    let began = Instant::now();
    let (codes, said) = ends(ranks);
    assert_eq!(said, "fused-collective: rank 1 was lost: it ended without a farewell\n");
    assert_eq!(codes, [Some(1), Some(1)]);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert_eq!(killed.wait(LIMIT).code, None);
}
