//! The values of options: each is checked here, so that an error names the option, the value and what is valid.

use std::{fmt, path::PathBuf, str::FromStr};

use fused_collective::{cuda, group::rendezvous::MIN_RANKS};

use crate::usage::UsageError;
use fused_collective_core::{
    MAX_WORLD_SIZE,
    fusion::{Operation, OperationError},
};

/// The longest deadline for ranks, in seconds: what kernels can wait. The same on every backend.
const MAX_DEADLINE: f64 = cuda::MAX_DEADLINE.as_secs() as f64;

/// The ranks that were asked for, if anyone asked: by `--nproc-per-node`, or by a launcher that set
/// `WORLD_SIZE` (or its like) to `launched`. With both they must agree, with neither the backend chooses.
pub(crate) fn world_size(
    nproc_per_node: Option<u32>,
    launched: Option<u32>,
) -> Result<Option<u32>, UsageError> {
    if let Some(world) = launched {
        check_world_size("WORLD_SIZE", world)?;
        if let Some(asked) = nproc_per_node.filter(|&asked| asked != world) {
            return Err(UsageError::new(format_args!(
                "--nproc-per-node: {asked} disagrees with the launcher's WORLD_SIZE, {world}: leave it out or use {world}"
            )));
        }
    }
    Ok(launched.or(nproc_per_node))
}

pub(crate) fn check_world_size(name: &str, ranks: u32) -> Result<(), UsageError> {
    if (MIN_RANKS..=MAX_WORLD_SIZE).contains(&ranks) {
        return Ok(());
    }
    let noun = if ranks == 1 { "rank" } else { "ranks" };
    Err(UsageError::new(format_args!(
        "{name}: {ranks} {noun} cannot form a group: use {MIN_RANKS} to {MAX_WORLD_SIZE}"
    )))
}

/// Refuses an operation that is none, and names the option that made it so.
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

pub(crate) fn deadline(text: &str) -> Result<f64, UsageError> {
    seconds("--deadline", text, MAX_DEADLINE)
}

/// A time above 0 and up to `most`, in seconds. It is a nanosecond at least: what is shorter would be no time as a
/// [`Duration`](std::time::Duration).
pub(crate) fn seconds(option: &str, text: &str, most: f64) -> Result<f64, UsageError> {
    positive(option, text, "a number of seconds", Some(most)).map(|seconds| seconds.max(1e-9))
}

pub(crate) fn one<T>(
    text: Option<String>,
    parse: impl Fn(&str) -> Result<T, UsageError>,
    default: T,
) -> Result<T, UsageError> {
    text.map_or(Ok(default), |text| parse(&text))
}

/// The values of a list option, in order, each once. Commas separate, and may trail.
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

pub(crate) fn name<T: FromStr<Err: fmt::Display>>(option: &str, text: &str) -> Result<T, UsageError> {
    text.parse().map_err(|error| UsageError::new(format_args!("{option}: '{text}' is {error}")))
}

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

/// A finite number above 0 and up to `most`, if there is a most.
pub(crate) fn positive(option: &str, text: &str, what: &str, most: Option<f64>) -> Result<f64, UsageError> {
    let valid = |number: &f64| number.is_finite() && *number > 0.0 && most.is_none_or(|most| *number <= most);
    text.parse().ok().filter(valid).ok_or_else(|| {
        let limit = most.map_or(String::new(), |most| format!(" and up to {most}"));
        UsageError::new(format_args!("{option}: '{text}' is not {what}: use a number above 0{limit}"))
    })
}

pub(crate) fn ranks(text: &str) -> Result<u32, UsageError> {
    let option = "--nproc-per-node";
    let ranks = text.parse().map_err(|_| {
        UsageError::new(format_args!(
            "{option}: '{text}' is not a number of ranks: use {MIN_RANKS} to {MAX_WORLD_SIZE}"
        ))
    })?;
    check_world_size(option, ranks).map(|()| ranks)
}

pub(crate) fn groups(text: &str) -> Result<u32, UsageError> {
    number("--groups", text, "a number of groups", 1, Some(MAX_WORLD_SIZE / MIN_RANKS))
}

/// Refuses more groups of so many ranks than one job can have.
pub(crate) fn check_groups(groups: u32, ranks: Option<u32>) -> Result<(), UsageError> {
    let ranks = ranks.unwrap_or(MIN_RANKS);
    if ranks * groups <= MAX_WORLD_SIZE {
        return Ok(());
    }
    Err(UsageError::new(format_args!(
        "--groups: {groups} groups of {ranks} ranks are more than {MAX_WORLD_SIZE} ranks: use fewer"
    )))
}

pub(crate) fn file(option: &str, text: Option<String>) -> Result<Option<PathBuf>, UsageError> {
    match text {
        Some(text) if text.is_empty() => {
            Err(UsageError::new(format_args!("{option}: '' is not a file name")))
        }
        text => Ok(text.map(PathBuf::from)),
    }
}
