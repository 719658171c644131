//! Random bytes from outside are read or refused, without a panic and in bounded time: command lines, the environment and
//! reports. The tests of `peers` do the same with replies; those of the library with messages, calls and headers.
//!
//! `FUSED_COLLECTIVE_LONG_TESTS=1 cargo test any_` tries for a minute, `PROPTEST_CASES=1000000 cargo test any_` for longer.

use std::{collections::HashMap, ffi::OsString, os::unix::ffi::OsStringExt as _, time::Duration};

use fused_collective_core::fusion::Mode;
use proptest::{collection::vec, prelude::*};
use serde_json::Value;

use crate::{
    commands::{
        self, Invocation,
        bench::report::{
            compare, fixture, json, markdown,
            plot::{Lines, to_svg},
            table,
        },
    },
    job::rank_env::RankEnv,
};

/// The number of cases that a test tries: `PROPTEST_CASES` if that is set, else `few`, or `50 * few` if
/// `FUSED_COLLECTIVE_LONG_TESTS` is set.
pub(crate) fn cases(few: u32) -> ProptestConfig {
    let set = |variable| std::env::var_os(variable).is_some();
    match (set("PROPTEST_CASES"), set("FUSED_COLLECTIVE_LONG_TESTS")) {
        (true, _) => ProptestConfig::default(),
        (false, false) => ProptestConfig::with_cases(few),
        (false, true) => ProptestConfig::with_cases(50 * few),
    }
}

/// The cases that a test tries in about a second.
pub(crate) const FEW: u32 = 256;

/// Values for an option, by the word that stands for them in the help: valid ones, and similar invalid ones.
fn values_of(kind: &str) -> &'static [&'static str] {
    match kind {
        "n" => &[
            "2",
            "3",
            "16",
            "48",
            "8192",
            "1",
            "0",
            "-1",
            "1,2",
            "1,2,,3",
            "2 3",
            "0.5",
            "4294967296",
            "0x10",
            "١",
        ],
        "seconds" | "percent" => &["1", "0.5", "3600", "0", "-0.0", "1e400", "inf", "NaN", "1e-300"],
        "dtype" => &["bfloat16", "float16,float32", "int8", ","],
        "mode" => &["none", "fp8,fp4", "FP8", "fp5"],
        "how" => &["replicated", "sharded", "none", "both"],
        "name" => &[
            "cpu",
            "cuda",
            "auto",
            "nccl",
            "custom",
            "nccl,nccl-symmetric,custom",
            "torch",
            "flashinfer,torch",
            "moe",
            "post-norm",
            "exact,int4",
            "tpu",
        ],
        "type" => &["f32", "element", "f16", ""],
        "program" => &["python3", "-", ""],
        "file" => &["a.json", "/dev/null", "-", "", "a\u{1b}b"],
        "case" => &[
            "start/kill/1",
            "operations/abort/0",
            "replays/other-order/15",
            "start/abort/0",
            "end/stop/16",
            "//",
        ],
        other => panic!("no values are known for '{other}' of the help: add some here"),
    }
}

/// An option of any command, with a value of its own or of another option, or without one.
fn options() -> impl Strategy<Value = Vec<String>> {
    let options: Vec<(String, Option<String>)> =
        commands::commands().into_iter().flat_map(|(_, options)| options).collect();
    let kinds: Vec<String> = options.iter().filter_map(|(_, kind)| kind.clone()).collect();
    let value = |kind: String| prop::sample::select(values_of(&kind)).prop_map(str::to_owned);
    let any_value = prop_oneof![
        4 => prop::sample::select(kinds).prop_flat_map(value),
        2 => any::<u64>().prop_map(|number| number.to_string()),
        1 => any::<f64>().prop_map(|number| number.to_string()),
        1 => ".{0,8}",
    ];
    (prop::sample::select(options), any_value, 0..16).prop_flat_map(move |((option, kind), other, how)| {
        let own = match kind {
            Some(kind) => value(kind).prop_map(Some).boxed(),
            None => Just(None).boxed(),
        };
        own.prop_map(move |own| match (how, own) {
            (0, _) => vec![format!("{option}={other}")],
            (1, _) => vec![option.clone(), other.clone()],
            (2, Some(_)) | (_, None) => vec![option.clone()],
            (3, Some(own)) => vec![format!("{option}={own}")],
            (_, Some(own)) => vec![option.clone(), own],
        })
    })
}

/// Arguments that are no options with values.
fn words() -> impl Strategy<Value = Vec<String>> {
    let known = [
        "bench",
        "verify",
        "links",
        "soak",
        "faults",
        "help",
        "--help",
        "-h",
        "--",
        "-",
        "--version",
        "--json=",
    ];
    let word = prop_oneof![3 => prop::sample::select(known.to_vec()).prop_map(str::to_owned), 1 => ".{0,12}"];
    word.prop_map(|word| vec![word])
}

/// A command line, mostly with options of its own command.
fn lines() -> impl Strategy<Value = Vec<String>> {
    let own = prop::sample::select(commands::commands()).prop_flat_map(|(command, options)| {
        let option = |(option, kind): (String, Option<String>)| match kind {
            None => Just(vec![option]).boxed(),
            Some(kind) => prop::sample::select(values_of(&kind))
                .prop_map(move |value| vec![option.clone(), value.to_owned()])
                .boxed(),
        };
        let options = prop::sample::select(options).prop_flat_map(option);
        vec(options, 0..4).prop_map(move |options| (command.clone(), options.concat()))
    });
    let others = vec(prop_oneof![3 => options(), 1 => words()], 0..4).prop_map(|others| others.concat());
    prop_oneof![
        3 => own.clone().prop_map(|(command, own)| [vec![command], own].concat()),
        2 => (own, others.clone()).prop_map(|((command, own), others)| [vec![command], own, others].concat()),
        1 => others,
    ]
}

/// Some of the values above must be valid, or the code behind the parser would not be tried.
#[test]
fn every_option_of_every_command_takes_some_value_that_is_tried() {
    for (command, options) in commands::commands() {
        for (option, kind) in options.into_iter().filter(|(option, _)| option != "--help") {
            let values = kind.as_deref().map_or(&[""][..], values_of);
            let takes = |value: &str| {
                let words = [command.as_str(), option.as_str(), value];
                let words = words.into_iter().filter(|word| !word.is_empty());
                // Help and the version do not count.
                matches!(commands::parse(words.map(OsString::from)), Ok(run) if !matches!(run, Invocation::Print(_)))
            };
            let taken = values.iter().filter(|value| takes(value)).count();
            assert!(taken > 0, "{command} {option}: {values:?}");
            assert!(kind.is_none() || taken < values.len(), "{command} {option}: {values:?}");
        }
    }
}

proptest! {
    #![proptest_config(cases(FEW))]

    #[test]
    fn any_arguments_are_understood_or_refused_in_one_line(args in lines()) {
        match commands::parse(args.into_iter().map(OsString::from)) {
            Ok(Invocation::Bench(settings)) => {
                prop_assert!(!settings.num_tokens.is_empty() && settings.trials > 0);
                prop_assert!(settings.job.deadline() > Duration::ZERO && settings.peer_deadline() > Duration::ZERO);
                for case in settings.cases() {
                    prop_assert_eq!(settings.operation(case, Mode::Auto).validate(), Ok(()));
                }
            }
            Ok(Invocation::Verify(settings)) => {
                prop_assert!(settings.problems().all(|problem| problem.operation(Mode::Auto).validate().is_ok()));
                prop_assert!((1..=8).contains(&settings.job.groups) && settings.job.deadline() > Duration::ZERO);
            }
            Ok(Invocation::Links(settings)) => {
                prop_assert!(settings.job.deadline() > Duration::ZERO);
                prop_assert!(settings.json.is_none_or(|file| !file.as_os_str().is_empty()));
            }
            Ok(Invocation::Soak(settings)) => {
                prop_assert!(settings.minutes > 0.0 && settings.minutes.is_finite() && settings.operations != Some(0));
                prop_assert!((1..=8).contains(&settings.job.groups) && settings.job.deadline() > Duration::ZERO);
            }
            Ok(Invocation::Faults(settings)) => {
                prop_assert!(settings.cases.iter().flatten().all(|case| case.fault.happens_in(case.phase)));
                prop_assert!(settings.job.deadline() > Duration::ZERO);
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
        if let Err(error) = commands::parse(args.into_iter().map(OsString::from_vec)) {
            prop_assert!(!error.to_string().chars().any(char::is_control));
        }
    }

    #[test]
    fn any_environment_is_a_rank_or_none_or_refused(
        variables in vec((prop::sample::select(VARIABLES.to_vec()), values()), 0..12),
        parent: u32,
    ) {
        let variables: HashMap<&str, String> = variables.into_iter().collect();
        match RankEnv::parse(|name| variables.get(name).cloned(), || parent) {
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

    /// Replaces one value anywhere in a valid report. If the result is a report, it can be compared and shown.
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
            prop_assert!(markdown::to_string(&read).contains("## Conclusion"));
            prop_assert!(!table::conclusion(&read.conclusion, 40).is_empty());
            for lines in [Lines::Deciding, Lines::All] {
                prop_assert!(to_svg(&read, lines).unwrap().ends_with("</svg>\n"));
            }
        }
    }
}

const VARIABLES: [&str; 27] = [
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
    "PMI_JOBID",
    "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_ID",
    "SLURM_JOB_ID",
    "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_NODELIST",
    "FUSED_COLLECTIVE_KEY",
    "FUSED_COLLECTIVE_ADDRESS",
];

fn values() -> impl Strategy<Value = String> {
    prop_oneof![
        6 => (0u32..5).prop_map(|number| number.to_string()),
        1 => any::<i64>().prop_map(|number| number.to_string()),
        1 => Just("4294967295".to_owned()),
        1 => ".{0,10}",
    ]
}

pub(crate) fn json_values() -> impl Strategy<Value = Value> {
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

/// The number of values in `value`, itself included.
pub(crate) fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(values) => values.iter().map(count).sum::<usize>(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// Replaces the value after `left` other values.
pub(crate) fn replace(value: &mut Value, left: &mut usize, other: &Value) {
    if *left == 0 {
        *value = other.clone();
    }
    // The counter stays above 0 after the replacement, so no other value is replaced.
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
