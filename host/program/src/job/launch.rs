//! Starts the ranks of a job on this host, and answers for all of them.
//!
//! A program that was started plainly calls [`Launcher::run`], which starts it again once for each rank, with
//! the [variables](crate::job::rank_env) of a `torchrun` job; each of these processes calls [`tie_to_parent`] first
//! of all. By convention only rank 0 writes to the standard output.
//!
//! What must hold:
//! - no process outlives the launcher, however it ends: the kernel kills the ranks with it;
//! - when a rank fails, the others have the grace period to notice, say why and end; then they are ended. Once the
//!   cause is known they are ended sooner: what they could still say is only that they miss that rank;
//! - **one clear error reaches the user.** A rank that fails for a reason of its own prints it and exits with
//!   [`FAILURE`] or [`USAGE`]; a rank that fails because another was lost prints nothing and exits with
//!   [`SECONDARY`], unless it is the one that [reports the loss](reports). The launcher adds a line for what no
//!   rank can have printed: a rank that was killed, or that ended in another way.

use std::{
    env,
    ffi::OsString,
    fmt,
    fs::File,
    io::{self, Write},
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
    consts::{SIGCHLD, SIGINT, SIGTERM},
    low_level::{signal_name, unregister},
};

use fused_collective::group::{How, Lost};

use crate::{
    exit::{FAILURE, SECONDARY, SUCCESS, USAGE},
    job::rank_env,
};

/// Set for the ranks of a [`Launcher`]: its process number.
const PARENT: &str = "FUSED_COLLECTIVE_PARENT";
/// What a rank may take to end when nothing is left to do or to say: before it is asked to, and then before it is ended
/// by force.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Why ranks could not be started or watched.
#[derive(Debug)]
pub enum Error {
    /// A rank's process could not be started.
    Start {
        /// The rank.
        rank: u32,
        /// What the system said.
        source: io::Error,
    },
    /// The launcher of this rank is gone.
    Orphan,
    /// The operating system refused something.
    System {
        /// What was being done.
        doing: &'static str,
        /// What it said.
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

/// Makes this process end with its launcher; does nothing in a process that none started. A program calls it
/// before anything else, on its main thread: the tie ends with the thread that made it.
///
/// # Errors
/// [`Error::Orphan`] if the launcher has ended already: there is nobody left to work for.
pub fn tie_to_parent() -> Result<(), Error> {
    let Some(parent) = env::var_os(PARENT) else { return Ok(()) };
    set_parent_process_death_signal(Some(Signal::KILL))
        .map_err(Error::system("tie this rank to its launcher"))?;
    // The launcher may have ended before the line above: then another process has adopted this one.
    let adopted = getppid().is_none_or(|pid| parent != *pid.as_raw_pid().to_string());
    if adopted { Err(Error::Orphan) } else { Ok(()) }
}

/// What the launcher of this rank has [handed over](Launcher::hand_over) as `variable`: a path to open.
pub fn handed_over(variable: &str) -> Option<PathBuf> {
    let descriptor: u32 = env::var(variable).ok()?.parse().ok()?;
    // Opened anew, so that every rank reads from the start.
    is_launched().then(|| format!("/proc/self/fd/{descriptor}").into())
}

/// A key that no other job has.
///
/// # Errors
/// The system gives no random numbers.
pub fn new_key() -> Result<String, Error> {
    let mut random = [0_u8; 16];
    getrandom(&mut random, GetRandomFlags::empty()).map_err(Error::system("draw the job's key"))?;
    Ok(format!("launch/{:032x}", u128::from_ne_bytes(random)))
}

/// `program` as rank `rank` of `ranks`, which share the `key`, for callers that watch ranks themselves. Like a
/// [`Launcher`]'s, it [ends with this process](tie_to_parent). It has no input.
pub fn rank_command(program: &Path, rank: u32, ranks: u32, key: &str) -> Command {
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
    command
}

/// This program's file.
///
/// # Errors
/// The system does not say which it is.
pub fn program() -> Result<PathBuf, Error> {
    env::current_exe().map_err(Error::system("find this program's file"))
}

/// Whether a [`Launcher`] started this process.
pub fn is_launched() -> bool {
    env::var_os(PARENT).is_some()
}

/// Whether `rank` should tell the user of `lost` and exit with [`FAILURE`], or say nothing and exit with
/// [`SECONDARY`]. `launched` is [`is_launched`]: a launcher sees for itself how a process ended.
pub fn reports(lost: &Lost, rank: u32, launched: bool) -> bool {
    rank == lost.reporter() && !(launched && lost.how == How::Ended)
}

/// Starts the ranks of one job. See the [module](self).
#[derive(Debug)]
pub struct Launcher {
    program: PathBuf,
    arguments: Vec<OsString>,
    ranks: u32,
    grace: Duration,
    /// Files that ranks inherit, each with the variable that tells its descriptor.
    files: Vec<(&'static str, OwnedFd)>,
}

/// How a job ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The status to exit with.
    pub status: u8,
    /// A line for the user, where no rank can have told what happened.
    pub message: Option<String>,
}

impl Launcher {
    /// For `ranks` copies of this process: the same program with the same arguments.
    ///
    /// # Errors
    /// The system does not say which file this program is.
    pub fn new(ranks: u32) -> Result<Self, Error> {
        Ok(Launcher {
            program: program()?,
            arguments: env::args_os().skip(1).collect(),
            ranks,
            grace: Duration::from_secs(10),
            files: Vec::new(),
        })
    }

    /// How long the other ranks may go on once one has failed and while none says why (10 s unless set).
    pub fn grace(mut self, grace: Duration) -> Self {
        self.grace = grace;
        self
    }

    /// Gives every rank `content` to read, as a file without a name: [`handed_over`] opens it under the same `variable`.
    /// What this process has read from a pipe no other can read again.
    ///
    /// # Errors
    /// The system's.
    pub fn hand_over(mut self, variable: &'static str, content: &[u8]) -> Result<Self, Error> {
        let doing = "hand a file to the ranks";
        // Inherited: not closed where a rank's program starts.
        let file = memfd_create(variable, MemfdFlags::empty()).map_err(Error::system(doing))?;
        let mut file = File::from(file);
        file.write_all(content).map_err(Error::system(doing))?;
        self.files.push((variable, file.into()));
        Ok(self)
    }

    /// Starts all ranks and waits until the last has ended.
    ///
    /// SIGINT and SIGTERM end the ranks, with status 130 or 143. They stay caught afterwards, so the program
    /// should exit soon. Call this on a thread that does not end before it returns, or the ranks end with it.
    ///
    /// # Errors
    /// Ranks could not be started or waited for; none is left running.
    pub fn run(&self) -> Result<Outcome, Error> {
        // Before the first rank starts, so that no signal comes unnoticed.
        let signals = Signals::catch().map_err(Error::system("catch signals"))?;
        let mut job = Job { ranks: self.start()?, cause: None, interrupted: None, pressure: Pressure::None };
        loop {
            job.reap()?;
            if job.ranks.iter().all(|rank| rank.status.is_some()) {
                return Ok(job.outcome());
            }
            job.press(signals.interruption(), self.grace)?;
            signals.wait(job.pressure.due())?;
        }
    }

    fn start(&self) -> Result<Vec<Rank>, Error> {
        let key = new_key()?;
        let mut ranks = Vec::new();
        for rank in 0..self.ranks {
            let files = self.files.iter().map(|(variable, file)| (variable, file.as_raw_fd().to_string()));
            let mut command = rank_command(&self.program, rank, self.ranks, &key);
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
    /// It was still running when the launcher asked it to end.
    ended_by_us: bool,
}

impl Drop for Rank {
    fn drop(&mut self) {
        if self.status.is_none() {
            // Fails only if it has ended; then there is only its status left to collect.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// What the launcher does to make ranks end.
#[derive(Clone, Copy)]
enum Pressure {
    None,
    /// A rank has failed; the others should notice.
    Grace {
        until: Instant,
    },
    /// They were asked to end.
    Asked {
        until: Instant,
    },
    /// They were killed.
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

struct Job {
    ranks: Vec<Rank>,
    /// The first rank that failed for a reason of its own.
    cause: Option<(u32, ExitStatus)>,
    /// The signal that ends the job.
    interrupted: Option<i32>,
    pressure: Pressure,
}

impl Job {
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
        // Of several seen at once, one that was killed is the likelier cause of the others.
        causes.sort_by_key(|(_, status)| status.signal().is_none());
        self.cause = self.cause.or(causes.first().copied());
        Ok(())
    }

    /// Takes the next step towards the end of those that are left, if it is time.
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

    /// How much longer ranks may go on after one has failed.
    fn patience(&self, grace: Duration) -> Duration {
        match self.cause {
            // One of them is about to say what it is.
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

    /// Of a job whose ranks have all ended.
    fn outcome(&self) -> Outcome {
        if let Some(signal) = self.interrupted {
            return Outcome { status: 128 + signal as u8, message: Some("interrupted".to_owned()) };
        }
        if let Some((rank, status)) = self.cause {
            return match status.code().map(u8::try_from) {
                Some(Ok(code)) if has_told(status) => Outcome { status: code, message: None },
                _ => Outcome { status: FAILURE, message: Some(format!("rank {rank} {}", describe(status))) },
            };
        }
        let of = |matches: fn(&Rank) -> bool| self.ranks.iter().position(matches);
        let message = if let Some(rank) = of(|rank| rank.ended_by_us) {
            format!("rank {rank} did not end when the others did, and was ended")
        } else if of(|rank| !rank.status.is_some_and(|status| status.success())).is_none() {
            return Outcome { status: SUCCESS, message: None };
        } else if let Some(rank) = of(|rank| rank.status.is_some_and(|status| status.success())) {
            format!("rank {rank} ended before the others were done")
        } else {
            "the ranks lost each other, and none says why".to_owned()
        };
        Outcome { status: FAILURE, message: Some(message) }
    }
}

/// Whether the user has the reason for this status from the rank itself.
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

/// The signals that a launcher waits for, as bytes in a pipe.
struct Signals {
    pipe: UnixStream,
    /// The last of SIGINT and SIGTERM that came, or 0.
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
        // After the flags: actions run in the order they were registered.
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
        // A time too long to be told to the kernel is as good as none.
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut [PollFd::from_borrowed_fd(self.pipe.as_fd(), PollFlags::IN)], timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(Error::system("wait for the ranks")(error)),
        }
        // The bytes say no more than that something came: what, the caller looks up.
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
