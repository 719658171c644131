//! Bounded reads and writes of what is outside: a file may be an endless device, a line from a pipe may never end, and a
//! pipe may have nobody at its other end.

use std::{
    fs::{File, OpenOptions},
    io::{self, BufRead, BufReader, ErrorKind, Read, Write},
    os::{fd::AsFd, unix::fs::OpenOptionsExt as _},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
    io::Errno,
};

/// Longest wait for the other end of a pipe that no option sets.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Reads the text of the file, pipe or device at `path`. Nobody has to write to a pipe, so each wait for more ends after
/// `patience`.
///
/// # Errors
/// It cannot be read, it has more than `most` bytes ([`ErrorKind::FileTooLarge`]), it is not UTF-8
/// ([`ErrorKind::InvalidData`]), or nothing came in time ([`ErrorKind::TimedOut`]).
pub(crate) fn read_to_string(path: &Path, most: u64, patience: Duration) -> io::Result<String> {
    let file = open(OpenOptions::new().read(true), path)?;
    let pipe = Patient { file: &file, patience };
    let mut bytes = Vec::new();
    pipe.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        let why = format!("it has more than {most} bytes, the most that is read");
        return Err(io::Error::new(ErrorKind::FileTooLarge, why));
    }
    String::from_utf8(bytes).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
}

/// Writes `bytes` to the pipe or device at `path`. Nobody has to read from a pipe, so each wait for a reader ends after
/// `patience`.
///
/// # Errors
/// It cannot be written, or nobody read in time ([`ErrorKind::TimedOut`]).
pub(crate) fn write(path: &Path, bytes: &[u8], patience: Duration) -> io::Result<()> {
    let until = Instant::now() + patience;
    let file = loop {
        match open(OpenOptions::new().write(true), path) {
            // A pipe without a reader, which may be about to come.
            Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => {
                if Instant::now() >= until {
                    return Err(timed_out("nobody reads from it", patience));
                }
                thread::sleep(Duration::from_millis(10));
            }
            opened => break opened?,
        }
    };
    Patient { file: &file, patience }.write_all(bytes)
}

/// Opens `path` so that no call on it waits: neither this one, for the other end of a pipe, nor a read or a write.
fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
    options.custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path)
}

/// A file whose reads and writes wait for the other end of a pipe, but no longer than `patience`.
struct Patient<'a> {
    file: &'a File,
    patience: Duration,
}

impl Patient<'_> {
    /// Waits until `ready` is true of the file, then runs `call`.
    fn when(
        &self,
        ready: PollFlags,
        silence: &str,
        mut call: impl FnMut() -> io::Result<usize>,
    ) -> io::Result<usize> {
        let until = Instant::now() + self.patience;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            // A duration that does not fit is one without an end.
            let left = Timespec::try_from(left).ok();
            match poll(&mut [PollFd::from_borrowed_fd(self.file.as_fd(), ready)], left.as_ref()) {
                Ok(0) => return Err(timed_out(silence, self.patience)),
                Ok(_) => match call() {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    done => return done,
                },
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut file = self.file;
        self.when(PollFlags::IN, "nobody wrote to it", || file.read(buffer))
    }
}

impl Write for Patient<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut file = self.file;
        self.when(PollFlags::OUT, "nobody read from it", || file.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn timed_out(silence: &str, patience: Duration) -> io::Error {
    io::Error::new(ErrorKind::TimedOut, format!("{silence} for {} s", patience.as_secs_f64()))
}

/// `text` with control characters escaped: one line that cannot control a terminal.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}

/// A line without its end.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// The text, in which bytes that are not UTF-8 are replaced.
    pub(crate) text: String,
    /// True if the line was longer, and this is its start.
    pub(crate) is_cut: bool,
}

/// Calls `each` with the first `most` bytes of every line of `pipe`, until it returns false or the pipe ends.
pub(crate) fn for_each_line(pipe: impl Read, most: u64, mut each: impl FnMut(Line) -> bool) {
    let mut pipe = BufReader::new(pipe);
    loop {
        let mut bytes = Vec::new();
        // One more byte for the line's end.
        match pipe.by_ref().take(most.saturating_add(1)).read_until(b'\n', &mut bytes) {
            Ok(1..) => {}
            _ => return,
        }
        let has_ended = bytes.pop_if(|byte| *byte == b'\n').is_some();
        let is_cut = !has_ended && bytes.len() as u64 > most;
        if is_cut {
            bytes.pop();
        }
        // The rest of the line may never end, so `each` is called before it is skipped.
        let text = String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
        if !each(Line { text, is_cut }) {
            return;
        }
        if is_cut && pipe.skip_until(b'\n').is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::repeat, path::PathBuf, process::Command};

    use super::*;

    #[test]
    fn no_more_is_read_than_is_wanted() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("text");
        fs::write(&file, "12345678").unwrap();
        let read_to_string = |file: &Path, most| read_to_string(file, most, PATIENCE);
        assert_eq!(read_to_string(&file, 8).unwrap(), "12345678");
        for (file, most) in [(file.as_path(), 7), (Path::new("/dev/zero"), 1000)] {
            let error = read_to_string(file, most).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::FileTooLarge);
            assert_eq!(error.to_string(), format!("it has more than {most} bytes, the most that is read"));
        }
        // The length is checked first, even if the limit cuts a character.
        fs::write(&file, "é").unwrap();
        assert_eq!(read_to_string(&file, 0).unwrap_err().kind(), ErrorKind::FileTooLarge);
        fs::write(&file, b"\xff").unwrap();
        assert_eq!(read_to_string(&file, 8).unwrap_err().kind(), ErrorKind::InvalidData);
    }

    /// A named pipe in `folder`.
    fn pipe(folder: &tempfile::TempDir) -> PathBuf {
        let pipe = folder.path().join("pipe");
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        pipe
    }

    #[test]
    fn a_pipe_without_another_end_is_waited_for_no_longer_than_patience() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = pipe(&folder);
        let brief = Duration::from_millis(50);
        let error = read_to_string(&pipe, 8, brief).unwrap_err();
        assert_eq!(
            (error.kind(), &*error.to_string()),
            (ErrorKind::TimedOut, "nobody wrote to it for 0.05 s")
        );
        let error = write(&pipe, b"text", brief).unwrap_err();
        assert_eq!(
            (error.kind(), &*error.to_string()),
            (ErrorKind::TimedOut, "nobody reads from it for 0.05 s")
        );
        // A reader that does not read: the pipe fills up.
        let _reader = open(OpenOptions::new().read(true), &pipe).unwrap();
        let error = write(&pipe, &vec![0; 1 << 20], brief).unwrap_err();
        assert_eq!(
            (error.kind(), &*error.to_string()),
            (ErrorKind::TimedOut, "nobody read from it for 0.05 s")
        );
    }

    #[test]
    fn what_comes_through_a_pipe_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = pipe(&folder);
        // More than a pipe holds at once.
        let text = "0123456789".repeat(100_000);
        thread::scope(|scope| {
            let reader = scope.spawn(|| read_to_string(&pipe, 1 << 20, Duration::from_secs(60)));
            write(&pipe, text.as_bytes(), Duration::from_secs(60)).unwrap();
            assert_eq!(reader.join().unwrap().unwrap(), text);
        });
    }

    fn lines(pipe: impl Read, most: u64) -> Vec<(String, bool)> {
        let mut lines = Vec::new();
        for_each_line(pipe, most, |Line { text, is_cut }| {
            lines.push((text, is_cut));
            lines.len() < 5
        });
        lines
    }

    #[test]
    fn a_line_is_cut_where_it_is_too_long_and_the_next_is_whole() {
        let whole = |text: &str| (text.to_owned(), false);
        let cut = |text: &str| (text.to_owned(), true);
        assert_eq!(
            lines(&b"123\n1234\n12345\n\nlast"[..], 4)[..],
            [whole("123"), whole("1234"), cut("1234"), whole(""), whole("last"),]
        );
        assert_eq!(lines(&b"1234"[..], 4), [whole("1234")]);
        assert_eq!(lines(&b"12345"[..], 4), [cut("1234")]);
        assert_eq!(lines(&b""[..], 4), []);
    }

    #[test]
    fn a_line_without_an_end_is_told_before_it_has_come() {
        let mut told = Vec::new();
        for_each_line(repeat(b'x'), 3, |line| {
            told.push(line);
            false
        });
        assert_eq!(told, [Line { text: "xxx".to_owned(), is_cut: true }]);
    }
}
