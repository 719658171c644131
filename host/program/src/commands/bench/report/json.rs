//! The report as JSON: every figure, for scripts and for a comparison with a later run.
//!
//! Reading is strict: a report of another schema, with unknown or missing fields, or with impossible figures is refused.
//! The conclusion is derived anew, so reports of earlier versions get it too.

use std::{fmt, io, ops::RangeInclusive, path::Path, time::Duration};

use serde_json::Value;

use super::data::{Report, RowOutcome, SCHEMA};
use crate::{bounded, usage::UsageError};

/// The most bytes of a report that are read. The longest benchmarks write a few hundredths of that. With a million trials
/// it is enough for the rows of one configuration.
pub const MAX_BYTES: u64 = 256 << 20;

/// The medians that a report may have, in microseconds: from less than any clock tells to more than a lifetime.
const MEDIANS_US: RangeInclusive<f64> = 1e-9..=1e18;

/// The reason why a report cannot be read.
#[derive(Debug)]
pub enum ReadError {
    /// The file cannot be read.
    Io(io::Error),
    /// It is not JSON.
    Syntax(serde_json::Error),
    /// It is JSON without a schema, so not a report.
    NoReport,
    /// It is a report of another schema, as written in the file.
    Schema(String),
    /// It is a report of this schema with missing, unknown or wrong fields.
    Fields(serde_json::Error),
    /// The figures of a row are impossible: its configuration and name.
    Figures(String),
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ReadError::Io(error) => match error.kind() {
                io::ErrorKind::NotFound => f.write_str("there is no such file"),
                io::ErrorKind::IsADirectory => f.write_str("it is a directory"),
                io::ErrorKind::PermissionDenied => f.write_str("no permission to read it"),
                io::ErrorKind::InvalidData => f.write_str("it is not a JSON report: not UTF-8"),
                _ => error.fmt(f),
            },
            ReadError::Syntax(error) => write!(f, "it is not a JSON report: {error}"),
            ReadError::NoReport => f.write_str("it is not a report that --json wrote: it has no schema"),
            ReadError::Schema(found) => {
                write!(f, "its schema is {found}, this program reads schema {SCHEMA}")
            }
            ReadError::Fields(error) => write!(f, "it is not a report of schema {SCHEMA}: {error}"),
            ReadError::Figures(row) => write!(f, "its figures for {row} are impossible"),
        }
    }
}

impl std::error::Error for ReadError {}

/// The report as indented JSON, with a newline at the end.
pub fn to_string(report: &Report) -> serde_json::Result<String> {
    serde_json::to_string_pretty(report).map(|text| text + "\n")
}

/// The file of an earlier report, as an option names it. The name `-` is the standard input.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The option, for messages.
    pub option: &'static str,
    /// The path as the user wrote it.
    pub named: &'a Path,
    /// Longest wait for the writer of a pipe.
    pub patience: Duration,
}

impl<'a> Source<'a> {
    /// The path to read.
    pub fn path(&self) -> &'a Path {
        if self.named == Path::new("-") { Path::new("/dev/stdin") } else { self.named }
    }

    /// Reads the text, from another `path` if a pipe's content has been handed over.
    pub fn text(&self, path: Option<&Path>) -> Result<String, UsageError> {
        bounded::read_to_string(path.unwrap_or(self.path()), MAX_BYTES, self.patience)
            .map_err(|error| self.unusable(&ReadError::Io(error)))
    }

    /// The report that `text` is.
    pub fn report(&self, text: &str) -> Result<Report, UsageError> {
        parse(text).map_err(|error| self.unusable(&error))
    }

    fn unusable(&self, error: &ReadError) -> UsageError {
        UsageError::new(format_args!("{}: cannot use '{}': {error}", self.option, self.named.display()))
    }
}

/// Reads a report from text.
pub fn parse(text: &str) -> Result<Report, ReadError> {
    let value: Value = serde_json::from_str(text).map_err(ReadError::Syntax)?;
    match value.get("schema") {
        None => return Err(ReadError::NoReport),
        Some(schema) if *schema != SCHEMA => return Err(ReadError::Schema(schema.to_string())),
        Some(_) => {}
    }
    // Once more from the text: its errors name line and column.
    let mut report: Report = serde_json::from_str(text).map_err(ReadError::Fields)?;
    for configuration in &report.configurations {
        for row in &configuration.rows {
            if let RowOutcome::Verified { figures, .. } = &row.outcome
                && (configuration.num_tokens == 0 || !MEDIANS_US.contains(&figures.median_us))
            {
                return Err(ReadError::Figures(format!("{} at {}", row.variant, configuration.title())));
            }
        }
    }
    report.conclude();
    Ok(report)
}

#[cfg(test)]
mod tests {
    use std::{fs, process::Command};

    use super::{super::fixture, *};

    #[test]
    fn a_report_comes_back_as_it_was() {
        let report = fixture::report();
        assert_eq!(parse(&to_string(&report).unwrap()).unwrap(), report);
    }

    #[test]
    fn the_form_of_a_row_is_stable() {
        let value: Value = serde_json::from_str(&to_string(&fixture::report()).unwrap()).unwrap();
        assert_eq!(value["schema"], 1);
        let rows = &value["configurations"][0]["rows"];
        let expected = serde_json::json!({
            "variant": "standard_allreduce_rmsnorm_native_compiled",
            "kind": "standard",
            "outcome": {
                "status": "verified",
                "max_error": 0.5,
                "unit": "ulp",
                "operations_per_trial": 10,
                "times_us": [250.0, 240.0, 260.5],
                "figures": {
                    "median_us": 250.0,
                    "min_us": 240.0,
                    "p99_us": 260.5,
                    "algorithm_bandwidth_gb_s": 8.388608,
                    "bus_bandwidth_gb_s": 8.388608,
                    "speedup": 1.0,
                    "is_baseline": true,
                },
            },
        });
        assert_eq!(rows[1], expected);
        let failed =
            serde_json::json!({"status": "failed", "reason": "rank 1: 3 elements differ by up to 17 ulp"});
        assert_eq!(rows[3]["outcome"], failed);
    }

    #[track_caller]
    fn refused(edit: impl FnOnce(&mut Value), expected: &str) {
        let mut value = serde_json::to_value(fixture::report()).unwrap();
        edit(&mut value);
        let error = parse(&value.to_string()).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn anything_but_this_schema_is_refused() {
        let error = |text| parse(text).unwrap_err().to_string();
        assert!(
            error("# Markdown").starts_with("it is not a JSON report: expected value at line 1 column 1")
        );
        assert_eq!(error("[1, 2]"), "it is not a report that --json wrote: it has no schema");
        refused(|v| v["schema"] = 2.into(), "its schema is 2, this program reads schema 1");
        refused(|v| v["schema"] = "1".into(), "its schema is \"1\", this program reads schema 1");
    }

    #[test]
    fn fields_that_are_missing_unknown_or_wrong_are_refused() {
        let expected = "it is not a report of schema 1: ";
        refused(|v| v["surprise"] = 1.into(), &format!("{expected}unknown field `surprise`"));
        refused(
            |v| drop(v.as_object_mut().unwrap().remove("backend")),
            &format!("{expected}missing field `backend`"),
        );
        refused(
            |v| v["settings"]["dtypes"][0] = "int8".into(),
            &format!("{expected}'int8' is not an element type"),
        );
        let outcome = |v: &mut Value| v["configurations"][0]["rows"][1]["outcome"].take();
        refused(|v| drop(outcome(v)), expected);
    }

    #[test]
    fn an_impossible_median_is_refused() {
        let set =
            |v: &mut Value| v["configurations"][0]["rows"][1]["outcome"]["figures"]["median_us"] = 0.into();
        let row = "standard_allreduce_rmsnorm_native_compiled at num_tokens=128, dtype=bfloat16, with residual, quant=none";
        refused(set, &format!("its figures for {row} are impossible"));
    }

    #[test]
    fn a_report_without_its_conclusion_gets_it_from_the_rows() {
        let mut value = serde_json::to_value(fixture::report()).unwrap();
        value.as_object_mut().unwrap().remove("conclusion").unwrap();
        assert_eq!(parse(&value.to_string()).unwrap(), fixture::report());
    }

    #[test]
    fn a_file_that_cannot_be_used_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let error = |path: &Path| {
            let source = Source { option: "--from", named: path, patience: Duration::from_millis(20) };
            let error = source.text(None).and_then(|text| source.report(&text)).unwrap_err().to_string();
            let start = format!("--from: cannot use '{}': ", path.display());
            error.strip_prefix(&start).unwrap_or_else(|| panic!("{error}")).to_owned()
        };
        assert_eq!(error(&folder.path().join("none.json")), "there is no such file");
        assert_eq!(error(folder.path()), "it is a directory");
        let path = folder.path().join("binary");
        fs::write(&path, b"\xff\xfe").unwrap();
        assert_eq!(error(&path), "it is not a JSON report: not UTF-8");
        fs::write(&path, "# Markdown").unwrap();
        assert!(error(&path).starts_with("it is not a JSON report: "));
        let pipe = folder.path().join("pipe");
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert_eq!(error(&pipe), "nobody wrote to it for 0.02 s");
    }

    #[test]
    fn a_name_is_shown_in_one_line() {
        let named = Path::new("no such\nfile.json");
        let source = Source { option: "--compare", named, patience: Duration::ZERO };
        let error = source.text(None).unwrap_err().to_string();
        assert_eq!(error, "--compare: cannot use 'no such\\nfile.json': there is no such file");
    }
}
