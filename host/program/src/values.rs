//! The values of options. Every value is checked here or in [`job::options`](crate::job::options), so an error names the
//! option, the value and the valid ones.

use std::{fmt, path::PathBuf, str::FromStr};

use fused_collective_core::fusion::{Operation, OperationError};

use crate::usage::UsageError;

/// Refuses an invalid operation, and names the option to change.
pub(crate) fn check_operation(operation: &Operation) -> Result<(), UsageError> {
    operation.validate().map_err(|error| {
        let option = match error {
            OperationError::TooLarge { .. } => "--num-tokens",
            _ => "--hidden-dim",
        };
        UsageError::new(format_args!("{option}: {error}"))
    })
}

pub(crate) fn seed(text: &str) -> Result<u64, UsageError> {
    number("--seed", text, "a seed", 0, None)
}

pub(crate) fn hidden_dim(text: &str) -> Result<u64, UsageError> {
    number("--hidden-dim", text, "a hidden size", 0, None)
}

/// A duration in seconds, above 0 and up to `most`. The result is at least a nanosecond: a shorter time would be zero as
/// a [`Duration`](std::time::Duration).
pub(crate) fn seconds(option: &str, text: &str, most: f64) -> Result<f64, UsageError> {
    positive(option, text, "a number of seconds", Some(most)).map(|seconds| seconds.max(1e-9))
}

/// The value of an option that may be left out.
pub(crate) fn one<T>(
    text: Option<String>,
    parse: impl Fn(&str) -> Result<T, UsageError>,
    default: T,
) -> Result<T, UsageError> {
    text.map_or(Ok(default), |text| parse(&text))
}

/// The values of a list option, in order and without repeats. Commas separate values, and may trail.
pub(crate) fn list<T: PartialEq>(
    option: &str,
    texts: &[String],
    parse: impl Fn(&str) -> Result<T, UsageError>,
    default: Vec<T>,
) -> Result<Vec<T>, UsageError> {
    if texts.is_empty() {
        return Ok(default);
    }
    let mut values = Vec::new();
    for text in texts.iter().flat_map(|text| text.split(',')).map(str::trim).filter(|text| !text.is_empty()) {
        let value = parse(text)?;
        if !values.contains(&value) {
            values.push(value);
        }
    }
    if values.is_empty() {
        Err(UsageError::new(format_args!("{option}: no value given")))
    } else {
        Ok(values)
    }
}

/// One of a set of names. The error of `T` says which names are valid.
pub(crate) fn name<T: FromStr<Err: fmt::Display>>(option: &str, text: &str) -> Result<T, UsageError> {
    text.parse().map_err(|error| UsageError::new(format_args!("{option}: '{text}' is {error}")))
}

/// A whole number in `from..=to`, without an upper limit if `to` is `None`. `what` names the number in the error.
pub(crate) fn number<N: FromStr + PartialOrd + fmt::Display>(
    option: &str,
    text: &str,
    what: &str,
    from: N,
    to: Option<N>,
) -> Result<N, UsageError> {
    let number =
        text.parse().ok().filter(|number| *number >= from && to.as_ref().is_none_or(|to| number <= to));
    number.ok_or_else(|| {
        let valid = to.map_or(format!("whole numbers from {from}"), |to| format!("{from} to {to}"));
        UsageError::new(format_args!("{option}: '{text}' is not {what}: use {valid}"))
    })
}

/// A finite number above 0, and up to `most` if there is a limit.
pub(crate) fn positive(option: &str, text: &str, what: &str, most: Option<f64>) -> Result<f64, UsageError> {
    let valid = |number: &f64| number.is_finite() && *number > 0.0 && most.is_none_or(|most| *number <= most);
    text.parse().ok().filter(valid).ok_or_else(|| {
        let limit = most.map_or(String::new(), |most| format!(" and up to {most}"));
        UsageError::new(format_args!("{option}: '{text}' is not {what}: use a number above 0{limit}"))
    })
}

pub(crate) fn file(option: &str, text: Option<String>) -> Result<Option<PathBuf>, UsageError> {
    match text {
        Some(text) if text.is_empty() => {
            Err(UsageError::new(format_args!("{option}: '' is not a file name")))
        }
        text => Ok(text.map(PathBuf::from)),
    }
}
