//! Bounded reads of data from outside: a file may be an endless device, and a line from a pipe may never end.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, ErrorKind, Read},
    path::Path,
};

/// Reads the text of the file, pipe or device at `path`.
///
/// # Errors
/// It cannot be read, it has more than `most` bytes ([`ErrorKind::FileTooLarge`]), or it is not UTF-8
/// ([`ErrorKind::InvalidData`]).
pub(crate) fn read_to_string(path: &Path, most: u64) -> io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        let why = format!("it has more than {most} bytes, the most that is read");
        return Err(io::Error::new(ErrorKind::FileTooLarge, why));
    }
    String::from_utf8(bytes).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
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
    use std::{fs, io::repeat};

    use super::*;

    #[test]
    fn no_more_is_read_than_is_wanted() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("text");
        fs::write(&file, "12345678").unwrap();
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
