//! Small crates of kernels, built as a build script does it, sound ones and others.
//!
//! `cargo xtask test` runs this once the tools for kernels are there. By hand: `cargo xtask ptx`, then
//! `cargo test -p fused-collective-build --test compiled`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use fused_collective_build::{Assembly, Bounds, Error, FaultKind, Kernels, Module, Processor};
use tempfile::TempDir;

/// The manifest after the name.
const MANIFEST: &str = "\
edition = '2024'

[workspace]

[lib]
crate-type = ['staticlib']
";

const BEGINNING: &str = "\
#![no_std]
#![feature(abi_ptx)]

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
";

const SOUND: &str = "
#[unsafe(no_mangle)]
pub unsafe extern \"ptx-kernel\" fn double(number: *mut f32) {
    unsafe { *number *= 2.0 };
}
";

/// A crate of kernels in a folder of its own.
struct Crate(TempDir);

impl Crate {
    /// The builds share a cache, in which crates are told apart by their names.
    fn new(name: &str, kernels: &str) -> Self {
        let own = Crate(tempfile::tempdir().unwrap());
        fs::create_dir(own.0.path().join("src")).unwrap();
        own.write_manifest(name, MANIFEST);
        own.write(kernels);
        own
    }

    fn write_manifest(&self, name: &str, rest: &str) {
        let text = format!("[package]\nname = '{name}'\n{rest}");
        fs::write(self.0.path().join("Cargo.toml"), text).unwrap();
    }

    fn write(&self, kernels: &str) {
        fs::write(self.0.path().join("src/lib.rs"), format!("{BEGINNING}{kernels}")).unwrap();
    }

    fn output(&self) -> PathBuf {
        self.0.path().join("ptx")
    }

    /// Its build, with the tools and the `core` that the project's own kernels are built with.
    fn kernels(&self) -> Kernels {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
        Kernels::new(self.0.path())
            .processors(&[Processor::Sm90])
            .bounds(|_| Bounds { threads: 256, blocks: 2 })
            .assembly(Assembly::Check)
            .output(self.output())
            .cache(target)
    }

    /// Kinds of the faults of its kernels.
    fn faults(&self) -> Vec<FaultKind> {
        match self.kernels().build() {
            Err(Error::Refused { faults, .. }) => faults.into_iter().map(|fault| fault.kind).collect(),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_crate_becomes_ptx_with_bounds_and_machine_code_for_every_processor() {
    let own = Crate::new("sound-kernels", SOUND);
    let modules = own.kernels().processors(&Processor::ALL).assembly(Assembly::Keep).build().unwrap();
    let processors: Vec<Processor> = modules.iter().map(|module| module.processor).collect();
    assert_eq!(processors, Processor::ALL);
    for Module { name, processor, path, machine_code, report, .. } in modules {
        assert_eq!(path, own.output().join(processor.name()).join("sound_kernels.ptx"));
        let ptx = fs::read_to_string(&path).unwrap();
        assert!(ptx.contains(&format!(".target {processor}\n")), "{ptx}");
        assert_eq!(ptx.matches(".maxntid 256, 1, 1\n.minnctapersm 2\n{").count(), 1, "{ptx}");
        let code = fs::read(machine_code.unwrap()).unwrap();
        assert!(code.starts_with(b"\x7fELF"), "{name} for {processor}");
        assert_eq!(report.layout, None);
        let [double] = &report.functions[..] else { panic!("{report:?}") };
        assert_eq!(double.name, "double");
        assert!(double.registers.is_some_and(|registers| registers > 0) && !double.uses_local_memory());
    }
    // Machine code of an earlier build does not stay beside PTX.
    own.write(&SOUND.replace("2.0", "3.0"));
    let [module] = &own.kernels().build().unwrap()[..] else { panic!("one processor, one module") };
    assert!(fs::read_to_string(&module.path).unwrap().contains("0f40400000"), "it is not built again");
    assert!(module.machine_code.is_none() && !module.path.with_extension("cubin").exists());
}

#[test]
fn kernels_that_panic_or_use_local_memory_are_refused() {
    let panics = Crate::new(
        "panicking",
        "
#[unsafe(no_mangle)]
pub unsafe extern \"ptx-kernel\" fn checked(numbers: &mut [f32; 4], index: usize) {
    numbers[index] = 1.0;
}
",
    );
    let faults = panics.faults();
    assert!(faults.iter().any(|fault| matches!(fault, FaultKind::PanicPath(_))), "{faults:?}");

    let local = Crate::new(
        "indexing",
        "
#[unsafe(no_mangle)]
pub unsafe extern \"ptx-kernel\" fn indexed(out: *mut u32, index: u32) {
    let mut numbers = [0; 256];
    for (place, number) in numbers.iter_mut().enumerate() {
        *number = unsafe { out.add(place).read_volatile() };
    }
    unsafe { *out = numbers[(index % 256) as usize] };
}
",
    );
    let faults = local.faults();
    let [FaultKind::LocalMemory(function)] = &faults[..] else { panic!("{faults:?}") };
    assert_eq!((&*function.name, function.stack), ("indexed", 1024));
}

#[test]
fn kernels_of_other_launch_structs_are_refused() {
    let other = "
#[used]
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static fused_collective_layout: u32 = 0x0102_0304;
";
    let faults = Crate::new("other-launch", &format!("{SOUND}{other}")).faults();
    assert!(matches!(&faults[..], [FaultKind::Layout { found: 0x0102_0304, .. }]), "{faults:?}");
}

#[test]
fn what_does_not_compile_or_is_no_crate_of_kernels_is_an_error_that_says_why() {
    let own = Crate::new("broken", "fn broken() -> u32 {}");
    let error = own.kernels().build().unwrap_err();
    assert!(matches!(error, Error::Command { .. }) && error.to_string().contains("E0308"), "{error}");

    own.write_manifest("broken", &MANIFEST.replace("staticlib", "rlib"));
    let error = own.kernels().build().unwrap_err();
    assert!(matches!(error, Error::Package { .. }) && error.to_string().contains("staticlib"), "{error}");

    own.write_manifest("broken", MANIFEST);
    fs::write(own.0.path().join("build.rs"), "fn main() {}").unwrap();
    let error = own.kernels().build().unwrap_err();
    assert!(matches!(error, Error::Package { .. }) && error.to_string().contains("build script"), "{error}");

    let error = Kernels::new("no-such-folder").output("ptx").cache("cache").build().unwrap_err();
    assert!(matches!(error, Error::Io { .. }) && error.to_string().contains("no-such-folder"), "{error}");
}
