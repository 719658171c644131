//! The files of a benchmark's report.

use std::{path::PathBuf, time::Duration};

use super::{data::Report, json, markdown, plot};
use crate::{
    commands::bench::settings::Outputs,
    report::output_file::{Content, OutputFile, WriteError},
    usage::UsageError,
};

/// The files of a report, checked before the run.
#[derive(Debug, Default)]
pub(crate) struct Files {
    files: Vec<(Form, OutputFile)>,
    /// The file in the place of the JSON report if that may not replace the report it was compared with.
    beside: Option<OutputFile>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Markdown,
    Json,
    Plot(plot::Lines),
}

impl Form {
    const fn option(self) -> &'static str {
        match self {
            Form::Markdown => "--output-file",
            Form::Json => "--json",
            Form::Plot(_) => "--plot",
        }
    }

    fn content(self, report: &Report) -> Content {
        Ok(match self {
            Form::Markdown => markdown::to_string(report),
            Form::Json => json::to_string(report)?,
            Form::Plot(lines) => plot::to_svg(report, lines)?,
        })
    }
}

impl Files {
    /// Checks that every file asked for can be written, that no two are the same, and that none but a JSON report replaces a
    /// report that is read.
    pub(crate) fn check(outputs: &Outputs) -> Result<Files, UsageError> {
        let lines = if outputs.plot_all { plot::Lines::All } else { plot::Lines::Deciding };
        let wanted = [
            (Form::Markdown, &outputs.output_file),
            (Form::Json, &outputs.json),
            (Form::Plot(lines), &outputs.plot),
        ];
        let read = [("--from", &outputs.from), ("--compare", &outputs.compare)];
        let mut files: Vec<(Form, OutputFile)> = Vec::new();
        let mut beside = None;
        for (form, named) in wanted {
            let Some(named) = named else { continue };
            let file = OutputFile::check(form.option(), named)?;
            files.iter().try_for_each(|(_, other)| file.check_differs(other))?;
            for (option, path) in read {
                match path {
                    Some(path) if !file.is(path) => {}
                    None => {}
                    Some(_) if form != Form::Json => return Err(file.taken_by(option)),
                    Some(_) if option == "--compare" => beside = Some(file.beside()?),
                    Some(_) => {}
                }
            }
            files.push((form, file));
        }
        if let Some(beside) = &beside {
            files.iter().try_for_each(|(_, other)| beside.check_differs(other))?;
        }
        Ok(Files { files, beside })
    }

    /// True if one of the files is the standard output.
    pub(crate) fn take_stdout(&self) -> bool {
        self.files.iter().any(|(_, file)| file.is_stdout())
    }

    /// Writes every file, and returns the first failure. A file that fails does not keep the others from being written. If
    /// the report has `failed`, as a variant did or as it is slower than the one that it was compared with, it does not replace
    /// that one but goes to a file beside it, whose path is returned. Named pipes share the `patience` for a reader.
    pub(crate) fn write(
        &self,
        report: &Report,
        failed: bool,
        patience: Duration,
    ) -> Result<Option<PathBuf>, WriteError> {
        let beside = self.beside.as_ref().filter(|_| failed);
        let patience = patience / self.files.len().max(1) as u32;
        let write = |(form, file): &(Form, OutputFile)| {
            let file = if *form == Form::Json { beside.unwrap_or(file) } else { file };
            file.write(form.content(report), patience)
        };
        let results: Vec<_> = self.files.iter().map(write).collect();
        results.into_iter().collect::<Result<(), _>>()?;
        Ok(beside.map(|file| file.named().to_owned()))
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

    fn read(path: &Path) -> Report {
        json::parse(&fs::read_to_string(path).unwrap()).unwrap()
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
        assert_eq!(files.write(&report, false, Duration::ZERO).unwrap(), None);
        assert_eq!(names(folder.path()), ["a.md", "a.svg", "old.json"]);
        assert_eq!(read(&old), report);
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
        Files::check(&json(&link)).unwrap().write(&fixture::report(), false, Duration::ZERO).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(read(&file), fixture::report());
        let both = Outputs { plot: Some(file.clone()), ..json(&link) };
        let expected =
            format!("--plot: '{}' is the file that --json names: give each its own", file.display());
        assert_eq!(refused(&both), expected);
    }

    #[test]
    fn a_stream_is_written_as_it_is() {
        let device = Outputs { plot: Some("/dev/null".into()), ..json("/dev/null") };
        Files::check(&device).unwrap().write(&fixture::report(), false, Duration::ZERO).unwrap();
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
    fn a_report_that_is_slower_leaves_the_one_it_was_compared_with() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("a.json"), folder.path().join("link.json"));
        fs::write(&file, "the baseline").unwrap();
        symlink(&file, &link).unwrap();
        let files = Files::check(&Outputs { compare: Some(link), ..json(&file) }).unwrap();
        let beside = folder.path().join("a.json.new");
        assert_eq!(files.write(&fixture::report(), true, Duration::ZERO).unwrap(), Some(beside.clone()));
        assert_eq!(fs::read_to_string(&file).unwrap(), "the baseline");
        assert_eq!(read(&beside), fixture::report());
        // One that is not slower takes its place.
        assert_eq!(files.write(&fixture::report(), false, Duration::ZERO).unwrap(), None);
        assert_eq!(read(&file), fixture::report());
    }

    #[test]
    fn a_report_that_is_read_is_not_replaced_by_another_form() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a.json");
        fs::write(&file, "the baseline").unwrap();
        let name = file.display();
        let plot = Outputs { plot: Some(file.clone()), compare: Some(file.clone()), ..Outputs::default() };
        let expected = format!("--plot: '{name}' is the file that --compare names: give each its own");
        assert_eq!(refused(&plot), expected);
        let markdown =
            Outputs { output_file: Some(file.clone()), from: Some(file.clone()), ..Outputs::default() };
        let expected = format!("--output-file: '{name}' is the file that --from names: give each its own");
        assert_eq!(refused(&markdown), expected);
    }

    #[test]
    fn one_output_alone_may_be_the_standard_output() {
        assert!(Files::check(&json("-")).unwrap().take_stdout());
        assert!(!Files::check(&json("./-")).unwrap().take_stdout());
        let both = Outputs { plot: Some("-".into()), ..json("-") };
        assert_eq!(refused(&both), "--plot: '-' is the file that --json names: give each its own");
    }
}
