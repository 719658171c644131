//! The report for a terminal.

use std::fmt::Write;

use super::{
    cells::Cells,
    data::{Conclusion, Configuration, Report, short_name},
};
use crate::report::grid::{grid, table};

/// The heading: backend, ranks, trials and machine.
pub fn heading(report: &Report) -> String {
    let Report { backend, world_size, settings, .. } = report;
    let (warmup, trials, hidden) = (settings.warmup, settings.trials, settings.hidden_dim);
    let pattern = match settings.pattern.is_default() {
        true => String::new(),
        false => format!(", {}", settings.pattern),
    };
    let place = if settings.in_place { ", in place" } else { "" };
    let caches = if settings.cold { ", cold caches" } else { "" };
    format!(
        "{backend} backend, {world_size} ranks, hidden size {hidden}{pattern}, {trials} trials after {warmup} to warm up{place}{caches}\n{}\n",
        report.machine.summary()
    )
}

/// One configuration as a table at most `width` columns wide, followed by its notes and failures.
pub fn configuration(configuration: &Configuration, width: u16) -> String {
    let header = ["Operation", "median µs", "min µs", "p99 µs", "busbw GB/s", "ulp", "speedup"];
    let rows = configuration.rows.iter().map(|row| {
        let Cells { median, min, p99, bus_bandwidth, max_error, speedup } = Cells::of(row);
        vec![row.variant.clone(), median, min, p99, bus_bandwidth, max_error, speedup]
    });
    let rows = rows.collect();
    let mut out = format!("{}\n{}\n", configuration.title(), grid(&header, rows, width));
    for note in &configuration.notes {
        let _ = writeln!(out, "note: {note}");
    }
    for (row, reason) in configuration.failures() {
        let _ = writeln!(out, "FAILED {}: {reason}", row.variant);
    }
    out
}

/// The conclusion: a table at most `width` columns wide, and its sentences.
pub fn conclusion(conclusion: &Conclusion, width: u16) -> String {
    let header =
        ["quantization", "tokens", "fastest separate", "fastest fused", "separate µs", "fused µs", "gain"];
    let rows = conclusion.cells(short_name).map(Vec::from).collect();
    let mut out = format!("Conclusion\n{}\n\n", table(4, &header, rows, width));
    for sentence in &conclusion.sentences {
        let _ = writeln!(out, "{sentence}");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::{super::fixture, *};
    use crate::{pattern::Pattern, report::grid::WIDTH};

    #[test]
    fn the_form_is_exact() {
        let report = fixture::report();
        let expected = "\
num_tokens=128, dtype=bfloat16, with residual, quant=none
Operation                                   median     min      p99  busbw   ulp   speedup
                                                µs      µs       µs   GB/s
------------------------------------------------------------------------------------------
standard_allreduce_native_rms_norm          400.00  390.25  1400.12   5.24  0.50     0.62x
standard_allreduce_rmsnorm_native_compiled  250.00  240.00   260.50   8.39  0.50  baseline
fused_allreduce_rmsnorm_oneshot             125.00  120.00   130.00  16.78  0.50     2.00x
fused_allreduce_rmsnorm_twoshot             FAILED       -        -      -     -         -
FAILED fused_allreduce_rmsnorm_twoshot: rank 1: 3 elements differ by up to 17 ulp
num_tokens=128, dtype=bfloat16, with residual, quant=fp8
Operation                                              median      min      p99 busbw  ulp  speedup
                                                           µs       µs       µs  GB/s
---------------------------------------------------------------------------------------------------
standard_allreduce_native_rms_norm_custom_quant_fp8  12345.68 12345.68 12345.68  0.17 0.50    0.81x
standard_allreduce_rmsnorm_fp8_quant_native_compiled 10000.00 10000.00 10000.00  0.21 0.50 baseline
fused_allreduce_rmsnorm_fp8_quant_oneshot            20000.00 20000.00 20000.00  0.10 0.50    0.50x
note: More ranks than cores: times include waiting for a core.
";
        let text = configuration(&report.configurations[0], WIDTH)
            + &configuration(&report.configurations[1], WIDTH);
        assert_eq!(text, expected);
    }

    #[test]
    fn names_wrap_where_the_terminal_is_narrow() {
        let text = configuration(&fixture::report().configurations[1], 80);
        let table: Vec<&str> = text.lines().skip(1).take_while(|line| !line.starts_with("note")).collect();
        assert!(table.iter().all(|line| line.chars().count() <= 80), "{text}");
        let name: Vec<&str> =
            table[3..5].iter().map(|line| line.split("  ").find(|part| !part.is_empty()).unwrap()).collect();
        assert_eq!(name.concat(), "standard_allreduce_native_rms_norm_custom_quant_fp8", "{text}");
    }

    #[test]
    fn the_heading_says_what_ran_where() {
        let expected = "cpu backend, 2 ranks, hidden size 8192, 3 trials after 5 to warm up\n\
                        Test CPU, 2 cores, 16.0 GiB, Linux (Test 1) (kernel 6.1.0, x86_64)\n";
        assert_eq!(heading(&fixture::report()), expected);
        let mut cold = fixture::report();
        cold.settings.cold = true;
        assert!(heading(&cold).contains("5 to warm up, cold caches\n"));
        cold.settings.pattern = Pattern::Moe;
        cold.settings.in_place = true;
        assert!(
            heading(&cold)
                .contains("hidden size 8192, moe, 3 trials after 5 to warm up, in place, cold caches\n")
        );
    }
}
