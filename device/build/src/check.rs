//! Kernels are held to what they must be: no path that panics, no spilled registers, no local memory, and the launch
//! structs of this version.

use std::{
    fs,
    panic::resume_unwind,
    path::{Path, PathBuf},
    thread,
};

use fused_collective_core::launch::{LAYOUT, layout_of};

use crate::{Error, Fault, FaultKind, Module, Ptxas};

/// Use of NVIDIA's assembler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Assembly {
    /// None: kernels may spill or use local memory unnoticed.
    Skip,
    /// A check, where ptxas is found.
    #[default]
    CheckIfFound,
    /// A check. It is an error if there is no ptxas.
    Check,
    /// A check whose machine code is kept. It is an error if there is no ptxas.
    Keep,
}

/// Looks at every module, several at a time, and completes its report. Returns what is wrong.
pub(crate) fn check(modules: &mut [Module], ptxas: Option<&Ptxas>, keep: bool) -> Result<Vec<Fault>, Error> {
    let at_once = thread::available_parallelism().map_or(1, usize::from);
    let share = modules.len().div_ceil(at_once).max(1);
    let checked: Vec<Result<Vec<Fault>, Error>> = thread::scope(|scope| {
        let part = |part| move || check_each(part, ptxas, keep);
        let parts: Vec<_> = modules.chunks_mut(share).map(|it| scope.spawn(part(it))).collect();
        parts.into_iter().map(|part| part.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    Ok(checked.into_iter().collect::<Result<Vec<_>, _>>()?.concat())
}

fn check_each(modules: &mut [Module], ptxas: Option<&Ptxas>, keep: bool) -> Result<Vec<Fault>, Error> {
    let mut faults = Vec::new();
    for module in modules {
        let ptx = fs::read_to_string(&module.path).map_err(Error::io("read", &module.path))?;
        let mut kinds = Vec::from_iter(panic_path(&ptx).map(|line| FaultKind::PanicPath(line.to_owned())));
        module.report.layout = layout_of(&ptx);
        if let Some(found) = module.report.layout.filter(|&found| found != LAYOUT) {
            kinds.push(FaultKind::Layout { found, expected: LAYOUT });
        }
        if let Some(ptxas) = ptxas {
            let machine_code = keep.then(|| machine_code(&module.path));
            module.report.functions =
                ptxas.assemble(&module.path, module.processor, machine_code.as_deref())?;
            module.machine_code = machine_code;
            let slow = module.report.functions.iter().filter(|function| function.uses_local_memory());
            kinds.extend(slow.cloned().map(FaultKind::LocalMemory));
        }
        let (processor, name) = (module.processor, &module.name);
        faults.extend(kinds.into_iter().map(|kind| Fault { processor, module: name.clone(), kind }));
    }
    Ok(faults)
}

/// The file of a module's machine code.
pub(crate) fn machine_code(ptx: &Path) -> PathBuf {
    ptx.with_extension("cubin")
}

/// The first line of a path that panics in a module, if there is one: a function of `core` that panics, or the endless loop
/// that inlining makes of the panic handler.
fn panic_path(ptx: &str) -> Option<&str> {
    let mut label = "";
    for line in ptx.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//")) {
        if line.contains("panicking") {
            return Some(line);
        }
        if let Some(target) = line.strip_prefix("bra.uni").map(|rest| rest.trim().trim_end_matches(';'))
            && target == label
        {
            return Some(line);
        }
        // A comment may follow the label.
        label = line.split_once(':').map_or("", |(label, _)| label);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Processor, Report};

    #[test]
    fn a_loop_that_makes_progress_is_no_panic_path() {
        let ptx = "$L__BB0_1:  // %bb1\n\tld.b32 \t%r1, [%rd1];\n\t@%p1 bra \t$L__BB0_1;\n\tbra.uni \t$L__BB0_2;\n\
                   $L__BB0_2:\n\tret;\n";
        assert_eq!(panic_path(ptx), None);
    }

    #[test]
    fn panic_paths_are_found_by_name_and_by_their_endless_loop() {
        let named = ".func _ZN4core9panicking9panic_fmt17h0123456789abcdefE()\n";
        assert_eq!(panic_path(named), Some(named.trim()));
        let inlined = "\tret;\n$L__BB0_3:  // %panic\n                        // =>This Inner Loop Header: Depth=1\n\
                       \tbra.uni \t$L__BB0_3;\n";
        assert!(panic_path(inlined).is_some_and(|line| line.starts_with("bra.uni")));
    }

    #[test]
    fn a_module_of_another_launch_layout_is_refused_and_one_without_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let checked = |text: &str| {
            let path = folder.path().join("own.ptx");
            fs::write(&path, text).unwrap();
            let (processor, report) = (Processor::Sm90, Report::default());
            let mut modules =
                [Module { name: "own".to_owned(), processor, path, machine_code: None, report }];
            let faults = check(&mut modules, None, false).unwrap();
            (modules[0].report.layout, faults)
        };
        let declared = |layout| format!(".global .u32 fused_collective_layout = {layout};\n");
        assert_eq!(checked(""), (None, Vec::new()));
        assert_eq!(checked(&declared(LAYOUT)), (Some(LAYOUT), Vec::new()));
        let (found, faults) = checked(&declared(7));
        assert_eq!(found, Some(7));
        assert!(matches!(
            &faults[..],
            [Fault { kind: FaultKind::Layout { found: 7, expected: LAYOUT }, .. }]
        ));
        assert!(faults[0].to_string().starts_with("sm_90/own: its launch layout is 0x00000007, not 0x"));
    }
}
