//! The files that a run writes, checked before it starts and written whole when it is done.
//!
//! A run takes minutes; a file that cannot be written is found before, not after. Checking leaves no trace:
//! no file is made, emptied or changed until its content is complete, and then it appears at once, by a
//! rename. An interrupted run therefore leaves an older report as it was.

use std::{
    error::Error,
    fmt::{self, Write as _},
    fs::{self, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use rustix::fs::{Access, access};

use super::{Report, json, markdown, plot};
use crate::{commands::bench::settings::Outputs, usage::UsageError};

/// Output files that could be written when [checked](OutputFiles::check).
#[derive(Debug)]
pub struct OutputFiles {
    files: Vec<OutputFile>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Markdown,
    Json,
    Plot,
}

impl Form {
    const fn option(self) -> &'static str {
        match self {
            Form::Markdown => "--output-file",
            Form::Json => "--json",
            Form::Plot => "--plot",
        }
    }
}

#[derive(Debug)]
struct OutputFile {
    form: Form,
    /// As the user wrote it, for messages.
    named: PathBuf,
    target: Target,
}

/// Where the bytes go.
#[derive(Debug, PartialEq)]
enum Target {
    /// A regular file, existing or not, with every symbolic link resolved: replaced by a rename.
    File { folder: PathBuf, path: PathBuf },
    /// A pipe, a terminal or the like: written to as it is.
    Stream,
}

/// What a file should hold, or why there is nothing.
type Content = Result<String, Box<dyn Error + Send + Sync>>;

/// An output file that could not be written after all.
#[derive(Debug)]
pub struct WriteError {
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

impl OutputFiles {
    /// Checks that every file asked for can be written and that no two are the same.
    pub fn check(outputs: &Outputs) -> Result<OutputFiles, UsageError> {
        let wanted = [
            (Form::Markdown, &outputs.output_file),
            (Form::Json, &outputs.json),
            (Form::Plot, &outputs.plot),
        ];
        let mut files: Vec<OutputFile> = Vec::new();
        for (form, named) in wanted {
            let Some(named) = named else { continue };
            let target = target(named).map_err(|why| {
                UsageError::new(format_args!("{}: cannot write '{}': {why}", form.option(), named.display()))
            })?;
            if target != Target::Stream
                && let Some(same) = files.iter().find(|other| other.target == target)
            {
                return Err(UsageError::new(format_args!(
                    "{}: '{}' is the file that {} names: give each its own",
                    form.option(),
                    named.display(),
                    same.form.option()
                )));
            }
            files.push(OutputFile { form, named: named.clone(), target });
        }
        Ok(OutputFiles { files })
    }

    /// Writes every file. One that fails does not keep the others from being written; the first failure is
    /// returned.
    pub fn write(&self, report: &Report) -> Result<(), WriteError> {
        let results: Vec<_> = self.files.iter().map(|file| file.write(file.form.content(report))).collect();
        results.into_iter().collect()
    }

    /// Writes `text` to the JSON file, if one was asked for.
    pub fn write_json(&self, text: &str) -> Result<(), WriteError> {
        let mut files = self.files.iter().filter(|file| file.form == Form::Json);
        files.try_for_each(|file| file.write(Ok(text.to_owned())))
    }
}

impl OutputFile {
    fn write(&self, content: Content) -> Result<(), WriteError> {
        let written = content.and_then(|content| Ok(self.put(content.as_bytes())?));
        written.map_err(|cause| WriteError { named: self.named.clone(), cause })
    }

    fn put(&self, content: &[u8]) -> io::Result<()> {
        let Target::File { folder, path } = &self.target else {
            return OpenOptions::new().write(true).open(&self.named)?.write_all(content);
        };
        // A temporary file is private unless told otherwise; this one becomes the user's, so it gets the
        // permissions that any program's output has, or those of the file that it replaces.
        let mut file =
            tempfile::Builder::new().permissions(Permissions::from_mode(0o666)).tempfile_in(folder)?;
        if let Ok(existing) = fs::metadata(path) {
            file.as_file().set_permissions(existing.permissions())?;
        }
        file.write_all(content)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    }
}

impl Form {
    fn content(self, report: &Report) -> Content {
        Ok(match self {
            Form::Markdown => markdown::to_string(report),
            Form::Json => json::to_string(report)?,
            Form::Plot => plot::to_svg(report)?,
        })
    }
}

/// What `path` names, or why it cannot be written.
fn target(path: &Path) -> Result<Target, String> {
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
    // An existing file is followed to where it is, so that a rename replaces it and not a link to it.
    let resolved = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let Some(name) = resolved.file_name() else { return Err(is_folder()) };
    let folder = match resolved.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let missing = |_| format!("directory '{}' does not exist", folder.display());
    let folder = fs::canonicalize(folder).map_err(missing)?;
    // A file without a name, or with one for an instant: nothing stays behind.
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
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::{super::fixture, *};

    fn json(path: impl Into<PathBuf>) -> Outputs {
        Outputs { json: Some(path.into()), ..Outputs::default() }
    }

    fn refused(outputs: &Outputs) -> String {
        OutputFiles::check(outputs).unwrap_err().to_string()
    }

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn checking_changes_nothing_and_writing_replaces() {
        let folder = tempfile::tempdir().unwrap();
        let old = folder.path().join("old.json");
        fs::write(&old, "precious").unwrap();
        fs::set_permissions(&old, Permissions::from_mode(0o640)).unwrap();
        let outputs = Outputs {
            output_file: Some(folder.path().join("a.md")),
            plot: Some(folder.path().join("a.svg")),
            ..json(&old)
        };
        let files = OutputFiles::check(&outputs).unwrap();
        assert_eq!(names(folder.path()), ["old.json"]);
        assert_eq!(fs::read_to_string(&old).unwrap(), "precious");

        let report = fixture::report();
        files.write(&report).unwrap();
        assert_eq!(names(folder.path()), ["a.md", "a.svg", "old.json"]);
        assert_eq!(json::read(&old).unwrap(), report);
        assert_eq!(fs::metadata(&old).unwrap().mode() & 0o777, 0o640);
        // As a file made in the ordinary way, whatever the umask.
        let plain = folder.path().join("plain");
        File::create(&plain).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().mode();
        assert_eq!(mode(&folder.path().join("a.md")), mode(&plain));
    }

    #[test]
    fn a_link_is_written_through() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file.json"), folder.path().join("link.json"));
        fs::write(&file, "").unwrap();
        symlink(&file, &link).unwrap();
        OutputFiles::check(&json(&link)).unwrap().write(&fixture::report()).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(json::read(&file).is_ok());
        let both = Outputs { plot: Some(file.clone()), ..json(&link) };
        let expected =
            format!("--plot: '{}' is the file that --json names: give each its own", file.display());
        assert_eq!(refused(&both), expected);
    }

    #[test]
    fn a_stream_is_written_as_it_is() {
        let device = Outputs { plot: Some("/dev/null".into()), ..json("/dev/null") };
        OutputFiles::check(&device).unwrap().write(&fixture::report()).unwrap();
        assert!(!fs::metadata("/dev/null").unwrap().is_file());
    }

    #[test]
    fn one_file_for_two_outputs_is_refused_however_it_is_spelled() {
        let folder = tempfile::tempdir().unwrap();
        let (plain, dotted) = (folder.path().join("x"), folder.path().join("./x"));
        let both = Outputs { output_file: Some(dotted), ..json(&plain) };
        let expected =
            format!("--json: '{}' is the file that --output-file names: give each its own", plain.display());
        assert_eq!(refused(&both), expected);
    }

    #[test]
    fn what_cannot_be_written_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let line = |path: &Path, why: &str| format!("--json: cannot write '{}': {why}", path.display());
        let is_folder = "it is a directory: give a file name";
        assert_eq!(refused(&json(path)), line(path, is_folder));
        let slash = path.join("none/");
        assert_eq!(refused(&json(&slash)), line(&slash, is_folder));
        let orphan = path.join("none/a.json");
        let missing = format!("directory '{}' does not exist", path.join("none").display());
        assert_eq!(refused(&json(&orphan)), line(&orphan, &missing));
        fs::write(path.join("file"), "").unwrap();
        let below = path.join("file/a.json");
        assert_eq!(refused(&json(&below)), line(&below, "a part of its path is not a directory"));
        // The kernel's own files are nobody's to create, not even root's.
        let error = refused(&json("/proc/a.json"));
        assert!(error.starts_with("--json: cannot write '/proc/a.json': "), "{error}");
    }

    #[test]
    fn a_folder_that_vanishes_is_reported() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        let files = OutputFiles::check(&json(&path)).unwrap();
        drop(folder);
        let error = files.write(&fixture::report()).unwrap_err().to_string();
        assert!(error.starts_with(&format!("cannot write '{}': ", path.display())), "{error}");
    }

    #[test]
    fn permissions_are_told_plainly() {
        // Tests may run as root, whom no permission stops.
        assert_eq!(reason(io::ErrorKind::PermissionDenied.into()), "no permission");
        assert_eq!(reason(io::ErrorKind::ReadOnlyFilesystem.into()), "the file system is read-only");
    }
}
