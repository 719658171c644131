//! A file that a command writes: checked before the run, and written whole after it.
//!
//! A run takes minutes, so a file that cannot be written must be found before it. The check leaves no trace: no file is
//! made, emptied or changed. A file gets its content at once, by a rename, so an interrupted run leaves an older file as it
//! was. The name `-` is the standard output.

use std::{
    error::Error,
    fmt::{self, Write as _},
    fs::{self, File, Permissions},
    io::{self, Write},
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::{Access, access};

use crate::{bounded, exit::Stream, usage::UsageError};

/// A file that could be written when it was [checked](OutputFile::check).
#[derive(Debug)]
pub(crate) struct OutputFile {
    /// The option that names it.
    option: &'static str,
    /// The path as the user wrote it, for messages.
    named: PathBuf,
    target: Target,
}

/// The place where the bytes go.
#[derive(Debug, PartialEq)]
enum Target {
    /// A regular file, existing or not, with every symbolic link resolved. A rename replaces it.
    File { folder: PathBuf, path: PathBuf },
    /// A pipe, a terminal or another stream, which is written in place.
    Stream,
    /// The standard output, which is this file's alone.
    Stdout,
}

/// The content of a file, or the reason why there is none.
pub(crate) type Content = Result<String, Box<dyn Error + Send + Sync>>;

/// An output file that could not be written after the run.
#[derive(Debug)]
pub(crate) struct WriteError {
    named: PathBuf,
    cause: Box<dyn Error + Send + Sync>,
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot write '{}': {}", self.named.display(), self.cause)
    }
}

impl Error for WriteError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.cause)
    }
}

impl OutputFile {
    /// Checks that the file that `option` names can be written.
    pub(crate) fn check(option: &'static str, named: &Path) -> Result<Self, UsageError> {
        let target = target(named).map_err(|why| {
            UsageError::new(format_args!("{option}: cannot write '{}': {why}", named.display()))
        })?;
        Ok(OutputFile { option, named: named.to_owned(), target })
    }

    /// Refuses this file if it is the same as `other`. One stream may serve two outputs.
    pub(crate) fn check_differs(&self, other: &OutputFile) -> Result<(), UsageError> {
        if self.target == Target::Stream || self.target != other.target {
            return Ok(());
        }
        Err(self.taken_by(other.option))
    }

    /// The error of naming the same file as `option`.
    pub(crate) fn taken_by(&self, option: &str) -> UsageError {
        UsageError::new(format_args!(
            "{}: '{}' is the file that {option} names: give each its own",
            self.option,
            self.named.display()
        ))
    }

    /// True if this is the standard output.
    pub(crate) fn is_stdout(&self) -> bool {
        self.target == Target::Stdout
    }

    /// True if this is the file at `path`, however either is spelled.
    pub(crate) fn is(&self, path: &Path) -> bool {
        let Target::File { path: own, .. } = &self.target else { return false };
        let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino()));
        matches!((identity(own), identity(path)), (Ok(a), Ok(b)) if a == b)
    }

    /// The file beside this one whose name ends in `.new`.
    pub(crate) fn beside(&self) -> Result<OutputFile, UsageError> {
        let mut named = self.named.clone().into_os_string();
        named.push(".new");
        OutputFile::check(self.option, Path::new(&named))
    }

    /// The path as the user wrote it.
    pub(crate) fn named(&self) -> &Path {
        &self.named
    }

    /// Writes the file, whole or not at all. A named pipe has so much `patience` for a reader.
    pub(crate) fn write(&self, content: Content, patience: Duration) -> Result<(), WriteError> {
        let written = content.and_then(|content| Ok(self.put(&content, patience)?));
        written.map_err(|cause| WriteError { named: self.named.clone(), cause })
    }

    fn put(&self, content: &str, patience: Duration) -> io::Result<()> {
        let (folder, path) = match &self.target {
            Target::File { folder, path } => (folder, path),
            Target::Stream => return bounded::write(&self.named, content.as_bytes(), patience),
            Target::Stdout => return Stream::Output.write(content),
        };
        // Temporary files are private by default. This one becomes the user's, so it gets the permissions of ordinary
        // output, or those of the file that it replaces.
        let mut file =
            tempfile::Builder::new().permissions(Permissions::from_mode(0o666)).tempfile_in(folder)?;
        if let Ok(existing) = fs::metadata(path) {
            file.as_file().set_permissions(existing.permissions())?;
        }
        file.write_all(content.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    }
}

/// The file or stream that `path` names, or the reason why it cannot be written.
fn target(path: &Path) -> Result<Target, String> {
    if path == Path::new("-") {
        return Ok(Target::Stdout);
    }
    let is_folder = || "it is a directory: give a file name".to_owned();
    match fs::metadata(path) {
        Ok(existing) if existing.is_dir() => return Err(is_folder()),
        Ok(existing) => {
            access(path, Access::WRITE_OK).map_err(|error| reason(error.into()))?;
            if !existing.is_file() {
                return Ok(Target::Stream);
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(reason(error)),
    }
    if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
        return Err(is_folder());
    }
    // Links are resolved, so that the rename replaces the file and not a link to it.
    let resolved = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let Some(name) = resolved.file_name() else { return Err(is_folder()) };
    let folder = match resolved.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let missing = |_| format!("directory '{}' does not exist", folder.display());
    let folder = fs::canonicalize(folder).map_err(missing)?;
    // An anonymous file, or one that has a name for an instant: nothing stays behind.
    let probe: io::Result<File> = tempfile::tempfile_in(&folder);
    probe.map_err(|error| {
        let mut why = reason(error);
        let _ = write!(why, " (in directory '{}')", folder.display());
        why
    })?;
    Ok(Target::File { path: folder.join(name), folder })
}

fn reason(error: io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "no permission".to_owned(),
        io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only".to_owned(),
        io::ErrorKind::NotADirectory => "a part of its path is not a directory".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(path: &Path) -> String {
        OutputFile::check("--json", path).unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_written_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let line = |path: &Path, why: &str| format!("--json: cannot write '{}': {why}", path.display());
        let is_folder = "it is a directory: give a file name";
        assert_eq!(refused(path), line(path, is_folder));
        let slash = path.join("none/");
        assert_eq!(refused(&slash), line(&slash, is_folder));
        let orphan = path.join("none/a.json");
        let missing = format!("directory '{}' does not exist", path.join("none").display());
        assert_eq!(refused(&orphan), line(&orphan, &missing));
        fs::write(path.join("file"), "").unwrap();
        let below = path.join("file/a.json");
        assert_eq!(refused(&below), line(&below, "a part of its path is not a directory"));
        // The kernel's own files are nobody's to create, not even root's.
        let error = refused(Path::new("/proc/a.json"));
        assert!(error.starts_with("--json: cannot write '/proc/a.json': "), "{error}");
    }

    #[test]
    fn a_folder_that_vanishes_is_reported() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let file = OutputFile::check("--json", &path).unwrap();
        drop(folder);
        let error = file.write(Ok("text".to_owned()), Duration::ZERO).unwrap_err().to_string();
        assert!(error.starts_with(&format!("cannot write '{}': ", path.display())), "{error}");
    }

    #[test]
    fn permissions_are_told_plainly() {
        // Tests may run as root, whom no permission stops.
        assert_eq!(reason(io::ErrorKind::PermissionDenied.into()), "no permission");
        assert_eq!(reason(io::ErrorKind::ReadOnlyFilesystem.into()), "the file system is read-only");
    }
}
