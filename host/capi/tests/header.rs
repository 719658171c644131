//! The header is made from the sources, and C and C++ compile it.

use std::{env, fs, path::Path, process::Command};

use cbindgen::{Builder, Config, Language, RenameRule};

const HEADER: &str = "include/fused_collective.h";
const SOURCES: [&str; 3] = ["src/types.rs", "src/failure.rs", "src/communicator.rs"];
/// Enums whose values are numbers in fields of structs.
const ENUMS: [&str; 13] = [
    "fc_backend",
    "fc_type",
    "fc_residual",
    "fc_norm",
    "fc_quantization",
    "fc_scale_layout",
    "fc_group_scale",
    "fc_rounding",
    "fc_wire",
    "fc_partial_sums",
    "fc_mode",
    "fc_algorithm",
    "fc_status",
];
/// Set to write the header in place of comparing it.
const WRITE: &str = "FUSED_COLLECTIVE_WRITE_HEADER";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn generated() -> String {
    let mut config = Config {
        language: Language::C,
        cpp_compat: true,
        include_guard: Some("FUSED_COLLECTIVE_H".to_owned()),
        header: Some(
            "/* fused-collective: fused all-reduce + residual + RMSNorm + quantization for the ranks of one host.\n \
             * Made from host/capi/src by its tests: do not edit.\n */"
                .to_owned(),
        ),
        no_includes: true,
        sys_includes: vec!["stdint.h".to_owned()],
        ..Config::default()
    };
    config.enumeration.rename_variants = RenameRule::QualifiedScreamingSnakeCase;
    config.export.include = ENUMS.map(str::to_owned).to_vec();
    let sources = SOURCES.iter().fold(Builder::new(), |builder, it| builder.with_src(root().join(it)));
    let mut header = Vec::new();
    sources.with_config(config).generate().expect("the sources are C's").write(&mut header);
    String::from_utf8(header).expect("text")
}

#[test]
fn the_header_is_that_of_the_sources() {
    let (path, generated) = (root().join(HEADER), generated());
    if env::var_os(WRITE).is_some() {
        fs::create_dir_all(path.parent().expect("a folder"))
            .and_then(|()| fs::write(&path, &generated))
            .expect("written");
    }
    let committed = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        committed == generated,
        "{HEADER} differs from the sources: {WRITE}=1 cargo test -p fused-collective-capi --test header"
    );
    for name in ENUMS.iter().chain(&["fc_operation", "fc_join(", "fc_abort(", "fc_error_text("]) {
        assert!(committed.contains(name), "{name} is not in the header");
    }
}

#[test]
fn the_header_compiles_as_c_and_as_cpp() {
    let folder = tempfile::tempdir().expect("a folder");
    for (compiler, name, standard) in [("cc", "a.c", "-std=c11"), ("c++", "a.cpp", "-std=c++17")] {
        let source = folder.path().join(name);
        let text =
            "#include <fused_collective.h>\nint main(void) { return fc_check(0) == FC_STATUS_INVALID; }\n";
        fs::write(&source, text).expect("a source");
        let output = Command::new(compiler)
            .args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-c", standard, "-I"])
            .arg(root().join("include"))
            .arg(&source)
            .arg("-o")
            .arg(folder.path().join("a.o"))
            .output()
            .unwrap_or_else(|error| panic!("{compiler}: {error}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
