//! The example, compiled by a C compiler against both libraries and run by two processes, gives the specification's bits.

use std::{
    env,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use fused_collective::core::{
    dtype::DType,
    fusion::{Mode, Norm, Operation, PartialSums, Residual, Rounding},
    norm::Weights,
    quant::Quantization,
    specification::{Row, Token},
};

const TOKENS: usize = 2;
const HIDDEN: usize = 32;

/// The folder into which cargo puts this package's libraries, which are built with its tests.
fn libraries() -> PathBuf {
    let test = env::current_exe().expect("this program");
    test.parent().expect("a folder").to_owned()
}

fn compile(program: &Path, library: &[&str]) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = libraries();
    let output = Command::new("cc")
        .args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-std=c11", "-I"])
        .arg(root.join("include"))
        .arg(root.join("examples/all_reduce_norm.c"))
        .arg(format!("-L{}", folder.display()))
        .arg(format!("-Wl,-rpath,{}", folder.display()))
        .args(library)
        .arg("-o")
        .arg(program)
        .output()
        .expect("a C compiler");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The output of each of two ranks.
fn run(program: &Path, key: &str) -> Vec<String> {
    let start = |rank: u32| {
        Command::new(program)
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", "2")
            .env("FUSED_COLLECTIVE_KEY", format!("{key} {}", std::process::id()))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the example starts")
    };
    let ranks = [0, 1].map(start).map(|rank| thread::spawn(|| rank.wait_with_output().expect("it ends")));
    let outputs = ranks.map(|rank| rank.join().expect("no panic"));
    let text = |bytes| String::from_utf8(bytes).expect("text");
    outputs
        .into_iter()
        .map(|output| {
            assert!(output.status.success(), "{}", text(output.stderr));
            text(output.stdout)
        })
        .collect()
}

/// The lines that the specification gives for the example's inputs.
fn specified() -> String {
    let operation = Operation {
        dtype: DType::F32,
        tokens: TOKENS as u64,
        hidden: HIDDEN as u64,
        residual: Residual::Replicated,
        bias: false,
        post_norm: None,
        experts: None,
        wire: None,
        partial_sums: PartialSums::F32,
        norm: Some(Norm::default()),
        quantization: Quantization::Fp8Static,
        keep_norm: true,
        rounding: Rounding::Once,
        mode: Mode::Auto,
    };
    let elements = || 0..TOKENS * HIDDEN;
    let input =
        |rank: usize| -> Vec<f32> { elements().map(|at| (rank * 3 + at % 7) as f32 / 8.0 - 0.5).collect() };
    let inputs = [input(0), input(1)];
    let residual: Vec<f32> = elements().map(|at| (at % 5) as f32 / 3.0).collect();
    let gamma: Vec<f32> = (0..HIDDEN).map(|at| 1.0 + at as f32 / 64.0).collect();
    let [mut sums, mut norms] = [(); 2].map(|()| vec![0.0; TOKENS * HIDDEN]);
    let mut codes = [0; TOKENS * HIDDEN];
    for token in 0..TOKENS {
        let row = token * HIDDEN..(token + 1) * HIDDEN;
        let given = Token {
            inputs: &[&inputs[0][row.clone()], &inputs[1][row.clone()]],
            hosts: 1,
            residual: Some(&residual[row.clone()]),
            bias: None,
            post_gamma: None,
            experts: None,
            gamma: Weights::Element(&gamma),
            scale: 1.0 / 64.0,
            index: token as u64,
        };
        let mut out = Row {
            residual_out: &mut sums[row.clone()],
            norm: &mut norms[row.clone()],
            values: &mut codes[row],
            scales: &mut [],
        };
        out.compute(&operation, &given).expect("a valid row");
    }
    let bits = |values: &[f32]| -> String {
        values.iter().map(|value| format!(" {:08x}", value.to_bits())).collect()
    };
    let codes: String = codes.iter().map(|code| format!(" {code:02x}")).collect();
    format!("sum{}\nnorm{}\ncodes{codes}\n", bits(&sums), bits(&norms))
}

#[test]
fn two_processes_in_c_give_the_specification_s_bits_with_either_library() {
    let folder = tempfile::tempdir().expect("a folder");
    let archive = libraries().join("libfused_collective_capi.a");
    let archive = archive.to_str().expect("text");
    let system = ["-lpthread", "-ldl", "-lm", "-lgcc_s"];
    let expected = specified();
    for (name, library) in
        [("shared", vec!["-lfused_collective_capi"]), ("static", [&[archive][..], &system].concat())]
    {
        let program = folder.path().join(name);
        compile(&program, &library);
        for (rank, found) in run(&program, name).iter().enumerate() {
            assert_eq!(found, &expected, "rank {rank}, {name}");
        }
    }
}
