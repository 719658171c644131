//! The launcher, which starts the ranks of a job on this host and reports their end.
//!
//! A program that was started plainly calls [`Launcher::run`], which starts the program again once for each rank, with the
//! [variables](super::rank_env) of a `torchrun` job. Each of these processes calls [`tie_to_parent`] first. By convention
//! only rank 0 writes to the standard output.
//!
//! Invariants:
//! - No process outlives the launcher: the kernel kills the ranks with it.
//! - After a rank has failed, the others have the grace period to report the reason and to end; then the launcher ends
//!   them. Once the cause is known, it ends them sooner, as they could only report the loss of that rank.
//! - **One clear error reaches the user.** A rank that fails for a reason of its own prints it, and exits with [`FAILURE`]
//!   or [`USAGE`]. A rank that fails because another was lost prints nothing and exits with [`SECONDARY`], unless it is the
//!   one that [reports the loss](reports). The launcher prints a line for an end that no rank can have reported, such as a
//!   kill.

use std::{
    env,
    ffi::OsString,
    fmt,
    fs::File,
    io::{self, Write},
    net::TcpListener,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    io::Errno,
    process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal},
    rand::{GetRandomFlags, getrandom},
};
use signal_hook::{
    SigId,
    consts::{SIGCHLD, SIGINT, SIGKILL, SIGTERM},
    low_level::{signal_name, unregister},
};

use fused_collective::group::{How, Lost, meeting_place::NCCL_HOST};

use crate::{
    exit::{self, FAILURE, SECONDARY, SUCCESS, USAGE},
    job::rank_env,
    report::memory,
};

/// The variable with the [`Launcher`]'s process number, which its ranks have.
const PARENT: &str = "FUSED_COLLECTIVE_PARENT";
/// The time that a rank has to end once the cause is known, before SIGTERM, and again before SIGKILL.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// The error of starting or observing ranks.
#[derive(Debug)]
pub enum Error {
    /// A rank's process could not be started.
    Start {
        /// The rank.
        rank: u32,
        /// The system's error.
        source: io::Error,
    },
    /// The launcher of this rank has ended.
    Orphan,
    /// The operating system refused something.
    System {
        /// The action that was refused.
        doing: &'static str,
        /// The system's error.
        source: io::Error,
    },
}

impl Error {
    fn system<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Error {
        move |source| Error::System { doing, source: source.into() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Start { rank, source } => write!(f, "could not start rank {rank}: {source}"),
            Error::Orphan => f.write_str("the process that started this rank has ended"),
            Error::System { doing, source } => write!(f, "could not {doing}: {source}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Start { source, .. } | Error::System { source, .. } => Some(source),
            Error::Orphan => None,
        }
    }
}

/// Makes the kernel end this process with its launcher. Does nothing in a process that no launcher started. A program calls
/// it first, on its main thread, because the tie ends with the thread that made it.
///
/// # Errors
/// [`Error::Orphan`] if the launcher has already ended.
pub fn tie_to_parent() -> Result<(), Error> {
    let Some(parent) = env::var_os(PARENT) else { return Ok(()) };
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(Error::system("tie this rank to its launcher"))?;
    // The launcher may have ended before the line above: then another process has adopted this one.
    let adopted = getppid().is_none_or(|pid| parent != *pid.as_raw_pid().to_string());
    if adopted { Err(Error::Orphan) } else { Ok(()) }
}

/// The path of the content that this rank's launcher has [handed over](Launcher::hand_over) as `variable`.
pub fn handed_over(variable: &str) -> Option<PathBuf> {
    let descriptor: u32 = env::var(variable).ok()?.parse().ok()?;
    // Opened anew, so that every rank reads from the start.
    is_launched().then(|| format!("/proc/self/fd/{descriptor}").into())
}

/// A random key for a job.
///
/// # Errors
/// The system gives no random numbers.
pub fn new_key() -> Result<String, Error> {
    let mut random = [0_u8; 16];
    getrandom(&mut random, GetRandomFlags::empty()).map_err(Error::system("draw the job's key"))?;
    Ok(format!("launch/{:032x}", u128::from_ne_bytes(random)))
}

/// Hosts that one host simulates, for tests: ranks that meet as those of several do, and share no memory.
#[derive(Clone, Debug)]
pub struct SimulatedHosts {
    count: u32,
    secret: String,
    address: String,
}

impl SimulatedHosts {
    /// So many hosts, at a port that was free a moment ago; `None` for one host, which is this one.
    ///
    /// # Errors
    /// The system gives no random numbers, or no port.
    pub fn new(count: u32) -> Result<Option<Self>, Error> {
        if count < 2 {
            return Ok(None);
        }
        let listener = TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr());
        let address = listener.map_err(Error::system("find a free port"))?.to_string();
        let mut random = [0_u8; 32];
        getrandom(&mut random, GetRandomFlags::empty()).map_err(Error::system("draw the job's secret"))?;
        let secret = random.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Some(SimulatedHosts { count, secret, address }))
    }

    /// The variables of a rank, of so many on all hosts.
    fn variables(&self, rank: u32, ranks: u32) -> [(&'static str, String); 4] {
        let of_host = ranks / self.count;
        [
            ("LOCAL_WORLD_SIZE", of_host.to_string()),
            (NCCL_HOST, format!("simulated-host-{}", rank / of_host.max(1))),
            (rank_env::SECRET, self.secret.clone()),
            (rank_env::ADDRESS, self.address.clone()),
        ]
    }
}

/// A command that starts `program` as rank `rank` of `ranks`, for callers that observe ranks themselves. The ranks of a job
/// share the `key`, and on several hosts these. Like a [`Launcher`]'s rank, the process [ends with this one](tie_to_parent).
/// It has no input.
pub fn rank_command(
    program: &Path,
    rank: u32,
    ranks: u32,
    key: &str,
    hosts: Option<&SimulatedHosts>,
) -> Command {
    let (number, size) = (rank.to_string(), ranks.to_string());
    let mut command = Command::new(program);
    command
        .env("RANK", &number)
        .env("LOCAL_RANK", &number)
        .env("WORLD_SIZE", &size)
        .env("LOCAL_WORLD_SIZE", &size)
        .env(rank_env::KEY, key)
        .env(PARENT, std::process::id().to_string())
        .stdin(Stdio::null());
    if let Some(hosts) = hosts {
        command.envs(hosts.variables(rank, ranks));
    }
    command
}

/// The path of this program's file.
///
/// # Errors
/// The system does not say it.
pub fn program() -> Result<PathBuf, Error> {
    env::current_exe().map_err(Error::system("find this program's file"))
}

/// True if a [`Launcher`] started this process.
pub fn is_launched() -> bool {
    env::var_os(PARENT).is_some()
}

/// True if `rank` should report the lost rank and exit with [`FAILURE`], false if it should exit with [`SECONDARY`] and
/// print nothing. `launched` is [`is_launched`]: a launcher observes itself that a process has ended.
pub fn reports(lost: &Lost, rank: u32, launched: bool) -> bool {
    rank == lost.reporter() && !(launched && lost.how == How::Ended)
}

/// The launcher of one job. See the [module](self).
#[derive(Debug)]
pub struct Launcher {
    program: PathBuf,
    arguments: Vec<OsString>,
    ranks: u32,
    hosts: Option<SimulatedHosts>,
    grace: Duration,
    /// Files that ranks inherit, each with the variable for its descriptor.
    files: Vec<(&'static str, OwnedFd)>,
}

/// The end of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobEnd {
    /// The status to exit with.
    pub status: u8,
    /// A line for the user, if no rank can have reported the cause.
    pub message: Option<String>,
}

impl Launcher {
    /// A launcher of `ranks` copies of this process: the same program with the same arguments.
    ///
    /// # Errors
    /// The system does not say the path of this program.
    pub fn new(ranks: u32) -> Result<Self, Error> {
        Ok(Launcher {
            program: program()?,
            arguments: env::args_os().skip(1).collect(),
            ranks,
            hosts: None,
            grace: Duration::from_secs(10),
            files: Vec::new(),
        })
    }

    /// Starts the ranks as those of several hosts.
    pub fn on_hosts(mut self, hosts: Option<SimulatedHosts>) -> Self {
        self.hosts = hosts;
        self
    }

    /// Sets the time that the other ranks may go on after one has failed and none has reported the reason. The default is
    /// 10 s.
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Gives `content` to every rank, as an anonymous file. A rank finds it by [`handed_over`] with the same `variable`. This
    /// serves for the content of a pipe, which can be read once.
    ///
    /// # Errors
    /// The system cannot make the file.
    pub fn hand_over(mut self, variable: &'static str, content: &[u8]) -> Result<Self, Error> {
        let doing = "hand a file to the ranks";
        // Without CLOEXEC, so that ranks inherit it.
        let file = memfd_create(variable, MemfdFlags::empty()).map_err(Error::system(doing))?;
        let mut file = File::from(file);
        file.write_all(content).map_err(Error::system(doing))?;
        self.files.push((variable, file.into()));
        Ok(self)
    }

    /// Starts all ranks, and waits until the last has ended.
    ///
    /// SIGINT and SIGTERM end the ranks, with status 130 or 143. The signals stay caught afterwards, so the program should
    /// exit soon. The ranks end with the thread that calls this.
    ///
    /// # Errors
    /// Ranks could not be started or waited for. None is left running.
    pub fn run(&self) -> Result<JobEnd, Error> {
        // Before the first rank starts, so that no signal is missed.
        let signals = Signals::catch().map_err(Error::system("catch signals"))?;
        let oom_kills = memory::oom_kills();
        let (cause, interrupted, pressure) = (None, None, Pressure::None);
        let mut ranks = Ranks { ranks: self.start()?, cause, oom_kills, interrupted, pressure };
        loop {
            ranks.reap()?;
            if ranks.ranks.iter().all(|rank| rank.status.is_some()) {
                return Ok(ranks.end());
            }
            ranks.press(signals.interruption(), self.grace)?;
            signals.wait(ranks.pressure.due())?;
        }
    }

    fn start(&self) -> Result<Vec<Rank>, Error> {
        let key = new_key()?;
        let mut ranks = Vec::new();
        for rank in 0..self.ranks {
            let files = self.files.iter().map(|(variable, file)| (variable, file.as_raw_fd().to_string()));
            let mut command = rank_command(&self.program, rank, self.ranks, &key, self.hosts.as_ref());
            let child = command
                .args(&self.arguments)
                .envs(files)
                .spawn()
                .map_err(|source| Error::Start { rank, source })?;
            ranks.push(Rank { child, status: None, ended_by_us: false });
        }
        Ok(ranks)
    }
}

/// A rank's process. It does not outlive this value.
struct Rank {
    child: Child,
    status: Option<ExitStatus>,
    /// True if it was still running when the launcher asked it to end.
    ended_by_us: bool,
}

impl Drop for Rank {
    fn drop(&mut self) {
        if self.status.is_none() {
            // Fails only if the process has ended. Then only its status is left to collect.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The launcher's means to make ranks end.
#[derive(Clone, Copy)]
enum Pressure {
    None,
    /// A rank has failed, and the others should notice.
    Grace {
        until: Instant,
    },
    /// The ranks have got SIGTERM.
    Asked {
        until: Instant,
    },
    /// The ranks have got SIGKILL.
    Killed,
}

impl Pressure {
    fn due(self) -> Option<Instant> {
        match self {
            Pressure::Grace { until } | Pressure::Asked { until } => Some(until),
            Pressure::None | Pressure::Killed => None,
        }
    }
}

/// The processes of a job.
struct Ranks {
    ranks: Vec<Rank>,
    /// The first rank that failed for a reason of its own.
    cause: Option<(u32, ExitStatus)>,
    /// Processes of the control group that were killed for memory before the ranks started, where that is known.
    oom_kills: Option<u64>,
    /// The signal that ends the job.
    interrupted: Option<i32>,
    pressure: Pressure,
}

impl Ranks {
    /// Collects the ranks that have ended.
    fn reap(&mut self) -> Result<(), Error> {
        let mut causes = Vec::new();
        for (number, rank) in (0..).zip(&mut self.ranks).filter(|(_, rank)| rank.status.is_none()) {
            rank.status = rank.child.try_wait().map_err(Error::system("wait for the ranks"))?;
            let Some(status) = rank.status else { continue };
            let secondary = status.code() == Some(i32::from(SECONDARY));
            if !status.success() && !secondary && !rank.ended_by_us {
                causes.push((number, status));
            }
        }
        // Of several that ended at once, a killed one is the likelier cause of the others.
        causes.sort_by_key(|(_, status)| status.signal().is_none());
        self.cause = self.cause.or(causes.first().copied());
        Ok(())
    }

    /// Takes the next step to end the remaining ranks, if it is time.
    fn press(&mut self, interruption: Option<i32>, grace: Duration) -> Result<(), Error> {
        let now = Instant::now();
        if self.interrupted.is_none() && interruption.is_some() {
            self.interrupted = interruption;
            self.pressure = Pressure::Grace { until: now };
        }
        let failed = self.ranks.iter().any(|rank| rank.status.is_some_and(|status| !status.success()));
        if failed && let Some(limit) = now.checked_add(self.patience(grace)) {
            self.pressure = match self.pressure {
                Pressure::None => Pressure::Grace { until: limit },
                Pressure::Grace { until } => Pressure::Grace { until: until.min(limit) },
                pressed => pressed,
            };
        }
        match self.pressure {
            Pressure::Grace { until } if now >= until => {
                self.signal(Signal::TERM)?;
                self.pressure = Pressure::Asked { until: now + LAST_WORDS };
            }
            Pressure::Asked { until } if now >= until => {
                self.signal(Signal::KILL)?;
                self.pressure = Pressure::Killed;
            }
            _ => {}
        }
        Ok(())
    }

    /// The time that ranks may go on after one has failed.
    fn patience(&self, grace: Duration) -> Duration {
        match self.cause {
            // A rank is about to report the cause.
            None => grace,
            Some((_, status)) if has_told(status) => grace.min(LAST_WORDS),
            Some(_) => Duration::ZERO,
        }
    }

    fn signal(&mut self, signal: Signal) -> Result<(), Error> {
        for rank in self.ranks.iter_mut().filter(|rank| rank.status.is_none()) {
            rank.ended_by_us = true;
            // Not collected yet, so the number is still this child's.
            let pid = Pid::from_child(&rank.child);
            kill_process(pid, signal).map_err(Error::system("end a rank"))?;
        }
        Ok(())
    }

    /// The end of the job, once all ranks have ended.
    fn end(&self) -> JobEnd {
        if let Some(signal) = self.interrupted {
            return JobEnd { status: exit::of_signal(signal as u8), message: Some("interrupted".to_owned()) };
        }
        if let Some((rank, status)) = self.cause {
            return match status.code().map(u8::try_from) {
                Some(Ok(code)) if has_told(status) => JobEnd { status: code, message: None },
                _ => {
                    let out_of_memory =
                        status.signal() == Some(SIGKILL) && memory::killed_since(self.oom_kills);
                    let why = if out_of_memory { ": its control group ran out of memory" } else { "" };
                    JobEnd {
                        status: FAILURE,
                        message: Some(format!("rank {rank} {}{why}", describe(status))),
                    }
                }
            };
        }
        let of = |matches: fn(&Rank) -> bool| self.ranks.iter().position(matches);
        let message = if let Some(rank) = of(|rank| rank.ended_by_us) {
            format!("rank {rank} did not end when the others did, and was ended")
        } else if of(|rank| !rank.status.is_some_and(|status| status.success())).is_none() {
            return JobEnd { status: SUCCESS, message: None };
        } else if let Some(rank) = of(|rank| rank.status.is_some_and(|status| status.success())) {
            format!("rank {rank} ended before the others were done")
        } else {
            "the ranks lost each other, and none reported the reason".to_owned()
        };
        JobEnd { status: FAILURE, message: Some(message) }
    }
}

/// True if the rank itself has reported the reason for this status.
fn has_told(status: ExitStatus) -> bool {
    [FAILURE, USAGE].map(|told| Some(i32::from(told))).contains(&status.code())
}

fn describe(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) => match signal_name(signal) {
            Some(name) => format!("was killed by signal {signal} ({name})"),
            None => format!("was killed by signal {signal}"),
        },
        (None, Some(code)) => format!("exited with status {code}"),
        (None, None) => format!("ended: {status}"),
    }
}

/// The signals that a launcher waits for, which a pipe delivers as bytes.
struct Signals {
    pipe: UnixStream,
    /// The last of SIGINT and SIGTERM, or 0.
    interruption: Arc<AtomicUsize>,
    registered: Vec<SigId>,
}

impl Signals {
    fn catch() -> io::Result<Self> {
        let (pipe, written) = UnixStream::pair()?;
        pipe.set_nonblocking(true)?;
        let mut signals = Signals { pipe, interruption: Arc::default(), registered: Vec::new() };
        for signal in [SIGINT, SIGTERM] {
            let flag = Arc::clone(&signals.interruption);
            signals.registered.push(signal_hook::flag::register_usize(signal, flag, signal as usize)?);
        }
        // After the flags, as actions run in the order of their registration.
        for signal in [SIGCHLD, SIGINT, SIGTERM] {
            signals.registered.push(signal_hook::low_level::pipe::register(signal, written.try_clone()?)?);
        }
        Ok(signals)
    }

    fn interruption(&self) -> Option<i32> {
        match self.interruption.load(Ordering::SeqCst) {
            0 => None,
            signal => Some(signal as i32),
        }
    }

    /// Sleeps until a signal has come since the last call, or until `end`.
    fn wait(&self, end: Option<Instant>) -> Result<(), Error> {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        // A time too long for the kernel is as good as none.
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut [PollFd::from_borrowed_fd(self.pipe.as_fd(), PollFlags::IN)], timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Error::system("wait for the ranks")(error)),
        }
        // The bytes only say that a signal came. The caller looks up which.
        while matches!(rustix::io::read(&self.pipe, &mut [0; 64]), Ok(1..)) {}
        Ok(())
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for id in self.registered.drain(..) {
            unregister(id);
        }
    }
}
