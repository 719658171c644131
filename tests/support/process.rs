//! A program under test, with every process that it starts, directly or not, in any group or session. A mark in their
//! environment, which children inherit, identifies them.

use std::{
    fmt, fs,
    io::Read,
    process::{Child, Command, Stdio, id},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

/// The variable that marks the processes of one run.
const MARK: &str = "FUSED_COLLECTIVE_TEST_RUN";
/// The time that the other processes of a run may outlive the first one. The kernel takes a moment to end them.
const GRACE: Duration = Duration::from_secs(2);
/// The time that a process may be without an environment while it loads another program.
const LOADING: Duration = Duration::from_millis(200);

/// A running program. Dropping this value kills all its processes.
pub struct Running {
    processes: Processes,
    started: Instant,
    stdout: Output,
    stderr: Output,
}

/// The end of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The exit status, or `None` if a signal ended the program.
    pub code: Option<i32>,
    /// The standard output of all its processes.
    pub stdout: String,
    /// The standard error of all its processes.
    pub stderr: String,
    /// The duration.
    pub time: Duration,
    /// Processes that still ran well after the end of the program. They have been killed.
    pub survivors: Vec<i32>,
}

impl Running {
    /// Starts `command` without input, and captures its output.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start(command: &mut Command) -> Self {
        static RUNS: AtomicU64 = AtomicU64::new(0);
        // No other run has this mark.
        let mark = format!("{}-{}", id(), RUNS.fetch_add(1, Ordering::Relaxed));
        command.env(MARK, &mark).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let stdout = Output::of(child.stdout.take().expect("it is a pipe"));
        let stderr = Output::of(child.stderr.take().expect("it is a pipe"));
        Running { processes: Processes { child, mark }, started, stdout, stderr }
    }

    /// The process that was started.
    pub fn pid(&self) -> i32 {
        self.processes.pid().as_raw_nonzero().get()
    }

    /// The other live processes of the run, in the order of their numbers.
    pub fn children(&self) -> Vec<i32> {
        self.processes.children()
    }

    /// Waits until `ready` is true for the live processes other than the first, and returns them.
    ///
    /// # Panics
    /// That takes longer than `limit`.
    pub fn wait_for_children(&self, limit: Duration, ready: impl Fn(&[i32]) -> bool) -> Vec<i32> {
        let deadline = Instant::now() + limit;
        loop {
            let children = self.children();
            if ready(&children) {
                return children;
            }
            assert!(Instant::now() < deadline, "after {limit:?} the run's other processes are {children:?}");
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The process of a rank that the program started itself: the child with `RANK` in its environment.
    ///
    /// # Panics
    /// There is none within `limit`.
    pub fn wait_for_rank(&self, rank: u32, limit: Duration) -> i32 {
        let variable = format!("RANK={rank}");
        let is_rank = |&pid: &i32| has_variable(pid, &variable);
        let children = self.wait_for_children(limit, |children| children.iter().any(is_rank));
        children
            .into_iter()
            .find(is_rank)
            .unwrap_or_else(|| panic!("rank {rank} ended as soon as it was seen"))
    }

    /// Waits until the standard output contains `text`.
    ///
    /// # Panics
    /// That takes longer than `limit`.
    pub fn wait_for_stdout(&self, text: &str, limit: Duration) {
        let found = wait_until(Instant::now() + limit, || self.stdout.so_far().contains(text).then_some(()));
        assert!(
            found.is_some(),
            "after {limit:?} the output has no {text:?}: {}{}",
            self.stdout.so_far(),
            self.stderr.so_far()
        );
    }

    /// Sends `signal` to one process of the run. Does nothing if it has ended.
    pub fn signal(&self, pid: i32, signal: Signal) {
        send(pid, signal);
    }

    /// Waits for the program to end.
    ///
    /// # Panics
    /// It has not ended after `limit`. All its processes are killed, and the message has their output.
    pub fn wait(self, limit: Duration) -> Outcome {
        let Running { mut processes, started, stdout, stderr } = self;
        let status =
            wait_until(started + limit, || processes.child.try_wait().expect("a child can be waited for"));
        let time = started.elapsed();
        if status.is_some() {
            wait_until(Instant::now() + GRACE, || processes.children().is_empty().then_some(()));
        }
        let survivors = processes.children();
        // Live processes hold the pipes open, so all are ended before the pipes are read to the end.
        drop(processes);
        let code = status.and_then(|status| status.code());
        let outcome = Outcome { code, stdout: stdout.whole(), stderr: stderr.whole(), time, survivors };
        assert!(status.is_some(), "no end within {limit:?}: {outcome}");
        outcome
    }
}

impl Outcome {
    /// Asserts success: status 0, nothing on the standard error, and no process left.
    ///
    /// # Panics
    /// One of these is not so.
    pub fn assert_success(&self) {
        assert!(self.code == Some(0) && self.stderr.is_empty() && self.survivors.is_empty(), "{self}");
    }

    /// Asserts a failure with this status, with this one line on the standard error after the program's name, and with no
    /// process left.
    ///
    /// # Panics
    /// One of these is not so.
    pub fn assert_failure(&self, code: i32, line: &str) {
        let expected = format!("fused-collective: {line}\n");
        assert!(
            self.code == Some(code) && self.stderr == expected && self.survivors.is_empty(),
            "status {code} and {expected:?}, not {self}"
        );
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Outcome { code, stdout, stderr, time, survivors } = self;
        writeln!(f, "exit status {code:?} after {time:?}, processes left behind: {survivors:?}")?;
        write!(f, "--- standard output\n{stdout}--- standard error\n{stderr}---")
    }
}

/// The processes of one run, killed on drop.
struct Processes {
    child: Child,
    mark: String,
}

impl Processes {
    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn children(&self) -> Vec<i32> {
        let mark = format!("{MARK}={}", self.mark);
        let is_marked = |&pid: &i32| has_variable(pid, &mark);
        let processes = fs::read_dir("/proc").expect("/proc lists the processes");
        let pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        let mut marked: Vec<i32> =
            pids.filter(|&pid| pid != self.pid().as_raw_nonzero().get()).filter(is_marked).collect();
        marked.sort_unstable();
        marked
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        // Both fail only for a process that has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // A process that starts while they are listed turns up in the next round.
        wait_until(Instant::now() + GRACE, || {
            let children = self.children();
            for &pid in &children {
                send(pid, Signal::KILL);
            }
            children.is_empty().then_some(())
        });
    }
}

fn send(pid: i32, signal: Signal) {
    if let Some(pid) = Pid::from_raw(pid) {
        // It may have ended since it was listed.
        let _ = kill_process(pid, signal);
    }
}

/// Calls `poll` until it returns a value, and returns `None` at the deadline.
fn wait_until<T>(deadline: Instant, mut poll: impl FnMut() -> Option<T>) -> Option<T> {
    loop {
        match poll() {
            None if Instant::now() < deadline => thread::sleep(Duration::from_millis(2)),
            result => return result,
        }
    }
}

/// True if a process has this `NAME=value` in its environment.
fn has_variable(pid: i32, variable: &str) -> bool {
    let environment = environment(pid);
    environment.split(|&byte| byte == 0).any(|found| found == variable.as_bytes())
}

/// A process's environment. Empty if the process has ended, or belongs to another user or to the kernel.
fn environment(pid: i32) -> Vec<u8> {
    let read = || {
        let bytes = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        // While the process loads another program, none or a part of it can be read.
        let is_whole = !bytes.is_empty() && environment_length(pid) == Some(bytes.len() as u64);
        (is_whole || fs::read_link(format!("/proc/{pid}/exe")).is_err()).then_some(bytes)
    };
    // Some programs have an empty environment.
    wait_until(Instant::now() + LOADING, read).unwrap_or_default()
}

/// The length of a process's environment, if it has one.
fn environment_length(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The first two fields are the number and, in brackets, a name that may hold anything.
    let (_, fields) = stat.rsplit_once(") ")?;
    // Fields 50 and 51: its first and last address; 0 before there is one.
    let mut addresses = fields.split(' ').skip(50 - 3).map(|field| field.parse::<u64>().ok());
    let (start, end) = (addresses.next()??, addresses.next()??);
    (start != 0).then(|| end.checked_sub(start))?
}

/// The output of a pipe, read on a thread of its own, so that a program that fills one pipe can write to the other.
struct Output {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Output {
    fn of(mut pipe: impl Read + Send + 'static) -> Self {
        let bytes = Arc::<Mutex<Vec<u8>>>::default();
        let read = Arc::clone(&bytes);
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            // Bytes before an error are kept.
            while let Ok(length @ 1..) = pipe.read(&mut buffer) {
                read.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..length]);
            }
        });
        Output { bytes, reader }
    }

    fn so_far(&self) -> String {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The whole output, once all processes have closed the pipe.
    ///
    /// # Panics
    /// A process without the run's mark still has the pipe after [`GRACE`], and may write more.
    fn whole(self) -> String {
        let ended = wait_until(Instant::now() + GRACE, || self.reader.is_finished().then_some(()));
        assert!(ended.is_some(), "a process without the run's mark has its output open: {}", self.so_far());
        self.so_far()
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Running {
        Running::start(Command::new("sh").args(["-c", script]))
    }

    #[test]
    fn an_outcome_has_the_exit_status_and_both_outputs() {
        let outcome = shell("echo out; echo err >&2; exit 3").wait(LONG);
        assert_eq!(
            (outcome.code, outcome.stdout.as_str(), outcome.stderr.as_str()),
            (Some(3), "out\n", "err\n")
        );
        assert!(outcome.survivors.is_empty(), "{outcome}");
    }

    #[test]
    fn output_can_be_waited_for_while_the_program_runs() {
        let running = shell("echo begun; sleep 600");
        running.wait_for_stdout("begun\n", LONG);
        running.wait_for_children(LONG, |children| children.len() == 1);
    }

    #[test]
    fn a_rank_is_found_by_its_environment() {
        let running = shell("RANK=10 sleep 600 & RANK=1 sleep 600 & wait");
        running.wait_for_children(LONG, |children| children.len() == 2);
        let rank = running.wait_for_rank(1, LONG);
        assert!(rank != running.wait_for_rank(10, LONG) && running.children().contains(&rank));
    }

    #[test]
    fn a_program_that_a_signal_ends_has_no_exit_status() {
        let running = shell("exec sleep 600");
        running.signal(running.pid(), Signal::TERM);
        assert_eq!(running.wait(LONG).code, None);
    }

    #[test]
    fn a_process_left_behind_is_reported_and_killed_even_in_a_session_of_its_own() {
        let running = shell("setsid sleep 600 & exit 0");
        let mark = running.processes.mark.clone();
        let outcome = running.wait(LONG);
        assert_eq!((outcome.code, outcome.survivors.len()), (Some(0), 1), "{outcome}");
        // The mark finds no process any more.
        let mut done = Command::new("true").spawn().unwrap();
        done.wait().unwrap();
        assert!(Processes { child: done, mark }.children().is_empty());
    }

    #[test]
    fn a_run_past_its_limit_fails_with_what_it_printed_and_is_killed() {
        let running = shell("echo begun; sleep 600 & sleep 600");
        running.wait_for_children(LONG, |children| children.len() == 2);
        let panic = catch_unwind(AssertUnwindSafe(|| running.wait(Duration::ZERO))).unwrap_err();
        let message = panic.downcast_ref::<String>().unwrap();
        assert!(message.starts_with("no end within 0ns") && message.contains("begun\n"), "{message}");
    }

    #[test]
    fn a_process_is_found_while_it_turns_into_another_program() {
        let script = tempfile::NamedTempFile::new().unwrap();
        fs::write(script.path(), "exec sh $0").unwrap();
        let running = shell(&format!("sh {} & wait", script.path().display()));
        running.wait_for_children(LONG, |children| children.len() == 1);
        for look in 0..1000 {
            assert_eq!(running.children().len(), 1, "look {look}");
        }
    }

    #[test]
    fn dropping_a_run_kills_its_processes() {
        let running = shell("sleep 600 & sleep 600");
        let children = running.wait_for_children(LONG, |children| children.len() == 2);
        drop(running);
        for pid in children {
            assert!(!fs::read(format!("/proc/{pid}/environ")).is_ok_and(|bytes| !bytes.is_empty()));
        }
    }
}
