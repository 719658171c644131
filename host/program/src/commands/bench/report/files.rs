//! The files of a benchmark's report.

use super::{data::Report, json, markdown, plot};
use crate::{
    commands::bench::settings::Outputs,
    report::output_file::{Content, OutputFile, WriteError},
    usage::UsageError,
};

/// The files of a report, checked before the run.
#[derive(Debug)]
pub(crate) struct Files {
    files: Vec<(Form, OutputFile)>,
}

#[derive(Clone, Copy, Debug)]
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

    fn content(self, report: &Report) -> Content {
        Ok(match self {
            Form::Markdown => markdown::to_string(report),
            Form::Json => json::to_string(report)?,
            Form::Plot => plot::to_svg(report)?,
        })
    }
}

impl Files {
    /// Checks that every file asked for can be written and that no two are the same.
    pub(crate) fn check(outputs: &Outputs) -> Result<Files, UsageError> {
        let wanted = [
            (Form::Markdown, &outputs.output_file),
            (Form::Json, &outputs.json),
            (Form::Plot, &outputs.plot),
        ];
        let mut files: Vec<(Form, OutputFile)> = Vec::new();
        for (form, named) in wanted {
            let Some(named) = named else { continue };
            let file = OutputFile::check(form.option(), named)?;
            files.iter().try_for_each(|(_, other)| file.check_differs(other))?;
            files.push((form, file));
        }
        Ok(Files { files })
    }

    /// Writes every file, and returns the first failure. A file that fails does not keep the others from being written.
    pub(crate) fn write(&self, report: &Report) -> Result<(), WriteError> {
        let results: Vec<_> =
            self.files.iter().map(|(form, file)| file.write(form.content(report))).collect();
        results.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File, Permissions},
        os::unix::fs::{MetadataExt, PermissionsExt as _, symlink},
        path::{Path, PathBuf},
    };

    use super::{super::fixture, *};

    fn json(path: impl Into<PathBuf>) -> Outputs {
        Outputs { json: Some(path.into()), ..Outputs::default() }
    }

    fn refused(outputs: &Outputs) -> String {
        Files::check(outputs).unwrap_err().to_string()
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
        let files = Files::check(&outputs).unwrap();
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
        Files::check(&json(&link)).unwrap().write(&fixture::report()).unwrap();
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
        Files::check(&device).unwrap().write(&fixture::report()).unwrap();
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
}
