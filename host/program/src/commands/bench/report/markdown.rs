//! The report as Markdown: the conclusion, and then the form of vLLM's `benchmark_fused_collective.py`, which is the settings
//! and a section with a table for each configuration.

use std::fmt::Write;

use super::{
    cells::Cells,
    data::{Configuration, Report},
};

/// The whole report.
pub fn to_string(report: &Report) -> String {
    let Report { settings, .. } = report;
    let modes: Vec<&str> = settings.quant_modes.iter().map(|mode| mode.name()).collect();
    let mut out = String::from("# Fused Collective Operations Benchmark Results\n\n");
    conclusion(&mut out, report);
    let pattern = (!settings.pattern.is_default()).then(|| ("Pattern", settings.pattern.to_string()));
    let in_place = settings.in_place.then(|| ("Outputs", "in place, of fused variants".to_owned()));
    let cold = settings.cold.then(|| ("Caches", "cold: tensors come from memory".to_owned()));
    let settings = [
        ("World Size", report.world_size.to_string()),
        ("Hidden Dimension", settings.hidden_dim.to_string()),
        ("Warmup Iterations", settings.warmup.to_string()),
        ("Benchmark Trials", settings.trials.to_string()),
        ("Quantization Modes", modes.join(",")),
        ("Backend", report.backend.clone()),
        ("Machine", report.machine.summary()),
        ("Version", report.version.clone()),
        ("Date", report.created.clone()),
    ];
    for (name, value) in settings.into_iter().chain(pattern).chain(in_place).chain(cold) {
        // Two spaces at the end break the line.
        let _ = writeln!(out, "**{name}:** {value}  ");
    }
    let _ = write!(
        out,
        "\n```sh\n{}\n```\n\n\
         Time is the slowest rank's, per operation: the median of the trials. \
         Every variant was verified before it was timed{}. \
         Speedup is against the fastest verified standard variant of the same configuration, the *baseline*. \
         Bus bandwidth is nccl-tests'.\n\n---\n",
        report.command_line(),
        if report.verified_after { " and after" } else { "" }
    );
    for configuration in &report.configurations {
        section(&mut out, configuration);
    }
    out
}

fn conclusion(out: &mut String, report: &Report) {
    out.push_str("## Conclusion\n\n");
    for sentence in &report.conclusion.sentences {
        let _ = writeln!(out, "- {sentence}");
    }
    out.push_str(
        "\n| Quantization | Tokens | Fastest separate | Fastest fused | Separate (µs) | Fused (µs) | Gain |\n\
         | :--- | ---: | :--- | :--- | ---: | ---: | ---: |\n",
    );
    for cells in report.conclusion.cells(|variant| format!("`{variant}`")) {
        let _ = writeln!(out, "| {} |", cells.join(" | "));
    }
    out.push('\n');
}

fn section(out: &mut String, configuration: &Configuration) {
    let mib = configuration.input_bytes() / f64::from(1 << 20);
    let _ = write!(
        out,
        "\n## Configuration: {}\n**Input Size:** {mib:.2} MiB\n\n\
         | Operation | Time (µs) | Min (µs) | P99 (µs) | Bus bandwidth (GB/s) | Max error (ulp) | Speedup |\n\
         | :--- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        configuration.title()
    );
    for row in &configuration.rows {
        let Cells { median, min, p99, bus_bandwidth, max_error, speedup } = Cells::of(row);
        let speedup = if speedup == "baseline" { "*baseline*".to_owned() } else { speedup };
        let _ = writeln!(
            out,
            "| `{}` | {median} | {min} | {p99} | {bus_bandwidth} | {max_error} | {speedup} |",
            row.variant
        );
    }
    let notes = configuration.notes.iter().map(|note| format!("- {note}"));
    let failures =
        configuration.failures().map(|(row, reason)| format!("- FAILED `{}`: {reason}", row.variant));
    for (index, line) in notes.chain(failures).enumerate() {
        let blank = if index == 0 { "\n" } else { "" };
        let _ = writeln!(out, "{blank}{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::{super::fixture, *};
    use crate::pattern::Pattern;

    #[test]
    fn the_form_is_exact() {
        let expected = "\
# Fused Collective Operations Benchmark Results

## Conclusion

- Fusing is 0.50 to 2.00 times as fast as the fastest separate operations. It does not pay at 128 tokens (fp8).
- FP8 in the fused kernel takes 160 times the time without quantization.
- Not counted: 1 of 7 variants, which FAILED.

| Quantization | Tokens | Fastest separate | Fastest fused | Separate (µs) | Fused (µs) | Gain |
| :--- | ---: | :--- | :--- | ---: | ---: | ---: |
| none | 128 | `standard_allreduce_rmsnorm_native_compiled` | `fused_allreduce_rmsnorm_oneshot` | 250.00 | 125.00 | 2.00x |
| fp8 | 128 | `standard_allreduce_rmsnorm_fp8_quant_native_compiled` | `fused_allreduce_rmsnorm_fp8_quant_oneshot` | 10000.00 | 20000.00 | 0.50x |

**World Size:** 2  
**Hidden Dimension:** 8192  
**Warmup Iterations:** 5  
**Benchmark Trials:** 3  
**Quantization Modes:** none,fp8  
**Backend:** cpu  
**Machine:** Test CPU, 2 cores, 16.0 GiB, Linux (Test 1) (kernel 6.1.0, x86_64)  
**Version:** 0.1.0  
**Date:** 2026-01-02T03:04:05Z  

```sh
fused-collective bench --output-file 'my results.md'
```

Time is the slowest rank's, per operation: the median of the trials. Every variant was verified before it was timed and after. Speedup is against the fastest verified standard variant of the same configuration, the *baseline*. Bus bandwidth is nccl-tests'.

---

## Configuration: num_tokens=128, dtype=bfloat16, with residual, quant=none
**Input Size:** 2.00 MiB

| Operation | Time (µs) | Min (µs) | P99 (µs) | Bus bandwidth (GB/s) | Max error (ulp) | Speedup |
| :--- | ---: | ---: | ---: | ---: | ---: | ---: |
| `standard_allreduce_native_rms_norm` | 400.00 | 390.25 | 1400.12 | 5.24 | 0.50 | 0.62x |
| `standard_allreduce_rmsnorm_native_compiled` | 250.00 | 240.00 | 260.50 | 8.39 | 0.50 | *baseline* |
| `fused_allreduce_rmsnorm_oneshot` | 125.00 | 120.00 | 130.00 | 16.78 | 0.50 | 2.00x |
| `fused_allreduce_rmsnorm_twoshot` | FAILED | - | - | - | - | - |

- FAILED `fused_allreduce_rmsnorm_twoshot`: rank 1: 3 elements differ by up to 17 ulp

## Configuration: num_tokens=128, dtype=bfloat16, with residual, quant=fp8
**Input Size:** 2.00 MiB

| Operation | Time (µs) | Min (µs) | P99 (µs) | Bus bandwidth (GB/s) | Max error (ulp) | Speedup |
| :--- | ---: | ---: | ---: | ---: | ---: | ---: |
| `standard_allreduce_native_rms_norm_custom_quant_fp8` | 12345.68 | 12345.68 | 12345.68 | 0.17 | 0.50 | 0.81x |
| `standard_allreduce_rmsnorm_fp8_quant_native_compiled` | 10000.00 | 10000.00 | 10000.00 | 0.21 | 0.50 | *baseline* |
| `fused_allreduce_rmsnorm_fp8_quant_oneshot` | 20000.00 | 20000.00 | 20000.00 | 0.10 | 0.50 | 0.50x |

- More ranks than cores: times include waiting for a core.
";
        assert_eq!(to_string(&fixture::report()), expected);
        let mut moe = fixture::report();
        moe.settings.pattern = Pattern::Moe;
        assert!(to_string(&moe).contains("Z  \n**Pattern:** moe  \n"));
        let mut in_place = fixture::report();
        in_place.settings.in_place = true;
        assert!(to_string(&in_place).contains("Z  \n**Outputs:** in place, of fused variants  \n"));
        let mut cold = fixture::report();
        cold.settings.cold = true;
        assert!(
            to_string(&cold)
                .contains("**Date:** 2026-01-02T03:04:05Z  \n**Caches:** cold: tensors come from memory  \n")
        );
    }
}
