//! An invalid command line ends in one line that names the value and the valid ones, and in status 2. Nothing was started or
//! changed.

use std::{fs, path::Path, process::Command};

use fused_collective_tests::{bench, command, run};

/// Runs the program, which must refuse its command line. Returns the line, which must contain each of `parts`.
#[track_caller]
fn refused(command: &mut Command, parts: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let outcome = run(command.current_dir(folder.path()).env("TMPDIR", folder.path()));
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{outcome}");
    assert!(outcome.survivors.is_empty(), "{outcome}");
    let line = outcome.stderr.strip_suffix('\n').unwrap_or_default();
    assert!(line.starts_with("fused-collective: ") && !line.contains('\n'), "{outcome}");
    for part in parts {
        assert!(line.contains(part), "no {part:?} in {line:?}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "files were left");
    line.to_owned()
}

#[track_caller]
fn refused_options(options: &str, parts: &[&str]) {
    refused(&mut bench(options), parts);
}

#[test]
fn an_unknown_element_type() {
    refused_options("--dtypes int8", &["--dtypes", "'int8'", "use float16, bfloat16 or float32"]);
    refused_options("--dtypes float16 half8", &["'half8'", "use float16, bfloat16 or float32"]);
}

#[test]
fn an_unknown_quantization_mode() {
    refused_options(
        "--quant-modes none,fp6",
        &["--quant-modes", "'fp6'", "use one of none, fp8, fp4, fp8_per_token, "],
    );
}

#[test]
fn tokens_that_are_zero_or_no_number() {
    for bad in ["0", "many", "-3", "1.5", "99999999999999999999"] {
        refused_options(
            &format!("--num-tokens 128 {bad}"),
            &["--num-tokens", &format!("'{bad}'"), "use whole numbers from 1"],
        );
    }
}

#[test]
fn a_hidden_size_that_is_no_multiple_of_16_or_over_the_limit() {
    for bad in ["100", "8", "65552"] {
        refused_options(
            &format!("--hidden-dim {bad}"),
            &["--hidden-dim", bad, "a multiple of 16 from 16 to 65536"],
        );
    }
}

#[test]
fn too_few_or_too_many_ranks() {
    for bad in ["0", "1", "17"] {
        refused_options(
            &format!("--nproc-per-node {bad}"),
            &["--nproc-per-node", &format!(": {bad} rank"), "use 2 to 16"],
        );
    }
    refused_options("--nproc-per-node two", &["--nproc-per-node", "'two'", "use 2 to 16"]);
}

#[test]
fn numbers_out_of_range() {
    refused_options("--trials 0", &["--trials", "'0'", "use 1 to 1000000"]);
    refused_options("--warmup -1", &["--warmup", "'-1'", "use 0 to 1000000"]);
    refused_options("--seed x", &["--seed", "'x'", "use whole numbers from 0"]);
    refused_options("--deadline 0", &["--deadline", "'0'", "above 0 and up to 3600"]);
    refused_options("--tolerance -1", &["--tolerance", "'-1'", "a number above 0"]);
}

#[test]
fn an_unknown_all_reduce() {
    refused_options(
        "--allreduce nccl,gloo",
        &["--allreduce", "'gloo'", "use nccl, nccl-symmetric or custom"],
    );
}

#[test]
fn an_all_reduce_of_gpus_without_gpus() {
    for only in ["nccl", "nccl-symmetric"] {
        let needs = format!("{only} needs the cuda backend: use custom");
        refused_options(&format!("--allreduce {only}"), &["--allreduce", &needs]);
    }
}

#[test]
fn an_unknown_backend() {
    refused(&mut command(&["bench", "--backend", "rocm"]), &["--backend", "'rocm'", "use auto, cpu or cuda"]);
}

#[test]
fn cuda_where_no_gpu_can_be_seen() {
    let mut bench = command(&["bench", "--backend", "cuda", "--num-tokens", "1"]);
    refused(bench.env("CUDA_VISIBLE_DEVICES", ""), &["--backend", "cuda", "cpu"]);
}

#[test]
fn an_option_without_its_value_or_that_does_not_exist() {
    refused_options("--num-tokens --trials 1", &["--num-tokens", "no value given"]);
    let help = "see fused-collective bench --help";
    let meant = |option: &str| format!("no option of bench (did you mean {option}?); {help}");
    refused_options("--tokens 1", &["--tokens: ", &meant("--num-tokens")]);
    refused_options("--num-token 1", &["--num-token: ", &meant("--num-tokens")]);
    refused_options("--hiden-dim=1", &["--hiden-dim: ", &meant("--hidden-dim")]);
    refused_options("--qqq", &[&format!("--qqq: no option of bench; {help}")]);
    refused(
        &mut command(&["links", "--num-tokens", "1"]),
        &["--num-tokens: no option of links", "links --help"],
    );
    refused(
        &mut command(&["--verison"]),
        &["--verison: no option (did you mean --version?); see fused-collective --help"],
    );
    refused(&mut command(&["bench", "stray"]), &[&format!("stray: no argument of bench; {help}")]);
}

#[test]
fn no_command_or_an_unknown_one() {
    refused(&mut command(&[]), &["use bench", "--help"]);
    refused(
        &mut command(&["benchmark"]),
        &["benchmark: no command (did you mean bench?); see fused-collective --help"],
    );
}

#[test]
fn a_value_of_several_lines_is_quoted_in_one() {
    refused(&mut command(&["bench", "--dtypes", "a\nb"]), &[r"'a\nb'"]);
}

#[test]
fn a_workspace_larger_than_memory_is_refused_before_it_is_allocated() {
    refused_options(
        "--num-tokens 100000000 --hidden-dim 65536",
        &["--num-tokens", "100000000 tokens of hidden size 65536", "GiB", "are free", "use fewer tokens"],
    );
    refused_options(
        "--num-tokens 18446744073709551615",
        &["18446744073709551615 tokens", "use fewer tokens"],
    );
}

#[test]
fn outputs_that_cannot_be_written_are_found_before_the_benchmark_runs() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "").unwrap();
    let cases = [
        ("missing/report", "does not exist"),
        ("", "it is a directory: give a file name"),
        ("file/report", "a part of its path is not a directory"),
    ];
    for option in ["--output-file", "--json", "--plot"] {
        for (name, why) in cases {
            let path = folder.path().join(name);
            let mut bench = bench("--num-tokens 1");
            refused(bench.arg(option).arg(&path), &[option, path.to_str().unwrap(), why]);
        }
    }
    // Not even root can create a file there.
    refused_options("--json /proc/report.json", &["--json", "/proc/report.json"]);
}

#[test]
fn one_file_for_two_outputs() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report");
    let mut bench = bench("--num-tokens 1");
    bench.arg("--json").arg(&file).arg("--plot").arg(&file);
    refused(
        &mut bench,
        &["--plot", file.to_str().unwrap(), "the file that --json names", "give each its own"],
    );
}

fn compare_with(file: &Path) -> Command {
    let mut bench = bench("--num-tokens 1");
    bench.arg("--compare").arg(file);
    bench
}

#[test]
fn an_earlier_report_that_is_missing_or_broken() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("earlier.json");
    let named = file.to_str().unwrap();
    refused(&mut compare_with(&file), &["--compare", named, "there is no such file"]);
    refused(&mut compare_with(folder.path()), &["--compare", "it is a directory"]);
    let cases = [
        ("# Markdown", "it is not a JSON report"),
        ("", "it is not a JSON report"),
        ("{}", "it has no schema"),
        (r#"{"schema": 99}"#, "its schema is 99, this program reads schema 1"),
        (r#"{"schema": 1}"#, "it is not a report of schema 1: missing field"),
    ];
    for (text, why) in cases {
        fs::write(&file, text).unwrap();
        refused(&mut compare_with(&file), &["--compare", named, why]);
        assert_eq!(fs::read_to_string(&file).unwrap(), text);
    }
}

#[test]
fn a_report_to_show_that_is_broken_or_comes_with_options_of_a_measurement() {
    let show = |args: &[&str]| command(&[&["bench", "--from"], args].concat());
    refused(&mut show(&["none.json"]), &["--from", "'none.json'", "there is no such file"]);
    refused(&mut show(&["/dev/null"]), &["--from", "'/dev/null'", "it is not a JSON report"]);
    refused(
        &mut show(&["a.json", "--num-tokens", "1"]),
        &["--from: it shows a report", "use only --output-file"],
    );
}

#[test]
fn an_output_in_the_place_of_a_report_that_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("report.json");
    fs::write(&file, "{}").unwrap();
    for (output, input) in [("--plot", "--compare"), ("--output-file", "--from")] {
        let mut command = command(&["bench"]);
        command.arg(output).arg(&file).arg(input).arg(&file);
        refused(&mut command, &[output, &format!("the file that {input} names"), "give each its own"]);
    }
}

#[test]
fn an_earlier_report_without_an_end() {
    let why = "it has more than 268435456 bytes, the most that is read";
    refused(&mut compare_with(Path::new("/dev/zero")), &["--compare", "/dev/zero", why]);
}

#[test]
fn existing_outputs_stay_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["report.md", "report.json", "report.svg"];
    let mut bench = bench("--num-tokens 1 --dtypes int8");
    for (option, name) in ["--output-file", "--json", "--plot"].iter().zip(names) {
        fs::write(folder.path().join(name), name).unwrap();
        bench.arg(option).arg(folder.path().join(name));
    }
    refused(&mut bench, &["int8"]);
    for name in names {
        assert_eq!(fs::read_to_string(folder.path().join(name)).unwrap(), name);
    }
}

#[test]
fn help_and_the_version_are_no_errors() {
    for args in [&["--help"][..], &["bench", "--help"], &["--version"]] {
        let outcome = run(&mut command(args));
        outcome.assert_success();
        assert!(outcome.stdout.contains("fused-collective"), "{outcome}");
    }
}
