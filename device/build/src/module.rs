//! A module of kernels, and what is known of them.

use std::{fmt, path::PathBuf};

use crate::Processor;

/// A module of kernels as PTX.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Module {
    /// The name of the static library that it was built from.
    pub name: String,
    /// The processor that it is for.
    pub processor: Processor,
    /// The PTX: `OUTPUT/sm_90/NAME.ptx`.
    pub path: PathBuf,
    /// The machine code beside it, `NAME.cubin`, for this one processor; with [`Assembly::Keep`](crate::Assembly::Keep).
    pub machine_code: Option<PathBuf>,
    /// Registers, memory and spills of the kernels, as far as known.
    pub report: Report,
}

/// A report on a module's kernels.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// The fingerprint of the launch structs that `fused-collective-device` was built with; `None` in kernels without it.
    pub layout: Option<u32>,
    /// Resources of each function. Empty if the module was not assembled.
    pub functions: Vec<Function>,
}

/// A line for each function: `sm_90/bf16_w4: two_shot_norm_p1: 64 registers`.
impl fmt::Display for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = |function| writeln!(f, "{}/{}: {function}", self.processor, self.name);
        self.report.functions.iter().try_for_each(line)
    }
}

/// Resources of one function of a module, as `ptxas --verbose` reports it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Function {
    /// The entry point's name, or that of a function that was not inlined.
    pub name: String,
    /// Registers of a thread; unknown for what is not an entry point.
    pub registers: Option<u32>,
    /// Bytes of local memory for variables.
    pub stack: u32,
    /// Bytes of registers written to local memory.
    pub spill_stores: u32,
    /// Bytes of registers read back.
    pub spill_loads: u32,
}

impl Function {
    /// Tells if any of it is in local memory, which is as slow as global memory.
    pub fn uses_local_memory(&self) -> bool {
        self.stack + self.spill_stores + self.spill_loads > 0
    }
}

impl fmt::Display for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:", self.name)?;
        if let Some(registers) = self.registers {
            write!(f, " {registers} registers")?;
        }
        if self.uses_local_memory() {
            let Function { stack, spill_stores, spill_loads, .. } = self;
            write!(f, " {stack} bytes of stack, {spill_stores} spilled, {spill_loads} read back")?;
        }
        Ok(())
    }
}
