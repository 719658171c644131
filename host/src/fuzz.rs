//! Whatever bytes come from outside, they are read or refused, without a panic and without going on for long: command
//! lines, the environment, reports. Messages of ranks are fed to their parser in `rendezvous::frame`, announcements in
//! `board`, headers and calls in `core`.
//!
//! `PROPTEST_CASES=1000000 cargo test any_` does this for longer.

use std::{collections::HashMap, ffi::OsString, os::unix::ffi::OsStringExt as _};

use fused_collective_core::fusion::Mode;
use proptest::{collection::vec, prelude::*};
use serde_json::Value;

use crate::{
    cli::{self, Invocation},
    rank_env::RankEnv,
    report::{compare, fixture, json},
};

/// Words that a command line is made of, and what stands next to them.
fn words() -> impl Strategy<Value = String> {
    let known = [
        "bench",
        "verify",
        "soak",
        "faults",
        "help",
        "--help",
        "-h",
        "--",
        "-",
        "--version",
        "--num-tokens",
        "--hidden-dim",
        "--dtypes",
        "--quant-modes",
        "--no-residual",
        "--trials",
        "--warmup",
        "--seed",
        "--backend",
        "--nproc-per-node",
        "--deadline",
        "--json",
        "--compare",
        "--tolerance",
        "--minutes",
        "--operations",
        "--cases",
        "--quick",
        "--allreduce",
        "cpu",
        "cuda",
        "bfloat16",
        "fp8,fp4",
        "none",
        "nccl",
        "start/kill/1",
        "operations/abort/0",
        "16",
        "8192",
        "0",
        "-1",
        "1,2,,3",
        ",",
        "1e400",
        "inf",
        "NaN",
        "18446744073709551616",
        "4294967296",
        "0x10",
        "١",
    ];
    let number = any::<u64>().prop_map(|number| number.to_string());
    let float = any::<f64>().prop_map(|number| number.to_string());
    prop_oneof![
        12 => prop::sample::select(known.to_vec()).prop_map(str::to_owned),
        2 => number,
        1 => float,
        1 => (prop::sample::select(known.to_vec()), ".{0,8}").prop_map(|(word, value)| format!("{word}={value}")),
        1 => ".{0,12}",
    ]
}

proptest! {
    #[test]
    fn any_arguments_are_understood_or_refused_in_one_line(
        command in prop::sample::select(vec!["bench", "verify", "links", "soak", "faults", ""]),
        words in vec(words(), 0..10),
    ) {
        let args = std::iter::once(command.to_owned()).chain(words).filter(|word| !word.is_empty());
        match cli::parse(args.map(OsString::from)) {
            Ok(Invocation::Bench(settings)) => {
                prop_assert!(!settings.num_tokens.is_empty() && settings.trials > 0);
                for case in settings.cases() {
                    prop_assert_eq!(settings.operation(case, Mode::Auto).validate(), Ok(()));
                }
            }
            Ok(Invocation::Verify(settings)) => {
                prop_assert!(settings.problems().all(|problem| problem.operation(Mode::Auto).validate().is_ok()));
            }
            Ok(Invocation::Links(settings, json)) => {
                prop_assert!(settings.deadline() > std::time::Duration::ZERO);
                prop_assert!(json.is_none_or(|file| !file.as_os_str().is_empty()));
            }
            Ok(Invocation::Soak(settings)) => {
                prop_assert!(settings.minutes > 0.0 && settings.minutes.is_finite() && settings.operations != Some(0));
                prop_assert!((1..=8).contains(&settings.groups));
            }
            Ok(Invocation::Faults(settings)) => {
                prop_assert!(settings.cases.iter().flatten().all(|case| case.fault.happens_in(case.phase)));
                prop_assert!(settings.deadline() > std::time::Duration::ZERO);
            }
            Ok(Invocation::Print(text)) => prop_assert!(!text.is_empty()),
            Err(error) => {
                let line = error.to_string();
                prop_assert!(!line.is_empty() && !line.chars().any(char::is_control), "{:?}", line);
            }
        }
    }

    #[test]
    fn any_bytes_as_arguments_are_understood_or_refused(args in vec(vec(any::<u8>(), 0..20), 0..5)) {
        if let Err(error) = cli::parse(args.into_iter().map(OsString::from_vec)) {
            prop_assert!(!error.to_string().chars().any(char::is_control));
        }
    }

    #[test]
    fn any_environment_is_a_rank_or_none_or_refused(
        variables in vec((prop::sample::select(VARIABLES.to_vec()), values()), 0..12),
        parent: u32,
    ) {
        let variables: HashMap<&str, String> = variables.into_iter().collect();
        match RankEnv::parse(|name| variables.get(name).cloned(), parent) {
            Ok(None) => {}
            Ok(Some(rank)) => {
                prop_assert!(rank.rank < rank.world_size && rank.local_rank < rank.world_size);
                prop_assert!(!rank.key.is_empty());
            }
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }

    #[test]
    fn any_text_is_a_report_or_refused(text in ".{0,200}") {
        if let Err(error) = json::parse(&text) {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    /// One value anywhere in a right report is replaced: if it is still one, it can be compared with and shown.
    #[test]
    fn any_change_of_a_report_gives_another_or_is_refused(at in any::<prop::sample::Index>(), other in json_values()) {
        let report = fixture::report();
        let mut value: Value = serde_json::from_str(&json::to_string(&report).unwrap()).unwrap();
        let count = count(&value);
        replace(&mut value, &mut at.index(count), &other);
        if let Ok(read) = json::parse(&value.to_string()) {
            let comparison = compare::compare(&read, &report, 10.0);
            prop_assert!(!comparison.render(80).is_empty());
            prop_assert!(compare::compare(&report, &read, 10.0).regressions().count() < 1000);
        }
    }
}

const VARIABLES: [&str; 24] = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "PMIX_NAMESPACE",
    "PMI_RANK",
    "PMI_SIZE",
    "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_ID",
    "SLURM_JOB_ID",
    "SLURM_STEP_NUM_NODES",
    "FUSED_COLLECTIVE_KEY",
];

fn values() -> impl Strategy<Value = String> {
    prop_oneof![
        6 => (0u32..5).prop_map(|number| number.to_string()),
        1 => any::<i64>().prop_map(|number| number.to_string()),
        1 => Just("4294967295".to_owned()),
        1 => ".{0,10}",
    ]
}

fn json_values() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,10}".prop_map(Value::from),
        Just(Value::Array(Vec::new())),
        Just(Value::Object(serde_json::Map::new())),
    ]
}

/// Values in `value`, itself included.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(values) => values.iter().map(count).sum::<usize>(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// Replaces the value that `left` values come before.
fn replace(value: &mut Value, left: &mut usize, other: &Value) {
    if *left == 0 {
        *value = other.clone();
    }
    // Past 0 no other is.
    let Some(next) = left.checked_sub(1) else {
        *left = usize::MAX;
        return;
    };
    *left = next;
    match value {
        Value::Array(values) => values.iter_mut().for_each(|value| replace(value, left, other)),
        Value::Object(fields) => fields.values_mut().for_each(|value| replace(value, left, other)),
        _ => {}
    }
}
