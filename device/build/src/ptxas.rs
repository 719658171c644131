//! NVIDIA's assembler, which turns PTX into machine code and says what each kernel takes. It needs neither a GPU nor a
//! driver.

use std::{
    env, fmt, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{Error, Function, Processor, command::run};

/// The first release that knows every processor and its PTX version.
const MIN_RELEASE: (u32, u32) = (12, 8);
/// The package on PyPI.
const PYPI_PACKAGE: &str = "nvidia-cuda-nvcc==13.0.*";
/// The time that each step of fetching it gets.
const FETCH_LIMIT: Duration = Duration::from_secs(1200);
/// The wheel's path of it, with the major release in it.
const WHEEL_PATH: &str = "nvidia/cu13/bin/ptxas";

/// A ptxas that is recent enough: of CUDA 12.8 or later.
#[derive(Clone, Debug)]
pub struct Ptxas(PathBuf);

impl fmt::Display for Ptxas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.display())
    }
}

impl Ptxas {
    /// The ptxas on `PATH`, or that of the toolkit in `CUDA_HOME`, or the one that was fetched into `folder` before. With
    /// `install`, it is fetched there from PyPI, by pip.
    ///
    /// # Errors
    /// [`Error::NoPtxas`]: none is recent enough, and none can be had.
    pub fn find(folder: &Path, install: bool) -> Result<Self, Error> {
        let toolkit = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/ptxas"));
        let known = [Some("ptxas".into()), toolkit, Some(folder.join(WHEEL_PATH))];
        if let Some(ptxas) = known.into_iter().flatten().find(|ptxas| is_recent(ptxas)) {
            return Ok(Ptxas(ptxas));
        }
        let none = |why: &str| Error::NoPtxas {
            tried: format!("none on PATH, in CUDA_HOME or in {}{why}", folder.display()),
        };
        if !install {
            return Err(none(""));
        }
        fetch(folder).map(Ptxas).map_err(|error| none(&format!(", nor {PYPI_PACKAGE} from PyPI: {error}")))
    }

    /// Assembles the PTX in `module` for `processor`, into `machine_code` if that is wanted, and says what each function
    /// takes.
    ///
    /// # Errors
    /// [`Error::Assembler`]: it does not assemble, or ptxas reports on no kernel.
    pub fn assemble(
        &self,
        module: &Path,
        processor: Processor,
        machine_code: Option<&Path>,
    ) -> Result<Vec<Function>, Error> {
        let mut command = Command::new(&self.0);
        command.args(["--verbose", "--gpu-name", processor.name(), "--output-file"]);
        command.arg(machine_code.unwrap_or(Path::new("/dev/null"))).arg(module);
        let output = command.output().map_err(Error::io("start", &self.0))?;
        // What ptxas has to say goes to either output, from release to release.
        let report = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        let functions = parse(&report);
        if output.status.success() && functions.iter().any(|function| function.registers.is_some()) {
            return Ok(functions);
        }
        Err(Error::Assembler { path: module.to_owned(), processor, report })
    }
}

/// Tells if `ptxas` runs and is of [`MIN_RELEASE`] or later.
fn is_recent(ptxas: &Path) -> bool {
    // One that is missing cannot be started.
    let Ok(output) = Command::new(ptxas).arg("--version").output() else {
        return false;
    };
    release(&String::from_utf8_lossy(&output.stdout)) >= Some(MIN_RELEASE)
}

/// The release in what `ptxas --version` prints.
fn release(version: &str) -> Option<(u32, u32)> {
    let (_, rest) = version.split_once("release ")?;
    let (major, minor) = rest.split_once(',')?.0.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// PyPI's ptxas, downloaded to `folder`.
fn fetch(folder: &Path) -> Result<PathBuf, Error> {
    let ptxas = folder.join(WHEEL_PATH);
    let mut pip = Command::new("python3");
    pip.args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest"])
        .arg(folder)
        .arg(PYPI_PACKAGE);
    run(&mut pip, FETCH_LIMIT)?;
    let files = fs::read_dir(folder).map_err(Error::io("read", folder))?;
    let mut files = files.filter_map(|entry| Some(entry.ok()?.path()));
    let wheel = files.find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    let wheel = wheel.unwrap_or_else(|| folder.join("no.whl"));
    run(Command::new("python3").args(["-m", "zipfile", "--extract"]).args([&*wheel, folder]), FETCH_LIMIT)?;
    // A zip file's permissions are not restored.
    fs::set_permissions(&ptxas, fs::Permissions::from_mode(0o755))
        .map_err(Error::io("make executable", &ptxas))?;
    if is_recent(&ptxas) {
        return Ok(ptxas);
    }
    Err(Error::Command { command: ptxas.display().to_string(), outcome: "does not run".to_owned() })
}

/// The functions in a report of `ptxas --verbose`.
fn parse(report: &str) -> Vec<Function> {
    let mut functions: Vec<Function> = Vec::new();
    for line in report.lines() {
        let line = line
            .strip_prefix("ptxas info")
            .map_or(line, |rest| rest.trim_start().trim_start_matches(':'))
            .trim();
        if let Some(name) = line.strip_prefix("Function properties for ") {
            functions.push(Function { name: name.to_owned(), ..Function::default() });
        }
        // What follows is about the function named last.
        let Some(function) = functions.last_mut() else {
            continue;
        };
        let numbers: Vec<u32> = line.split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
        if line.contains("bytes stack frame")
            && let [stack, spill_stores, spill_loads] = numbers[..]
        {
            *function = Function { stack, spill_stores, spill_loads, ..std::mem::take(function) };
        } else if line.starts_with("Used ") {
            function.registers = numbers.first().copied();
        }
    }
    functions
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What ptxas 13.0 printed of a module with a sound kernel, one with an array indexed at run time, and a function.
    const REPORT: &str = "\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'scale' for 'sm_90a'
ptxas info    : Function properties for scale
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
ptxas info    : Compile time = 12.355 ms
ptxas info    : Compiling entry function 'local' for 'sm_90a'
ptxas info    : Function properties for local
    256 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 17 registers, used 0 barriers, 256 bytes cumulative stack size
ptxas info    : Compile time = 32.357 ms
ptxas info    : Function properties for helper
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
";

    #[test]
    fn the_report_is_read_function_by_function() {
        let functions = parse(REPORT);
        let function = |name: &str, registers, stack, spill_stores, spill_loads| Function {
            name: name.to_owned(),
            registers,
            stack,
            spill_stores,
            spill_loads,
        };
        assert_eq!(
            functions,
            [
                function("scale", Some(10), 0, 0, 0),
                function("local", Some(17), 256, 8, 4),
                function("helper", None, 0, 0, 0)
            ]
        );
        assert_eq!(
            functions.iter().map(Function::uses_local_memory).collect::<Vec<_>>(),
            [false, true, false]
        );
        assert_eq!(
            functions[1].to_string(),
            "local: 17 registers 256 bytes of stack, 8 spilled, 4 read back"
        );
    }

    #[test]
    fn the_release_is_read_from_the_version() {
        let version =
            "ptxas: NVIDIA (R) Ptx optimizing assembler\nCuda compilation tools, release 13.0, V13.0.88\n";
        assert_eq!(release(version), Some((13, 0)));
        assert!(release("Cuda compilation tools, release 12.4, V12.4.131") < Some(MIN_RELEASE));
        assert!(release("not a version") < Some(MIN_RELEASE));
    }

    #[test]
    fn a_program_that_is_missing_is_not_recent() {
        assert!(!is_recent(Path::new("/nonexistent/ptxas")));
    }
}
