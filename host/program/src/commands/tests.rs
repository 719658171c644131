//! The promises of the command line: the meaning of arguments, and the exact line for each that is refused.

use fused_collective_core::dtype::DType;

use super::*;
use crate::backend::all_reduce_choice::AllReduceChoice;
use crate::{
    commands::bench::settings::{Outputs, Settings},
    job::options::{BackendChoice, JobOptions},
    pattern::Pattern,
    peers::choice::PeerChoice,
    quant_mode::QuantMode,
    wire::Wire,
};

fn run(line: &str) -> Result<Invocation, UsageError> {
    parse(line.split(' ').filter(|arg| !arg.is_empty()).map(OsString::from))
}

fn bench(options: &str) -> Settings {
    match run(&format!("bench {options}")).unwrap() {
        Invocation::Bench(settings) => *settings,
        other => panic!("{other:?}"),
    }
}

fn verify(options: &str) -> verify::settings::Settings {
    match run(&format!("verify {options}")).unwrap() {
        Invocation::Verify(settings) => settings,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn refused(line: &str, expected: &str) {
    assert_eq!(run(line).unwrap_err().to_string(), expected);
}

#[test]
fn no_options_are_the_defaults() {
    assert_eq!(bench(""), Settings::default());
}

#[test]
fn every_option_reaches_its_setting() {
    let settings = bench(
        "--num-tokens 1 2 --hidden-dim 65536 --dtypes float16 --quant-modes fp4 --no-residual --no-oneshot \
         --warmup 0 --trials 1 --seed 7 --backend cpu --allreduce custom --nproc-per-node 16 --oversubscribe --partial-sums element --hosts 1 --deadline 0.5 --output-file a.md \
         --cold --in-place --wire exact,int4 --peers torch,flashinfer torch --python a/python --peer-deadline 2.5 \
         --json a.json --plot a.svg --plot-all --compare b.json --tolerance 2.5",
    );
    let expected = Settings {
        num_tokens: vec![1, 2],
        hidden_dim: 65_536,
        dtypes: vec![DType::F16],
        quant_modes: vec![QuantMode::Fp4],
        pattern: Pattern::default(),
        wires: vec![Wire::Exact, Wire::Int4],
        use_residual: false,
        sharded_residual: false,
        oneshot: false,
        warmup: 0,
        trials: 1,
        seed: 7,
        job: JobOptions {
            backend: BackendChoice::Cpu,
            nproc_per_node: Some(16),
            groups: 1,
            hosts: 1,
            element_partial_sums: true,
            oversubscribe: true,
            deadline_seconds: 0.5,
        },
        all_reduces: vec![AllReduceChoice::Custom],
        cold: true,
        in_place: true,
        peers: vec![PeerChoice::Torch, PeerChoice::FlashInfer],
        peer_deadline_seconds: 2.5,
        python: "a/python".into(),
        tolerance_percent: 2.5,
        outputs: Outputs {
            output_file: Some("a.md".into()),
            json: Some("a.json".into()),
            plot: Some("a.svg".into()),
            plot_all: true,
            from: None,
            compare: Some("b.json".into()),
        },
    };
    assert_eq!(settings, expected);
}

#[test]
fn a_report_of_an_earlier_run_is_shown_without_options_of_a_measurement() {
    let settings = bench("--from a.json --json - --tolerance 5 --deadline 3");
    let outputs = Outputs { from: Some("a.json".into()), json: Some("-".into()), ..Outputs::default() };
    let job = JobOptions { deadline_seconds: 3.0, ..JobOptions::default() };
    assert_eq!(settings, Settings { outputs, job, tolerance_percent: 5.0, ..Settings::default() });
    for option in ["--num-tokens 1", "--trials 3", "--backend cpu", "--peers torch", "--no-residual"] {
        let error = run(&format!("bench --from a.json {option}")).unwrap_err().to_string();
        assert!(error.starts_with("--from: it shows a report and measures nothing"), "{option}: {error}");
    }
}

#[test]
fn a_pattern_and_a_format_between_ranks_are_named() {
    assert_eq!(bench("--pattern post-norm").pattern, Pattern::PostNorm);
    assert_eq!(bench("--pattern moe").pattern, Pattern::Moe);
    assert_eq!(bench("--pattern all-reduce-norm"), bench(""));
    let error = |options: &str| run(&format!("bench {options}")).unwrap_err().to_string();
    assert_eq!(
        error("--pattern gemma"),
        "--pattern: 'gemma' is not a pattern: use all-reduce-norm, post-norm or moe"
    );
    assert_eq!(
        error("--wire int8 fp8"),
        "--wire: 'fp8' is not a format between ranks: use exact, int8 or int4"
    );
}

#[test]
fn a_deadline_is_never_no_time_at_all() {
    let settings = bench("--deadline 1e-300 --peer-deadline 1e-300");
    let nanosecond = std::time::Duration::from_nanos(1);
    assert_eq!([settings.job.deadline(), settings.peer_deadline()], [nanosecond; 2]);
}

#[test]
fn lists_take_spaces_and_commas_and_drop_repeats() {
    for options in
        ["128 512 7", "128,512,7", "128,512 7", "128, 512, 7,", "128 512 128 7", "128 --num-tokens 512,7"]
    {
        assert_eq!(bench(&format!("--num-tokens {options}")).num_tokens, [128, 512, 7], "{options}");
    }
    assert_eq!(bench("--num-tokens=128,512 7").num_tokens, [128, 512, 7]);
    assert_eq!(bench("--dtypes float16 bfloat16 fp16").dtypes, [DType::F16, DType::Bf16]);
    assert_eq!(bench("--quant-modes FP8,none").quant_modes, [QuantMode::Fp8, QuantMode::None]);
}

#[test]
fn help_at_both_levels_names_everything() {
    let text = |line: &str| match run(line) {
        Ok(Invocation::Print(text)) => text,
        other => panic!("{line}: {other:?}"),
    };
    for line in ["--help", "-h", "help"] {
        assert!(text(line).contains("\n  bench "), "{line}");
    }
    for sub in TopLevel::get_args_info().commands {
        let name = sub.name;
        assert!(text("--help").contains(&format!("\n  {name} ")), "{name}");
        for line in ["_ --help", "_ -h", "--help _", "help _"].map(|line| line.replace('_', name)) {
            let help = text(&line);
            for flag in sub.command.flags {
                assert!(help.contains(&format!(" {}", flag.long)), "{line}: {}", flag.long);
            }
            let wide = help.lines().find(|line| line.chars().count() > 100);
            assert_eq!(wide, None, "{line}");
        }
    }
}

#[test]
fn ranks_of_simulated_hosts_are_one_number() {
    let job = |line: &str| verify(line).job;
    assert_eq!(verify("--hosts 1 --nproc-per-node 4 3").group_sizes, [4, 3]);
    assert_eq!(verify("--hosts 2 --nproc-per-node 2").group_sizes, [0u32; 0]);
    assert_eq!(
        (job("--hosts 2 --nproc-per-node 2").hosts, job("--hosts 2 --nproc-per-node 2").nproc_per_node),
        (2, Some(2))
    );
    refused(
        "verify --hosts 2 --nproc-per-node 2 3",
        "--nproc-per-node: with --hosts, use one number: the ranks of each host",
    );
}

#[test]
fn every_option_of_verify_reaches_its_setting() {
    assert_eq!(verify(""), verify::settings::Settings::default());
    assert_eq!(verify("--quick"), verify::settings::Settings::quick());
    let options = "--num-tokens 0 17 --hidden-dim 48,64 80 --seed 7 --special --backend cpu --nproc-per-node 3 2 --groups 4 \
         --oversubscribe --partial-sums element --faults --dependents 5 --deadline 2";
    let expected = verify::settings::Settings {
        num_tokens: vec![0, 17],
        hidden_dims: vec![48, 64, 80],
        seed: 7,
        special: true,
        job: JobOptions {
            backend: BackendChoice::Cpu,
            nproc_per_node: Some(3),
            groups: 4,
            element_partial_sums: true,
            oversubscribe: true,
            deadline_seconds: 2.0,
            ..JobOptions::default()
        },
        group_sizes: vec![3, 2],
        conversions: true,
        faults: true,
        dependents: 5,
    };
    assert_eq!(verify(options), expected);
    let expected = verify::settings::Settings { conversions: false, ..expected };
    assert_eq!(verify(&format!("{options} --quick")), expected);
}

#[test]
fn every_option_of_links_reaches_its_setting() {
    let links = |options: &str| match run(&format!("links {options}")) {
        Ok(Invocation::Links(settings)) => settings,
        other => panic!("{other:?}"),
    };
    assert_eq!(links(""), links::settings::Settings::default());
    assert_eq!(links("--backend auto --deadline 10"), links(""));
    let options = "--backend cpu --nproc-per-node 3 --oversubscribe --deadline 2.5 --json a.json";
    let expected = links::settings::Settings {
        job: JobOptions {
            backend: BackendChoice::Cpu,
            nproc_per_node: Some(3),
            oversubscribe: true,
            deadline_seconds: 2.5,
            ..JobOptions::default()
        },
        json: Some("a.json".into()),
    };
    assert_eq!(links(options), expected);
    refused("links --json=", "--json: '' is not a file name");
    refused("links --nproc-per-node 1", "--nproc-per-node: 1 rank cannot form a group: use 2 to 16");
    refused("links --num-tokens 1", "--num-tokens: no option of links; see fused-collective links --help");
}

#[test]
fn the_help_of_verify_states_the_lists_that_hold() {
    let Ok(Invocation::Print(help)) = run("verify --help") else { panic!("no help") };
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let words = |list: &[u64]| list.iter().map(u64::to_string).collect::<Vec<_>>().join(" ");
    let (whole, quick) = (verify::settings::Settings::default(), verify::settings::Settings::quick());
    for list in [&whole.num_tokens, &whole.hidden_dims] {
        assert!(help.contains(&format!("(default: {})", words(list))), "{help}");
    }
    let lists = format!("tokens {}, hidden sizes {}", words(&quick.num_tokens), words(&quick.hidden_dims));
    assert!(help.contains(&lists), "{help}");
}

#[test]
fn a_list_of_verify_that_bench_takes_once_is_refused_there() {
    let line = "bench --hidden-dim 48 64";
    refused(line, "64: no argument of bench; see fused-collective bench --help");
}

#[test]
fn the_help_states_the_defaults_that_hold() {
    let Ok(Invocation::Print(help)) = run("bench --help") else { panic!("no help") };
    // Wrapping aside, each default in the help, given as an option, changes nothing.
    let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
    let defaults = [
        ("--num-tokens", "128 512 1024 2048"),
        ("--hidden-dim", "8192"),
        ("--dtypes", "bfloat16"),
        ("--quant-modes", "none,fp8,fp4"),
        ("--warmup", "5"),
        ("--trials", "20"),
        ("--seed", "0"),
        ("--backend", "auto"),
        ("--deadline", "10"),
        ("--tolerance", "10"),
        ("--peer-deadline", "300"),
        ("--python", "python3"),
    ];
    for (option, value) in defaults {
        let (_, after) = help.split_once(&format!(" {option} ")).unwrap();
        let (_, after) = after.split_once("(default: ").unwrap();
        assert!(after.starts_with(value), "{option}: {after}");
        assert_eq!(bench(&format!("{option} {value}")), Settings::default(), "{option}");
    }
}

#[test]
fn the_version_is_the_crate_s() {
    let expected = format!("fused-collective {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(run("--version"), Ok(Invocation::Print(expected)));
}

#[test]
fn what_is_not_a_command_or_option_is_refused() {
    refused("", "no command given: use bench, verify, links, soak or faults, or see fused-collective --help");
    refused("bnch", "bnch: no command (did you mean bench?); see fused-collective --help");
    refused(
        "bench --tokens 3",
        "--tokens: no option of bench (did you mean --num-tokens?); see fused-collective bench --help",
    );
    refused("bench 3", "3: no argument of bench; see fused-collective bench --help");
    refused("bench --no-residual=yes", "yes: no argument of bench; see fused-collective bench --help");
    refused("bench --json", "--json: no value given");
    refused("bench --json --plot a.svg", "--json: no value given");
    refused("bench --json=", "--json: '' is not a file name");
    refused(
        "bench --trials 3 --trials 4",
        "Error parsing option '--trials' with value '4': duplicate values provided; see fused-collective bench --help",
    );
}

#[test]
fn bad_token_counts_are_refused() {
    let valid = "is not a number of tokens: use whole numbers from 1";
    for bad in ["abc", "0", "-5", "1.5", "99999999999999999999"] {
        refused(&format!("bench --num-tokens 128 {bad}"), &format!("--num-tokens: '{bad}' {valid}"));
    }
    refused("bench --num-tokens -5", &format!("--num-tokens: '-5' {valid}"));
    refused("bench --num-tokens ,", "--num-tokens: no value given");
}

#[test]
fn bad_names_are_refused() {
    refused(
        "bench --dtypes int8",
        "--dtypes: 'int8' is not an element type: use float16, bfloat16 or float32",
    );
    refused(
        "bench --quant-modes none,fp6",
        "--quant-modes: 'fp6' is not a quantization mode: use one of none, fp8, fp4, fp8_per_token, \
         fp8_group128, fp8_group128_f32, fp8_group64, mxfp8, mxfp4",
    );
    refused("bench --peers vllm", "--peers: 'vllm' is not a peer: use flashinfer or torch");
    refused("bench --python=", "--python: '' is not a file name");
    refused("bench --backend rocm", "--backend: 'rocm' is not a backend: use auto, cpu or cuda");
}

#[test]
fn a_residual_is_replicated_sharded_or_none() {
    let residual = |arguments| {
        let settings = bench(arguments);
        (settings.use_residual, settings.sharded_residual)
    };
    assert_eq!(residual(""), (true, false));
    assert_eq!(residual("--residual replicated"), (true, false));
    assert_eq!(residual("--residual sharded"), (true, true));
    assert_eq!(residual("--residual none"), (false, false));
    assert_eq!(residual("--residual none --no-residual"), (false, false));
    refused(
        "bench --residual split",
        "--residual: 'split' is not a kind of residual: use replicated, sharded or none",
    );
    refused(
        "bench --residual sharded --no-residual",
        "--residual: 'sharded' and --no-residual contradict each other: leave one out",
    );
}

#[test]
fn bad_hidden_sizes_are_refused() {
    let valid = "is not valid: use a multiple of 16 from 16 to 65536";
    refused("bench --hidden-dim 100", &format!("--hidden-dim: hidden size 100 {valid}"));
    refused("bench --hidden-dim 65552", &format!("--hidden-dim: hidden size 65552 {valid}"));
    refused("bench --hidden-dim 0", &format!("--hidden-dim: hidden size 0 {valid}"));
    refused("bench --hidden-dim big", "--hidden-dim: 'big' is not a hidden size: use whole numbers from 0");
    assert_eq!(bench("--hidden-dim 16").hidden_dim, 16);
}

#[test]
fn an_activation_past_64_bits_is_refused() {
    refused(
        "bench --num-tokens 18446744073709551615",
        "--num-tokens: 18446744073709551615 tokens of hidden size 8192 are more bytes than 64 bits count: use fewer tokens",
    );
}

#[test]
fn bad_counts_and_limits_are_refused() {
    refused("bench --warmup -1", "--warmup: '-1' is not a number of trials: use 0 to 1000000");
    refused("bench --trials 0", "--trials: '0' is not a number of trials: use 1 to 1000000");
    refused("bench --trials 1000001", "--trials: '1000001' is not a number of trials: use 1 to 1000000");
    refused("bench --seed x", "--seed: 'x' is not a seed: use whole numbers from 0");
    for bad in ["0", "-1", "nan", "inf", "3601", "soon"] {
        let line = format!("bench --deadline {bad}");
        refused(
            &line,
            &format!("--deadline: '{bad}' is not a number of seconds: use a number above 0 and up to 3600"),
        );
    }
    refused(
        "bench --peer-deadline 0",
        "--peer-deadline: '0' is not a number of seconds: use a number above 0 and up to 86400",
    );
    for bad in ["0", "-1", "nan", "inf", "10%"] {
        let line = format!("bench --tolerance {bad}");
        refused(&line, &format!("--tolerance: '{bad}' is not a percentage: use a number above 0"));
    }
}

#[test]
fn a_group_has_2_to_16_ranks() {
    refused("bench --nproc-per-node 1", "--nproc-per-node: 1 rank cannot form a group: use 2 to 16");
    refused("bench --nproc-per-node 0", "--nproc-per-node: 0 ranks cannot form a group: use 2 to 16");
    refused("bench --nproc-per-node 17", "--nproc-per-node: 17 ranks cannot form a group: use 2 to 16");
    refused("bench --nproc-per-node two", "--nproc-per-node: 'two' is not a number of ranks: use 2 to 16");
}

#[test]
fn an_error_stays_one_line_whatever_it_quotes() {
    let args = ["bench", "--dtypes", "a\nb"].map(OsString::from);
    let error = parse(args).unwrap_err().to_string();
    assert_eq!(error, "--dtypes: 'a\\nb' is not an element type: use float16, bfloat16 or float32");
}

#[test]
fn groups_that_are_too_many_are_refused() {
    assert_eq!(verify("--groups 8").job.groups, 8);
    refused("verify --groups 0", "--groups: '0' is not a number of groups: use 1 to 8");
    refused("verify --groups 9", "--groups: '9' is not a number of groups: use 1 to 8");
    refused(
        "verify --groups 4 --nproc-per-node 2,5",
        "--groups: 4 groups of 5 ranks are more than 16 ranks: use fewer",
    );
    refused("soak --groups 9", "--groups: '9' is not a number of groups: use 1 to 8");
    refused(
        "soak --groups 4 --nproc-per-node 5",
        "--groups: 4 groups of 5 ranks are more than 16 ranks: use fewer",
    );
}
