//! Every variant of every kind of configuration is measured under its known name, with right results.

use fused_collective_tests::{measure, report::Report};

const NONE: [&str; 5] = [
    "standard_allreduce_native_rms_norm",
    "standard_allreduce_custom_rms_norm",
    "standard_allreduce_rmsnorm_native_compiled",
    "fused_allreduce_rmsnorm_oneshot",
    "fused_allreduce_rmsnorm_twoshot",
];
const FP8: [&str; 7] = [
    "standard_allreduce_native_rms_norm_native_quant_fp8",
    "standard_allreduce_native_rms_norm_custom_quant_fp8",
    "standard_allreduce_custom_rms_norm_native_quant_fp8",
    "standard_allreduce_custom_rms_norm_custom_quant_fp8",
    "standard_allreduce_rmsnorm_fp8_quant_native_compiled",
    "fused_allreduce_rmsnorm_fp8_quant_oneshot",
    "fused_allreduce_rmsnorm_fp8_quant_twoshot",
];
const FP4: [&str; 5] = [
    "standard_allreduce_native_rms_norm_fp4_quant",
    "standard_allreduce_custom_rms_norm_fp4_quant",
    "standard_allreduce_rmsnorm_fp4_quant_native_compiled",
    "fused_allreduce_rmsnorm_fp4_quant_oneshot",
    "fused_allreduce_rmsnorm_fp4_quant_twoshot",
];

/// The variants of a quantization mode.
fn variants(quant_mode: &str) -> &'static [&'static str] {
    match quant_mode {
        "none" => &NONE,
        "fp8" => &FP8,
        "fp4" => &FP4,
        other => panic!("{other} is no quantization mode"),
    }
}

/// Runs one trial of each variant of `options`, and asserts that all are verified and timed.
fn check(options: &str) -> Report {
    let report = measure(&format!("{options} --trials 1 --warmup 0"));
    assert!(!report.configurations.is_empty());
    for configuration in &report.configurations {
        let title = configuration.title();
        let wanted = |name: &&&str| report.settings.oneshot || !name.ends_with("oneshot");
        let all = variants(&configuration.quant_mode);
        let mut expected: Vec<String> = all.iter().filter(wanted).map(|&name| name.to_owned()).collect();
        if report.settings.sharded_residual {
            expected.push(format!("{}_sharded", all[all.len() - 1]));
        }
        assert_eq!(configuration.variants(), expected, "{title}");
        for row in &configuration.rows {
            let verified = row.verified();
            let error = verified.max_error;
            // Inputs are random, so nothing is exact. Fused operations round once, and in 16-bit types f32 sums are as
            // good as exact; elsewhere cancellation makes any number of units out of one rounding.
            let most = if row.kind == "fused" && configuration.dtype != "float32" { 1.0 } else { f64::MAX };
            assert!(error > 0.0 && error < most, "{}, {title}: {error} {}", row.variant, verified.unit);
            assert!(matches!(verified.times_us[..], [time] if time > 0.0), "{}, {title}", row.variant);
        }
    }
    report
}

fn titles(report: &Report) -> Vec<String> {
    report.configurations.iter().map(|configuration| configuration.title()).collect()
}

#[test]
fn every_quantization_mode_is_measured_unless_some_are_chosen() {
    let modes = |options: &str| {
        let report = check(&format!("--num-tokens 3 --hidden-dim 256 {options}"));
        report.configurations.into_iter().map(|configuration| configuration.quant_mode).collect::<Vec<_>>()
    };
    assert_eq!(modes(""), ["none", "fp8", "fp4"]);
    assert_eq!(modes("--quant-modes fp4,none"), ["fp4", "none"]);
}

#[test]
fn every_element_type_is_right_in_every_mode() {
    let report = check("--num-tokens 5 --hidden-dim 320 --dtypes float32 float16 bfloat16");
    let expected: Vec<String> = ["float32", "float16", "bfloat16"]
        .iter()
        .flat_map(|dtype| {
            let title = move |mode| format!("num_tokens=5, dtype={dtype}, with residual, quant={mode}");
            ["none", "fp8", "fp4"].map(title)
        })
        .collect();
    assert_eq!(titles(&report), expected);
}

#[test]
fn every_variant_is_right_without_a_residual() {
    let report = check("--no-residual --num-tokens 4 --hidden-dim 512 --dtypes float16,bfloat16,float32");
    assert_eq!(report.configurations.len(), 9);
    assert!(report.configurations.iter().all(|configuration| !configuration.use_residual));
}

#[test]
fn a_sharded_residual_is_measured_beside_the_replicated_one() {
    let report = check(
        "--residual sharded --num-tokens 1,7 --hidden-dim 80 --dtypes float16,bfloat16,float32 --nproc-per-node 3",
    );
    assert_eq!(report.configurations.len(), 18);
    assert!(report.settings.sharded_residual && report.settings.use_residual);
}

#[test]
fn no_oneshot_leaves_out_the_oneshot_variants_alone() {
    let report = check("--no-oneshot --num-tokens 2 --hidden-dim 64");
    assert_eq!(report.configurations.iter().map(|c| c.rows.len()).sum::<usize>(), 4 + 6 + 4);
}

#[test]
fn every_number_of_tokens_is_measured_in_the_order_given() {
    let report = check("--num-tokens 17,1 --num-tokens 3 --hidden-dim 16 --quant-modes none");
    let tokens: Vec<u64> = report.configurations.iter().map(|c| c.num_tokens).collect();
    assert_eq!(tokens, [17, 1, 3]);
}

#[test]
fn one_token_is_right() {
    check("--num-tokens 1 --hidden-dim 8192");
}

#[test]
fn fewer_tokens_than_ranks_on_three_ranks_and_a_hidden_size_of_48_are_right() {
    let report = check("--nproc-per-node 3 --num-tokens 2 7 --hidden-dim 48");
    assert_eq!(report.world_size, 3);
}

#[test]
fn a_hidden_size_of_2880_is_right() {
    check("--num-tokens 9 --hidden-dim 2880 --dtypes bfloat16 float32");
}

#[test]
fn the_largest_hidden_size_is_right() {
    check("--num-tokens 1 --hidden-dim 65536");
}

#[test]
fn an_activation_of_many_rounds_is_right() {
    check("--num-tokens 700 --hidden-dim 4096");
}

#[test]
fn sixteen_ranks_more_than_there_are_cores_are_right() {
    let report = check("--nproc-per-node 16 --num-tokens 5 --hidden-dim 48");
    assert_eq!(report.world_size, 16);
}

#[test]
fn formats_of_fewer_bits_are_measured_beside_exact_rows_with_the_error_of_their_sums() {
    let options =
        "--num-tokens 3 --hidden-dim 2880 --quant-modes fp8 --residual sharded --wire exact,int8,int4";
    let report = measure(&format!("{options} --trials 1 --warmup 0"));
    let fused = report.configurations[0].rows.iter().filter(|row| row.kind == "fused");
    let mut errors = fused.map(|row| (row.variant.as_str(), row.verified().sum_error.map(|error| error.rms)));
    for (wire, most) in [("", 0.0), ("_int8_wire", 0.006), ("_int4_wire", 0.1)] {
        for (mode, hops) in [("oneshot", 1.0f64), ("twoshot", 2.0), ("twoshot_sharded", 1.0)] {
            let (variant, error) = errors.next().unwrap();
            assert_eq!(variant, format!("fused_allreduce_rmsnorm_fp8_quant{wire}_{mode}"));
            match error {
                None => assert_eq!(wire, ""),
                Some(error) => {
                    let most = most * hops.sqrt();
                    assert!(error > most / 4.0 && error < most, "{variant}: {error}");
                }
            }
        }
    }
    assert_eq!(errors.next(), None);
    assert_eq!(report.settings.wires, ["exact", "int8", "int4"]);
    let told = |wire: &str| format!("with {wire} between ranks a fused sum misses by");
    for wire in ["int8", "int4"] {
        assert!(report.conclusion.sentences.iter().any(|sentence| sentence.contains(&told(wire))));
    }
}
