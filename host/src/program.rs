//! What the program does once its arguments are understood.
//!
//! A program that was started plainly checks everything it can, then starts itself once per rank; each rank
//! checks again, which costs nothing, and takes part. Only rank 0 writes to the standard output.

use std::{
    env,
    io::{self, Write},
    os::fd::AsFd,
    process::ExitCode,
};

use fused_collective_core::fusion::Mode;

use crate::{
    bench::{self, problem},
    cli::{self, Invocation, PROGRAM, UsageError},
    collective::{self, Collective},
    cpu::{self, Communicator, Engine, Watch},
    cuda,
    launch::{self, Launcher},
    rank_env::RankEnv,
    rendezvous::{self, Group, Membership},
    report::{Report, compare, outputs::OutputFiles, progress::Progress, table},
    settings::{AllReduceChoice, BackendChoice, Settings},
};

/// Ranks that are started where nobody says how many.
const DEFAULT_RANKS: u32 = 2;

/// How a run ended, if not well.
enum Failure {
    /// Nothing was run: the line says what is wrong with what was asked.
    Usage(String),
    /// Something failed; the line says what. Empty if the report has said it.
    Failed(String),
    /// Something failed on another rank, which says so.
    Elsewhere,
}

impl From<UsageError> for Failure {
    fn from(error: UsageError) -> Self {
        Failure::Usage(error.to_string())
    }
}

/// Runs the program with the process's arguments and environment.
pub fn main() -> ExitCode {
    if let Err(error) = launch::tie_to_parent() {
        complain(&error);
        return ExitCode::from(launch::FAILURE);
    }
    let status = match run() {
        Ok(status) => status,
        Err(Failure::Usage(line)) => {
            complain(&line);
            launch::USAGE
        }
        Err(Failure::Failed(line)) => {
            if !line.is_empty() {
                complain(&line);
            }
            launch::FAILURE
        }
        Err(Failure::Elsewhere) => launch::SECONDARY,
    };
    ExitCode::from(status)
}

fn complain(what: &dyn std::fmt::Display) {
    // Nobody is left to tell if stderr is gone.
    let _ = writeln!(io::stderr(), "{PROGRAM}: {what}");
}

fn run() -> Result<u8, Failure> {
    match cli::parse(env::args_os().skip(1))? {
        Invocation::Print(text) => {
            print(&text)?;
            Ok(launch::SUCCESS)
        }
        Invocation::Bench(settings) => Bench::new(*settings)?.run(),
    }
}

/// Writes to stdout. A reader who has gone away is a failure, not a panic.
fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(|error| Failure::Failed(format!("cannot write to the standard output: {error}")))
}

/// A benchmark that has been asked for and can be run.
struct Bench {
    settings: Settings,
    environment: Option<RankEnv>,
    backend: Backend,
    world_size: u32,
    outputs: OutputFiles,
    earlier: Option<Report>,
}

/// The backend that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backend {
    Cpu,
    Cuda,
}

impl Backend {
    fn name(self) -> &'static str {
        match self {
            Backend::Cpu => "cpu",
            Backend::Cuda => "cuda",
        }
    }
}

impl Bench {
    /// Checks all that can be checked before anything runs.
    fn new(settings: Settings) -> Result<Self, Failure> {
        let environment = RankEnv::from_env().map_err(|error| Failure::Usage(error.to_string()))?;
        let launched = environment.as_ref().map(|environment| environment.world_size);
        let asked = cli::world_size(settings.nproc_per_node, launched)?;
        let (backend, world_size) = choose_backend(&settings, asked, launched.is_some())?;
        let outputs = OutputFiles::check(&settings.outputs)?;
        let earlier = match &settings.outputs.compare {
            Some(path) => {
                let earlier = compare::read(path)?;
                compare::check(&earlier, &settings, backend.name(), world_size)?;
                Some(earlier)
            }
            None => None,
        };
        if backend == Backend::Cpu {
            check_memory(&settings, world_size)?;
        }
        Ok(Bench { settings, environment, backend, world_size, outputs, earlier })
    }

    fn run(self) -> Result<u8, Failure> {
        match &self.environment {
            None => self.launch(),
            Some(environment) => self.take_part(environment),
        }
    }

    /// Starts the ranks and waits for them.
    fn launch(&self) -> Result<u8, Failure> {
        let failed = |error: launch::Error| Failure::Failed(error.to_string());
        let launcher = Launcher::new(self.world_size).map_err(failed)?.grace(self.settings.deadline());
        let outcome = launcher.run().map_err(failed)?;
        if let Some(message) = outcome.message {
            complain(&message);
        }
        Ok(outcome.status)
    }

    /// Is one of the ranks.
    fn take_part(&self, environment: &RankEnv) -> Result<u8, Failure> {
        let rank = environment.rank;
        let config =
            serde_json::to_vec(&self.settings).map_err(|error| Failure::Failed(error.to_string()))?;
        let membership = Membership {
            rank,
            world_size: self.world_size,
            key: &environment.key,
            config: &config,
            deadline: self.settings.deadline(),
        };
        let group = Group::join(&membership).map_err(|error| rendezvous_failure(&error, rank))?;
        let outcome = match self.backend {
            Backend::Cpu => {
                join_cpu(&self.settings, &group).and_then(|mut engine| self.measure(&group, &mut engine))
            }
            Backend::Cuda => join_cuda(&self.settings, &group, environment.local_rank)
                .and_then(|mut engine| self.measure(&group, &mut engine)),
        };
        match outcome {
            Ok(report) => {
                let status = if rank == 0 { self.conclude(&report)? } else { launch::SUCCESS };
                // A rank that waits at the farewell waits for rank 0's files, too.
                group.farewell().map_err(|error| rendezvous_failure(&error, rank))?;
                Ok(status)
            }
            Err(error) => Err(self.give_up(&group, &error)),
        }
    }

    /// Runs the benchmark, and on rank 0 shows it as it goes.
    fn measure(&self, group: &Group, backend: &mut dyn Collective) -> Result<Report, bench::Error> {
        let settings = &self.settings;
        let name = self.backend.name();
        let mut report = Report::new(env::args().skip(1).collect(), name, self.world_size, settings.clone());
        let shows = group.rank() == 0;
        // Without steps there is nothing to draw.
        let steps = bench::count(settings, backend.all_reduces().len());
        let progress = if shows { Progress::new(steps) } else { Progress::hidden() };
        let mut shown = Ok(());
        if shows {
            shown = print(&table::heading(&report));
        }
        bench::run(settings, group, backend, &progress, |measured| {
            report.push(measured.case, measured.notes, measured.variants);
            if let (true, Ok(()), Some(configuration)) = (shows, &shown, report.configurations.last()) {
                shown = progress
                    .suspend(|| print(&format!("\n{}", table::configuration(configuration, width()))));
            }
        })?;
        match shown {
            Err(Failure::Failed(line) | Failure::Usage(line)) => Err(bench::Error::Failed(line)),
            _ => Ok(report),
        }
    }

    /// On rank 0: writes the files and says how it went.
    fn conclude(&self, report: &Report) -> Result<u8, Failure> {
        self.outputs.write(report).map_err(|error| Failure::Failed(error.to_string()))?;
        let mut status = launch::SUCCESS;
        let failures = report.failures().count();
        if failures > 0 {
            let rows: usize = report.configurations.iter().map(|case| case.rows.len()).sum();
            complain(&format_args!("{failures} of {rows} variants FAILED"));
            status = launch::FAILURE;
        }
        if let Some(earlier) = &self.earlier {
            let comparison = compare::compare(earlier, report, self.settings.tolerance_percent);
            print(&format!("\n{}", comparison.render(width())))?;
            if comparison.regressions().next().is_some() {
                status = launch::FAILURE;
            }
        }
        Ok(status)
    }

    /// Tells the others, unless it was one of them, and the user.
    fn give_up(&self, group: &Group, error: &bench::Error) -> Failure {
        if let Some(lost) = group.lost() {
            return loss(&lost, group.rank());
        }
        if let bench::Error::Group(error) = error {
            return rendezvous_failure(error, group.rank());
        }
        let line = format!("rank {}: {error}", group.rank());
        group.abort(&error.to_string());
        // Another rank may have been first.
        match group.lost() {
            Some(lost) if lost.rank != group.rank() => loss(&lost, group.rank()),
            _ => Failure::Failed(line),
        }
    }
}

/// Columns of the terminal, or of the tables where there is none.
fn width() -> u16 {
    rustix::termios::tcgetwinsize(io::stdout()).map_or(table::WIDTH, |size| size.ws_col.max(40))
}

fn loss(lost: &rendezvous::Lost, rank: u32) -> Failure {
    if launch::reports(lost, rank, launch::is_launched()) {
        Failure::Failed(lost.to_string())
    } else {
        Failure::Elsewhere
    }
}

fn rendezvous_failure(error: &rendezvous::Error, rank: u32) -> Failure {
    match error {
        rendezvous::Error::Lost(lost) => loss(lost, rank),
        error => Failure::Failed(format!("rank {rank}: {error}")),
    }
}

/// The backend and the number of ranks, from what was `asked` for. `launched`: something else has started the ranks.
fn choose_backend(
    settings: &Settings,
    asked: Option<u32>,
    launched: bool,
) -> Result<(Backend, u32), Failure> {
    let chosen = match settings.backend {
        BackendChoice::Cpu => (Backend::Cpu, asked.unwrap_or(DEFAULT_RANKS)),
        BackendChoice::Auto => {
            match gpu_ranks(asked).and_then(|ranks| cuda::check_peers(ranks).map(|()| ranks)) {
                Ok(ranks) => (Backend::Cuda, ranks),
                Err(_) => (Backend::Cpu, asked.unwrap_or(DEFAULT_RANKS)),
            }
        }
        BackendChoice::Cuda => {
            // A launcher may show each rank its own GPU alone: then the ranks find out together.
            let check = |ranks| if launched { Ok(ranks) } else { cuda::check_peers(ranks).map(|()| ranks) };
            let ranks = gpu_ranks(asked).and_then(check).map_err(|error| {
                Failure::Usage(format!("--backend: cuda: {error}: use cpu, or leave the option out"))
            })?;
            (Backend::Cuda, ranks)
        }
    };
    if chosen.0 == Backend::Cpu && !settings.all_reduces.contains(&AllReduceChoice::Custom) {
        return Err(Failure::Usage(
            "--allreduce: nccl needs the cuda backend: use custom, or leave the option out".to_owned(),
        ));
    }
    Ok(chosen)
}

/// The ranks of a group of GPUs: as many as `asked` for, or one for each GPU.
fn gpu_ranks(asked: Option<u32>) -> Result<u32, cuda::Error> {
    let count = cuda::count()?;
    let ranks = asked.unwrap_or(count.min(cuda::MAX_RANKS));
    if (DEFAULT_RANKS..=cuda::MAX_RANKS).contains(&ranks) {
        return Ok(ranks);
    }
    let most = cuda::MAX_RANKS;
    Err(cuda::Error::Devices(format!("{ranks} GPUs cannot form a group: {DEFAULT_RANKS} to {most} can")))
}

/// Refuses what would not fit in memory.
fn check_memory(settings: &Settings, world_size: u32) -> Result<(), Failure> {
    let needed = memory_needed(settings, world_size);
    let available = crate::report::machine::available_memory();
    match (needed, available) {
        (Some(needed), Some(available)) if needed <= available => Ok(()),
        (Some(_), None) => Ok(()),
        (needed, available) => {
            let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64);
            Err(Failure::Usage(format!(
                "--num-tokens: {} tokens of hidden size {} on {world_size} ranks need {} of memory, and {} are free: use fewer tokens or ranks",
                settings.num_tokens.iter().max().copied().unwrap_or(0),
                settings.hidden_dim,
                needed.map_or_else(|| "more than 64 bits count".to_owned(), gib),
                available.map_or_else(|| "not so many".to_owned(), gib),
            )))
        }
    }
}

/// Bytes that the largest configuration takes on all ranks; `None` past 64 bits.
fn memory_needed(settings: &Settings, world_size: u32) -> Option<u64> {
    let mut most = 0;
    for case in settings.cases() {
        let problem = problem(settings, case);
        let outputs = collective::Tensor::OUTPUTS
            .iter()
            .try_fold(0u64, |total, &tensor| total.checked_add(problem.bytes(tensor)?))?;
        // Tensors, and while they are verified a copy of the outputs.
        most = most.max(problem.total_bytes()?.checked_add(outputs)?);
    }
    let dtype = settings.dtypes.iter().map(|dtype| dtype.bytes()).max().unwrap_or(0);
    let shared = cpu::layout(world_size, settings.hidden_dim.checked_mul(dtype)?).ok()?.total_bytes();
    most.checked_mul(u64::from(world_size))?.checked_add(shared)
}

/// Sets up the group's shared memory.
fn join_cpu(settings: &Settings, group: &Group) -> Result<Engine, bench::Error> {
    let failed =
        |what: &dyn std::fmt::Display| bench::Error::Failed(format!("the group's shared memory: {what}"));
    let dtype = settings.dtypes.iter().map(|dtype| dtype.bytes()).max().unwrap_or(0);
    let layout =
        cpu::layout(group.world_size(), settings.hidden_dim * dtype).map_err(|error| failed(&error))?;
    let own = match group.rank() {
        0 => Some(cpu::create_shared_memory(&layout).map_err(|error| failed(&error))?),
        _ => None,
    };
    let memory = group.share_fd(own.as_ref().map(AsFd::as_fd))?;
    let alarm = group.alarm();
    let watch = Watch::new(move || alarm.lost_rank().map(|rank| format!("rank {rank} was lost")));
    let communicator = Communicator::join(memory.as_fd(), layout, group.rank(), settings.deadline(), watch)
        .map_err(collective::Error::from)?;
    Ok(Engine::new(communicator))
}

/// Makes the group's workspace on the GPUs.
fn join_cuda<'a>(
    settings: &Settings,
    group: &'a Group,
    local_rank: u32,
) -> Result<cuda::Engine<'a>, bench::Error> {
    let deadline = settings.deadline();
    let slot_bytes = settings
        .cases()
        .map(|case| cuda::slot_bytes(group.world_size(), &settings.operation(case, Mode::Auto)))
        .max()
        .unwrap_or(0);
    let engine = cuda::Communicator::join(group, local_rank, slot_bytes, deadline)
        .and_then(|communicator| cuda::Engine::new(group, communicator, &settings.all_reduces, deadline));
    Ok(engine.map_err(collective::Error::from)?)
}
