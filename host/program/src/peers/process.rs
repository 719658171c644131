//! One rank's process of a peer.
//!
//! Invariants: the process cannot hang this program; it does not outlive this program; and if it ends early, the last line
//! of its standard error reaches the user.

use std::{
    fs::File,
    io::Write,
    os::{fd::AsRawFd, unix::process::CommandExt},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{MemfdFlags, memfd_create},
    process::{
        Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus, kill_process_group,
        set_parent_process_death_signal, waitid,
    },
};

use super::protocol::{Reply, Request};
use crate::bounded::{Line, for_each_line, one_line};

/// The peers' program: what they share, a class for each, and the call.
const PROGRAM: &str = concat!(
    include_str!("peer.py"),
    "\n\n",
    include_str!("torch_peer.py"),
    "\n\n",
    include_str!("flashinfer_peer.py"),
    "\n\nmain()\n",
);
/// The longest line that is read: the times of a million trials of each variant.
const MAX_LINE: u64 = 256 << 20;
/// Bytes of a line of the standard error that are read; the rest of a longer line is skipped.
const MAX_WORDS: u64 = 64 << 10;
/// The most signs of life before the final reply.
const MAX_WORKING: u32 = 10_000;
/// The time in which a process that has closed its output must end.
const LAST_MOMENT: Duration = Duration::from_secs(2);

/// A peer's process and its children. Dropping this value ends all of them.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    input: ChildStdin,
    lines: Receiver<Line>,
    /// The last line on its standard error.
    last_words: Arc<Mutex<String>>,
    /// The time of its last line, or of the last request.
    heard: Instant,
    working: u32,
}

impl Process {
    /// Starts `python` with the peers' program.
    ///
    /// # Errors
    /// The reason why it does not start, for the user.
    pub(super) fn start(python: &Path) -> Result<Process, String> {
        let program =
            program_file().map_err(|error| format!("cannot pass on the peers' program: {error}"))?;
        let mut command = Command::new(python);
        command
            .arg("-u")
            .arg(format!("/proc/self/fd/{}", program.as_raw_fd()))
            // Its children are in its process group, and end with it.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: one system call, which allocates nothing and touches no lock.
        unsafe {
            command.pre_exec(|| Ok(set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        let mut child = command.spawn().map_err(|error| {
            format!("cannot start '{}': {error}: name another Python with --python", python.display())
        })?;
        let (Some(input), Some(output), Some(errors)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            unreachable!("all three were asked for");
        };
        // A line may be long: no more are held than the one that is being read, and one before it.
        let (sender, lines) = sync_channel(1);
        // Both threads end with the process, which holds the other ends.
        thread::spawn(move || for_each_line(output, MAX_LINE, |line| sender.send(line).is_ok()));
        let last_words = Arc::<Mutex<String>>::default();
        let said = Arc::clone(&last_words);
        thread::spawn(move || {
            for_each_line(errors, MAX_WORDS, |line| {
                let words = clipped(&line.text);
                if !words.is_empty() {
                    *said.lock().unwrap_or_else(PoisonError::into_inner) = words;
                }
                true
            });
        });
        Ok(Process { child, input, lines, last_words, heard: Instant::now(), working: 0 })
    }

    /// Sends a request.
    ///
    /// # Errors
    /// The reason why the process is no longer usable, for the user.
    pub(super) fn send(&mut self, request: &Request<'_>) -> Result<(), String> {
        self.heard = Instant::now();
        self.working = 0;
        let mut line = serde_json::to_vec(request).map_err(|error| error.to_string())?;
        line.push(b'\n');
        // A pipe takes a request whole even if nobody reads; one whose reader has gone is an error.
        self.input.write_all(&line).map_err(|_| self.end())
    }

    /// The answer to the last request, if it comes within `wait`.
    ///
    /// # Errors
    /// The reason why the process is no longer usable, for the user: it has ended, it wrote an invalid reply, or it has
    /// been silent for `limit`.
    pub(super) fn poll(&mut self, wait: Duration, limit: Duration) -> Result<Option<Reply>, String> {
        match self.lines.recv_timeout(wait) {
            Ok(Line { is_cut: true, .. }) => {
                Err(format!("it wrote a line of more than {MAX_LINE} bytes, the most that is read"))
            }
            Ok(Line { text, .. }) => {
                self.heard = Instant::now();
                match serde_json::from_str(&text) {
                    Ok(Reply::Working { .. }) if self.working == MAX_WORKING => {
                        Err(format!("it reported {MAX_WORKING} steps of work without a reply"))
                    }
                    Ok(Reply::Working { .. }) => {
                        self.working += 1;
                        Ok(None)
                    }
                    Ok(reply) => Ok(Some(reply)),
                    Err(_) => Err(format!("it wrote \"{}\", which is no reply", clipped(&text))),
                }
            }
            Err(RecvTimeoutError::Timeout) if self.heard.elapsed() > limit => {
                Err(format!("it said nothing for {:.1} s", limit.as_secs_f64()))
            }
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(self.end()),
        }
    }

    /// Describes the end of the process. The process is not waited for yet, so its number stays its own.
    fn end(&mut self) -> String {
        let deadline = Instant::now() + LAST_MOMENT;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let status = loop {
            match waitid(WaitId::Pid(Pid::from_child(&self.child)), options) {
                Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
                Ok(status) => break status,
                Err(_) => break None,
            }
        };
        // Its last line may still be on its way.
        thread::sleep(Duration::from_millis(50));
        let how = status.and_then(|status| describe(&status));
        let how = how.unwrap_or_else(|| "it closed its output".to_owned());
        let words = self.last_words.lock().unwrap_or_else(PoisonError::into_inner);
        if words.is_empty() { how } else { format!("{how}: {words}") }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Until the process is waited for, its number, and so the group's, is not reused.
        let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The peers' program as an anonymous file, which children inherit and which is gone with its last user.
fn program_file() -> std::io::Result<File> {
    let mut file = File::from(memfd_create("fused-collective-peer.py", MemfdFlags::empty())?);
    file.write_all(PROGRAM.as_bytes())?;
    Ok(file)
}

fn describe(status: &WaitIdStatus) -> Option<String> {
    let exited = status.exit_status().map(|code| format!("it exited with status {code}"));
    exited.or_else(|| status.terminating_signal().map(|signal| format!("it was killed by signal {signal}")))
}

/// The start of a text, as one line without control characters.
pub(super) fn clipped(text: &str) -> String {
    const LENGTH: usize = 300;
    let text = text.trim();
    let end = text.floor_char_boundary(LENGTH);
    let mut line = one_line(&text[..end]);
    if end < text.len() {
        line.push_str("...");
    }
    line
}
