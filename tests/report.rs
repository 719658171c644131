//! The report of one run in every form, checked against the raw times in its JSON.

use std::{
    collections::HashSet,
    ffi::OsStr,
    fs::{self, File},
    io::Read,
    os::unix::ffi::OsStrExt as _,
    path::Path,
    process::{Command, Stdio},
    sync::OnceLock,
};

use fused_collective_tests::{
    LIMIT, Outcome, Running, bench, command, measure,
    report::{Conclusion, Configuration, Fastest, Report, Row, Verified},
    run,
};
use rustix::{
    io::Errno,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

/// Three ranks, so that bus and algorithm bandwidth differ; an even number of trials above 100, so that the median lies
/// between two of them and the 99th percentile is not the slowest.
const OPTIONS: &str = "--num-tokens 5 1 --hidden-dim 96 --dtypes float16,float32 --quant-modes fp4 --no-residual \
                       --nproc-per-node 3 --trials 102 --warmup 1 --seed 7 --deadline 50 --tolerance 25";

/// One run with every output.
struct Run {
    outcome: Outcome,
    report: Report,
    markdown: String,
    svg: String,
    json: String,
}

/// The run that all tests here look at.
fn reported() -> &'static Run {
    static RUN: OnceLock<Run> = OnceLock::new();
    RUN.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        // An existing file is replaced.
        fs::write(path("report.md"), "an older report").unwrap();
        let mut bench = bench(OPTIONS);
        bench.current_dir(folder.path());
        bench.args(["--output-file", "report.md", "--json", "report.json", "--plot", "a plot.svg"]);
        let outcome = run(&mut bench);
        outcome.assert_success();
        let mut names: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["a plot.svg", "report.json", "report.md"]);
        Run {
            outcome,
            report: Report::read(&path("report.json")),
            markdown: fs::read_to_string(path("report.md")).unwrap(),
            svg: fs::read_to_string(path("a plot.svg")).unwrap(),
            json: fs::read_to_string(path("report.json")).unwrap(),
        }
    })
}

fn verified_rows(report: &Report) -> impl Iterator<Item = (&Configuration, &Row, &Verified)> {
    let rows = |configuration| rows(configuration).map(move |(row, verified)| (configuration, row, verified));
    report.configurations.iter().flat_map(rows)
}

fn rows(configuration: &Configuration) -> impl Iterator<Item = (&Row, &Verified)> {
    configuration.rows.iter().map(|row| (row, row.verified()))
}

#[test]
fn json_says_what_was_asked_for() {
    let Report { command, settings, .. } = &reported().report;
    let files = ["--output-file", "report.md", "--json", "report.json", "--plot", "a plot.svg"];
    let expected: Vec<&str> =
        ["bench", "--backend", "cpu"].into_iter().chain(OPTIONS.split_whitespace()).chain(files).collect();
    assert_eq!(command, &expected);
    assert_eq!(settings.num_tokens, [5, 1]);
    assert_eq!(settings.hidden_dim, 96);
    assert_eq!(settings.dtypes, ["float16", "float32"]);
    assert_eq!(settings.quant_modes, ["fp4"]);
    assert!(!settings.use_residual && settings.oneshot);
    assert_eq!((settings.warmup, settings.trials, settings.seed), (1, 102, 7));
    assert_eq!((settings.deadline_seconds, settings.tolerance_percent), (50.0, 25.0));
    assert_eq!((settings.backend.as_str(), settings.nproc_per_node), ("cpu", Some(3)));
}

#[test]
fn json_says_what_ran_where_and_when() {
    let Report { schema, version, created, machine, backend, world_size, .. } = &reported().report;
    assert_eq!((*schema, backend.as_str(), *world_size), (1, "cpu", 3));
    assert_eq!(version, env!("CARGO_PKG_VERSION"));
    assert_eq!(machine.cores, std::thread::available_parallelism().unwrap().get());
    assert_eq!(machine.arch, std::env::consts::ARCH);
    assert!(machine.memory_bytes > 1 << 20 && !machine.cpu.is_empty() && !machine.os.is_empty());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(machine.kernel, kernel.trim());
    // RFC 3339, UTC, whole seconds.
    let shape: String = created.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00T00:00:00Z");
}

#[test]
fn json_has_a_configuration_for_each_combination_and_all_times() {
    let report = &reported().report;
    let found: Vec<_> = report.configurations.iter().map(|c| (c.num_tokens, c.dtype.as_str())).collect();
    assert_eq!(found, [(5, "float16"), (5, "float32"), (1, "float16"), (1, "float32")]);
    for configuration in &report.configurations {
        assert_eq!((configuration.hidden_dim, configuration.use_residual), (96, false));
        assert_eq!((configuration.quant_mode.as_str(), configuration.rows.len()), ("fp4", 5));
    }
    for (_, row, verified) in verified_rows(report) {
        assert_eq!(row.kind, row.variant.split('_').next().unwrap());
        assert_eq!((verified.times_us.len(), verified.unit.as_str()), (102, "ulp"));
        assert!(verified.times_us.iter().all(|&time| time > 0.0) && verified.operations_per_trial >= 1);
    }
}

#[test]
fn median_minimum_and_99th_percentile_follow_from_the_times() {
    for (_, row, verified) in verified_rows(&reported().report) {
        let mut times = verified.times_us.clone();
        times.sort_by(f64::total_cmp);
        assert_eq!(verified.figures.median_us, (times[50] + times[51]) / 2.0, "{}", row.variant);
        assert_eq!(verified.figures.min_us, times[0], "{}", row.variant);
        // 101 of 102 trials are at least 99%, 100 are not.
        assert_eq!(verified.figures.p99_us, times[100], "{}", row.variant);
    }
}

#[test]
fn bandwidths_are_those_of_nccl_tests() {
    for (configuration, row, verified) in verified_rows(&reported().report) {
        let element_bytes = if configuration.dtype == "float32" { 4 } else { 2 };
        let bytes = (configuration.num_tokens * 96 * element_bytes) as f64;
        let seconds = verified.figures.median_us * 1e-6;
        let algorithm = bytes / seconds * 1e-9;
        let close = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-12;
        assert!(close(verified.figures.algorithm_bandwidth_gb_s, algorithm), "{}", row.variant);
        // 2 (n - 1) / n for 3 ranks.
        assert!(close(verified.figures.bus_bandwidth_gb_s, algorithm * 4.0 / 3.0), "{}", row.variant);
    }
}

#[test]
fn the_baseline_is_the_fastest_standard_variant_and_speedup_is_against_it() {
    for configuration in &reported().report.configurations {
        let medians = rows(configuration).filter(|(row, _)| row.kind == "standard");
        let fastest = medians.map(|(_, verified)| verified.figures.median_us).min_by(f64::total_cmp).unwrap();
        let baselines: Vec<_> = rows(configuration).filter(|(_, one)| one.figures.is_baseline).collect();
        let [(row, baseline)] = baselines[..] else { panic!("not one baseline: {configuration:?}") };
        assert_eq!((row.kind.as_str(), baseline.figures.median_us), ("standard", fastest));
        for (row, verified) in rows(configuration) {
            assert_eq!(
                verified.figures.speedup,
                Some(fastest / verified.figures.median_us),
                "{}",
                row.variant
            );
        }
    }
}

/// A row's figures as people read them: microseconds, GB/s, ulp.
fn cells(verified: &Verified) -> [String; 6] {
    let figures = &verified.figures;
    let numbers =
        [figures.median_us, figures.min_us, figures.p99_us, figures.bus_bandwidth_gb_s, verified.max_error];
    let [median, min, p99, bus, error] = numbers.map(|number| format!("{number:.2}"));
    let speedup = match figures.speedup {
        Some(speedup) if !figures.is_baseline => format!("{speedup:.2}x"),
        _ => "baseline".to_owned(),
    };
    [median, min, p99, bus, error, speedup]
}

/// The machine in a line.
fn machine(report: &Report) -> String {
    let machine = &report.machine;
    let plural = if machine.cores == 1 { "" } else { "s" };
    let gib = machine.memory_bytes as f64 / (1u64 << 30) as f64;
    let cpus = &machine.rank_cpus;
    let where_ranks_ran = match cpus.iter().collect::<HashSet<_>>().len() {
        1 if cpus[0].contains(['-', ',']) => format!("3 ranks share CPUs {}", cpus[0]),
        1 => format!("3 ranks share CPU {}", cpus[0]),
        _ => format!("3 ranks on CPUs {}", cpus.join(" / ")),
    };
    format!(
        "{}, {} core{plural}, {gib:.1} GiB, {} (kernel {}, {}), {where_ranks_ran}",
        machine.cpu, machine.cores, machine.os, machine.kernel, machine.arch
    )
}

#[test]
fn the_terminal_shows_the_heading_and_a_table_for_each_configuration() {
    let Run { outcome, report, .. } = reported();
    let mut lines = outcome.stdout.lines();
    let mut next = || lines.next().expect("another line");
    assert_eq!(next(), "cpu backend, 3 ranks, hidden size 96, 102 trials after 1 to warm up");
    assert_eq!(next(), machine(report));
    for configuration in &report.configurations {
        assert_eq!(next(), "");
        assert_eq!(next(), configuration.title());
        let words = |line: &'static str| line.split_whitespace().collect::<Vec<_>>();
        assert_eq!(words(next()), ["Operation", "median", "min", "p99", "busbw", "ulp", "speedup"]);
        assert_eq!(words(next()), ["µs", "µs", "µs", "GB/s"]);
        let rule = next();
        assert!(!rule.is_empty() && rule.len() <= 100 && rule.chars().all(|c| c == '-'), "{rule}");
        for (row, verified) in rows(configuration) {
            let line = next();
            let expected: Vec<String> = std::iter::once(row.variant.clone()).chain(cells(verified)).collect();
            assert_eq!(words(line), expected);
            // Names to the left, figures to the right, all of one width.
            assert!(line.starts_with("standard_") || line.starts_with("fused_"), "{line:?}");
            assert_eq!(line.chars().count(), rule.len(), "{line:?}");
        }
        for note in &configuration.notes {
            assert_eq!(next(), format!("note: {note}"));
        }
    }
    assert_eq!((next(), next()), ("", "Conclusion"));
    let rest: Vec<&str> = lines.collect();
    let (table, sentences) = rest.split_at(rest.len() - report.conclusion.sentences.len());
    assert_eq!(sentences, report.conclusion.sentences);
    let table = table.strip_suffix(&[""]).unwrap();
    // Two lines of a header, and a rule.
    let cells = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let found: Vec<_> = table[3..].iter().map(|line| cells(line)).collect();
    let expected: Vec<_> = answers(report, short).into_iter().map(|line| cells(&line.join(" "))).collect();
    assert_eq!(found, expected);
}

/// A variant's name without what it shares with the others.
fn short(variant: &str) -> String {
    let name = variant.replace("standard_", "").replace("fused_allreduce_rmsnorm", "fused");
    name.replace("_rmsnorm", "").replace("_fp4_quant", "")
}

/// The lines of the conclusion's table, by element type and then tokens, from the rows.
fn answers(report: &Report, name: impl Fn(&str) -> String) -> Vec<[String; 7]> {
    let mut configurations: Vec<&Configuration> = report.configurations.iter().collect();
    configurations.sort_by_key(|one| (std::cmp::Reverse(one.dtype.clone()), one.num_tokens));
    let answer = |configuration: &&Configuration| {
        let fastest = |kind: &str| {
            let of_kind = rows(configuration).filter(|(row, _)| row.kind == kind);
            let times = of_kind.map(|(row, one)| (row.variant.clone(), one.figures.median_us));
            times.min_by(|a, b| a.1.total_cmp(&b.1)).unwrap()
        };
        let ((separate, before), (fused, after)) = (fastest("standard"), fastest("fused"));
        let mode = format!("{} {}", configuration.dtype, configuration.quant_mode);
        let [separate, fused] = [separate, fused].map(|variant| name(&variant));
        let gain = format!("{:.2}x", before / after);
        let [before, after] = [before, after].map(|time| format!("{time:.2}"));
        [mode, configuration.num_tokens.to_string(), separate, fused, before, after, gain]
    };
    configurations.iter().map(answer).collect()
}

#[test]
fn json_has_the_conclusion_with_each_gain() {
    let Conclusion { sentences, gains } = &reported().report.conclusion;
    assert!(sentences.iter().any(|sentence| sentence.starts_with("Fusing is ")), "{sentences:?}");
    let expected = answers(&reported().report, str::to_owned);
    assert_eq!(gains.len(), expected.len());
    for (gain, [mode, tokens, separate, fused, before, after, factor]) in gains.iter().zip(expected) {
        assert_eq!(
            (format!("{} {}", gain.dtype, gain.quant_mode), gain.num_tokens.to_string()),
            (mode, tokens)
        );
        for (fastest, variant, time) in [(&gain.separate, separate, before), (&gain.fused, fused, after)] {
            let Fastest { variant: found, median_us, spread } = fastest.as_ref().unwrap();
            assert_eq!((found, format!("{median_us:.2}")), (&variant, time));
            assert!(*spread >= 0.0);
        }
        assert_eq!(format!("{:.2}x", gain.gain.unwrap()), factor);
    }
}

#[test]
fn output_that_is_no_terminal_has_no_control_characters() {
    let Run { outcome, .. } = reported();
    assert_eq!(outcome.stdout.chars().find(|&c| c.is_control() && c != '\n'), None);
}

#[test]
fn markdown_has_the_heading_the_settings_and_a_section_for_each_configuration() {
    let Run { report, markdown, .. } = reported();
    let mut expected = String::from("# Fused Collective Operations Benchmark Results\n\n## Conclusion\n\n");
    for sentence in &report.conclusion.sentences {
        expected += &format!("- {sentence}\n");
    }
    expected += "\n| Quantization | Tokens | Fastest separate | Fastest fused | Separate (µs) | Fused (µs) | Gain |\n\
                 | :--- | ---: | :--- | :--- | ---: | ---: | ---: |\n";
    for line in answers(report, |variant| format!("`{variant}`")) {
        expected += &format!("| {} |\n", line.join(" | "));
    }
    expected += &format!(
        "\n**World Size:** 3  \n\
         **Hidden Dimension:** 96  \n\
         **Warmup Iterations:** 1  \n\
         **Benchmark Trials:** 102  \n\
         **Quantization Modes:** fp4  \n\
         **Backend:** cpu  \n\
         **Machine:** {}  \n\
         **Version:** {}  \n\
         **Date:** {}  \n\n\
         ```sh\n\
         fused-collective bench --backend cpu {OPTIONS} --output-file report.md --json report.json --plot 'a plot.svg'\n\
         ```\n\n\
         Time is the slowest rank's, per operation: the median of the trials. \
         Every variant was verified before it was timed and after. \
         Speedup is against the fastest verified standard variant of the same configuration, the *baseline*. \
         Bus bandwidth is nccl-tests'.\n\n\
         ---\n",
        machine(report),
        report.version,
        report.created,
    );
    for configuration in &report.configurations {
        expected += &format!(
            "\n## Configuration: {}\n**Input Size:** 0.00 MiB\n\n\
             | Operation | Time (µs) | Min (µs) | P99 (µs) | Bus bandwidth (GB/s) | Max error (ulp) | Speedup |\n\
             | :--- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
            configuration.title()
        );
        for (row, verified) in rows(configuration) {
            let cells =
                cells(verified).map(|cell| if cell == "baseline" { "*baseline*".to_owned() } else { cell });
            expected += &format!("| `{}` | {} |\n", row.variant, cells.join(" | "));
        }
        expected += &format!("\n- {}\n", configuration.notes.join("\n- "));
    }
    assert_eq!(*markdown, expected);
}

#[test]
fn the_plot_is_well_formed_and_names_what_decides_in_every_panel() {
    let Run { report, svg, .. } = reported();
    let document = roxmltree::Document::parse(svg).unwrap();
    let root = document.root_element();
    assert_eq!(
        (root.tag_name().name(), root.tag_name().namespace()),
        ("svg", Some("http://www.w3.org/2000/svg"))
    );
    let texts: Vec<&str> = document
        .descendants()
        .filter(|node| node.has_tag_name((root.tag_name().namespace().unwrap(), "text")))
        .map(|node| node.text().unwrap_or("").trim())
        .collect();
    let shown = |text: &str| assert!(texts.contains(&text), "no {text:?} in {texts:?}");
    shown("tokens");
    shown("µs per operation");
    // Long lines break.
    assert!(texts.join(" ").contains(&machine(report)), "{texts:?}");
    for dtype in ["float16", "float32"] {
        shown(&format!("{dtype}, quantization fp4"));
    }
    // A line ends at the most tokens, and has its name and its time there.
    for configuration in report.configurations.iter().filter(|configuration| configuration.num_tokens == 5) {
        for (row, verified) in rows(configuration) {
            let time = format!("{:.2}", verified.figures.median_us);
            if row.kind == "fused" {
                shown(&format!("{}: {time}", short(&row.variant)));
            } else if verified.figures.is_baseline {
                shown(&format!("fastest separate: {time}"));
            }
            assert!(!texts.iter().any(|text| text.starts_with("standard_")), "{texts:?}");
        }
    }
}

/// A process has the CPUs of the thread that starts it.
#[test]
fn each_rank_has_a_cpu_of_its_own_and_ranks_that_share_one_are_noted() {
    const OPTIONS: &str = "--num-tokens 1 --hidden-dim 32 --quant-modes none --trials 2 --warmup 0";
    let note = "MORE RANKS THAN CPUS: 2 ranks take turns on 1 CPU, and times include the wait for a turn";
    let notes =
        |report: &Report| report.configurations[0].notes.iter().filter(|known| *known == note).count();
    let before = sched_getaffinity(None).unwrap();
    let report = measure(OPTIONS);
    let cpus = report.machine.rank_cpus.iter().collect::<HashSet<_>>();
    let expected = before.count().min(2) as usize;
    assert_eq!((report.machine.rank_cpus.len(), cpus.len(), notes(&report)), (2, expected, 2 - expected));

    let number = (0..CpuSet::MAX_CPU).find(|&number| before.is_set(number)).unwrap();
    let mut one = CpuSet::new();
    one.set(number);
    sched_setaffinity(None, &one).unwrap();
    let report = measure(OPTIONS);
    sched_setaffinity(None, &before).unwrap();
    assert_eq!(report.machine.rank_cpus, [number.to_string(), number.to_string()]);
    assert_eq!(notes(&report), 1, "{:?}", report.configurations[0].notes);
}

#[test]
fn a_program_in_a_folder_whose_name_is_not_utf_8_reports_as_any_other() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().join(OsStr::from_bytes(b"r\xe9seau"));
    fs::create_dir(&folder).unwrap();
    let program = folder.join("fused-collective");
    if fs::hard_link(fused_collective_tests::program(), &program).is_err() {
        fs::copy(fused_collective_tests::program(), &program).unwrap();
    }
    for (command, options) in [
        ("bench", &["--num-tokens", "1", "--hidden-dim", "32", "--trials", "1", "--warmup", "0"][..]),
        ("links", &[]),
    ] {
        let mut run = Command::new(&program);
        run.current_dir(&folder).args([command, "--backend", "cpu", "--json", "report.json"]).args(options);
        Running::start(&mut run).wait(LIMIT).assert_success();
        let report: serde_json::Value =
            serde_json::from_slice(&fs::read(folder.join("report.json")).unwrap()).unwrap();
        assert_eq!(report["command"][0], command);
    }
}

#[test]
fn a_report_shown_from_its_json_is_the_same_in_every_form() {
    let Run { outcome, report, markdown, svg, json } = reported();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("a.json"), json).unwrap();
    let mut again = command(&["bench", "--from", "a.json", "--json", "b.json", "--output-file", "b.md"]);
    let shown = run(again.args(["--plot", "b.svg"]).current_dir(folder.path()));
    shown.assert_success();
    assert_eq!(shown.stdout, outcome.stdout);
    let read = |name: &str| fs::read_to_string(path(name)).unwrap();
    assert_eq!([&read("b.json"), &read("b.md"), &read("b.svg")], [json, markdown, svg]);

    // All variants, on demand.
    run(command(&["bench", "--from", "a.json", "--plot", "b.svg", "--plot-all"]).current_dir(folder.path()))
        .assert_success();
    for configuration in &report.configurations {
        for variant in configuration.variants() {
            assert!(read("b.svg").contains(variant), "{variant}");
        }
    }

    // Compared with itself it lost nothing; a report of an older version has no conclusion of its own.
    let mut older: serde_json::Value = serde_json::from_str(json).unwrap();
    older.as_object_mut().unwrap().remove("conclusion").unwrap();
    fs::write(path("older.json"), older.to_string()).unwrap();
    let compared =
        run(command(&["bench", "--from", "older.json", "--compare", "a.json"]).current_dir(folder.path()));
    compared.assert_success();
    assert!(compared.stdout.starts_with(&outcome.stdout), "{compared}");
    assert!(compared.stdout.ends_with("0 of 20 rows lost more than 10%\n"), "{compared}");
}

#[test]
fn a_file_may_be_the_standard_output_and_is_alone_there() {
    let Run { outcome, markdown, json, .. } = reported();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.json"), json).unwrap();
    for (option, content) in [("--output-file", markdown), ("--json", json)] {
        let shown = run(command(&["bench", "--from", "a.json", option, "-"]).current_dir(folder.path()));
        assert_eq!(
            (shown.code, &shown.stdout, &shown.stderr),
            (Some(0), content, &outcome.stdout),
            "{shown}"
        );
        assert!(!folder.path().join("-").exists());
    }
    // Of a run as of a report that is read.
    let shown = run(bench("--num-tokens 1 --hidden-dim 64 --trials 1 --json -").current_dir(folder.path()));
    assert_eq!(shown.code, Some(0), "{shown}");
    let report: Report =
        serde_json::from_str(&shown.stdout).unwrap_or_else(|error| panic!("{error}: {shown}"));
    assert!(shown.stderr.ends_with(&format!("{}\n", report.conclusion.sentences.join("\n"))), "{shown}");
    // Of the links as of a benchmark.
    let links = ["links", "--backend", "cpu", "--deadline", "60", "--json", "-"];
    let shown = run(command(&links).current_dir(folder.path()));
    assert_eq!(shown.code, Some(0), "{shown}");
    assert!(serde_json::from_str::<serde_json::Value>(&shown.stdout).is_ok(), "{shown}");
    assert!(shown.stderr.starts_with("cpu backend, 2 ranks\n"), "{shown}");
}

/// The text of the report on a terminal with so many columns.
fn on_terminal(columns: u16) -> String {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("a.json"), &reported().json).unwrap();
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    tcsetwinsize(&terminal, Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let screen = File::options().read(true).write(true).open(Path::new(name.to_str().unwrap())).unwrap();
    let mut program = command(&["bench", "--from", "a.json"])
        .current_dir(folder.path())
        .stdin(Stdio::null())
        .stdout(screen)
        .spawn()
        .unwrap();
    let mut text = Vec::new();
    // It ends with an error when the program does, which alone has the screen open.
    let end = File::from(terminal).read_to_end(&mut text);
    assert_eq!(end.unwrap_err().raw_os_error(), Some(Errno::IO.raw_os_error()));
    assert!(program.wait().unwrap().success());
    String::from_utf8(text).unwrap().replace('\r', "")
}

#[test]
fn on_a_narrow_terminal_every_line_fits_and_no_word_of_a_note_is_broken() {
    for columns in [72, 40] {
        let text = on_terminal(columns);
        for line in text.lines() {
            assert!(line.chars().count() <= columns.into(), "{columns}: {line:?} in\n{text}");
        }
        let words: Vec<&str> = text.split_whitespace().collect();
        let notes = reported().report.configurations.iter().flat_map(|configuration| &configuration.notes);
        for note in notes {
            let note: Vec<&str> = note.split_whitespace().collect();
            // A word that is longer than a line is broken.
            let fits = note.iter().all(|word| word.chars().count() + 2 <= columns.into());
            assert!(
                words.windows(note.len()).any(|words| words == note)
                    || !fits && words.concat().contains(&note.concat()),
                "{columns}: no {note:?} in\n{text}"
            );
        }
    }
    // Where there is room, all is as elsewhere.
    let notes = |text: &str| {
        text.lines().filter(|line| line.starts_with("note: ")).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(notes(&on_terminal(500)), notes(&reported().outcome.stdout));
}

#[test]
fn a_file_that_cannot_be_written_costs_no_screen() {
    let folder = tempfile::tempdir().unwrap();
    // A pipe that nobody reads.
    assert!(Command::new("mkfifo").arg(folder.path().join("pipe")).status().unwrap().success());
    let links = ["links", "--backend", "cpu", "--deadline", "4", "--json", "pipe"];
    let shown = run(command(&links).current_dir(folder.path()));
    assert_eq!(shown.code, Some(1), "{shown}");
    assert!(shown.stdout.contains("verdict: passed"), "{shown}");
    fs::write(folder.path().join("a.json"), &reported().json).unwrap();
    let from = ["bench", "--from", "a.json", "--deadline", "4", "--output-file", "pipe"];
    let shown = run(command(&from).current_dir(folder.path()));
    assert_eq!(shown.code, Some(1), "{shown}");
    assert_eq!(shown.stdout, reported().outcome.stdout);
}

#[test]
fn a_screen_that_cannot_be_written_costs_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let program = bench("--num-tokens 1 2 --hidden-dim 64 --trials 1 --json a.json --output-file a.md");
    // A device that is always full.
    let mut full = Command::new("sh");
    full.args(["-c", r#"exec "$0" "$@" > /dev/full"#]).arg(program.get_program()).args(program.get_args());
    let outcome = run(full.current_dir(folder.path()));
    assert_eq!(outcome.code, Some(1), "{outcome}");
    assert!(outcome.stderr.contains("cannot write to the standard output: "), "{outcome}");
    assert_eq!(outcome.stderr.lines().count(), 1, "{outcome}");
    assert_eq!(Report::read(&folder.path().join("a.json")).configurations.len(), 6);
    assert!(folder.path().join("a.md").exists());
}
